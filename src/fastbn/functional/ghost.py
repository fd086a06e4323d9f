# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm by slices of the batch, each with statistics of its own: one call for each.

Ghost batch norm: Hoffer, Hubara & Soudry 2017, algorithm 1. May cut tensors into slices. May
not compute with their elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from fastbn._numpy import CHECKED, INPUT, binding
from fastbn.functional.counted import ALL, Counted
from fastbn.functional.rounding import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Vector


def check_size(ghost_batch_size: SupportsIndex | None) -> int | None:
    """Return `ghost_batch_size` as an int, or None; or raise."""
    if ghost_batch_size is None:
        return None
    size = binding.check_integer(ghost_batch_size, "ghost_batch_size")
    if size < 1:
        raise ValueError(f"ghost_batch_size: expected at least 1, got {ghost_batch_size}")
    return size


def slices_of(x: NDArray, layout: str | None, size: int) -> list[tuple[slice, ...]]:
    """Return the slices of x along its instances; raise if one has one value per channel."""
    axis = binding.axis_of_instances(layout)
    instances = x.shape[axis]
    slices = [
        (*[slice(None)] * axis, slice(start, min(start + size, instances)))
        for start in range(0, instances, size)
    ]
    channels = binding.count_channels(x, layout, "x")
    if slices and x.size:
        least = min(size, instances, instances % size or size)
        if x.size // (channels * instances) * least == 1:
            raise ValueError(
                "ghost_batch_size: expected slices of more than one value per channel, got "
                f"{size} for x of shape {x.shape}, which leaves a slice of one"
            )
    return slices


def counted_slices(
    x: NDArray, layout: str | None, slices: list[tuple[slice, ...]], counted: Counted
) -> list[Counted]:
    """Return what counts of each slice; raise if it is one value per channel."""
    whole = counted.as_mask(x, layout)
    if whole.mask is None:
        return [ALL] * len(slices)
    instances, channels = binding.axis_of_instances(layout), binding.axis_of_channels(layout, x)
    parts = [whole.of_instances(part[-1], instances - (instances > channels)) for part in slices]
    shape = list(x.shape)
    del shape[channels]
    for part, counts in zip(slices, parts, strict=True):
        assert counts.mask is not None
        shape[instances - (instances > channels)] = part[-1].stop - part[-1].start
        if np.count_nonzero(np.broadcast_to(counts.mask, shape)) == 1:
            raise ValueError(
                "ghost_batch_size: expected slices of more than one value per channel, got "
                f"{part[-1]} of x of shape {x.shape}, of which one value counts"
            )
    return parts


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
    normalise: Callable[[NDArray, NDArray | None, NDArray, Counted], tuple],
    counted: Counted,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Return y and the statistics of the slices: `normalise(x, residual, out, counted)` of each."""
    slices = slices_of(x, layout, size)
    counts = counted_slices(x, layout, slices, counted)
    mean, invstd = np.empty((2, len(slices), binding.count_channels(x, layout, "x")))
    for i, part in enumerate(slices):
        residuals = None if residual is None else residual[part]
        _, mean[i], invstd[i] = normalise(x[part], residuals, y[part], counts[i])
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
) -> Gradients[Floating]:
    """Return the gradients; those of parameters are summed in float64, slice after slice."""
    channels = binding.count_channels(x, layout, "x")
    slices = slices_of(x, layout, size)
    shape = (len(slices), channels)
    for name, table in ("mean", mean), ("invstd", invstd):
        binding.check_parameter(table, name, shape)
        binding.check_apart(out, table, name)
    options = (True, layout, activation, negative_slope, INPUT)
    one = np.zeros(channels)
    dx, dweight, dbias, *rest = binding.batch_backward(
        dy, x, one, one, weight, bias, residual, out, *options, counted, None, CHECKED
    )
    counts = counted_slices(x, layout, slices, counted)
    sums = np.zeros((2, channels))
    for i, part in enumerate(slices):
        residuals = (None, None) if residual is None else (residual[part], rest[0][part])
        _, *gradients = binding.batch_backward(
            dy[part], x[part], mean[i], invstd[i], weight, bias, residuals[0], dx[part],
            *options, counts[i], residuals[1]
        )  # fmt: skip
        with np.errstate(all="ignore"):
            sums += gradients[:2]
    with np.errstate(all="ignore"):
        return (dx, rounded(sums[0], dweight.dtype), rounded(sums[1], dbias.dtype), *rest)
