# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm of a part of a batch: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fastbn import functional
from fastbn._docs import filled
from fastbn.functional.batch import backward_otherwise, forward_otherwise
from fastbn.functional.counted import counted_of
from fastbn.sync._exchange import BACKWARD, FORWARD, together
from fastbn.sync._groups import as_group

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from fastbn._types import (
        Activation,
        Float64,
        Floating,
        Gradients,
        Kept,
        OnNonfinite,
        Vector,
    )


def _is_false(flag: object) -> bool:
    return isinstance(flag, (bool, np.bool_)) and not flag


@filled
def batch_norm_forward(
    x: NDArray[Floating],
    weight: Vector | None = None,
    bias: Vector | None = None,
    *,
    group: Any = None,
    running_mean: Kept | None = None,
    running_var: Kept | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    ghost_batch_size: SupportsIndex | None = None,
    update_running: bool = True,
    unbiased: bool = True,
    on_nonfinite: OnNonfinite = "propagate",
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise with the statistics of the batches of all ranks together.

    In training, each rank of `group` calls this with its part of the batch. With
    ``training=False`` nothing is sent.

    Parameters
    ----------
    {x}
        The parts may differ in all but the number of channels, and some may be empty.
    {affine: (C,)}
    {group}
    {running: optional}
        On all ranks alike.
    training : bool, default True
        Normalise with the statistics of the whole batch.
    {momentum}
    {eps}
    {layout}
    {counted}
        Of this part of the batch.
    {ghost}
        They are cut from the whole batch: the parts, one after another.
    {update_running}
    {unbiased}
    {on_nonfinite}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}
    {mean_and_invstd: of shape (C,)}
        Of the whole batch, or of all its slices: the same bits on all ranks.

    Raises
    ------
    ValueError, TypeError
        As `fastbn.batch_norm_forward`; for a group that is none. One value per channel
        is judged by the whole batch.
    FloatingPointError
        See `on_nonfinite`; on all ranks.
    RuntimeError
        If another rank raises an error before the exchange, has another number of
        channels, or is in backward.
    Exception
        What `allgather` raises.

    Notes
    -----
    Whatever is raised, running statistics are as before the call. If one rank has the
    whole batch, and the others have empty parts, results have the bits of
    `fastbn.batch_norm_forward`.

    References
    ----------
    Ioffe & Szegedy 2015, algorithm 1, on parts that are merged as in Chan, Golub &
    LeVeque 1983.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> class Alone:
    ...     rank, size = 0, 1
    ...     def allgather(self, array):
    ...         return [array]
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, mean, invstd = fastbn.sync.batch_norm_forward(x, group=Alone())
    >>> mean
    array([ 2., 20.])
    """
    if group is None or _is_false(training):
        return functional.batch_norm_forward(
            x, weight, bias, running_mean=running_mean, running_var=running_var,
            training=training, momentum=momentum, eps=eps, layout=layout, mask=mask,
            lengths=lengths, length_axis=length_axis, ghost_batch_size=ghost_batch_size,
            update_running=update_running, unbiased=unbiased, on_nonfinite=on_nonfinite,
            activation=activation, negative_slope=negative_slope, residual=residual, out=out
        )  # fmt: skip
    return together(as_group(group), FORWARD, lambda exchange: forward_otherwise(
        x, weight, bias, running_mean, running_var, residual, out, training, momentum, eps,
        layout, activation, negative_slope, ghost_batch_size, update_running, unbiased,
        on_nonfinite, counted_of(mask, lengths, length_axis), exchange
    ))  # fmt: skip


@filled
def batch_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None = None,
    *,
    group: Any = None,
    bias: Vector | None = None,
    training: bool = True,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    ghost_batch_size: SupportsIndex | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    """Return the gradients of `sync.batch_norm_forward`.

    In training, each rank of `group` calls this, with the loss being the sum of the losses
    of all ranks. With ``training=False`` nothing is sent.

    Parameters
    ----------
    {dy}
    {forward_x}
    {forward_statistics: of shape (C,)}
        Those of ghost batches have shape (slices, C).
    {forward_affine: (C,)}
    {group}
    training : bool, default True
        Whether the forward pass used the statistics of the batch.
    {forward_layout}
    {forward_counted}
    ghost_batch_size : int, optional
        As in the forward pass.
    {forward_fusion}
    {dx_out}

    Returns
    -------
    {dx}
    {dparameters: dweight, dbias}
        They are this rank's own share, as in ``torch.nn.SyncBatchNorm``: the gradients
        of the whole batch are the sums over all ranks.
    {dresidual}

    Raises
    ------
    ValueError, TypeError, RuntimeError, Exception
        As `sync.batch_norm_forward`.

    References
    ----------
    Ioffe & Szegedy 2015, section 3, with means over the whole batch.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = fastbn.sync.batch_norm_forward(x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dbias = fastbn.sync.batch_norm_backward(dy, x, mean, invstd)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    """
    if group is None or _is_false(training):
        return functional.batch_norm_backward(
            dy, x, mean, invstd, weight, bias=bias, training=training, layout=layout, mask=mask,
            lengths=lengths, length_axis=length_axis, ghost_batch_size=ghost_batch_size,
            activation=activation, negative_slope=negative_slope, residual=residual, out=out
        )  # fmt: skip
    return together(as_group(group), BACKWARD, lambda exchange: backward_otherwise(
        dy, x, mean, invstd, weight, bias, residual, out, training, layout, activation,
        negative_slope, ghost_batch_size, counted_of(mask, lengths, length_axis), exchange
    ))  # fmt: skip
