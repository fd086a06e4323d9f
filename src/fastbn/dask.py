# SPDX-License-Identifier: BSD-3-Clause
"""Statistics and normalisation of Dask arrays (``pip install "fastbn[dask]"``).

Blocks are counted where they are; what travels are statistics, merged as a tree in the order
of the blocks. The arithmetic is fastbn's functions on NumPy arrays.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

import fastbn
from fastbn._numpy import binding
from fastbn.data._libraries import library
from fastbn.data.scan import Counted, nothing_of, spread
from fastbn.data.sources import channel_axis, letters
from fastbn.functional.selection import checked_policy
from fastbn.stats import BatchStats

__all__ = ["batch_stats", "normalize"]

# How many statistics a node of the tree merges.
_SPLIT = 16


def _checked(array: Any, layout: str | None) -> int:
    """Return the axis of the channels of a Dask array, or raise."""
    dask_array = library("dask.array", "dask")
    if not isinstance(array, dask_array.Array):
        raise TypeError(f"array: expected a dask.array.Array, got {type(array).__name__}")
    binding.check_layout(layout)
    axis = channel_axis(layout, array.shape)
    if any(np.isnan(chunk) for chunk in array.chunks[axis]):
        raise ValueError("array: expected chunks of known lengths along the channels")
    return axis


def _block_stats(
    block: Any, layout: str, nan_policy: str, nodata: Any, where: slice, channels: int
) -> BatchStats:  # fmt: skip
    block = np.asarray(block)
    stats = fastbn.batch_stats(block, layout=layout, nan_policy=nan_policy, nodata=nodata)
    if where == slice(0, channels):
        return stats
    return spread(stats, where, channels)


def _merged(parts: list[BatchStats]) -> BatchStats:
    return BatchStats.merge(parts)


def _of_nothing(layout: str, dtype: Any, channels: int, axis: int) -> BatchStats:
    shape = [0] * len(layout)
    shape[axis] = channels
    stats = fastbn.batch_stats(np.empty(shape, dtype), layout=layout)
    return nothing_of(Counted(stats, np.zeros(channels))).stats


def batch_stats(
    array: Any,
    *,
    layout: str | None = None,
    nan_policy: str = "propagate",
    nodata: Any = None,
    compute: bool = True,
) -> Any:
    """Return the statistics of each channel of a Dask array.

    Parameters
    ----------
    array : dask.array.Array
        Of a type that `fastbn.batch_stats` takes.
    layout, nan_policy, nodata
        As for `fastbn.batch_stats`.
    compute : bool, default True
        Otherwise a Delayed of the statistics is returned.

    Returns
    -------
    BatchStats or dask.delayed.Delayed
        Of integers the bits are those of `fastbn.batch_stats`, whatever the chunks are.

    Raises
    ------
    TypeError, ValueError
        As `fastbn.batch_stats`, and for what is no Dask array.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.arange(12, chunks=4, dtype="uint8").reshape(6, 2)
    >>> fastbn.dask.batch_stats(x).mean
    array([5., 6.])
    """
    axis = _checked(array, layout)
    checked_policy(nan_policy)
    delayed = library("dask", "dask").delayed
    channels, named = array.shape[axis], letters(array.ndim, axis)
    starts = np.concatenate(([0], np.cumsum(array.chunks[axis]))).tolist()
    count, merge = delayed(_block_stats, pure=True), delayed(_merged, pure=True)
    blocks = array.to_delayed()
    parts = []
    for place in itertools.product(*map(range, blocks.shape)):
        where = slice(*starts[place[axis] : place[axis] + 2])
        own = list(nodata)[where] if np.ndim(nodata) else nodata
        parts.append(count(blocks[place], named, nan_policy, own, where, channels))
    if not parts:
        parts = [delayed(_of_nothing)(named, array.dtype, channels, axis)]
    while len(parts) > 1:
        parts = [merge(parts[i : i + _SPLIT]) for i in range(0, len(parts), _SPLIT)]
    return parts[0].compute() if compute else parts[0]


def _block_normalize(block: Any, mean: Any, std: Any, options: dict[str, Any]) -> Any:
    return fastbn.normalize(np.asarray(block), np.asarray(mean), np.asarray(std), **options)


def normalize(
    array: Any,
    mean: Any,
    std: Any,
    *,
    layout: str | None = None,
    out_layout: str | None = None,
    max_value: float = 1.0,
    dtype: Any = "float32",
) -> Any:
    """Return a Dask array normalised, ``(x / max_value - mean) / std``, block by block.

    Parameters
    ----------
    array : dask.array.Array
        Of a type that `fastbn.normalize` takes.
    mean, std, layout, out_layout, max_value, dtype
        As for `fastbn.normalize`.

    Returns
    -------
    dask.array.Array
        Not computed; its chunks are those of `array`.

    Raises
    ------
    TypeError, ValueError
        As `fastbn.normalize`, at once; and for what is no Dask array.

    Examples
    --------
    >>> import dask.array as da, fastbn.dask
    >>> x = da.arange(12, chunks=4, dtype="uint8").reshape(6, 2)
    >>> fastbn.dask.normalize(x, [5.0, 6.0], 2.0)[0].compute()
    array([-2.5, -2.5], dtype=float32)
    """
    axis = _checked(array, layout)
    dask_array = library("dask.array", "dask")
    channels = array.shape[axis]
    shape = [0 if i != axis else channels for i in range(array.ndim)]
    options: dict[str, Any] = {"layout": layout, "out_layout": out_layout, "max_value": max_value}
    y = fastbn.normalize(np.empty(shape, array.dtype), mean, std, dtype=dtype, **options)
    named = layout if layout is not None and layout != "N...C" else letters(array.ndim, axis)
    options = {"layout": named, "out_layout": out_layout or named, "max_value": max_value,
               "dtype": y.dtype}  # fmt: skip
    numbers = [
        dask_array.from_array(
            np.broadcast_to(np.asarray(value, np.float64), (channels,)),
            chunks=(array.chunks[axis],),
        )
        for value in (mean, std)
    ]
    return dask_array.blockwise(
        _block_normalize, options["out_layout"], array, named,
        numbers[0], "C", numbers[1], "C",
        options=options, dtype=y.dtype, meta=np.empty((0,) * array.ndim, y.dtype),
    )  # fmt: skip
