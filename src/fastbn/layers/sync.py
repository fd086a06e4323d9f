# SPDX-License-Identifier: BSD-3-Clause
"""The layer of batch norm over several processes. May keep state. May not do arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import binding
from fastbn.functional.counted import counted_of
from fastbn.layers.batch import BatchNorm, Normalised
from fastbn.sync import batch_norm_backward
from fastbn.sync._exchange import BACKWARD, FORWARD, Exchange, together
from fastbn.sync._groups import as_group

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from fastbn._types import Activation, Floating, Gradients, OnNonfinite


@filled
class SyncBatchNorm(BatchNorm):
    """Batch normalisation with the statistics of the batches of all ranks of a group.

    As `BatchNorm`, but in training each call and each `backward` is one of all ranks.
    Evaluation, and a layer that is frozen, send nothing.

    Parameters
    ----------
    {num_features}
    {eps}
    {average_momentum}
    {keep_affine: True}
    {track}
    {group}
    {layout}
    track : {"average", "pooled"}, default "average"
        As for `BatchNorm`.
    {ghost}
        They are cut from the batches of all ranks, one after another.
    {unbiased}
    {on_nonfinite}
    {activation}
    {negative_slope}
    {dtype: parameters and running statistics}

    Attributes
    ----------
    {weights: (C,)}
    {tracked}
    pooled, skipped, frozen
        As for `BatchNorm`.
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
        track: str = "average",
        ghost_batch_size: SupportsIndex | None = None,
        unbiased: bool = True,
        on_nonfinite: OnNonfinite = "propagate",
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout, track=track,
            ghost_batch_size=ghost_batch_size, unbiased=unbiased, on_nonfinite=on_nonfinite,
            activation=activation, negative_slope=negative_slope, dtype=dtype
        )  # fmt: skip
        if group is not None:
            as_group(group)
        self.group = group

    def _meets(self) -> bool:
        # Whether a call, or its backward, is one of all ranks.
        return self.group is not None and self.training and not self.frozen

    @filled
    def __call__(
        self,
        x: NDArray[Floating],
        out: NDArray[Floating] | None = None,
        *,
        residual: NDArray[Floating] | None = None,
        mask: NDArray[np.bool_] | None = None,
        lengths: ArrayLike | None = None,
        length_axis: str | None = None,
        update_running: bool = True,
    ) -> NDArray[Floating]:
        """Normalise `x`, a part of the batch; in training, keep what `backward` needs.

        Parameters
        ----------
        {layer_channels}
        {layer_out}
        {layer_residual}
        {counted}
            Of this part of the batch. `backward` uses what the call had.
        {update_running}

        Returns
        -------
        {y}

        Raises
        ------
        ValueError, TypeError, FloatingPointError
            As `BatchNorm.__call__`; what is not finite in the whole batch is raised by all
            ranks.
        RuntimeError, Exception
            As `sync.batch_norm_forward`.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.SyncBatchNorm(1)
        >>> bn(np.array([[1.0], [3.0]])).round(3).ravel().tolist()
        [-1.0, 1.0]
        """

        def compute(exchange: Exchange) -> Any:
            counted = counted_of(mask, lengths, length_axis)
            moves = binding.check_flag(update_running, "update_running")
            y, mean, invstd = self._normalise_batch(x, residual, out, moves, counted, exchange)
            self._keep(
                x, residual, out, Normalised(mean, invstd, True, self.ghost_batch_size, counted)
            )
            return y

        if self._meets():
            return together(as_group(self.group), FORWARD, compute)
        return super().__call__(
            x, out, residual=residual, mask=mask, lengths=lengths, length_axis=length_axis,
            update_running=update_running
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
        if self._saved is None and self._meets():
            # This rank has nothing to send but its error.
            return together(
                as_group(self.group), BACKWARD, lambda _: super(SyncBatchNorm, self).backward(dy)
            )
        return super().backward(dy, out)

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        mean, invstd, training, size, counted = statistics
        return batch_norm_backward(
            dy, x, mean, invstd, self.weight, group=self.group, bias=self.bias, training=training,
            layout=self.layout, ghost_batch_size=size, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual, out=out, **counted._asdict()
        )  # fmt: skip
