# SPDX-License-Identifier: BSD-3-Clause
"""Results -> Markdown. The same results give the same text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean, median

import numpy as np

from benchmarks import results
from benchmarks.cases import NORMS, OPERATIONS, SMALL
from benchmarks.results import COPY, Outcome, Results

Rows = Iterable[Iterable[object]]
Numbers = dict[tuple[object, ...], list[float]]  # by what a row begins with, and its column
LOST = 1.05  # a peer has won where fastbn takes so many times its time
NEW_ARRAYS = ("PyTorch", "PyTorch group_norm")  # against these fastbn makes new ones too
SIZES = (
    ("less than 512 KB", SMALL),
    ("512 KB to 16 MB", 16e6),
    ("16 MB and more", np.inf),
)


def lost(outcome: Outcome) -> bool:
    return outcome.peer is not None and outcome.lead * LOST < 1


def size(outcome: Outcome) -> str:
    """Return which of SIZES x has."""
    return next(label for label, below in SIZES if outcome.case.nbytes < below)


def threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def in_common(found: Results) -> set[str]:
    """Return what all cases have in common: tables have no column of it."""
    names = ("norm", "dtype")
    return {name for name in names if len({getattr(o.case, name) for o in found.outcomes}) == 1}


def table(found: Results, head: list[str], rows: Rows) -> str:
    """Return a table without what all cases have in common; nothing if it has no rows."""
    common = in_common(found)
    shown = [i for i, name in enumerate(head) if name not in common]
    lines = [[row[i] for i in shown] for row in (head, ["---"] * len(head), *rows)]
    if len(lines) == 2:
        return ""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def pivoted(
    found: Results, keys: list[str], numbers: Numbers, cell: Callable[[list[float]], str]
) -> str:
    """Return a table with a row for each key, a column for each last part of one."""
    rows = dict.fromkeys(key[:-1] for key in numbers)
    columns = list(dict.fromkeys(key[-1] for key in numbers))
    cells = ([cell(numbers[*r, c]) if (*r, c) in numbers else "" for c in columns] for r in rows)
    body = [[*row, *line] for row, line in zip(rows, cells, strict=True)]
    return table(found, [*keys, *columns], body)


def _mean(factors: list[float]) -> str:
    return f"{geometric_mean(factors):.2f}"


def _mean_and_least(factors: list[float]) -> str:
    return f"{geometric_mean(factors):.2f} ({min(factors):.2f} at least)"


def peer_table(found: Results) -> str:
    """Return how many times faster than each peer fastbn is, over all cases."""
    factors: Numbers = defaultdict(list)
    for o in found.outcomes:
        group = o.case.norm, o.case.dtype
        if o.peer:
            factors[*group, "the fastest peer"].append(o.lead)
        for name in o.of_kind("peer", "other"):
            label = name + ", as called" * (name in NEW_ARRAYS)
            factors[*group, label].append(_over(o, name))
    head = ["norm", "dtype", "fastbn over", "geometric mean", "least", "most", "cases", "lost"]
    rows = [
        [
            *key,
            _mean(of),
            f"{min(of):.2f}",
            f"{max(of):.1f}",
            len(of),
            sum(factor * LOST < 1 for factor in of),
        ]
        for key, of in factors.items()
    ]
    return table(found, head, rows)


def _over(outcome: Outcome, name: str) -> float:
    ours = outcome.best
    if name in NEW_ARRAYS and outcome.of_kind("fastbn new"):
        ours = outcome.ratios[outcome.of_kind("fastbn new")[0]]
    return outcome.ratios[name] / ours


def size_table(found: Results) -> str:
    """Return fastbn's time over the copy's, and its lead, by layout and size."""
    ratios: Numbers = defaultdict(list)
    leads: Numbers = defaultdict(list)
    for o in sorted(found.outcomes, key=_by_size):
        kind = "rows" if o.case.rows else "planes"
        label = size(o) if o.case.nbytes < SMALL else f"{kind}, {size(o)}"
        key = o.case.norm, o.case.dtype, label, f"{o.case.op}, {threads(o.case.threads)}"
        ratios[key].append(o.best)
        if o.peer:
            leads[key].append(o.lead)
    cells = {key: (of, leads[key]) for key, of in ratios.items()}
    return pivoted(found, ["norm", "dtype", "x"], cells, _ratio_and_lead)


def _by_size(o: Outcome) -> tuple[object, ...]:
    case = o.case
    sizes = [label for label, _ in SIZES]
    order = case.threads, OPERATIONS.index(case.op)
    return list(NORMS).index(case.norm), case.dtype, -sizes.index(size(o)), case.rows, order


def _ratio_and_lead(of: tuple[list[float], list[float]]) -> str:
    ratios, leads = of
    return f"{median(ratios):.2f}" + (f" / {geometric_mean(leads):.2f}" if leads else "")


def thread_table(found: Results) -> str:
    """Return how much faster fastbn is with the most threads than with one."""
    most = max(o.case.threads for o in found.outcomes)
    index = found.index
    numbers: Numbers = defaultdict(list)
    for (tensor, dtype, number, op), o in index.items():
        many = index.get((tensor, dtype, most, op))
        if number == 1 and most > 1 and many and o.seconds and many.seconds:
            factor = o.seconds * o.best / (many.seconds * many.best)
            numbers[o.case.norm, dtype, size(o), op].append(factor)
    return pivoted(found, ["norm", "dtype", f"{threads(most)} over 1"], numbers, _mean_and_least)


def half_table(found: Results) -> str:
    """Return geometric means of the times with 16 bits over those with float32."""
    numbers: Numbers = defaultdict(list)
    index = found.index
    for (tensor, dtype, number, op), o in index.items():
        single = index.get((tensor, "float32", number, op))
        if o.case.half and single and o.seconds and single.seconds:
            factor = o.seconds * o.best / (single.seconds * single.best)
            numbers[o.case.norm, dtype, number, size(o), op].append(factor)
    return pivoted(found, ["norm", "dtype", "threads", "x"], numbers, _mean)


def level_table(found: Results) -> str:
    """Return geometric means of the lower CPU levels' times over the best one's."""
    numbers: Numbers = defaultdict(list)
    for o in found.outcomes:
        for level in o.of_kind("fastbn")[1:]:
            key = level, o.case.norm, o.case.dtype, o.case.threads, size(o), o.case.op
            numbers[key].append(o.ratios[level] / o.best)
    return pivoted(found, ["level", "norm", "dtype", "threads", "x"], numbers, _mean)


def error_table(found: Results) -> str:
    """Return the largest error of each contender."""
    errors = {(norm, dtype, name, op): e for (norm, dtype, op, name), e in found.errors.items()}
    return pivoted(found, ["norm", "dtype", "contender"], errors, lambda error: f"{error:.1e}")


def lost_table(found: Results) -> str:
    """Return the cases that a peer wins, the worst first."""
    worst_first = sorted(filter(lost, found.outcomes), key=lambda o: (o.lead, o.case.name))
    head = ["norm", "dtype", "layout", "threads", "shape", "operation", "fastbn / fastest peer"]
    rows = [
        [o.case.norm, o.case.dtype, o.case.layout, o.case.threads, _shape(o), o.case.op, _both(o)]
        for o in worst_first
    ]
    return table(found, head, rows)


def case_tables(found: Results) -> str:
    """Return every case, in a table for each norm, dtype, number of threads and layout."""
    sections: dict[tuple[object, ...], dict[object, dict[str, Outcome]]] = {}
    for (tensor, dtype, number, op), o in found.index.items():
        key = f"{o.case.norm} norm, {dtype}, {threads(number)}, {o.case.layout}"
        sections.setdefault(key, {}).setdefault(tensor, {})[op] = o
    texts = []
    for title, tensors in sections.items():
        ops = list(dict.fromkeys(op for by_op in tensors.values() for op in by_op))
        head = ["network", "shape", "size", "copy, us", *ops]
        rows = [_line(by_op, ops) for by_op in tensors.values()]
        texts.append(f"### {title}\n\n{table(found, head, rows)}")
    return "\n\n".join(texts)


def _line(by_op: dict[str, Outcome], ops: list[str]) -> list[str]:
    o = next(iter(by_op.values()))
    cells = (_cell(by_op[op]) if op in by_op else "" for op in ops)
    return [o.case.network, _shape(o), _bytes(o.case.nbytes), _microseconds(o.seconds), *cells]


def _cell(outcome: Outcome) -> str:
    return f"**{_both(outcome)}**" if lost(outcome) else _both(outcome)


def _both(outcome: Outcome) -> str:
    peer = f" / {outcome.ratios[outcome.peer]:.2f} {outcome.peer}" if outcome.peer else ""
    return f"{outcome.best:.2f}{peer}"


def _shape(outcome: Outcome) -> str:
    return "x".join(map(str, outcome.case.shape))


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{float(f'{seconds * 1e6:.3g}'):g}"


def _bytes(nbytes: float) -> str:
    for unit in ("B", "KB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} MB"


def comparison(found: Results) -> str:
    """Return a table for each number of threads: the unit's time, all ratios, their means."""
    names = [name for name in found.kinds if name != found.unit]
    head = ["layout", "operation", "shape", f"{found.unit}, us", *names]
    texts = [f"Times as ratios to that of {found.unit}, in the same rounds."]
    for number in dict.fromkeys(o.case.threads for o in found.outcomes):
        rows, ratios = [], defaultdict(list)
        for o in found.outcomes:
            if o.case.threads != number:
                continue
            case, these = o.case, [o.ratios.get(name) for name in names]
            ratios[case.layout, case.op].append(these)
            cells = ["" if ratio is None else f"{ratio:.2f}" for ratio in these]
            rows.append([case.layout, case.op, _shape(o), _microseconds(o.seconds), *cells])
        for (layout, op), of in ratios.items():
            # An operation has a ratio of each name, or of none.
            means = ("" if None in column else _mean(column) for column in zip(*of, strict=True))
            rows.append([layout, op, "geometric mean", "", *means])
        texts.append(f"## {threads(number).capitalize()}\n\n{table(found, head, rows)}")
    return "\n\n".join(texts)


def moved(found: Results, again: Results) -> str:
    """Return how far the figures of two runs are apart, in per cent."""
    second = again.index
    pairs = [(o, second[key]) for key, o in found.index.items() if o.peer and key in second]

    def apart(figure: Callable[[Outcome], float], chosen: list[tuple[Outcome, Outcome]]) -> str:
        changes = [abs(np.log(figure(b) / figure(a))) for a, b in chosen]
        return " / ".join(f"{100 * np.expm1(np.percentile(changes, p)):.0f}" for p in (50, 90, 100))

    figures: dict[str, Callable[[Outcome], float]] = {
        "time of the copy": lambda o: o.seconds,
        "time of fastbn": lambda o: o.seconds * o.best,
        "fastbn to the copy": lambda o: o.best,
        "fastest peer to fastbn": lambda o: o.lead,
    }
    groups: dict[str, list[tuple[Outcome, Outcome]]] = defaultdict(list)
    for a, b in pairs:
        groups[f"{threads(a.case.threads)}, {size(a)}"].append((a, b))
    rows = (
        [label, *(apart(figure, of) for figure in figures.values())] for label, of in groups.items()
    )
    other = sum(lost(a) != lost(b) for a, b in pairs)
    head = ["change between two runs, %: median / 90% / largest", *figures]
    return f"{table(found, head, rows)}\n\nCases that are lost in one of the two only: {other}."


CELLS = (
    "fastbn / the fastest peer, in units of the best copy of the same tensor in the same rounds."
)
SECTIONS = (
    (
        "By size",
        """\
Median of fastbn's time over that of the best copy of the same tensor / how many times
faster than the fastest peer fastbn is (geometric mean). Planes: NCHW. Rows: NHWC, and
(N, C). Size: that of x.""",
        size_table,
    ),
    (
        "Against each peer",
        """\
How many times faster fastbn is. Lost: the peer takes less than 1/1.05 of fastbn's time.
Against PyTorch "as called" fastbn, too, makes a new array in each call.""",
        peer_table,
    ),
    ("Threads", "How many times faster, where times are kept: geometric mean.", thread_table),
    ("Half precision", "Time over that with float32: geometric mean.", half_table),
    ("CPU levels", "Time over that of the best level: geometric mean.", level_table),
    (
        "Errors",
        """\
Largest absolute error of the output, against a wider type; data of mean 1, standard
deviation 1.""",
        error_table,
    ),
    ("Lost cases", CELLS, lost_table),
    ("All cases", f"{CELLS}\nBold: lost.", case_tables),
)


def heading(found: Results) -> str:
    machine = found.machine
    names = {"fastbn": machine["fastbn"], "Python": machine["python"], **machine["versions"]}
    versions = ", ".join(f"{name} {version}" for name, version in names.items())
    return f"""\
Measured on {machine["date"]} by

    {found.command}

Machine: {machine["processor"]}; {machine["processors"]} processors; {machine["system"]}.
Versions: {versions}; {machine["compiler"]}."""


def text(found: Results) -> str:
    """Return the report, without a title."""
    if found.unit != COPY:
        return f"{heading(found)}\n\n{comparison(found)}\n"
    sections = ((title, note, make(found)) for title, note, make in SECTIONS)
    parts = [f"## {title}\n\n{note}\n\n{body}" for title, note, body in sections if body]
    return "\n\n".join([heading(found), *parts]) + "\n"


def summary(found: Results) -> str:
    """Return what a run prints at its end."""
    return f"{size_table(found)}\n\n{peer_table(found)}"


def write(found: Results, folder: Path) -> None:
    """Write results.md."""
    (folder / "results.md").write_text(f"# Results\n\n{text(found)}")


def write_pages(folder: Path) -> None:
    for page, content in documented(folder).items():
        page.write_text(content)


def documented(folder: Path) -> dict[Path, str]:
    """Return the pages of `folder`, each made from the file of its name in measurements/."""
    pages = {}
    for file in sorted((folder / "measurements").glob("*.json")):
        title = file.stem.replace("-", " ").capitalize()
        made = f"<!-- Made from measurements/{file.name} by `python -m benchmarks --tables`. -->"
        pages[folder / f"{file.stem}.md"] = f"{made}\n\n# {title}\n\n{text(results.read(file))}"
    return pages
