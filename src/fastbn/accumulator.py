# SPDX-License-Identifier: BSD-3-Clause
"""StatsAccumulator: statistics of batches that come one after the other. No arithmetic."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import binding
from fastbn.functional import batch_stats
from fastbn.functional.selection import checked_policy
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@filled
class StatsAccumulator:
    """Statistics of batches that come one after the other.

    They are those of ``BatchStats.merge`` of the `batch_stats` of each batch, in the order
    of the updates, bit for bit. Statistics of integers are exact, so that their order
    changes no bit.

    Parameters
    ----------
    {layout}
    nan_policy : {"propagate", "omit", "raise"}, default "propagate"
        As for `batch_stats`.
    nodata : float or array_like of shape (C,), optional
        As for `batch_stats`.

    Raises
    ------
    ValueError, TypeError
        For a `layout` or `nan_policy` that `batch_stats` would refuse.

    Notes
    -----
    Several threads may update one accumulator. The order of their updates is then theirs,
    and with it the last bits of statistics of floats.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> total = fastbn.StatsAccumulator(layout="NC")
    >>> for batch in np.split(np.arange(12, dtype=np.uint8).reshape(6, 2), 3):
    ...     total = total.update(batch)
    >>> total.result().mean
    array([5., 6.])
    """

    __slots__ = ("_layout", "_lock", "_nan_policy", "_nodata", "_total")

    def __init__(
        self,
        *,
        layout: str | None = None,
        nan_policy: str = "propagate",
        nodata: ArrayLike | None = None,
    ) -> None:
        binding.check_layout(layout)
        self._layout = layout
        self._nan_policy = checked_policy(nan_policy)
        # A copy, which the caller does not change later.
        self._nodata = np.array(nodata) if isinstance(nodata, np.ndarray) else nodata
        self._total: BatchStats | None = None
        self._lock = threading.Lock()

    def update(self, x: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> Self:
        """Count a batch.

        Parameters
        ----------
        x, mask : ndarray
            As for `batch_stats`.

        Returns
        -------
        StatsAccumulator
            The accumulator itself.

        Raises
        ------
        ValueError, TypeError
            As `batch_stats`, and for another number of channels than before. Nothing is
            changed then.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> x = np.array([[1.0, 2.0], [3.0, 6.0]])
        >>> fastbn.StatsAccumulator().update(x, np.array([True, False])).result().mean
        array([1., 2.])
        """
        part = batch_stats(
            x, layout=self._layout, mask=mask, nan_policy=self._nan_policy, nodata=self._nodata
        )
        return self._add(part, "x")

    def merge(self, other: StatsAccumulator | BatchStats) -> Self:
        """Count what another accumulator, or BatchStats, has counted; `other` stays.

        Parameters
        ----------
        other : StatsAccumulator or BatchStats
            Of the same number of channels. An accumulator without updates changes nothing.

        Returns
        -------
        StatsAccumulator
            The accumulator itself.

        Raises
        ------
        TypeError
            For anything else.
        ValueError
            For another number of channels.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> x = np.array([[1.0], [3.0]])
        >>> a, b = (fastbn.StatsAccumulator().update(x + shift) for shift in (0, 2))
        >>> a.merge(b).result().mean
        array([3.])
        """
        if isinstance(other, StatsAccumulator):
            part = other._snapshot()
        elif isinstance(other, BatchStats):
            part = BatchStats.merge([other])
        else:
            raise TypeError(
                f"other: expected a StatsAccumulator or BatchStats, got {type(other).__name__}"
            )
        return self if part is None else self._add(part, "other")

    def result(self) -> BatchStats:
        """Return the statistics so far; later updates do not change them.

        Returns
        -------
        BatchStats

        Raises
        ------
        ValueError
            Before the first update.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> fastbn.StatsAccumulator().update(np.array([[1.0], [3.0]])).result().var()
        array([1.])
        """
        total = self._snapshot()
        if total is None:
            raise ValueError("result: expected at least one update, got none")
        return total

    def _add(self, part: BatchStats, name: str) -> Self:
        with self._lock:
            total = self._total
            if total is not None and part.mean.size != total.mean.size:
                raise ValueError(
                    f"{name}: expected {total.mean.size} channels, as before, got {part.mean.size}"
                )
            self._total = part if total is None else total + part
        return self

    def _snapshot(self) -> BatchStats | None:
        with self._lock:
            return None if self._total is None else BatchStats.merge([self._total])

    def __getstate__(self) -> tuple[object, ...]:
        return self._layout, self._nan_policy, self._nodata, self._snapshot()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._layout, self._nan_policy, self._nodata, self._total = state
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"StatsAccumulator({self._snapshot() or 'no updates'})"
