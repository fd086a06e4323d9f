# SPDX-License-Identifier: BSD-3-Clause
"""The grid: shapes of real networks, layouts, operations; and the arrays of a case."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

import fastbn

OPERATIONS = ("inference", "training", "backward")
LAYOUTS = ("NCHW", "NHWC")
DTYPES = ("float32", "float64")
EPS, MOMENTUM = 1e-5, 0.1
SMALL = 512 << 10  # bytes; below, a call's overhead counts

# (N, C, spatial sizes). Where a network has dozens of layers, its kinds of shapes.
NETWORKS: dict[str, list[tuple[int, ...]]] = {
    "ResNet-50": [
        (32, 64, 112, 112), (32, 64, 56, 56), (32, 256, 56, 56), (32, 128, 28, 28),
        (32, 512, 28, 28), (32, 256, 14, 14), (32, 1024, 14, 14), (32, 512, 7, 7),
        (32, 2048, 7, 7),
    ],
    "ResNet-50, one image": [
        (1, 64, 112, 112), (1, 64, 56, 56), (1, 512, 28, 28), (1, 256, 14, 14), (1, 2048, 7, 7),
    ],
    "MobileNetV2": [
        (32, 32, 112, 112), (32, 96, 112, 112), (32, 144, 56, 56), (32, 192, 28, 28),
        (32, 384, 14, 14), (32, 960, 7, 7), (32, 1280, 7, 7),
    ],
    "DenseNet-121": [(16, 128, 56, 56), (16, 32, 28, 28), (16, 352, 14, 14), (16, 1024, 7, 7)],
    "U-Net": [(4, 64, 256, 256), (4, 128, 128, 128), (4, 512, 32, 32), (1, 64, 572, 572)],
    "3-D network": [(2, 32, 16, 112, 112), (2, 128, 8, 28, 28), (4, 16, 32, 32, 32)],
    "CIFAR ResNet-20": [(128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8)],
    "MLP": [(64, 1024), (256, 4096), (1024, 256), (128, 100)],
    "sequences": [(32, 64, 1000), (16, 512, 200)],
    "odd": [
        (16, 3, 224, 224), (32, 1, 28, 28), (8, 17, 33, 35), (8, 100, 14, 14), (32, 512, 1, 1),
        (64, 2048, 1, 1),
    ],
    "extremes": [(1, 8, 4, 4), (2, 16, 8, 8), (32, 64, 224, 224)],
}  # fmt: skip
QUICK = {
    (32, 64, 112, 112), (32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (1, 64, 56, 56),
    (256, 4096), (16, 3, 224, 224), (1, 8, 4, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operation on one tensor. `shape` is (N, C, ...) whatever the layout."""

    network: str
    shape: tuple[int, ...]
    layout: str
    op: str
    dtype: str
    threads: int

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape as it lies in memory."""
        n, c, *space = self.shape
        return (n, c, *space) if self.layout == "NCHW" else (n, *space, c)

    @property
    def nbytes(self) -> int:
        """The size of x."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def name(self) -> str:
        """The case in a few words."""
        return f"{'x'.join(map(str, self.shape))} {self.layout} {self.dtype} {self.op}"


def grid(
    quick: bool, ops: Iterable[str], layouts: Iterable[str], dtypes: Iterable[str],
    shapes: str, threads: int,
) -> Iterator[Case]:  # fmt: skip
    """Yield the cases; `shapes` is a part of a network's name or of "32x64x7x7"."""
    chosen = [
        (network, shape)
        for network, members in NETWORKS.items()
        for shape in members
        if (not quick or shape in QUICK)
        and shapes.lower() in f"{network} {'x'.join(map(str, shape))}".lower()
    ]
    for (network, shape), layout, dtype, op in itertools.product(chosen, layouts, dtypes, ops):
        same_in_both = len(shape) == 2 or set(shape[2:]) == {1} or shape[1] == 1
        if layout == "NCHW" or not same_in_both:
            yield Case(network, shape, layout, op, dtype, threads)


class Arrays:
    """What the contenders of a case work on. All of them write to the same `y`."""

    def __init__(self, case: Case):
        rng = np.random.default_rng(0)
        dtype, channels = np.dtype(case.dtype), case.shape[1]
        self.case = case
        self.x = rng.standard_normal(case.stored, dtype=dtype)
        self.x += 1
        self.dy = rng.standard_normal(case.stored, dtype=dtype)
        self.y = np.empty_like(self.x)
        self.weight = rng.uniform(0.5, 1.5, channels).astype(dtype)
        self.bias = rng.standard_normal(channels).astype(dtype)
        self.running_mean = np.ones(channels, dtype)
        self.running_var = np.ones(channels, dtype)

    def fit(self, case: Case) -> bool:
        """Is `case` an operation on the same tensor?"""
        return replace(case, op=self.case.op) == self.case

    def of(self, case: Case) -> Arrays:
        """Return the same arrays for another operation."""
        other = copy(self)
        other.case = case
        return other

    @property
    def channel_axis(self) -> int:
        """The axis of the channels, as x is stored."""
        return 1 if self.case.layout == "NCHW" else self.x.ndim - 1

    @property
    def fastbn_layout(self) -> str | None:
        """What fastbn calls the layout, at any rank."""
        return None if self.case.layout == "NCHW" else "N...C"

    @property
    def reduced(self) -> tuple[int, ...]:
        """All other axes."""
        return tuple(axis for axis in range(self.x.ndim) if axis != self.channel_axis)

    def along(self, vector: np.ndarray) -> np.ndarray:
        """Return `vector` in a shape that broadcasts along the channels."""
        shape = [1] * self.x.ndim
        shape[self.channel_axis] = -1
        return vector.reshape(shape)

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of each channel in float64."""
        stats = fastbn.batch_stats(self.x, layout=self.fastbn_layout)
        return stats.mean, stats.var()

    def exact(self, channels: slice) -> np.ndarray:
        """Return the result for some channels, channels first, in wider numbers than x's."""
        op = self.case.op
        wide = np.float64 if self.case.dtype == "float32" else np.longdouble
        x, dy = (
            np.moveaxis(a, self.channel_axis, 0)[channels].astype(wide, order="C")
            for a in (self.x, self.dy)
        )
        axes = tuple(range(1, x.ndim))
        column = (slice(None), *[None] * len(axes))
        weight, bias, mean, var = (
            a[channels].astype(wide)[column]
            for a in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        if op != "inference":
            mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        invstd = 1 / np.sqrt(var + EPS)
        xhat = (x - mean) * invstd
        if op != "backward":
            return xhat * weight + bias
        centred = dy - dy.mean(axes, keepdims=True)
        return weight * invstd * (centred - xhat * (dy * xhat).mean(axes, keepdims=True))

    def error(self, result: np.ndarray) -> float:
        """Return the largest error of `result`, stored like x, in the first channels."""
        some = slice(0, 4)
        found = np.moveaxis(result, self.channel_axis, 0)[some]
        return float(np.abs(found - self.exact(some)).max())
