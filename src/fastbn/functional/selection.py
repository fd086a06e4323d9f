# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of what is left of a batch: without what a mask, `nodata` or NaN leaves out.

The engine leaves out what a mask does. A channel of floats that has NaN or `nodata` besides is
copied without them and summed alone; the others have the bits that the mask gives them. May
not sum.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn._numpy import binding
from fastbn.functional.counted import ALL, Counted
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[Any]
    Mask = NDArray[np.bool_]

POLICIES = ("propagate", "omit", "raise")
NOTHING = -1 << 30  # that of kernels/images.pxd: no integer of 16 bits


def checked_policy(nan_policy: str) -> str:
    """Return `nan_policy`, or raise."""
    if not isinstance(nan_policy, str):
        raise TypeError(f"nan_policy: expected a string, got {nan_policy!r}")
    if nan_policy not in POLICIES:
        raise ValueError(f"nan_policy: expected one of {POLICIES}, got {nan_policy!r}")
    return nan_policy


def _number(value: object, given: object) -> int | float:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"nodata: expected real numbers, got {given!r}")
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real) or getattr(value, "dtype", None) == "bfloat16":
        return float(value)  # type: ignore[arg-type]
    raise TypeError(f"nodata: expected a real number, or one for each channel, got {given!r}")


def _held(number: int | float, dtype: np.dtype[Any]) -> bool:
    """Return whether `dtype` has exactly this number."""
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return number == number // 1 and limits.min <= number <= limits.max
    try:
        with np.errstate(all="ignore"):
            nearest = float(np.float64(number).astype(dtype))
    except OverflowError:  # an integer beyond float64
        return False
    return nearest == number or number != number


def checked_nodata(
    nodata: ArrayLike | None, dtype: np.dtype[Any], channels: int
) -> list[Any | None] | None:
    """Return for each channel a number of `dtype`, or None where `dtype` cannot hold it."""
    if nodata is None:
        return None
    if isinstance(nodata, np.ma.MaskedArray):
        raise TypeError("nodata: expected real numbers, got a masked array")
    if isinstance(nodata, np.ndarray) and nodata.ndim == 0:
        nodata = nodata[()]
    if isinstance(nodata, (list, tuple, np.ndarray)):
        values = [_number(value, nodata) for value in nodata]
        if len(values) != channels:
            raise ValueError(
                f"nodata: expected a number or {channels} of them, one for each channel, "
                f"got {len(values)}"
            )
    else:
        values = [_number(nodata, nodata)] * channels
    return [
        np.asarray(value).astype(dtype)[()] if _held(value, dtype) else None for value in values
    ]


def _is(values: Array, number: Any) -> Mask:
    found: Mask = np.isnan(values) if number != number else values == number
    return found


class _Channels:
    """The statistics of each channel, some of them put in the place of others."""

    def __init__(self, stats: BatchStats) -> None:
        self.members = {
            name: getattr(stats, name) for name in ("count", "mean", "m2", "min", "max")
        }

    def put(self, channel: int, stats: BatchStats) -> None:
        for name, array in self.members.items():
            array[channel] = getattr(stats, name)[0]

    def stats(self) -> BatchStats:
        return BatchStats(**self.members)


def select(
    x: Array, axis: int, whole: BatchStats, mask: Mask | None, nan_policy: str,
    nodata: list[Any | None] | None
) -> BatchStats:  # fmt: skip
    """Return the statistics of floats, those of `whole` wherever nothing is left out."""
    channels = _Channels(whole)
    with_nan: list[int] = []
    for channel in range(x.shape[axis]):
        values = x[(slice(None),) * axis + (channel,)]
        number = None if nodata is None else nodata[channel]
        kept = np.ones(values.shape, np.bool_) if mask is None else mask
        given = kept
        if number is not None:
            kept = kept & ~_is(values, number)
        if nan_policy != "propagate" and not np.isfinite(whole.mean[channel]):
            nan = np.isnan(values)
            if nan_policy == "raise" and (kept & nan).any():
                with_nan.append(channel)
            kept = kept & ~nan
        if not with_nan and kept is not given and not np.array_equal(kept, given):
            channels.put(channel, statistics_of_floats(values[kept].reshape(-1, 1), None))
    if with_nan:
        raise ValueError(f"x: expected no NaN, got some in channels {with_nan}")
    return channels.stats()


def statistics_of_floats(x: Array, layout: str | None, counted: Counted = ALL) -> BatchStats:
    """Return the statistics of what counts in x."""
    count, mean, m2, low, high = binding.batch_statistics(x, layout, counted)
    return BatchStats(count, mean, m2, min=low, max=high)


def _joined(lower: int, upper: int) -> int:
    """Return the integer of 128 bits that has these halves."""
    return (upper << 64) + (lower & (1 << 64) - 1)


def statistics_of_integers(
    x: Array, axis: int, mask: Mask | None, nodata: list[Any | None] | None
) -> BatchStats:
    """Return the exact statistics of integers."""
    left_out = None
    if nodata is not None and any(number is not None for number in nodata):
        left_out = np.array([NOTHING if n is None else n for n in nodata], np.int32)
    count, mean, m2, low, high, parts = binding.integer_statistics(x, axis, mask, left_out)
    sums, squares = [], []
    for lower, upper, lower_squares, upper_squares in parts.tolist():
        sums.append(_joined(lower, upper))
        squares.append(_joined(lower_squares, upper_squares))
    return BatchStats(count, mean, m2, min=low, max=high, sum=sums, sum_of_squares=squares)


def statistics(
    x: Array, layout: str | None, counted: Counted, nan_policy: str, nodata: ArrayLike | None
) -> BatchStats:
    """Return what `batch_stats` returns."""
    axis, integers = binding.check_image(x, layout)
    checked_policy(nan_policy)
    numbers = checked_nodata(nodata, x.dtype, x.shape[axis])
    if not integers and nan_policy == "propagate" and numbers is None:
        return statistics_of_floats(x, layout, counted)
    kept = counted.as_mask(x, layout).mask
    if kept is not None:
        kept = np.broadcast_to(kept, x.shape[:axis] + x.shape[axis + 1 :])
    if integers:
        return statistics_of_integers(x, axis, kept, numbers)
    return select(x, axis, statistics_of_floats(x, layout, counted), kept, nan_policy, numbers)
