# SPDX-License-Identifier: BSD-3-Clause
"""Findings, pictures, files and the command line; the same for each claim. Measures nothing."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HOLDS, DIFFERS, UNSEEN = "holds", "differs", "not to be seen at this size"
NAMES = (
    "ioffe_szegedy", "bjorck", "santurkar", "yang", "deep", "kohler", "small_batches",
    "fixed_statistics", "initialisation", "covariate_shift",
)  # fmt: skip
COLOURS = {"with": "C0", "without": "C1"}
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Finding:
    """One row of the table in docs/claims.md."""

    claim: str
    source: str
    paper: str  # what the paper says, in our words
    measured: str
    verdict: str


def verdict(holds, seen=True):
    """Return what the numbers say; ``seen`` is False where they cannot say either."""
    return (HOLDS if holds else DIFFERS) if seen else UNSEEN


def apart(less, more):
    """Return whether ``less`` is below ``more`` in all seeds.

    Ranges over the seeds that overlap (or meet) leave the question open; with five seeds each,
    chance alone takes them apart in the expected order once in 252 draws.
    """
    if np.max(less) < np.min(more):
        return HOLDS
    return DIFFERS if np.max(more) < np.min(less) else UNSEEN


def together(*verdicts):
    """Return the verdict on a claim with several parts."""
    return next((one for one in (DIFFERS, UNSEEN) if one in verdicts), HOLDS)


def highest(rate, rates):
    """Return a rate in words that say when it is the first or the last of those tried."""
    if rate is None:
        return "none"
    ends = {min(rates): ", the lowest tried", max(rates): ", the highest tried"}
    return number(rate) + ends.get(rate, "")


# ---- words -----------------------------------------------------------------------------------


def number(value):
    """Return a number in few digits."""
    if value is None or not np.isfinite(value):
        return "never"
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def spread(values, show=number):
    """Return the median, and the least and the most, over the seeds."""
    values = np.sort(np.asarray(values, float))
    return f"{show(np.median(values))} ({show(values[0])} to {show(values[-1])})"


def percent(value):
    """Return a share as percent."""
    return f"{100 * value:.1f}%"


# ---- pictures --------------------------------------------------------------------------------


def figure(columns=2, rows=1, width=4.2, height=3.0, **how):
    """Return a figure and its axes in one list."""
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **how)
    return made, list(axes.ravel())


def band(axis, x, curves, label, **how):
    """Draw the median over the seeds, and the range of all seeds in a paler colour."""
    curves = np.asarray(curves, float)
    (line,) = axis.plot(x, np.median(curves, axis=0), label=label, **how)
    low, high = curves.min(axis=0), curves.max(axis=0)
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def titled(axis, title, x, y):
    """Name the axes."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)


def save(picture, file):
    """Write a picture with few colours: a third of the bytes."""
    from PIL import Image

    drawn = io.BytesIO()
    picture.savefig(drawn, dpi=72)
    Image.open(drawn).convert("RGB").quantize(128).save(file, optimize=True)


# ---- files -----------------------------------------------------------------------------------


def run(name, quick, output):
    """Measure one claim; print and write what was found."""
    from threadpoolctl import threadpool_limits

    import fastbn

    module = importlib.import_module(f"examples.claims.{name}")
    start = time.perf_counter()
    with threadpool_limits(1), fastbn.threads(1):  # tensors are small
        findings, picture = module.measure(quick)
    seconds = time.perf_counter() - start
    print(f"\n{module.TITLE} ({seconds:.0f} s)")
    for found in findings:
        print(f"\n  {found.claim} [{found.source}]\n    paper:    {found.paper}"
              f"\n    measured: {found.measured}\n    {found.verdict}")  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    save(picture, output / f"{name}.png")
    record = {
        "title": module.TITLE,
        "command": f"python -m examples.claims.{name}" + " --quick" * quick,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, Python {platform.python_version()}, one thread",
        "seconds": round(seconds),
        "findings": [asdict(found) for found in findings],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (output / f"{name}.json").write_text(text + "\n")
    print(f"\n  {output / name}.png, .json")


def table(directory, name):
    """Return the table of one claim's record."""
    record = json.loads((directory / f"{name}.json").read_text())
    head = ["claim", "source", "the paper says", "measured here", ""]
    rows = [head, ["---"] * len(head)]
    for row in record["findings"]:
        found = Finding(**row)
        cells = [found.claim, found.source, found.paper, found.measured, f"**{found.verdict}**"]
        rows.append([cell.replace("|", "\\|") for cell in cells])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (f"`{record['command']}`, {record['date']}, {record['machine']}, "
            f"{record['seconds']} s:\n\n{lines}\n")  # fmt: skip


def summary(page, directory):
    """Return a table of the verdicts, a row for each claim, that links to the sections."""
    columns = (HOLDS, DIFFERS, UNSEEN)
    rows = [["", *columns], ["---"] * 4]
    for heading, name in re.findall(r"^## (.+)\n\n<!-- table: (\w+) -->", page, re.MULTILINE):
        record = json.loads((directory / f"{name}.json").read_text())
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found = [row["verdict"] for row in record["findings"]]
        title = f"{record['title'].split('.')[0]}. [{heading}](#{anchor})"
        rows.append([title, *(str(found.count(verdict) or "") for verdict in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_tables(page, directory):
    """Return the text of a page with the tables of the records between its marks."""

    def put(mark):
        return f"{mark[1]}\n\n{table(directory, mark[2])}\n{mark[3]}"

    pattern = r"(<!-- table: (\w+) -->)\n.*?(<!-- end of table -->)"
    page = re.sub(pattern, put, page, flags=re.DOTALL)
    pattern = r"(<!-- summary -->)\n.*?(<!-- end of summary -->)"
    verdicts = summary(page, directory)
    return re.sub(
        pattern, lambda mark: f"{mark[1]}\n\n{verdicts}\n\n{mark[2]}", page, flags=re.DOTALL
    )


# ---- the command line --------------------------------------------------------------------------


def _parser(about):
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, rates and steps")
    parser.add_argument("--output", type=Path, default=Path("claims-results"), metavar="DIRECTORY",
                        help="where pictures and records go (default: claims-results)")  # fmt: skip
    return parser


def main(file, about):
    """Run the claim of one module."""
    arguments = _parser(about.splitlines()[0]).parse_args()
    run(Path(file).stem, arguments.quick, arguments.output)


def main_of_all(about):
    """Run all claims, or those named."""
    parser = _parser(about.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--tables", action="store_true",
                        help="only put the records of docs/claims into the page")  # fmt: skip
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no claim of this name: {', '.join(sorted(unknown))}")
    if arguments.tables:
        page = ROOT / "docs" / "claims.md"
        page.write_text(with_tables(page.read_text(), ROOT / "docs" / "claims"))
        return
    for name in arguments.names or NAMES:
        run(name, arguments.quick, arguments.output)
