# SPDX-License-Identifier: BSD-3-Clause
"""Images: statistics of integers, normalize and denormalize, beside OpenCV, torchvision, NumPy.

    python -m pip install ".[bench]" torchvision
    python -m benchmarks.images

Interleaved rounds on one thread and on all. The yardsticks come first: the best copy or sum of
as many bytes, as a bound of what any program can reach. `bound` is the time that the bytes
take by the yardstick; every other number is a ratio to it, and beside it the ratio of each
peer to fastbn. Prints Markdown and writes images.md. Like `python -m benchmarks` it needs an
idle machine; it takes about two minutes.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import fastbn
from benchmarks.machine import command, machine

try:
    import cv2
except ImportError:
    cv2 = None
try:
    import torch
    from torchvision.transforms.v2 import functional as vision
except ImportError:
    torch = vision = None

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SHORTEST = 2e-3  # seconds of a round of one contender
Calls = dict[str, Callable[[], object]]


def images(shape: tuple[int, ...], dtype: str = "uint8") -> np.ndarray:
    """Return random integers of the whole range."""
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def race(calls: Calls, budget: float) -> dict[str, float]:
    """Return the median of the seconds of each call, of rounds in a random order."""
    loops = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        loops[name] = max(1, int(SHORTEST / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times[next(iter(times))]) < 5:
        for name in random.sample(list(calls), len(calls)):
            began = time.perf_counter()
            for _ in range(loops[name]):
                calls[name]()
            times[name].append((time.perf_counter() - began) / loops[name])
    return {name: float(np.median(found)) for name, found in times.items()}


# ---- normalize -----------------------------------------------------------------------


def copies(x: np.ndarray, y: np.ndarray) -> Calls:
    """Read as much as x and write as much as y: the input as often as it takes, and the rest."""
    out = y.reshape(-1).view(np.uint8)
    source = np.resize(x.reshape(-1).view(np.uint8), x.nbytes)
    blank = np.zeros(out.nbytes - source.nbytes, np.uint8) if out.nbytes > source.nbytes else None

    def bound() -> None:
        np.copyto(out[: source.nbytes], source[: out.nbytes])
        if blank is not None:
            out[source.nbytes :].fill(0)

    return {"bound": bound}


def normalizing(shape: tuple[int, ...], dtype: str, layouts: tuple[str, str], to: str) -> Calls:
    x = images(shape, dtype)
    layout, out_layout = layouts
    largest = float(np.iinfo(dtype).max)
    channels = shape[layout.index("C")]
    mean, std = np.resize(MEAN, channels), np.resize(STD, channels)
    axes = [layout.index(letter) for letter in out_layout]
    kind = np.dtype(np.float32) if to == "bfloat16" else np.dtype(to)
    if to == "bfloat16":
        import ml_dtypes

        kind = np.dtype(ml_dtypes.bfloat16)
    y = np.empty([shape[axis] for axis in axes], kind)
    calls = copies(x, y)
    options = {"layout": layout, "out_layout": out_layout, "max_value": largest, "dtype": kind}
    calls["fastbn"] = lambda: fastbn.normalize(x, mean, std, **options, out=y)
    calls["fastbn new"] = lambda: fastbn.normalize(x, mean, std, **options)
    if to != "float32":
        return calls
    along = [-1 if letter == "C" else 1 for letter in layout]
    mean32, std32 = (v.astype(np.float32).reshape(along) for v in (mean, std))
    calls["NumPy"] = lambda: np.copyto(
        y, ((x.astype(np.float32) / np.float32(largest) - mean32) / std32).transpose(axes)
    )
    if layouts == ("NHWC", "NCHW") and dtype == "uint8" and channels == 3:
        if cv2 is not None:
            each = list(x)
            calls["OpenCV"] = lambda: cv2.dnn.blobFromImages(each, 1 / 255, mean=tuple(255 * mean))
        if vision is not None:
            t = torch.from_numpy(x)
            calls["torchvision"] = lambda: vision.normalize(
                vision.to_dtype(t.permute(0, 3, 1, 2), torch.float32, scale=True).contiguous(),
                mean.tolist(), std.tolist(),
            )  # fmt: skip
    return calls


def denormalizing(shape: tuple[int, ...], layouts: tuple[str, str]) -> Calls:
    """The way back: NCHW floats to NHWC bytes."""
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    layout, out_layout = layouts
    axes = [layout.index(letter) for letter in out_layout]
    out = np.empty([shape[axis] for axis in axes], np.uint8)
    mean32, std32 = (v.astype(np.float32).reshape(1, 3, 1, 1) for v in (MEAN, STD))
    calls = copies(x, out)
    calls["fastbn"] = lambda: fastbn.denormalize(
        x, MEAN, STD, layout=layout, out_layout=out_layout, max_value=255.0, out=out
    )
    calls["NumPy"] = lambda: np.copyto(
        out, np.rint((x * std32 + mean32) * 255).clip(0, 255).transpose(axes), casting="unsafe"
    )
    return calls


# ---- statistics ----------------------------------------------------------------------


def summing(shape: tuple[int, ...], dtype: str, layout: str, masked: bool = False) -> Calls:
    x = images(shape, dtype)
    axis = layout.index("C")
    others = tuple(i for i in range(x.ndim) if i != axis)
    words = x.reshape(-1).view(np.uint64)
    calls: Calls = {"bound": lambda: np.bitwise_or.reduce(words)}
    mask = None
    if masked:
        rest = tuple(shape[i] for i in others)
        mask = np.random.default_rng(1).random(rest) < 0.5
    calls["fastbn"] = lambda: fastbn.batch_stats(x, layout=layout, mask=mask)
    if not masked:
        calls["NumPy"] = lambda: (x.mean(others), x.var(others))
    if cv2 is not None and axis == x.ndim - 1 and shape[-1] <= 4:
        plane = x.reshape(-1, shape[-2], shape[-1])
        chosen = None if mask is None else mask.reshape(plane.shape[:2]).astype(np.uint8)
        if dtype != "int8":
            calls["OpenCV"] = lambda: cv2.meanStdDev(plane, mask=chosen)
    return calls


BATCH, IMAGE = (32, 224, 224, 3), (1, 224, 224, 3)


def cases() -> dict[str, Callable[[], Calls]]:
    """Return a maker of the contenders of each case."""
    found: dict[str, Callable[[], Calls]] = {}
    to_planes = ("NHWC", "NCHW")
    for to in ("float32", "float16", "bfloat16", "float64"):
        found[f"normalize uint8 NHWC to {to} NCHW, 32x224x224x3"] = (
            lambda to=to: normalizing(BATCH, "uint8", to_planes, to))  # fmt: skip
    found["the same, one image, float32"] = lambda: normalizing(
        IMAGE, "uint8", to_planes, "float32"
    )
    found["normalize uint16 NHWC to float32 NCHW"] = (
        lambda: normalizing(BATCH, "uint16", to_planes, "float32"))  # fmt: skip
    for layouts in (("NHWC", "NHWC"), ("NCHW", "NCHW"), ("NCHW", "NHWC")):
        shape = BATCH if layouts[0] == "NHWC" else (32, 3, 224, 224)
        found[f"normalize uint8 {layouts[0]} to float32 {layouts[1]}"] = (
            lambda s=shape, v=layouts: normalizing(s, "uint8", v, "float32"))  # fmt: skip
    for channels in (1, 4, 13, 64):
        shape = (32, 224 * 224 * 3 // channels // 64, 64, channels)
        found[f"normalize uint8 NHWC to float32 NCHW, {channels} channels"] = (
            lambda s=shape: normalizing(s, "uint8", to_planes, "float32"))  # fmt: skip
    found["denormalize float32 NCHW to uint8 NHWC"] = (
        lambda: denormalizing((32, 3, 224, 224), ("NCHW", "NHWC")))  # fmt: skip
    for dtype in ("uint8", "int8", "uint16", "int16"):
        found[f"statistics of {dtype}, 32x224x224x3"] = (
            lambda d=dtype: summing(BATCH, d, "NHWC"))  # fmt: skip
    found["the same, uint8, masked"] = lambda: summing(BATCH, "uint8", "NHWC", masked=True)
    found["statistics of uint8, one image"] = lambda: summing(IMAGE, "uint8", "NHWC")
    for channels in (1, 4, 13, 64):
        rows = 32 * 224 * 224 * 3 // channels // 64 // 8 * 8
        found[f"statistics of uint8 rows, {channels} channels"] = (
            lambda s=(rows, 64, channels): summing(s, "uint8", "HWC"))  # fmt: skip
        found[f"statistics of uint8 planes, {channels} channels"] = (
            lambda s=(32, channels, rows // 32, 64): summing(s, "uint8", "NCHW"))  # fmt: skip
    return found


def row(name: str, seconds: dict[str, float]) -> str:
    """Return a line of the table: the bound's time, fastbn's ratio to it, the peers' to fastbn."""
    ours = seconds["fastbn"]
    cells = [name, f"{1e3 * seconds['bound']:.3f}", f"{ours / seconds['bound']:.2f}"]
    for peer in ("fastbn new", "OpenCV", "torchvision", "NumPy"):
        cells.append(f"{seconds[peer] / ours:.2f}" if peer in seconds else "")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.images", description=__doc__)
    parser.add_argument("--budget", type=float, default=1.5, help="seconds for each case, about")
    parser.add_argument("--filter", default="", help="only cases with these words")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    arguments = parser.parse_args()
    lines = [f"{key}: {value}  " for key, value in machine().items()]
    lines += [command("benchmarks.images"), ""]
    print("\n".join(lines))
    for threads in arguments.threads:
        fastbn.set_num_threads(threads)
        if cv2 is not None:
            cv2.setNumThreads(threads)
        if torch is not None:
            torch.set_num_threads(threads)
        head = [f"## {threads} threads", "",
                "| case | bound, ms | fastbn / bound | new / fastbn | OpenCV / fastbn | "
                "torchvision / fastbn | NumPy / fastbn |", "| --- |" + " --- |" * 6]  # fmt: skip
        print("\n".join(head))
        lines += head
        for name, make in cases().items():
            if arguments.filter in name:
                lines.append(row(name, race(make(), arguments.budget)))
                print(lines[-1], flush=True)
        lines.append("")
        print()
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "images.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
