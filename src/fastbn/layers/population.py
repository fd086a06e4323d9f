# SPDX-License-Identifier: BSD-3-Clause
"""Layers whose running statistics are those of all batches: how they follow one of them.

May keep state. May compute with vectors of channels, in float64. May not do arithmetic on
tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastbn._numpy import HELD, MOVED, UNMOVED, WITH_STATISTICS, binding
from fastbn.functional.counted import ALL, Counted
from fastbn.functional.running import Batch, move, moved_channels
from fastbn.layers.base import TrackingLayer
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import OnNonfinite
    from fastbn.sync._exchange import Exchange

#: What running statistics may be.
TRACKS = ("average", "pooled")


class PopulationLayer(TrackingLayer):
    """A layer that normalises with the statistics of the batch, and remembers them.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.BatchNorm(2, track="pooled").pooled
    BatchStats(channels=2, count=0)
    """

    #: What `update_statistics` sets while batches are seen.
    _while_estimated: ClassVar[Mapping[str, object]] = {}

    track: str = "average"
    unbiased: bool = True
    on_nonfinite: OnNonfinite = "propagate"
    pooled: BatchStats | None = None
    skipped: int = 0
    # Batches that a channel has left out, where another one has not.
    _left_out: NDArray[np.int64] | None = None

    def _nothing_pooled(self) -> BatchStats:
        zeros = np.zeros(self.num_features)
        return BatchStats(zeros, zeros, zeros)

    def _begin_anew(self) -> None:
        self.pooled = self._nothing_pooled() if self.track == "pooled" else None
        self._left_out = None
        self.skipped = 0

    def _normalise(
        self,
        x: Any,
        residual: Any,
        out: Any,
        moves: bool = True,
        counted: Counted = ALL,
        exchange: Exchange | None = None,
    ) -> tuple:
        # With the statistics of the batch, or of what it is a part of: y, mean, invstd.
        as_engine = (
            self.track == "average"
            and self.unbiased is True
            and self.on_nonfinite == "propagate"
            and exchange is None
        )
        mode = UNMOVED if not moves else MOVED if as_engine else HELD
        result = binding.batch_forward(
            x, self.weight, self.bias, self.running_mean, self.running_var, residual, out, True,
            self._average_momentum() if self.momentum is None else self.momentum, self.eps,
            self.layout, self.activation, self.negative_slope, WITH_STATISTICS, counted,
            self.num_features, None, mode, exchange
        )  # fmt: skip
        if mode == MOVED:
            self._count(x, counted)
            return result
        y, mean, invstd, count, m2 = result
        self._follow(Batch(mean, invstd, count, m2), moves)
        return y, mean, invstd

    def _follow(self, batch: Batch, moves: bool) -> None:
        # A batch of which nothing counts leaves running statistics alone.
        if batch.count == 0:
            return
        mean, var = (self.running_mean, self.running_var) if moves else (None, None)
        where = moved_channels(batch, mean, var, self.unbiased, self.on_nonfinite)
        if not moves:
            return
        if where is not None:
            self.skipped += 1
            if not where.any():
                return
        if self.track == "pooled":
            self._pool(batch, where)
        else:
            self._average(batch, where)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1

    def _average(self, batch: Batch, where: NDArray[np.bool_] | None) -> None:
        momentum: Any = self.momentum
        if momentum is None:
            # Each channel by the number of batches that it has followed.
            left_out = 0 if self._left_out is None else self._left_out
            momentum = 1.0 / ((self.num_batches_tracked or 0) + 1 - left_out)
        move(self.running_mean, batch.mean, momentum, where)
        if self.running_var is not None:
            move(self.running_var, batch.var(self.unbiased), momentum, where)
        if where is not None:
            self._left_out = (0 if self._left_out is None else self._left_out) + ~where

    def _pool(self, batch: Batch, where: NDArray[np.bool_] | None) -> None:
        if batch.m2 is None or self.running_mean is None or self.running_var is None:
            return
        seen = np.full(self.num_features, True) if where is None else where
        part = BatchStats(*(np.where(seen, v, 0.0) for v in (batch.count, batch.mean, batch.m2)))
        self.pooled = (self.pooled or self._nothing_pooled()) + part
        known = self.pooled.count > 0
        with np.errstate(all="ignore"):
            np.copyto(self.running_mean, self.pooled.mean, where=known)
            np.copyto(self.running_var, self.pooled.var(ddof=int(self.unbiased)), where=known)
