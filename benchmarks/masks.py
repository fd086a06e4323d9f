# SPDX-License-Identifier: BSD-3-Clause
"""What masks and lengths cost, float32: times as ratios to the same call without them.

    python -m benchmarks.masks

A mask of half of the positions, chosen at random; and lengths, evenly from none to all, whose
ratio is also given as one to the share that counts. Interleaved rounds, medians. Prints
Markdown. Like `python -m benchmarks` it needs an idle machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

import fastbn
from benchmarks.machine import command, machine

ROUNDS = 15
SHORTEST = 2e-3  # seconds that one call is repeated for, at least
#: (layout, shape); masks need no length axis, lengths take the axis T.
SHAPES = [
    ("NTC", (32, 400, 256)),
    ("NTC", (16, 128, 128)),
    ("NCT", (32, 256, 400)),
    ("NCT", (16, 128, 128)),
    ("NCHW", (32, 64, 56, 56)),
    ("NCHW", (8, 64, 28, 28)),
    ("NHWC", (32, 56, 56, 64)),
    ("NHWC", (8, 28, 28, 64)),
]


def operations(layout: str, shape: tuple[int, ...], norm: str) -> dict[str, Callable]:
    """Return operations that take a mask or lengths, by name."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    y, channels = np.empty_like(x), shape[layout.index("C")]
    running = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    groups = () if norm != "group" else (channels // 8,)
    forward = getattr(fastbn, f"{norm}_norm_forward")
    backward = getattr(fastbn, f"{norm}_norm_backward")

    def gradients(**counted: object) -> Callable[[], object]:
        _, mean, invstd = forward(x, *groups, layout=layout, **counted)
        return lambda: backward(dy, x, mean, invstd, *groups, layout=layout, out=y, **counted)

    found = {
        "forward": lambda **c: lambda: forward(x, *groups, layout=layout, out=y, **c),
        "backward": gradients,
    }
    if norm == "batch":
        found = {
            "statistics": lambda **c: lambda: fastbn.batch_stats(x, layout=layout, **c),
            "inference": lambda **c: (
                lambda: fastbn.batch_norm(x, *running, layout=layout, out=y, **c)
            ),
        } | found
    return found


def seconds(calls: list[Callable[[], object]]) -> list[float]:
    """Return the median time of each, in interleaved rounds."""
    repeats, times = [], [[] for _ in calls]
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        repeats.append(max(1, round(SHORTEST / (time.perf_counter() - start))))
    for _ in range(ROUNDS):
        for call, n, kept in zip(calls, repeats, times, strict=True):
            start = time.perf_counter()
            for _ in range(n):
                call()
            kept.append((time.perf_counter() - start) / n)
    return [float(np.median(kept)) for kept in times]


def rows(layout: str, shape: tuple[int, ...], norm: str) -> None:
    """Print those of one shape."""
    rng = np.random.default_rng(1)
    axis = layout.index("C")
    mask = rng.random(shape[:axis] + shape[axis + 1 :]) < 0.5
    for name, operation in operations(layout, shape, norm).items():
        calls = [operation(), operation(mask=mask)]
        share = None
        if "T" in layout:
            n, size = shape[0], shape[layout.index("T")]
            lengths = rng.permutation(np.linspace(0, size, n).round().astype(int))
            share = lengths.mean() / size
            calls.append(operation(lengths=lengths))
        plain, *others = seconds(calls)
        cells = [norm, layout, "x".join(map(str, shape)), name, f"{plain * 1e6:.0f}",
                 f"{others[0] / plain:.2f}"]  # fmt: skip
        if share is not None:
            cells += [f"{others[1] / plain:.2f}", f"{others[1] / plain / share:.2f}"]
        print("| " + " | ".join(cells + [""] * (8 - len(cells))) + " |", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--norm", nargs="+", default=["batch", "group"])
    arguments = parser.parse_args()
    fastbn.set_num_threads(arguments.threads)
    print(f"`{command('benchmarks.masks')}`, {fastbn.get_num_threads()} threads: {machine()}\n")
    print("| norm | layout | shape | operation | us | mask of half | lengths | to their share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for norm in arguments.norm:
        for layout, shape in SHAPES:
            rows(layout, shape, norm)


if __name__ == "__main__":
    main()
