# SPDX-License-Identifier: BSD-3-Clause
"""What Sphinx does not have: the list of the public names, figures of the benchmarks, MathML.

``api/index.rst`` is written from ``__all__`` of the public modules, so that a new name has a
page without an edit here. ``{performance} NORM`` is a table and a plot made from
docs/tables/measurements.
Formulas become MathML when the site is built: no script, and no connection, to read them.
"""

import importlib
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from latex2mathml.converter import convert
from sphinx import addnodes
from sphinx.ext.autodoc.mock import mock
from sphinx.util.docutils import SphinxDirective

import fastbn

ROOT = Path(__file__).parent.parent.parent
MEASUREMENTS = ROOT / "docs" / "tables" / "measurements"

# ---- the public names ------------------------------------------------------------------------

NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")


# Modules that `import fastbn` does not import, or whose names it does not repeat.
MODULES = {
    "fastbn.sync": ("Several processes", "/distributed"),
    "fastbn.data": ("Data sets", "/datasets"),
    "fastbn.dask": ("Dask arrays", "/datasets"),
    "fastbn.sklearn": ("scikit-learn", "/datasets"),
    "fastbn.dialects": ("Layers of other frameworks", "/statistics"),
    "fastbn.torch": ("PyTorch", "/torch"),
}


def _section(name):
    if name[0].isupper():
        return "Layers and statistics"
    if name.startswith(NORMS):
        return "Norms: forward and backward"
    return "Folding, images, threads and others"


def _listed(title, module, names):
    lines = ["", title, "-" * len(title), "", f".. currentmodule:: {module}", ""]
    if module in MODULES:
        lines += [f"``{module}``; :doc:`the guide <{MODULES[module][1]}>` says what for.", ""]
    lines += [".. autosummary::", "   :toctree: .", ""]
    return lines + [f"   {name}" for name in sorted(names, key=str.lower)]


def write_api(app, config):
    """Write the page from which autosummary makes one for each name."""
    sections = {}
    for name in fastbn.__all__:
        if name != "__version__":
            sections.setdefault(_section(name), []).append(name)
    lines = ["API", "===", "",
             "A page for each public function and class. It also names the programs of the gallery",
             "that use it. For ``fastbn.h``, see :doc:`/embedding`."]  # fmt: skip
    for title in sorted(sections, reverse=True):  # norms first
        lines += _listed(title, "fastbn", sections[title])
    with mock(config.autodoc_mock_imports):
        for module, (title, _) in MODULES.items():
            lines += _listed(title, module, importlib.import_module(module).__all__)
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
        """Return the nodes."""
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


# ---- tables and the gallery -------------------------------------------------------------------

GALLERY = (
    "train", "functions", "in_place", "other_norms", "fold", "running", "statistics", "images",
    "threads", "sync",
)  # fmt: skip


class GalleryOrder:
    """Sorts the programs of the gallery from the first steps on."""

    def __init__(self, src_dir):
        pass

    def __call__(self, name):
        """Return the place of a program."""
        return GALLERY.index(name.removeprefix("plot_").removesuffix(".py"))


def mark_tables(app, doctree):
    """Drop heads without a word; mark short cells with numbers, which are to stay in one line."""
    for head in list(doctree.findall(nodes.thead)):
        if not head.astext().strip():
            head.parent.remove(head)
    for cell in doctree.findall(nodes.entry):
        text = cell.astext()
        if len(text) < 16 and any(letter.isdigit() for letter in text):
            cell["classes"].append("number")


def name_pages_without_suffix(app, doctree):
    """Show a link whose text is the name of a file, ``threads.md``, as ``threads``."""
    for link in doctree.findall(lambda node: isinstance(node, addnodes.pending_xref)):
        for text in link.findall(nodes.Text):
            if re.fullmatch(r"[\w-]+\.md", text):
                text.parent.replace(text, nodes.Text(text.removesuffix(".md")))


# ---- formulas --------------------------------------------------------------------------------


def mathml(formula, display):
    """Return MathML. A bar over several letters is a border: not every font can stretch it."""
    return re.sub(
        r'<mover>(<mrow>(?:(?!<mrow>).)*?</mrow>)<mo accent="true">&#x02015;</mo></mover>',
        r'<mrow class="bar">\1</mrow>',
        convert(formula, display=display),
    )


def parts(formula):
    """Split a formula where a wide space stands outside of all braces."""
    found = [""]
    for piece in re.split(r"(\\qquad)", formula):
        text = found[-1]
        if piece == "\\qquad" and text.count("{") == text.count("}") and "\\begin" not in text:
            found.append("")
        else:
            found[-1] += piece
    return found


def _inline(writer, node):
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _display(writer, node):
    # Parts, since MathML does not break into lines: they wrap on a narrow screen.
    lines = "".join(f"<div>{mathml(part, 'block')}</div>" for part in parts(node.astext()))
    writer.body.append(f'<div class="formula">{lines}</div>')
    raise nodes.SkipNode


def setup(app):
    """Register all of it."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.add_directive("performance", Performance)
    app.connect("config-inited", write_api)
    app.connect("doctree-read", mark_tables)
    app.connect("doctree-read", name_pages_without_suffix)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
