# SPDX-License-Identifier: BSD-3-Clause
"""The grid: norms, shapes of real networks, layouts, operations; and the arrays of a case."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import ml_dtypes  # noqa: F401  NumPy knows "bfloat16" from here.
import numpy as np

OPERATIONS = ("inference", "training", "forward", "backward")
EPS, MOMENTUM = 1e-5, 0.1
SMALL = 512 << 10  # bytes; below, a call's overhead counts
MOST_GROUPS = 32
LARGEST_ROWS = 300e6  # bytes; larger tensors of rows are left out

Shapes = dict[str, list[tuple[int, ...]]]

# (N, C, spatial sizes). Where a network has dozens of layers, its kinds of shapes.
NETWORKS: Shapes = {
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
# Where batches are too small for batch norm, or an image has a style of its own.
IMAGES: Shapes = {
    "ResNet-50": [(32, 64, 112, 112), (32, 256, 56, 56), (32, 512, 28, 28), (32, 2048, 7, 7)],
    "U-Net": [(4, 64, 256, 256), (4, 128, 128, 128), (4, 512, 32, 32)],
    "diffusion": [(2, 320, 64, 64), (2, 1280, 16, 16), (1, 128, 512, 512)],
    "style transfer": [(4, 32, 256, 256), (4, 128, 64, 64)],
    "3-D U-Net": [(2, 32, 64, 64, 64)],
    "small": [(1, 8, 4, 4)],
}  # fmt: skip
# (rows, features). Rows: a token, sentences, batches of them.
TRANSFORMERS: Shapes = {
    "768, BERT": [(rows, 768) for rows in (1, 16, 128, 1024, 16384)],
    "1024, GPT-2": [(rows, 1024) for rows in (1, 16, 128, 1024, 16384)],
    "4096, Llama 8B": [(rows, 4096) for rows in (1, 16, 128, 1024, 16384)],
    "8192, Llama 70B": [(rows, 8192) for rows in (1, 16, 128, 1024, 4096)],
    "64, heads": [(10, 64)],
}


@dataclass(frozen=True)
class Norm:
    """One kind of normalisation: what is raced of it."""

    ops: tuple[str, ...]
    layouts: tuple[str, ...]
    networks: Shapes
    quick: tuple[tuple[int, ...], ...]  # the shapes of --quick, in half precision the first only


QUICK_IMAGES = (2, 1280, 16, 16), (4, 128, 64, 64)
QUICK_ROWS = (1024, 1024), (16, 4096)
NORMS = {
    "batch": Norm(
        ("inference", "training", "backward"), ("NCHW", "NHWC"), NETWORKS,
        ((32, 64, 56, 56), (32, 512, 7, 7), (1, 64, 56, 56), (256, 4096), (1, 8, 4, 4)),
    ),
    "layer": Norm(("forward", "backward"), ("rows",), TRANSFORMERS, QUICK_ROWS),
    "rms": Norm(("forward", "backward"), ("rows",), TRANSFORMERS, QUICK_ROWS),
    "group": Norm(("forward", "backward"), ("NCHW", "NHWC"), IMAGES, QUICK_IMAGES),
    "instance": Norm(("forward", "backward"), ("NCHW", "NHWC"), IMAGES, QUICK_IMAGES),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operation on one tensor. `shape` is (N, C, ...) whatever the layout.

    Every norm sees it as N images of G groups of C channels of S places, a row of
    features as one group with one place; `order` has these letters as x is stored.
    """

    norm: str
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
        return (n, *space, c) if self.layout == "NHWC" else (n, c, *space)

    @property
    def groups(self) -> int:
        """How many groups of an image have statistics of their own (batch: through all images)."""
        channels = self.shape[1]
        if self.layout == "rows":
            return 1
        if self.norm == "group":
            return max(groups for groups in range(1, MOST_GROUPS + 1) if channels % groups == 0)
        return channels

    @property
    def order(self) -> str:
        """The axes of `split`."""
        return "NSGC" if self.layout == "NHWC" else "NGCS"

    @property
    def split(self) -> tuple[int, ...]:
        """The shape in which each axis has one meaning."""
        n, channels, *space = self.shape
        sizes = {"N": n, "G": self.groups, "C": channels // self.groups, "S": int(np.prod(space))}
        return tuple(sizes[letter] for letter in self.order)

    def axes(self, letters: str) -> tuple[int, ...]:
        """Return which axes of `split` these are."""
        return tuple(axis for axis, letter in enumerate(self.order) if letter in letters)

    @property
    def reduced(self) -> str:
        """What statistics are taken over."""
        return "NCS" if self.norm == "batch" else "CS"

    @property
    def both(self) -> str:
        """What statistics and the gradients of weight and bias are both taken over."""
        return "NS" if self.norm == "batch" else "S"

    @property
    def centred(self) -> bool:
        """Is the mean subtracted?"""
        return self.norm != "rms"

    @property
    def half(self) -> bool:
        """Is it a dtype of 16 bits?"""
        return np.dtype(self.dtype).itemsize == 2

    @property
    def rows(self) -> bool:
        """Are neighbouring elements of different channels, or features of a row?"""
        return self.layout != "NCHW" or len(self.shape) == 2 or set(self.shape[2:]) == {1}

    @property
    def nbytes(self) -> int:
        """The size of x."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def name(self) -> str:
        """The case in a few words."""
        shape = "x".join(map(str, self.shape))
        return f"{self.norm} {shape} {self.layout} {self.dtype} {self.op}"


def grid(
    quick: bool, norms: Iterable[str], ops: Iterable[str], layouts: Iterable[str],
    dtypes: Iterable[str], shapes: str, threads: int,
) -> Iterator[Case]:  # fmt: skip
    """Yield the cases; `shapes` is a part of a network's name or of "32x64x7x7"."""
    for name in norms:
        norm = NORMS[name]
        chosen = [
            (network, shape)
            for network, members in norm.networks.items()
            for shape in members
            if shapes.lower() in f"{network} {'x'.join(map(str, shape))}".lower()
        ]
        for (network, shape), layout, dtype, op in itertools.product(
            chosen, norm.layouts, dtypes, norm.ops
        ):
            case = Case(name, network, shape, layout, op, dtype, threads)
            same_in_both = len(shape) == 2 or set(shape[2:]) == {1} or shape[1] == 1
            if (
                layout in layouts
                and op in ops
                and not (layout == "NHWC" and same_in_both)
                and not (layout == "rows" and case.nbytes > LARGEST_ROWS)
                and (not quick or shape in norm.quick[: 1 if case.half else None])
            ):
                yield case


class Arrays:
    """What the contenders of a case work on. All of them write to the same `y`.

    Beside x of 16 bits the vectors are float32, as in mixed precision, but of values that
    such numbers have: who needs them in x's dtype computes the same.
    """

    def __init__(self, case: Case):
        rng = np.random.default_rng(0)
        dtype, channels = np.dtype(case.dtype), case.shape[1]
        self.case = case
        self.kept = np.promote_types(dtype, np.float32)
        self.x = rng.standard_normal(case.stored, dtype=self.kept)
        self.x += 1
        self.x = self.x.astype(dtype, copy=False)
        self.dy = rng.standard_normal(case.stored, dtype=self.kept).astype(dtype, copy=False)
        self.y = np.empty_like(self.x)
        self.weight = rng.uniform(0.5, 1.5, channels).astype(dtype).astype(self.kept)
        self.bias = rng.standard_normal(channels).astype(dtype).astype(self.kept)
        self.running_mean = np.ones(channels, self.kept)
        self.running_var = np.ones(channels, self.kept)

    def fit(self, case: Case) -> bool:
        """Is `case` an operation on the same tensor?"""
        return replace(case, op=self.case.op) == self.case

    def of(self, case: Case) -> Arrays:
        """Return the same arrays for another operation."""
        other = copy(self)
        other.case = case
        vars(other).pop("exact", None)
        return other

    def split(self, stored: np.ndarray) -> np.ndarray:
        """Return an array stored like x with the axes of `case.order`."""
        return stored.reshape(self.case.split)

    def along(self, vector: np.ndarray) -> np.ndarray:
        """Return `vector` in a shape that broadcasts along the groups' channels."""
        case = self.case
        sizes = zip(case.order, case.split, strict=True)
        return vector.reshape([size if letter in "GC" else 1 for letter, size in sizes])

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (0 for rms) and variance in float64, broadcasting along `split`."""
        x, axes = self.split(self.x), self.case.axes(self.case.reduced)
        mean = x.mean(axes, dtype=np.float64, keepdims=True) * self.case.centred
        squares = x - mean
        np.square(squares, out=squares)
        return mean, squares.mean(axes, keepdims=True)

    def part(self, split: np.ndarray) -> np.ndarray:
        """Return a part with all that was reduced together, in a wider type, as (N, G, C, S)."""
        in_order = split.transpose([self.case.order.index(letter) for letter in "NGCS"])
        images = slice(None) if "N" in self.case.reduced else slice(16)
        wide = np.longdouble if self.case.dtype == "float64" else np.float64
        return in_order[images, :4].astype(wide, order="C")

    @cached_property
    def exact(self) -> np.ndarray:
        """The part of the result, computed from the parts of the input."""
        case = self.case
        x, dy = (self.part(self.split(a)) for a in (self.x, self.dy))
        weight, bias, mean, var = (
            self.part(self.along(v))
            for v in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        axes = tuple("NGCS".index(letter) for letter in case.reduced)
        if case.op != "inference":
            mean = x.mean(axes, keepdims=True) * case.centred
            var = np.square(x - mean).mean(axes, keepdims=True)
        invstd = 1 / np.sqrt(var + EPS)
        xhat = (x - mean) * invstd
        if case.op != "backward":
            return xhat * weight + bias * case.centred
        dxhat = dy * weight
        dmean = dxhat.mean(axes, keepdims=True) * case.centred
        return invstd * (dxhat - dmean - xhat * (dxhat * xhat).mean(axes, keepdims=True))

    def error(self, result: np.ndarray) -> float:
        """Return the largest error of the part of `result`, which is stored like x."""
        return float(np.abs(self.part(self.split(result)) - self.exact).max())
