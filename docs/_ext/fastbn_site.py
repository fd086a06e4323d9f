# SPDX-License-Identifier: BSD-3-Clause
"""What Sphinx does not have: the list of the public names, figures of the benchmarks, MathML.

``api/index.rst`` is written from ``fastbn.__all__``, so that a new name has a page without an
edit here. ``{performance} NORM`` is a table and a plot made from docs/tables/measurements.
Formulas become MathML when the site is built: no script, and no connection, to read them.
"""

import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from latex2mathml.converter import convert
from sphinx.util.docutils import SphinxDirective

import fastbn

ROOT = Path(__file__).parent.parent.parent
MEASUREMENTS = ROOT / "docs" / "tables" / "measurements"

# ---- the public names ------------------------------------------------------------------------

NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")


def _section(name):
    if name[0].isupper():
        return "Layers and statistics"
    if name.startswith(NORMS):
        return "Norms: forward and backward"
    return "Folding, statistics, threads and others"


def write_api(app, config):
    """Write the page from which autosummary makes one for each name."""
    sections = {}
    for name in fastbn.__all__:
        if name != "__version__":
            sections.setdefault(_section(name), []).append(name)
    lines = ["API", "===", "", ".. currentmodule:: fastbn", "",
             "Every public name of ``fastbn``, with a page that also names the examples that use "
             "it.", "`fastbn.torch` has :doc:`a page of its own </torch>`, ``fastbn.h`` "
             ":doc:`another </embedding>`."]  # fmt: skip
    for title in sorted(sections):
        lines += ["", title, "-" * len(title), "", ".. autosummary::", "   :toctree: .", ""]
        lines += [f"   {name}" for name in sorted(sections[title], key=str.lower)]
    page = Path(app.srcdir) / "api" / "index.rst"
    page.parent.mkdir(exist_ok=True)
    text = "\n".join(lines) + "\n"
    if not page.exists() or page.read_text() != text:
        page.write_text(text)


# ---- figures of the benchmarks ---------------------------------------------------------------


def _measured(norm):
    """Return the recorded float32 results of one norm."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    from benchmarks import results

    name = "batch-norm-float32" if norm == "batch" else "other-norms-float32"
    found = results.read(MEASUREMENTS / f"{name}.json")
    found.outcomes = [outcome for outcome in found.outcomes if outcome.case.norm == norm]
    return found, f"/tables/{name}.md"


class Performance(SphinxDirective):
    """A norm's table by size, and a plot of its cases against the fastest other library."""

    required_arguments = 1

    def run(self):
        norm = self.arguments[0]
        found, page = _measured(norm)
        from benchmarks import plots, report

        picture = Path(self.env.app.srcdir) / "norms" / "generated" / f"{norm}.png"
        picture.parent.mkdir(exist_ok=True)
        against = [outcome for outcome in found.outcomes if outcome.peer]
        plots.plot_leads(against, lambda o: o.case.network, f"{norm} norm, float32", picture)
        text = [
            report.size_table(found), "",
            "A cell: the time over that of the best copy of x (median) / how many times faster "
            "than the fastest other library (geometric mean). Planes are NCHW tensors, rows NHWC "
            "and (N, C) tensors.", "",
            f"![{norm} norm against the fastest other library](generated/{norm}.png)", "",
            f"Measured on {found.machine['date']}; [every case, and how it was measured]({page}).",
        ]  # fmt: skip
        lines = StringList("\n".join(text).splitlines(), source=self.env.docname)
        holder = nodes.container()
        self.state.nested_parse(lines, self.content_offset, holder)
        return holder.children


# ---- formulas --------------------------------------------------------------------------------


def _inline(writer, node):
    writer.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def _display(writer, node):
    writer.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app):
    """Register all of it."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.add_directive("performance", Performance)
    app.connect("config-inited", write_api)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
