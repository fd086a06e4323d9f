# SPDX-License-Identifier: BSD-3-Clause
"""Results -> Markdown tables and plots."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from benchmarks.cases import NETWORKS, OPERATIONS, SMALL

Row = dict[str, object]
LOST = 1.05  # a peer has won where fastbn takes so many times its time
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
        ours = "fastbn, new array" if name == "PyTorch" else self.best["name"]
        return self.by_name[name]["ratio"] / self.by_name[ours]["ratio"]

    @property
    def lead(self) -> float:
        """How many times faster than the fastest peer fastbn is."""
        return self.peer["ratio"] / self.best["ratio"]

    @property
    def key(self) -> tuple[object, ...]:
        """What the three operations on one tensor have in common."""
        case = self.case
        return (
            case["dtype"],
            case["threads"],
            case["layout"],
            case["network"],
            tuple(case["shape"]),
        )


def geometric_mean(numbers: Iterable[float]) -> float:
    return float(np.exp(np.mean(np.log(list(numbers)))))


def outcomes(results: Row) -> list[Outcome]:
    return [Outcome(case) for case in results["cases"]]


def summary(results: Row) -> str:
    """Return the whole grid in a few lines of Markdown."""
    found = [outcome for outcome in outcomes(results) if outcome.peer]
    if not found:
        return "No peers were raced."
    names = dict.fromkeys(
        row["name"]
        for outcome in found
        for row in outcome.case["contenders"]
        if row["kind"] in ("peer", "other")
    )
    lines = [
        "| fastbn is faster than | geometric mean | least | most | cases |",
        "| --- | --- | --- | --- | --- |",
    ]
    columns: dict[str, Callable[[Outcome], float | None]] = {
        "the fastest peer of each case": lambda outcome: outcome.lead,
    }
    for name in names:
        label = f"{name}, as called (fastbn with a new array too)" if name == "PyTorch" else name
        columns[label] = lambda outcome, name=name: outcome.over(name)
    for label, factor in columns.items():
        numbers = [n for n in map(factor, found) if n is not None]
        lines.append(
            f"| {label} | {geometric_mean(numbers):.2f} x | {min(numbers):.2f} x "
            f"| {max(numbers):.1f} x | {len(numbers)} |"
        )
    lost = [outcome for outcome in found if 1 / outcome.lead > LOST]
    lines.append(f"\nCases that a peer wins by more than 5%: {len(lost)} of {len(found)}.")
    lines.append(
        f"oneDNN, prepared and called from C, is no peer below {SMALL >> 10} KB, where a "
        "call's overhead counts; its row has those cases all the same."
    )
    return "\n".join(lines)


def _cell(outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    text = f"{outcome.best['ratio']:.2f}"
    if outcome.peer is None:
        return text
    text += f" / {outcome.peer['ratio']:.2f} {outcome.peer['name']}"
    return f"**{text}**" if 1 / outcome.lead > LOST else text


def _by_tensor(found: Iterable[Outcome]) -> dict[tuple[object, ...], dict[str, Outcome]]:
    groups: dict[tuple[object, ...], dict[str, Outcome]] = defaultdict(dict)
    for outcome in found:
        groups[outcome.key][outcome.case["op"]] = outcome
    return groups


def _size(nbytes: float) -> str:
    for unit in ("B", "KB", "MB"):
        if nbytes < 1000 or unit == "MB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    raise AssertionError


def _section(key: tuple[object, ...]) -> tuple[object, ...]:
    return key[:3]


def _sections(
    found: list[Outcome],
) -> Iterable[tuple[str, dict[tuple[object, ...], dict[str, Outcome]]]]:
    groups = _by_tensor(found)
    in_sections = sorted(groups, key=_section)
    for (dtype, threads, layout), members in itertools.groupby(in_sections, key=_section):
        title = f"{dtype}, {threads} thread{'s' * (threads > 1)}, {layout}"
        yield title, {key: groups[key] for key in members}


def main_table(results: Row) -> str:
    """Return fastbn and the fastest peer of each case, as ratios to the best copy."""
    lines = []
    for title, groups in _sections(outcomes(results)):
        lines += [
            f"\n### {title}\n",
            "| network | shape | size | copy, us | " + " | ".join(OPERATIONS) + " |",
            "| --- " * (4 + len(OPERATIONS)) + "|",
        ]
        for (*_, network, shape), by_op in groups.items():
            any_case = next(iter(by_op.values())).case
            cells = " | ".join(_cell(by_op.get(op)) for op in OPERATIONS)
            lines.append(
                f"| {network} | {'x'.join(map(str, shape))} | {_size(any_case['bytes'])} "
                f"| {any_case['copy'] * 1e6:.3g} | {cells} |"
            )
    return "\n".join(lines)


def level_table(results: Row) -> str:
    """Return geometric means of the lower CPU levels' times over the best one's."""
    numbers: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for outcome in outcomes(results):
        size = "4 MB and more" if outcome.case["bytes"] >= 4e6 else "less than 4 MB"
        for row in outcome.levels[1:]:
            key = (
                row["name"],
                outcome.case["dtype"],
                outcome.case["threads"],
                size,
                outcome.case["op"],
            )
            numbers[key].append(row["seconds"] / outcome.best["seconds"])
    lines = [
        "| level | dtype | threads | tensors | " + " | ".join(OPERATIONS) + " |",
        "| --- " * (4 + len(OPERATIONS)) + "|",
    ]
    for group in dict.fromkeys(key[:4] for key in numbers):
        cells = [
            f"{geometric_mean(numbers[*group, op]):.2f}" if (*group, op) in numbers else ""
            for op in OPERATIONS
        ]
        lines.append(f"| {' | '.join(map(str, group))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def thread_table(results: Row) -> str:
    """Return how much faster fastbn is with the most threads than with one."""
    most = max(case["threads"] for case in results["cases"])
    times = {
        (outcome.case["op"], outcome.case["threads"], outcome.key[0], *outcome.key[2:]): outcome
        for outcome in outcomes(results)
    }
    factors: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (op, threads, *rest), outcome in times.items():
        many = times.get((op, most, *rest))
        if threads == 1 and most > 1 and many:
            size = next(label for label, below in SIZES if outcome.case["bytes"] < below)
            factors[size, op].append(outcome.best["seconds"] / many.best["seconds"])
    lines = [
        f"| {most} threads over 1 | " + " | ".join(OPERATIONS) + " |",
        "| --- " * (1 + len(OPERATIONS)) + "|",
    ]
    for size, _ in SIZES:
        if any((size, op) in factors for op in OPERATIONS):
            cells = [
                f"{geometric_mean(factors[size, op]):.2f} x ({min(factors[size, op]):.2f} at least)"
                if factors[size, op]
                else ""
                for op in OPERATIONS
            ]
            lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def error_table(results: Row) -> str:
    """Return the largest error of each contender."""
    worst: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for outcome in outcomes(results):
        for row in outcome.case["contenders"]:
            name = "fastbn" if row["kind"].startswith("fastbn") else row["name"]
            cell = worst[name, outcome.case["dtype"]]
            op = outcome.case["op"]
            cell[op] = max(cell.get(op, 0), row["error"])
    lines = [
        "| largest error | dtype | " + " | ".join(OPERATIONS) + " |",
        "| --- " * (2 + len(OPERATIONS)) + "|",
    ]
    for (name, dtype), cell in worst.items():
        cells = [f"{cell[op]:.1e}" if op in cell else "" for op in OPERATIONS]
        lines.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def moved(results: Row, again: Row) -> str:
    """Return how far the figures of two runs are apart, in per cent."""
    second = {(o.key, o.case["op"]): o for o in outcomes(again)}
    pairs = [
        (o, second[o.key, o.case["op"]])
        for o in outcomes(results)
        if o.peer and (o.key, o.case["op"]) in second
    ]

    def apart(figure: Callable[[Outcome], float], chosen: list[tuple[Outcome, Outcome]]) -> str:
        changes = [abs(np.log(figure(b) / figure(a))) for a, b in chosen]
        return " / ".join(f"{100 * np.expm1(np.percentile(changes, p)):.0f}" for p in (50, 90, 100))

    figures: dict[str, Callable[[Outcome], float]] = {
        "time of the copy": lambda o: o.case["copy"],
        "time of fastbn": lambda o: o.best["seconds"],
        "fastbn to the copy": lambda o: o.best["ratio"],
        "fastest peer to fastbn": lambda o: o.lead,
    }
    lines = [
        "| change between two runs, %: median / 90% / largest | " + " | ".join(figures) + " |",
        "| --- " * (1 + len(figures)) + "|",
    ]
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
                cells = " | ".join(apart(figure, chosen) for figure in figures.values())
                lines.append(f"| {threads} thread{'s' * (threads > 1)}, {label} | {cells} |")
    other = sum((a.lead * LOST < 1) != (b.lead * LOST < 1) for a, b in pairs)
    lines.append(f"\nCases that are lost by more than 5% in one of the two only: {other}.")
    return "\n".join(lines)


def plot_time(results: Row, file: Path) -> None:
    """Time against size, with the copy as the floor: float32, the most threads."""
    import matplotlib.pyplot as plt

    threads = max((case["threads"] for case in results["cases"]), default=1)
    found = [
        o
        for o in outcomes(results)
        if o.case["dtype"] == "float32" and o.case["threads"] == threads
    ]
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
    figure.suptitle(f"Lower is better. float32, {threads} threads")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_networks(results: Row, file: Path) -> None:
    """How many times faster than the fastest peer, per network: float32."""
    import matplotlib.pyplot as plt

    found = [o for o in outcomes(results) if o.peer and o.case["dtype"] == "float32"]
    names = [name for name in NETWORKS if any(o.case["network"] == name for o in found)][::-1]
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
            leads = [o.lead for o in found if o.case["network"] == name and o.case["op"] == op]
            colors = ["C2" if lead * LOST >= 1 else "C3" for lead in leads]
            axis.scatter(leads, [y] * len(leads), s=14, c=colors, alpha=0.5, linewidths=0)
            axis.plot(geometric_mean(leads), y, "k|", ms=14, mew=2.5)
        axis.axvline(1, color="0.4", lw=1)
        axis.set(title=op, xscale="log", yticks=range(len(names)), yticklabels=names)
        axis.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axis.minorticks_off()
        axis.set_xlabel("times faster than the fastest peer")
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle("Each dot a case (red: a peer wins), the bar their geometric mean. float32")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write(results: Row, folder: Path) -> None:
    """Write results.md and the plots into `folder`."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = f"""\
## {machine["date"]}: {machine["processor"]}, {machine["processors"]} processors

{versions}; fastbn {machine["fastbn"]["version"]}, {machine["fastbn"]["compiler"]}.

{summary(results)}

{thread_table(results)}

Time of the lower CPU levels, as a ratio to the best level (geometric means):

{level_table(results)}

{error_table(results)}

Each cell: fastbn / the fastest peer, in units of the best copy of the same tensor in
the same rounds. Bold: the peer wins by more than 5%.
{main_table(results)}
"""
    (folder / "results.md").write_text(text)
    if any(outcome.case["dtype"] == "float32" and outcome.peer for outcome in outcomes(results)):
        plot_time(results, folder / "time.png")
        plot_networks(results, folder / "networks.png")
