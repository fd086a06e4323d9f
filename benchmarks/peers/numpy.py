# SPDX-License-Identifier: BSD-3-Clause
"""The formula, with existing arrays for everything large; for 16 bits in float32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.cases import EPS, MOMENTUM, OPERATIONS, Arrays
from benchmarks.contenders import Contender, python_calls


def contenders(a: Arrays) -> Iterator[Contender]:
    case = a.case
    x, dy, y = (a.split(v) for v in (a.x, a.dy, a.y))
    if case.half:
        x, dy, y = (np.empty(case.split, a.kept) for _ in range(3))
    scratch = np.empty(case.split, a.kept)
    weight, bias, running_mean, running_var = (
        a.along(v) for v in (a.weight, a.bias, a.running_mean, a.running_var)
    )
    reduced, summed, both = (case.axes(letters) for letters in (case.reduced, "NS", case.both))
    count = int(np.prod([case.split[axis] for axis in reduced]))
    if case.op == "backward":
        mean, var = (v.astype(a.kept) for v in a.moments)
        invstd = 1 / np.sqrt(var + EPS)

    def scaled(array: np.ndarray, invstd: np.ndarray) -> None:
        if case.layout == "rows":  # the product of invstd and weight would be as large as y
            np.multiply(array, invstd, out=y)
            np.multiply(y, weight, out=y)
        else:
            np.multiply(array, invstd * weight, out=y)

    def inference() -> None:
        scale = weight / np.sqrt(running_var + EPS)
        np.multiply(x, scale, out=y)
        np.add(y, bias - running_mean * scale, out=y)

    def sums(array: np.ndarray) -> np.ndarray:
        return array if case.layout == "rows" else array.sum(both, keepdims=True)

    def forward() -> tuple[np.ndarray | None, np.ndarray]:
        mean = sums(x).sum(reduced, keepdims=True) / count if case.centred else None
        centred = np.subtract(x, mean, out=y) if case.centred else x
        var = sums(np.square(centred, out=scratch)).sum(reduced, keepdims=True) / count
        scaled(centred, 1 / np.sqrt(var + EPS))
        if case.centred:
            np.add(y, bias, out=y)
        return mean, var

    def training() -> None:
        mean, var = forward()
        running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * var * count / (count - 1)

    def gradient(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return dweight or dbias, and the mean that dx needs."""
        parts = sums(array)
        mean = (parts * weight).sum(reduced, keepdims=True) / count
        return parts.sum(summed), mean * invstd

    def backward() -> list[np.ndarray]:
        centred = np.subtract(x, mean, out=scratch) if case.centred else x
        xhat = np.multiply(centred, invstd, out=scratch)
        dweight, slope = gradient(np.multiply(dy, xhat, out=y))
        np.multiply(xhat, slope, out=xhat)
        scaled(dy, invstd)
        np.subtract(y, xhat, out=y)
        if not case.centred:
            return [dweight]
        dbias, level = gradient(dy)
        np.subtract(y, level, out=y)
        return [dweight, dbias]

    operation = (inference, training, forward, backward)[OPERATIONS.index(case.op)]

    def converted() -> None:
        np.copyto(x, a.split(a.x))
        if case.op == "backward":
            np.copyto(dy, a.split(a.dy))
        operation()
        np.copyto(a.split(a.y), y)

    function = converted if case.half else operation
    yield Contender("NumPy", "peer", python_calls(function), lambda: a.y)
