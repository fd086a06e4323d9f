# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm by slices of the batch, each with statistics of its own: one call for each.

Ghost batch norm: Hoffer, Hubara & Soudry 2017, algorithm 1. With an exchange the batch is that
of all ranks, one after another. May cut tensors into slices. May not compute with their
elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fastbn._numpy import CHECKED, INPUT, MOVED, binding
from fastbn.functional.counted import Counted
from fastbn.functional.rounding import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Vector
    from fastbn.sync._exchange import Exchange


def check_size(ghost_batch_size: SupportsIndex | None) -> int | None:
    """Return `ghost_batch_size` as an int, or None; or raise."""
    if ghost_batch_size is None:
        return None
    size = binding.check_integer(ghost_batch_size, "ghost_batch_size")
    if size < 1:
        raise ValueError(f"ghost_batch_size: expected at least 1, got {ghost_batch_size}")
    return size


def _values_of(x: NDArray, layout: str | None, counted: Counted) -> NDArray[np.int64]:
    # How many values of a channel each instance has, of those that count.
    instances, channels = binding.axis_of_instances(layout), binding.axis_of_channels(layout, x)
    shape = [length for axis, length in enumerate(x.shape) if axis != channels]
    axis = instances - (instances > channels)
    if counted.mask is None:
        return np.full(shape[axis], math.prod(shape[:axis] + shape[axis + 1 :]))
    others = tuple(i for i in range(len(shape)) if i != axis)
    return np.count_nonzero(np.broadcast_to(counted.mask, shape), others)


def _cut(
    x: NDArray, layout: str | None, size: int, counted: Counted, exchange: Exchange | None
) -> list[tuple[tuple[slice, ...], Counted]]:
    """Return the slices of x along its instances, and what counts of each; or raise.

    Of a part of a batch, they are what it has of the slices of the whole.
    """
    axis, channels = binding.axis_of_instances(layout), binding.axis_of_channels(layout, x)
    counted = counted.as_mask(x, layout)
    own = values = _values_of(x, layout, counted)
    before = 0
    if exchange is not None:
        ranks = exchange.instances(x.shape[channels], own.astype(np.float64))
        values = np.concatenate(ranks).astype(np.int64)
        before = sum(map(len, ranks[: exchange.group.rank]))
    slices = []
    for start in range(0, len(values), size):
        stop = min(start + size, len(values))
        if values[start:stop].sum() == 1:
            raise ValueError(
                "ghost_batch_size: expected slices of more than one value per channel, got "
                f"{size}, with one value in instances {start} to {stop - 1} of {len(values)}"
            )
        part = slice(*(min(max(i - before, 0), len(own)) for i in (start, stop)))
        counts = counted.of_instances(part, axis - (axis > channels))
        slices.append(((*[slice(None)] * axis, part), counts))
    return slices


def _each(exchange: Exchange | None, compute: Callable[[Exchange | None], Any]) -> Any:
    # One slice, of all ranks.
    return compute(None) if exchange is None else exchange.again(compute)


@contextmanager
def unmoved_on_error(*arrays: NDArray | None) -> Iterator[None]:
    """Put back what was in the arrays, if the slices are not all done."""
    before = [None if array is None else array.copy() for array in arrays]
    try:
        yield
    except BaseException:
        for array, old in zip(arrays, before, strict=True):
            if array is not None and old is not None:
                array[...] = old
        raise


def forward(
    x: NDArray[Floating],
    residual: NDArray[Floating] | None,
    y: NDArray[Floating],
    layout: str | None,
    size: int,
    normalise: Callable[[NDArray, NDArray | None, NDArray, Counted, Exchange | None], tuple],
    counted: Counted,
    exchange: Exchange | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Return y and the statistics of the slices, once each of them was normalised."""
    slices = _cut(x, layout, size, counted, exchange)
    mean, invstd = np.empty((2, len(slices), binding.count_channels(x, layout, "x")))
    for i, (part, counts) in enumerate(slices):
        residuals = None if residual is None else residual[part]
        _, mean[i], invstd[i] = _each(
            exchange, partial(normalise, x[part], residuals, y[part], counts)
        )
    return y, mean, invstd


def backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None,
    bias: Vector | None,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    layout: str | None,
    activation: Activation | None,
    negative_slope: float,
    size: int,
    counted: Counted,
    exchange: Exchange | None = None,
) -> Gradients[Floating]:
    """Return the gradients; those of parameters are summed in float64, slice after slice."""
    channels = binding.count_channels(x, layout, "x")
    options = (True, layout, activation, negative_slope, INPUT)
    one = np.zeros(channels)
    dx, dweight, dbias, *rest = binding.batch_backward(
        dy, x, one, one, weight, bias, residual, out, *options, counted, None, CHECKED, exchange
    )
    binding.check_apart(out, mean, "mean")
    binding.check_apart(out, invstd, "invstd")
    slices = _cut(x, layout, size, counted, exchange)

    def check_tables() -> None:
        for name, table in ("mean", mean), ("invstd", invstd):
            binding.check_parameter(table, name, (len(slices), channels))

    def gradients_of(
        i: int, part: tuple[slice, ...], counts: Counted, exchange: Exchange | None
    ) -> Any:
        check_tables()  # here, where the other ranks hear of what is wrong
        residuals = (None, None) if residual is None else (residual[part], rest[0][part])
        return binding.batch_backward(
            dy[part], x[part], mean[i], invstd[i], weight, bias, residuals[0], dx[part],
            *options, counts, residuals[1], MOVED, exchange, x.nbytes
        )  # fmt: skip

    if not slices:
        check_tables()
    sums = np.zeros((2, channels))
    for i, (part, counts) in enumerate(slices):
        _, *gradients = _each(exchange, partial(gradients_of, i, part, counts))
        with np.errstate(all="ignore"):
            sums += gradients[:2]
    with np.errstate(all="ignore"):
        return (dx, rounded(sums[0], dweight.dtype), rounded(sums[1], dbias.dtype), *rest)
