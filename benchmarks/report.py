# SPDX-License-Identifier: BSD-3-Clause
"""Results -> Markdown tables and plots."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks.cases import NORMS, OPERATIONS, SMALL

Row = dict[str, object]
Numbers = dict[tuple[object, ...], list[float]]  # by what a row begins with, and the operation
LOST = 1.05  # a peer has won where fastbn takes so many times its time
NEW_ARRAYS = ("PyTorch", "PyTorch group_norm")  # against these fastbn makes new ones too
SIZES = (
    ("less than 512 KB", SMALL),
    ("512 KB to 1 MB", 1 << 20),
    ("1 MB to 8 MB", 8 << 20),
    ("8 MB and more", np.inf),
)


class Outcome:
    """One case: fastbn's times, and who was the fastest of its peers."""

    def __init__(self, case: Row):
        self.case = case
        self.by_name = {row["name"]: row for row in case["contenders"]}
        self.levels = [row for row in case["contenders"] if row["kind"] == "fastbn"]
        self.best = self.levels[0]
        self.peers = [row for row in case["contenders"] if row["kind"] == "peer"]
        # By their ratios to the copy in the same rounds: so it is with `lead` and `over`.
        self.peer = min(self.peers, key=lambda row: row["ratio"], default=None)

    def over(self, name: str) -> float | None:
        """Return how many times faster than `name` fastbn is."""
        if name not in self.by_name:
            return None
        ours = "fastbn, new array" if name in NEW_ARRAYS else self.best["name"]
        return self.by_name[name]["ratio"] / self.by_name[ours]["ratio"]

    @property
    def lead(self) -> float:
        """How many times faster than the fastest peer fastbn is."""
        return self.peer["ratio"] / self.best["ratio"]

    @property
    def tensor(self) -> tuple[object, ...]:
        """What cases with other dtypes, threads and operations have in common with this one."""
        case = self.case
        return case["norm"], case["layout"], case["network"], tuple(case["shape"])

    @property
    def size(self) -> str:
        """Which of SIZES it is of."""
        return next(label for label, below in SIZES if self.case["bytes"] < below)


def geometric_mean(numbers: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(numbers)))))


def outcomes(results: Row) -> list[Outcome]:
    return [Outcome(case) for case in results["cases"]]


def indexed(results: Row) -> dict[tuple[object, ...], Outcome]:
    """Return the outcomes by tensor, dtype, threads and operation."""
    return {
        (o.tensor, o.case["dtype"], o.case["threads"], o.case["op"]): o for o in outcomes(results)
    }


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(head)]
    lines += ["---" for _ in lines[0]], *rows
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def by_operation(head: list[str], numbers: Numbers, cell: Callable[[list[float]], str]) -> str:
    """Return a table with a column for each operation, and what `cell` says of its numbers."""
    groups = dict.fromkeys(key[:-1] for key in numbers)
    ops = [op for op in OPERATIONS if any(key[-1] == op for key in numbers)]
    cells = ([cell(numbers[*g, op]) if (*g, op) in numbers else "" for op in ops] for g in groups)
    return table([*head, *ops], ([*g, *row] for g, row in zip(groups, cells, strict=True)))


def summary(results: Row) -> str:
    """Return the whole grid in a few lines of Markdown."""
    found = [outcome for outcome in outcomes(results) if outcome.peer]
    if not found:
        return "No peers were raced."
    factors: Numbers = defaultdict(list)
    leads: Numbers = defaultdict(list)
    for o in found:
        norm = o.case["norm"]
        factors[norm, "the fastest peer of each case"].append(o.lead)
        leads[norm, o.case["dtype"], o.case["op"]].append(o.lead)
        for row in o.case["contenders"]:
            if row["kind"] in ("peer", "other"):
                new = ", as called (fastbn with a new array too)" * (row["name"] in NEW_ARRAYS)
                factors[norm, row["name"] + new].append(o.over(row["name"]))
    lines = [
        [
            *key,
            f"{geometric_mean(of):.2f} x",
            f"{min(of):.2f} x",
            f"{max(of):.1f} x",
            len(of),
            sum(factor * LOST < 1 for factor in of),
        ]
        for key, of in sorted(factors.items(), key=lambda item: list(NORMS).index(item[0][0]))
    ]
    head = ["norm", "fastbn is faster than", "geometric mean", "least", "most", "cases", "lost"]
    by_dtype = by_operation(["the fastest peer", "dtype"], leads, _mean_and_least)
    return f"""\
{table(head, lines)}

Lost: a peer wins by more than 5%; {sum(o.lead * LOST < 1 for o in found)} of {len(found)} cases.
oneDNN, prepared and called from C, is no peer below {SMALL >> 10} KB, where a call's
overhead counts; its rows have those cases all the same.

{by_dtype}"""


def _mean_and_least(numbers: list[float]) -> str:
    return f"{geometric_mean(numbers):.2f} x ({min(numbers):.2f} at least)"


def level_table(results: Row) -> str:
    """Return geometric means of the lower CPU levels' times over the best one's."""
    numbers: Numbers = defaultdict(list)
    for o in outcomes(results):
        case = o.case
        size = "4 MB and more" if case["bytes"] >= 4e6 else "less than 4 MB"
        for row in o.levels[1:]:
            key = row["name"], case["norm"], case["dtype"], case["threads"], size, case["op"]
            numbers[key].append(row["seconds"] / o.best["seconds"])
    head = ["level", "norm", "dtype", "threads", "tensors"]
    return by_operation(head, numbers, lambda of: f"{geometric_mean(of):.2f}")


def thread_table(results: Row) -> str:
    """Return how much faster fastbn is with the most threads than with one."""
    most = max(case["threads"] for case in results["cases"])
    index = indexed(results)
    numbers: Numbers = defaultdict(list)
    for (tensor, dtype, threads, op), o in index.items():
        many = index.get((tensor, dtype, most, op))
        if threads == 1 and most > 1 and many:
            numbers[o.case["norm"], o.size, op].append(o.best["seconds"] / many.best["seconds"])
    return by_operation([f"{most} threads over 1", "tensors"], numbers, _mean_and_least)


def half_table(results: Row) -> str:
    """Return geometric means of the times with 16 bits over those with float32."""
    numbers: Numbers = defaultdict(list)
    index = indexed(results)
    for (_, dtype, threads, op), o in index.items():
        factor = _over_float32(o, index)
        if factor and _is_half(dtype):
            numbers[o.case["norm"], dtype, threads, o.size, op].append(factor)
    head = ["norm", "dtype", "threads", "tensors"]
    return by_operation(head, numbers, lambda of: f"{geometric_mean(of):.2f}")


def _is_half(dtype: str) -> bool:
    return dtype.endswith("float16")


def _over_float32(outcome: Outcome, index: dict[tuple[object, ...], Outcome]) -> float | None:
    case = outcome.case
    single = index.get((outcome.tensor, "float32", case["threads"], case["op"]))
    return outcome.best["seconds"] / single.best["seconds"] if single else None


def error_table(results: Row) -> str:
    """Return the largest error of each contender."""
    numbers: Numbers = defaultdict(list)
    for o in outcomes(results):
        for row in o.case["contenders"]:
            name = "fastbn" if row["kind"].startswith("fastbn") else row["name"]
            numbers[o.case["norm"], o.case["dtype"], name, o.case["op"]].append(row["error"])
    head = ["norm", "dtype", "largest error"]
    return by_operation(head, numbers, lambda errors: f"{np.max(errors):.1e}")  # shows a NaN


def main_table(results: Row) -> str:
    """Return every case: fastbn, and the fastest peer, both beside the best copy."""
    index = indexed(results)
    sections: dict[tuple[object, ...], dict[object, dict[str, Outcome]]] = {}
    for (tensor, dtype, threads, op), o in index.items():
        norm, layout, *_ = tensor
        section = sections.setdefault((norm, dtype, threads, layout), {})
        section.setdefault(tensor, {})[op] = o
    lines = []
    for (norm, dtype, threads, layout), tensors in sections.items():
        ops = [op for op in NORMS[norm].ops if any(op in by_op for by_op in tensors.values())]
        head = ["network", "shape", "size", "copy, us", *ops, "error"]
        rows = [_line(by_op, ops) for by_op in tensors.values()]
        if _is_half(dtype):
            head.append("time over float32")
            for row, by_op in zip(rows, tensors.values(), strict=True):
                factors = (_over_float32(o, index) for o in by_op.values())
                row.append(" / ".join(f"{factor:.2f}" if factor else "-" for factor in factors))
        lines.append(f"\n### {norm} norm, {dtype}, {_threads(threads)}, {layout}")
        lines.append(f"\n{table(head, rows)}")
    return "\n".join(lines)


def _line(by_op: dict[str, Outcome], ops: list[str]) -> list[str]:
    case = next(iter(by_op.values())).case
    return [
        case["network"],
        "x".join(map(str, case["shape"])),
        _size(case["bytes"]),
        f"{case['copy'] * 1e6:.3g}",
        *(_cell(by_op[op]) if op in by_op else "" for op in ops),
        " / ".join(f"{o.best['error']:.0e}" for o in by_op.values()),
    ]


def _cell(outcome: Outcome) -> str:
    text = f"{outcome.best['seconds'] * 1e6:.3g} us, {outcome.best['ratio']:.2f}"
    if outcome.peer is None:
        return text
    text += f" / {outcome.peer['ratio']:.2f} {outcome.peer['name']}"
    return f"**{text}**" if outcome.lead * LOST < 1 else text


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000 or unit == "MB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def moved(results: Row, again: Row) -> str:
    """Return how far the figures of two runs are apart, in per cent."""
    second = indexed(again)
    pairs = [(o, second[key]) for key, o in indexed(results).items() if o.peer and key in second]

    def apart(figure: Callable[[Outcome], float], chosen: list[tuple[Outcome, Outcome]]) -> str:
        changes = [abs(np.log(figure(b) / figure(a))) for a, b in chosen]
        return " / ".join(f"{100 * np.expm1(np.percentile(changes, p)):.0f}" for p in (50, 90, 100))

    figures: dict[str, Callable[[Outcome], float]] = {
        "time of the copy": lambda o: o.case["copy"],
        "time of fastbn": lambda o: o.best["seconds"],
        "fastbn to the copy": lambda o: o.best["ratio"],
        "fastest peer to fastbn": lambda o: o.lead,
    }
    rows = []
    for threads in sorted({o.case["threads"] for o, _ in pairs}):
        for label, low, high in (
            ("less than 512 KB", 0, SMALL),
            ("512 KB to 16 MB", SMALL, 16e6),
            ("more than 16 MB", 16e6, np.inf),
        ):
            chosen = [
                (a, b)
                for a, b in pairs
                if a.case["threads"] == threads and low <= a.case["bytes"] < high
            ]
            if chosen:
                name = f"{_threads(threads)}, {label}"
                rows.append([name, *(apart(figure, chosen) for figure in figures.values())])
    other = sum((a.lead * LOST < 1) != (b.lead * LOST < 1) for a, b in pairs)
    head = ["change between two runs, %: median / 90% / largest", *figures]
    return f"""\
{table(head, rows)}

Cases that are lost by more than 5% in one of the two only: {other}."""


def plot_time(found: list[Outcome], title: str, file: Path) -> None:
    """Time against size, with the copy as the floor."""
    import matplotlib.pyplot as plt

    layouts = list(dict.fromkeys(o.case["layout"] for o in found))
    ops = [op for op in OPERATIONS if any(o.case["op"] == op for o in found)]
    names = list(dict.fromkeys(row["name"] for o in found for row in o.peers))
    figure, axes = plt.subplots(
        len(layouts),
        len(ops),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(4.4 * len(ops), 3.9 * len(layouts)),
        layout="constrained",
    )
    for (row, layout), (column, op) in itertools.product(enumerate(layouts), enumerate(ops)):
        here = sorted(
            (o for o in found if o.case["layout"] == layout and o.case["op"] == op),
            key=lambda o: o.case["bytes"],
        )
        axis = axes[row][column]
        sizes = np.array([o.case["bytes"] for o in here]) / 1e6
        axis.plot(
            sizes,
            [o.case["copy"] * 1e6 for o in here],
            color="0.6",
            lw=4,
            solid_capstyle="round",
            label="copy of the tensor",
            zorder=1,
        )
        for k, name in enumerate(names):
            points = [
                (o.case["bytes"] / 1e6, o.by_name[name]["seconds"] * 1e6)
                for o in here
                if name in o.by_name
            ]
            if points:
                axis.plot(*zip(*points, strict=True), ".", ms=5, color=f"C{k + 1}", label=name)
        axis.plot(
            sizes,
            [o.best["seconds"] * 1e6 for o in here],
            "o",
            ms=5,
            mfc="white",
            mew=1.6,
            color="k",
            label="fastbn",
        )
        axis.set(xscale="log", yscale="log", title=f"{op}, {layout}")
        axis.grid(alpha=0.3)
        if row == len(layouts) - 1:
            axis.set_xlabel("size of the tensor, MB")
        if column == 0:
            axis.set_ylabel("time of a call, us")
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Lower is better. {title}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_leads(
    found: list[Outcome], label: Callable[[Outcome], str], title: str, file: Path
) -> None:
    """How many times faster than the fastest peer: a line for each label, with its cases."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(map(label, found)))[::-1]
    ops = [op for op in OPERATIONS if any(o.case["op"] == op for o in found)]
    figure, axes = plt.subplots(
        1,
        len(ops),
        sharey=True,
        sharex=True,
        squeeze=False,
        figsize=(4.2 * len(ops), 1.2 + 0.42 * len(names)),
        layout="constrained",
    )
    for axis, op in zip(axes[0], ops, strict=True):
        for y, name in enumerate(names):
            leads = [o.lead for o in found if label(o) == name and o.case["op"] == op]
            if not leads:
                continue
            colors = ["C2" if lead * LOST >= 1 else "C3" for lead in leads]
            axis.scatter(leads, [y] * len(leads), s=14, c=colors, alpha=0.5, linewidths=0)
            axis.plot(geometric_mean(leads), y, "k|", ms=14, mew=2.5)
        axis.axvline(1, color="0.4", lw=1)
        axis.set(title=op, xscale="log", yticks=range(len(names)), yticklabels=names)
        axis.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
        axis.set_xlabel("times faster than the fastest peer")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Each dot a case (red: a peer wins), the bar their geometric mean. {title}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plots(results: Row, folder: Path) -> None:
    """For each norm times and networks in its first dtype; then all norms and dtypes."""
    found = [o for o in outcomes(results) if o.peer]
    threads = max((o.case["threads"] for o in found), default=1)
    for norm in dict.fromkeys(o.case["norm"] for o in found):
        of_norm = [o for o in found if o.case["norm"] == norm]
        dtype = of_norm[0].case["dtype"]
        same = [o for o in of_norm if o.case["dtype"] == dtype]
        most = [o for o in same if o.case["threads"] == threads]
        title = f"{norm} norm, {dtype}"
        plot_time(most, f"{title}, {_threads(threads)}", folder / f"time-{norm}.png")
        plot_leads(same, lambda o: o.case["network"], title, folder / f"networks-{norm}.png")
    if found:
        plot_leads(
            found, lambda o: f"{o.case['norm']}, {o.case['dtype']}", "", folder / "norms.png"
        )


def write(results: Row, folder: Path) -> None:
    """Write results.md and the plots into `folder`."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = f"""\
## {machine["date"]}: {machine["processor"]}, {machine["processors"]} processors

{versions}; fastbn {machine["fastbn"]["version"]}, {machine["fastbn"]["compiler"]}.

{summary(results)}

{thread_table(results)}

Time with 16 bits over the time with float32 (geometric means):

{half_table(results)}

Time of the lower CPU levels, as a ratio to the best level (geometric means):

{level_table(results)}

{error_table(results)}

Each cell: fastbn's time, and fastbn / the fastest peer, in units of the best copy of the
same tensor in the same rounds. Bold: the peer wins by more than 5%. Error: fastbn's
largest, absolute, of each operation.
{main_table(results)}
"""
    (folder / "results.md").write_text(text)
    plots(results, folder)
