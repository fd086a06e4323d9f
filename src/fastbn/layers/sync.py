# SPDX-License-Identifier: BSD-3-Clause
"""The layer of batch norm over several processes. May keep state. May not do arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import MOVED, ONLY_Y, WITH_STATISTICS, binding
from fastbn.functional.counted import Counted
from fastbn.layers.base import TrackingLayer
from fastbn.sync import batch_norm_backward
from fastbn.sync._exchange import BACKWARD, FORWARD, Exchange, together
from fastbn.sync._groups import as_group

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from fastbn._types import Activation, Floating, Gradients


@filled
class SyncBatchNorm(TrackingLayer):
    """Batch normalisation with the statistics of the batches of all ranks of a group.

    As `BatchNorm`, but in training each call and each `backward` is one of all ranks.
    Evaluation sends nothing.

    Parameters
    ----------
    {num_features}
    {eps}
    {average_momentum}
    {keep_affine: True}
    {track}
    {group}
    {layout}
    {activation}
    {negative_slope}
    {dtype: parameters and running statistics}

    Attributes
    ----------
    {weights: (C,)}
    {tracked}
    {gradients: (C,)}
        They are this rank's own share: the gradients of the whole batch are the sums over
        all ranks.
    {training}

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    Ioffe & Szegedy 2015, algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.SyncBatchNorm(2, group=None)
    >>> bn(np.array([[1.0, 10.0], [3.0, 30.0]])).round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    """

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        group: Any = None,
        layout: str | None = None,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout,
            activation=activation, negative_slope=negative_slope, dtype=dtype
        )  # fmt: skip
        if group is not None:
            as_group(group)
        self.group = group

    def _forward_counted(
        self, x: Any, residual: Any, out: Any, training: bool, counted: Counted
    ) -> Any:
        tensors = (x, residual, out)
        if not training:
            tracks = self.running_mean is not None and self.running_var is not None
            return self._normalise(tensors, counted, not tracks, ONLY_Y, None)
        if self.group is None:
            result = self._normalise(tensors, counted, True, WITH_STATISTICS, None)
            self._count(x, counted)
            return result

        def compute(exchange: Exchange) -> Any:
            result = self._normalise(tensors, counted, True, WITH_STATISTICS, exchange)
            # By the whole batch: it is the same number on all ranks.
            if self.num_batches_tracked is not None and exchange.count:
                self.num_batches_tracked += 1
            return result

        return together(as_group(self.group), FORWARD, compute)

    def _normalise(
        self,
        tensors: tuple,
        counted: Counted,
        of_batch: bool,
        only_y: bool,
        exchange: Exchange | None,
    ) -> Any:
        # In evaluation by the batch there is nothing to keep.
        x, residual, out = tensors
        keeps = self.training or not of_batch
        mean, var = (self.running_mean, self.running_var) if keeps else (None, None)
        momentum = self._average_momentum() if self.momentum is None else self.momentum
        return binding.batch_forward(
            x, self.weight, self.bias, mean, var, residual, out, of_batch, momentum, self.eps,
            self.layout, self.activation, self.negative_slope, only_y, counted,
            self.num_features, None, MOVED, exchange
        )  # fmt: skip

    def backward(self, dy: NDArray[Floating], out: NDArray[Floating] | None = None) -> Any:
        """Return `dx` of the last call in training, as `BatchNorm.backward` of all ranks.

        Parameters
        ----------
        dy : ndarray of the shape and dtype of the last `x`
            The gradient of the loss, the sum over all ranks, with respect to `y`.
        out : ndarray of the shape and dtype of `x`, optional
            Where to write `dx`; ``out=x`` rules out a second `backward`.

        Returns
        -------
        dx : ndarray
        dresidual : ndarray
            Only with a residual: then the two are a tuple.

        Raises
        ------
        RuntimeError
            As `BatchNorm.backward`, and as `sync.batch_norm_backward`.
        ValueError, TypeError
            As `sync.batch_norm_backward`.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.SyncBatchNorm(1)
        >>> y = bn(np.array([[1.0], [2.0], [6.0]]))
        >>> bn.backward(np.array([[1.0], [0.0], [0.0]])).round(3).ravel().tolist()
        [0.176, -0.22, 0.044]
        """
        if self._saved is None and self.group is not None:
            # This rank has nothing to send but its error.
            return together(
                as_group(self.group), BACKWARD, lambda _: super(SyncBatchNorm, self).backward(dy)
            )
        return super().backward(dy, out)

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        mean, invstd, counted = statistics
        return batch_norm_backward(
            dy, x, mean, invstd, self.weight, group=self.group, bias=self.bias,
            layout=self.layout, activation=self.activation, negative_slope=self.negative_slope,
            residual=residual, out=out, **counted._asdict()
        )  # fmt: skip
