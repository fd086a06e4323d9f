# SPDX-License-Identifier: BSD-3-Clause
"""BatchStats: count, mean, M2, extremes and sums of each channel; merging, pickling, arrays.

The only arithmetic is on vectors of channels: in float64, or in Python's integers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from typing import Self

    from numpy.typing import ArrayLike, NDArray

    from fastbn._types import Float64

    Bools = NDArray[np.bool_]


def _real_array(value: ArrayLike, name: str) -> Float64:
    """Return a new float64 array of real numbers, or raise."""
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name}: expected an array of numbers, got {value!r}") from None
    if array.dtype.kind not in "iuf" or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected real numbers, got {value!r}")
    return array.astype(np.float64)


def _extreme(value: ArrayLike | None, name: str, shape: tuple[int, ...]) -> NDArray[Any] | None:
    """Return a new array of `shape` and of the dtype of `value`, or raise."""
    if value is None:
        return None
    array = np.array(value)
    # The kind of bfloat16 is V; unlike others of that kind it has an order.
    if isinstance(value, np.ma.MaskedArray) or not (
        array.dtype.kind in "iuf" or array.dtype.name == "bfloat16"
    ):
        raise TypeError(f"{name}: expected real numbers, got {value!r}")
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    return array


def _whole(value: Sequence[int] | None, name: str, channels: int) -> list[int] | None:
    """Return a new list of Python's integers, or raise."""
    if value is None:
        return None
    try:
        numbers = [operator.index(number) for number in value]
    except TypeError:
        raise TypeError(f"{name}: expected a sequence of integers, got {value!r}") from None
    if len(numbers) != channels:
        raise ValueError(f"{name}: expected {channels} integers, got {len(numbers)}")
    return numbers


def moments_of_sums(
    count: Float64, sums: Sequence[int], squares: Sequence[int]
) -> tuple[list[float], list[float]]:
    """Return mean and M2 of integers, each rounded once: Python divides so."""
    mean, m2 = [], []
    for n, s1, s2 in zip(map(int, count), sums, squares, strict=True):
        mean.append(s1 / n if n else 0.0)
        m2.append((n * s2 - s1 * s1) / n if n else 0.0)
    return mean, m2


def unit_of(dtype: np.dtype[Any], name: str) -> Any:
    """Return what changes no "min" or "max" of `dtype`: its largest or smallest integer, or NaN."""
    if dtype.kind not in "iu":
        return np.nan
    limits = np.iinfo(dtype)
    return limits.max if name == "min" else limits.min


def _merged_extremes(
    a: NDArray[Any] | None, b: NDArray[Any] | None, empty: tuple[Bools, Bools] | None, name: str
) -> NDArray[Any] | None:
    """Return the smaller or larger ones; NaN where either is, but not of what is empty."""
    if a is None or b is None:
        return None
    merged: NDArray[Any] = np.minimum(a, b) if name == "min" else np.maximum(a, b)
    if empty is not None:
        merged = np.where(empty[0], b, np.where(empty[1], a, merged))
        merged[empty[0] & empty[1]] = unit_of(merged.dtype, name)
    return merged


def _merged_sums(a: Sequence[int] | None, b: Sequence[int] | None) -> list[int] | None:
    if a is None or b is None:
        return None
    return [one + other for one, other in zip(a, b, strict=True)]


class BatchStats:
    """Count, mean and M2 of each channel: statistics that can be merged.

    M2 is the sum of squared differences from the mean. The statistics of a
    whole follow from those of its parts, in the order in which they are given.
    Those of integers are exact: they have the same bits in any order and for any
    cut.

    Parameters
    ----------
    count, mean, m2 : array_like of shape (C,)
        Converted to float64; `count` may be one number for all channels.
    min, max : array_like of shape (C,), optional
        The extremes, of the dtype of the data. Of a channel of floats without
        values, NaN; of integers, the largest and the smallest of their dtype.
    sum, sum_of_squares : sequence of C int, optional
        Of integers only, and then both.

    Attributes
    ----------
    count, mean, m2 : ndarray of float64, shape (C,)
    min, max : ndarray of shape (C,), or None
    sum, sum_of_squares : list of int, or None

    Raises
    ------
    ValueError
        If the shapes differ, or are not (C,); for one of the sums without the other, or
        with a `count` that is no whole number.
    TypeError
        For anything that is not real numbers.

    Notes
    -----
    Extremes and sums of a merge are None where a part has none, but a part without any
    values changes nothing. Extremes of two dtypes become those of ``numpy.result_type``.

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
    >>> pixels = fastbn.batch_stats(np.array([[0, 7], [255, 9]], np.uint8))
    >>> pixels.min, pixels.max, pixels.sum
    (array([0, 7], dtype=uint8), array([255,   9], dtype=uint8), [255, 16])
    """

    __slots__ = ("count", "m2", "max", "mean", "min", "sum", "sum_of_squares")

    count: Float64
    mean: Float64
    m2: Float64
    min: NDArray[Any] | None
    max: NDArray[Any] | None
    sum: list[int] | None
    sum_of_squares: list[int] | None

    def __init__(
        self,
        count: ArrayLike,
        mean: ArrayLike,
        m2: ArrayLike,
        *,
        min: ArrayLike | None = None,
        max: ArrayLike | None = None,
        sum: Sequence[int] | None = None,
        sum_of_squares: Sequence[int] | None = None,
    ) -> None:
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
        self.min = _extreme(min, "min", self.mean.shape)
        self.max = _extreme(max, "max", self.mean.shape)
        self.sum = _whole(sum, "sum", self.mean.size)
        self.sum_of_squares = _whole(sum_of_squares, "sum_of_squares", self.mean.size)
        if (self.sum is None) != (self.sum_of_squares is None):
            raise ValueError("sum, sum_of_squares: expected both or neither, got one of them")
        if self.sum is not None and not (self.count % 1 == 0).all():
            raise ValueError(f"count: expected whole numbers with sums, got {self.count}")

    @classmethod
    def _of(cls, count: Float64, mean: Any, m2: Any, optional: dict[str, Any]) -> Self:
        """Return an object of what is known to be right, with extremes and sums of its own."""
        made = cls.__new__(cls)
        made.count, made.mean, made.m2 = count, np.asarray(mean), np.asarray(m2)
        for name, value in optional.items():
            setattr(made, name, None if value is None else value.copy())
        return made

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
        optional = self._optional_with(other)
        count = self.count + other.count
        if optional["sum"] is not None:
            moments = moments_of_sums(count, optional["sum"], optional["sum_of_squares"])
            return self._of(count, *moments, optional)
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
        return self._of(count, mean, m2, optional)

    def _optional(self) -> dict[str, Any]:
        """Return what a part may lack, as keywords."""
        return {name: getattr(self, name) for name in ("min", "max", "sum", "sum_of_squares")}

    def _optional_with(self, other: BatchStats) -> dict[str, Any]:
        """Return the same of both parts; of the other one alone, where a part has no values."""
        a, b = self._optional(), other._optional()
        values_in_a, values_in_b = bool(self.count.any()), bool(other.count.any())
        if values_in_a != values_in_b:
            return a if values_in_a else b
        if not values_in_a:
            a, b = ({name: x[name] if x[name] is not None else y[name] for name in x}
                    for x, y in ((a, b), (b, a)))  # fmt: skip
        merged: dict[str, Any] = {
            name: _merged_sums(a[name], b[name]) for name in ("sum", "sum_of_squares")
        }
        # Most parts have values everywhere; there are many merges.
        everywhere = self.count.all() and other.count.all()
        empty = None if everywhere else (self.count == 0, other.count == 0)
        for name in ("min", "max"):
            merged[name] = _merged_extremes(a[name], b[name], empty, name)
        return merged

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
        return cls(total.count, total.mean, total.m2, **total._optional())

    def to_array(self) -> Float64:
        """Return count, mean and M2 as one array, for sending elsewhere.

        Extremes and sums stay behind; pickles carry them.

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
        # The state sets members: a pickle that an older version wrote has none.
        return type(self), (self.count, self.mean, self.m2), (None, self._optional())

    def __repr__(self) -> str:
        low, high = (self.count.min(), self.count.max()) if self.count.size else (0, 0)
        count = f"{low:g}" if low == high else f"{low:g}..{high:g}"
        return f"BatchStats(channels={self.mean.size}, count={count})"
