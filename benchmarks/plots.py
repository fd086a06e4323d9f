# SPDX-License-Identifier: BSD-3-Clause
"""Results -> plots."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

import numpy as np

from benchmarks.cases import OPERATIONS
from benchmarks.report import lost, threads
from benchmarks.results import PEERS, Outcome, Results


def plot_time(found: list[Outcome], title: str, file: Path) -> None:
    """Time against size, with the copy as the floor."""
    import matplotlib.pyplot as plt

    layouts = list(dict.fromkeys(o.case.layout for o in found))
    ops = [op for op in OPERATIONS if any(o.case.op == op for o in found)]
    names = list(dict.fromkeys(name for o in found for name in o.of_kind(*PEERS)))
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
            (o for o in found if o.case.layout == layout and o.case.op == op),
            key=lambda o: o.case.nbytes,
        )
        axis = axes[row][column]
        sizes = np.array([o.case.nbytes for o in here]) / 1e6
        axis.plot(
            sizes,
            [o.seconds * 1e6 for o in here],
            color="0.6",
            lw=4,
            solid_capstyle="round",
            label="copy of the tensor",
            zorder=1,
        )
        for k, name in enumerate(names):
            points = [
                (o.case.nbytes / 1e6, o.seconds * o.ratios[name] * 1e6)
                for o in here
                if name in o.ratios
            ]
            if points:
                axis.plot(*zip(*points, strict=True), ".", ms=5, color=f"C{k + 1}", label=name)
        axis.plot(
            sizes,
            [o.seconds * o.best * 1e6 for o in here],
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
    ops = [op for op in OPERATIONS if any(o.case.op == op for o in found)]
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
            here = [o for o in found if label(o) == name and o.case.op == op]
            if not here:
                continue
            leads = [o.lead for o in here]
            colors = ["C3" if lost(o) else "C2" for o in here]
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


def write(results: Results, folder: Path) -> None:
    """Write for each norm times and networks in its first dtype; then all norms and dtypes."""
    found = [o for o in results.outcomes if o.peer and o.seconds]
    most = max((o.case.threads for o in found), default=1)
    for norm in dict.fromkeys(o.case.norm for o in found):
        of_norm = [o for o in found if o.case.norm == norm]
        dtype = of_norm[0].case.dtype
        same = [o for o in of_norm if o.case.dtype == dtype]
        parallel = [o for o in same if o.case.threads == most]
        title = f"{norm} norm, {dtype}"
        plot_time(parallel, f"{title}, {threads(most)}", folder / f"time-{norm}.png")
        plot_leads(same, lambda o: o.case.network, title, folder / f"networks-{norm}.png")
    if found:
        plot_leads(found, lambda o: f"{o.case.norm}, {o.case.dtype}", "", folder / "norms.png")
