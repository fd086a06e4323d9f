# SPDX-License-Identifier: BSD-3-Clause
"""BatchStats: count, mean and M2 of each channel; merging, pickling, arrays.

The only arithmetic is on vectors of channels, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from fastbn._types import Float64


def _real_array(value: ArrayLike, name: str) -> Float64:
    """Return a new float64 array of real numbers, or raise."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected an array of numbers, got {value!r}") from None
    if array.dtype.kind not in "iuf" or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected real numbers, got {value!r}")
    return array.astype(np.float64)


class BatchStats:
    """Count, mean and M2 of each channel: statistics that can be merged.

    M2 is the sum of squared differences from the mean. The statistics of a
    whole follow from those of its parts, in the order in which they are given.

    Parameters
    ----------
    count, mean, m2 : array_like of shape (C,)
        Converted to float64; `count` may be one number for all channels.

    Attributes
    ----------
    count, mean, m2 : ndarray of float64, shape (C,)

    Raises
    ------
    ValueError
        If the shapes differ, or are not (C,).

    References
    ----------
    Chan, Golub & LeVeque 1983, equation 2.1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.arange(12.0).reshape(6, 2)
    >>> whole = fastbn.batch_stats(x[:4]) + fastbn.batch_stats(x[4:])
    >>> whole
    BatchStats(channels=2, count=6)
    >>> np.array_equal(whole.var(), x.var(axis=0))
    True
    """

    __slots__ = ("count", "m2", "mean")

    count: Float64
    mean: Float64
    m2: Float64

    def __init__(self, count: ArrayLike, mean: ArrayLike, m2: ArrayLike) -> None:
        self.mean = _real_array(mean, "mean")
        self.m2 = _real_array(m2, "m2")
        if self.mean.ndim != 1 or self.mean.shape != self.m2.shape:
            raise ValueError(
                "mean, m2: expected two arrays of one shape (C,), "
                f"got {self.mean.shape} and {self.m2.shape}"
            )
        count = _real_array(count, "count")
        if count.shape not in ((), self.mean.shape):
            raise ValueError(
                f"count: expected a number or shape {self.mean.shape}, got shape {count.shape}"
            )
        self.count = np.full(self.mean.shape, count)

    def var(self, ddof: float = 0) -> Float64:
        """Return the variance, ``M2 / (count - ddof)``; NaN where that has no value.

        Parameters
        ----------
        ddof : float, default 0
            0 for the biased variance (normalisation), 1 for the unbiased
            (running statistics).

        Returns
        -------
        ndarray of float64, shape (C,)

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchStats(3, [0.0], [6.0]).var(ddof=1)
        array([3.])
        """
        freedom = self.count - _real_array(ddof, "ddof")
        if freedom.shape != self.mean.shape:
            raise ValueError(f"ddof: expected a number, got shape {np.shape(ddof)}")
        result = np.full(self.mean.shape, np.nan)
        with np.errstate(all="ignore"):
            return np.divide(self.m2, freedom, out=result, where=freedom > 0)

    def std(self, ddof: float = 0) -> Float64:
        """Return the standard deviation, the root of `var`.

        Parameters
        ----------
        ddof : float, default 0
            As for `var`.

        Returns
        -------
        ndarray of float64, shape (C,)

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchStats(3, [0.0], [12.0]).std()
        array([2.])
        """
        return np.sqrt(self.var(ddof))

    def __add__(self, other: BatchStats) -> BatchStats:
        """Return the statistics of both parts together, `self` first."""
        if not isinstance(other, BatchStats):
            return NotImplemented
        if other.mean.shape != self.mean.shape:
            raise ValueError(
                f"other: expected statistics of {self.mean.size} channels, got {other.mean.size}"
            )
        count = self.count + other.count
        with np.errstate(all="ignore"):
            weight = other.count / count
            delta = other.mean - self.mean
            mean = np.where(
                np.isfinite(delta),
                self.mean + delta * weight,
                (self.mean * self.count + other.mean * other.count) / count,
            )
            m2 = self.m2 + other.m2 + delta * delta * (self.count * weight)
        # An empty part changes nothing, so that its zeros round nothing.
        for empty, full in ((self.count == 0, other), (other.count == 0, self)):
            mean = np.where(empty, full.mean, mean)
            m2 = np.where(empty, full.m2, m2)
        return type(self)(count, mean, m2)

    @classmethod
    def merge(cls, parts: Iterable[BatchStats]) -> BatchStats:
        """Return the statistics of all parts together, merged in their order.

        Parameters
        ----------
        parts : iterable of BatchStats
            At least one; empty parts may stand anywhere.

        Returns
        -------
        BatchStats

        Raises
        ------
        TypeError
            If an item is no BatchStats.
        ValueError
            If there is no part, or their channels differ.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> x = np.arange(12.0).reshape(6, 2)
        >>> parts = [fastbn.batch_stats(part) for part in np.split(x, 3)]
        >>> fastbn.BatchStats.merge(parts).mean
        array([5., 6.])
        """
        if not isinstance(parts, Iterable):
            raise TypeError(f"parts: expected an iterable, got {type(parts).__name__}")
        total = None
        for part in parts:
            if not isinstance(part, BatchStats):
                raise TypeError(f"parts: expected BatchStats, got {type(part).__name__}")
            total = part if total is None else total + part
        if total is None:
            raise ValueError("parts: expected at least one BatchStats, got none")
        return cls(total.count, total.mean, total.m2)

    def to_array(self) -> Float64:
        """Return count, mean and M2 as one array, for sending elsewhere.

        Returns
        -------
        ndarray of float64, shape (3, C)

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchStats(2, [1.0], [4.0]).to_array()
        array([[2.],
               [1.],
               [4.]])
        """
        return np.stack((self.count, self.mean, self.m2))

    @classmethod
    def from_array(cls, array: ArrayLike) -> BatchStats:
        """Return the statistics that `to_array` turned into an array.

        Parameters
        ----------
        array : array_like of shape (3, C)
            Count, mean and M2.

        Returns
        -------
        BatchStats

        Raises
        ------
        ValueError
            If the shape is another.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchStats.from_array([[2.0], [1.0], [4.0]]).var()
        array([2.])
        """
        array = _real_array(array, "array")
        if array.ndim != 2 or array.shape[0] != 3:
            raise ValueError(f"array: expected shape (3, C), got {array.shape}")
        return cls(*array)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.count, self.mean, self.m2)

    def __repr__(self) -> str:
        low, high = (self.count.min(), self.count.max()) if self.count.size else (0, 0)
        count = f"{low:g}" if low == high else f"{low:g}..{high:g}"
        return f"BatchStats(channels={self.mean.size}, count={count})"
