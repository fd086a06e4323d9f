# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

from fastbn._docs import filled
from fastbn._numpy import CHECKED, HELD, INPUT, MOVED, ONLY_Y, UNMOVED, WITH_STATISTICS, binding
from fastbn.functional import ghost, running
from fastbn.functional.counted import Counted, counted_of
from fastbn.functional.selection import statistics

if TYPE_CHECKING:
    import numpy as np
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
    from fastbn.stats import BatchStats
    from fastbn.sync._exchange import Exchange


@filled
def batch_norm(
    x: NDArray[Floating],
    running_mean: Kept | None,
    running_var: Kept | None,
    weight: Vector | None = None,
    bias: Vector | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
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
) -> NDArray[Floating]:
    r"""Normalise each channel of a batch, as ``torch.nn.functional.batch_norm``.

    .. math:: y = (x - mean) / \sqrt{var + eps} \cdot weight + bias

    In training, mean and variance are those of the batch, and the running
    arrays are moved towards them; otherwise they are the running arrays.

    Parameters
    ----------
    {x}
    {running: or None}
    {affine: (C,)}
    training : bool, default False
        Normalise with the statistics of the batch.
    {momentum}
    {eps}
    {layout}
    {counted}
    {ghost}
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

    Raises
    ------
    ValueError
        For a wrong shape, rank, layout, `eps` or `momentum`; for read-only or
        overlapping memory that would be written; in training, for a batch with
        one value per channel.
    FloatingPointError
        See `on_nonfinite`.
    TypeError
        For anything that is not an array of such a dtype, and for running
        arrays that are missing when `training` is False.

    Notes
    -----
    {empty}
    An empty `x` leaves the running arrays alone.

    {half}

    References
    ----------
    S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network
    Training by Reducing Internal Covariate Shift", 2015: algorithm 1
    (training), algorithm 2 (inference).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]], dtype=np.float32)
    >>> mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> fastbn.batch_norm(x, mean, var, training=True).round(3)
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    >>> mean, var
    (array([0.2, 2. ], dtype=float32), array([ 1.1, 20.9], dtype=float32))
    """
    if (ghost_batch_size is None and update_running is True and unbiased is True
            and on_nonfinite == "propagate"):  # fmt: skip
        return binding.batch_forward(
            x, weight, bias, running_mean, running_var, residual, out, training, momentum, eps,
            layout, activation, negative_slope, ONLY_Y, (mask, lengths, length_axis)
        )  # fmt: skip
    return forward_otherwise(
        x, weight, bias, running_mean, running_var, residual, out, training, momentum, eps,
        layout, activation, negative_slope, ghost_batch_size, update_running, unbiased,
        on_nonfinite, counted_of(mask, lengths, length_axis)
    )[0]  # fmt: skip


@filled
def batch_norm_forward(
    x: NDArray[Floating],
    weight: Vector | None = None,
    bias: Vector | None = None,
    *,
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
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    {x}
    {affine: (C,)}
    {running: optional}
    training : bool, default True
        Normalise with the statistics of the batch.
    {momentum}
    {eps}
    {layout}
    {counted}
    {ghost}
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
        With ghost batches they are those of the slices, of shape (slices, C).
        With ``training=False`` these two are of the running statistics, as the
        backward of a frozen layer needs them.

    Raises
    ------
    ValueError, TypeError, FloatingPointError
        As `batch_norm`.

    Notes
    -----
    Of an empty batch in training, mean is 0 and invstd NaN. From `running_mean` on,
    arguments are given by keyword: four arrays of shape (C,), two of them written, are
    easily mixed up.

    References
    ----------
    Ioffe & Szegedy 2015, algorithm 1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, mean, invstd = fastbn.batch_norm_forward(x)
    >>> mean
    array([ 2., 20.])
    >>> invstd.round(4)
    array([1. , 0.1])
    """
    if (ghost_batch_size is None and update_running is True and unbiased is True
            and on_nonfinite == "propagate"):  # fmt: skip
        return binding.batch_forward(
            x, weight, bias, running_mean, running_var, residual, out, training, momentum, eps,
            layout, activation, negative_slope, WITH_STATISTICS, (mask, lengths, length_axis)
        )  # fmt: skip
    return forward_otherwise(
        x, weight, bias, running_mean, running_var, residual, out, training, momentum, eps,
        layout, activation, negative_slope, ghost_batch_size, update_running, unbiased,
        on_nonfinite, counted_of(mask, lengths, length_axis)
    )  # fmt: skip


def forward_otherwise(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Kept | None,
    running_var: Kept | None,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    training: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    activation: Activation | None,
    negative_slope: float,
    ghost_batch_size: SupportsIndex | None,
    update_running: bool,
    unbiased: bool,
    on_nonfinite: OnNonfinite,
    counted: Counted,
    exchange: Exchange | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise by slices, or where running statistics follow otherwise than in the engine.

    As `batch_norm_forward`; `exchange`: of a part of a batch, in training.
    """
    size = ghost.check_size(ghost_batch_size)
    moves = binding.check_flag(update_running, "update_running")
    unbiased = binding.check_flag(unbiased, "unbiased")
    running.check_on_nonfinite(on_nonfinite)
    options = (momentum, eps, layout, activation, negative_slope)
    if not binding.check_flag(training, "training"):
        return binding.batch_forward(
            x, weight, bias, running_mean, running_var, residual, out, False, *options,
            WITH_STATISTICS, counted
        )  # fmt: skip
    plain = moves and unbiased and on_nonfinite == "propagate"
    mode = MOVED if plain else HELD if moves else UNMOVED
    kept: tuple[Kept | None, Kept | None]
    kept = (running_mean, running_var) if moves else (None, None)
    whole = 0  # bytes of what x is a slice of, once it has been checked

    def normalise(
        x: NDArray,
        residual: NDArray | None,
        out: NDArray | None,
        counted: Counted,
        exchange: Exchange | None,
    ) -> Any:
        result = binding.batch_forward(
            x, weight, bias, running_mean, running_var, residual, out, True, *options,
            WITH_STATISTICS, counted, None, None, mode, exchange, whole
        )  # fmt: skip
        if not plain:
            y, mean, invstd, count, m2 = result
            batch = running.Batch(mean, invstd, count, m2)
            running.follow(batch, *kept, float(momentum), unbiased, on_nonfinite)
            return y, mean, invstd
        return result

    if size is None:
        return normalise(x, residual, out, counted, exchange)
    y = binding.batch_forward(
        x, weight, bias, kept[0], kept[1], residual, out, True, *options, ONLY_Y, counted, None,
        None, CHECKED, exchange
    )  # fmt: skip
    whole = x.nbytes
    with ghost.unmoved_on_error(*kept):
        return ghost.forward(x, residual, y, layout, size, normalise, counted, exchange)


@filled
def batch_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None = None,
    *,
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
    r"""Return the gradients with respect to `x`, weight and bias.

    With :math:`\hat x = (x - mean) \cdot invstd` and means over a channel,

    .. math:: dx = weight \cdot invstd \cdot
              (dy - \overline{dy} - \hat x \, \overline{dy \hat x})

    and, for statistics that do not depend on `x` (``training=False``),
    :math:`dx = weight \cdot invstd \cdot dy`.

    Parameters
    ----------
    {dy}
    {forward_x}
    {forward_statistics: of shape (C,)}
        Those of ghost batches have shape (slices, C).
    {forward_affine: (C,)}
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
    {dresidual}

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`.

    References
    ----------
    Ioffe & Szegedy 2015, section 3; docs/derivation.md has every step.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = fastbn.batch_norm_forward(x)
    >>> dy = np.array([[1.0], [0.0], [0.0]])
    >>> dx, dweight, dbias = fastbn.batch_norm_backward(dy, x, mean, invstd)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    >>> dbias
    array([1.])
    """
    if ghost_batch_size is None:
        return binding.batch_backward(
            dy, x, mean, invstd, weight, bias, residual, out, training, layout, activation,
            negative_slope, INPUT, (mask, lengths, length_axis)
        )  # fmt: skip
    return backward_otherwise(
        dy, x, mean, invstd, weight, bias, residual, out, training, layout, activation,
        negative_slope, ghost_batch_size, counted_of(mask, lengths, length_axis)
    )  # fmt: skip


def backward_otherwise(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None,
    bias: Vector | None,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    training: bool,
    layout: str | None,
    activation: Activation | None,
    negative_slope: float,
    ghost_batch_size: SupportsIndex | None,
    counted: Counted,
    exchange: Exchange | None = None,
) -> Gradients[Floating]:
    """Return the gradients of `forward_otherwise`."""
    size = ghost.check_size(ghost_batch_size)
    if size is not None and binding.check_flag(training, "training"):
        return ghost.backward(
            dy, x, mean, invstd, weight, bias, residual, out, layout, activation, negative_slope,
            size, counted, exchange
        )  # fmt: skip
    return binding.batch_backward(
        dy, x, mean, invstd, weight, bias, residual, out, training, layout, activation,
        negative_slope, INPUT, counted, None, MOVED, exchange
    )  # fmt: skip


@filled
def batch_stats(
    x: NDArray[Any],
    *,
    layout: str | None = None,
    mask: NDArray[np.bool_] | None = None,
    lengths: ArrayLike | None = None,
    length_axis: str | None = None,
    nan_policy: str = "propagate",
    nodata: ArrayLike | None = None,
) -> BatchStats:
    """Return count, mean, M2 and extremes of each channel; of integers the sums, too.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32, float64, uint8, int8, uint16 or int16
        The batch, or a part of one: statistics of parts can be merged. Those of integers
        are exact, and need neither a conversion nor a copy of `x`.
    layout : str, optional
        As for `batch_norm`.
    {counted}
    nan_policy : {"propagate", "omit", "raise"}, default "propagate"
        What to do about NaN (not Inf) in what the others leave: count it, leave it out of
        its channel, or raise.
    nodata : float or array_like of shape (C,), optional
        A value that does not count, compared by ``==``; NaN means NaN. One that the dtype
        of `x` cannot hold matches nothing.

    Returns
    -------
    BatchStats

    Raises
    ------
    ValueError
        For a wrong rank, layout, policy or shape; for NaN with ``nan_policy="raise"``.
    TypeError
        For a wrong dtype, or what is no array where one is expected.

    Notes
    -----
    A channel of which nothing is left out has the bits that it has without `mask`,
    `nan_policy` and `nodata`.

    References
    ----------
    T. Chan, G. Golub, R. LeVeque, "Algorithms for Computing the Sample
    Variance", 1983; docs/numerics.md has the bound of the error.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> stats = fastbn.batch_stats(x)
    >>> stats.mean, stats.var()
    (array([ 2., 20.]), array([  1., 100.]))
    >>> stats = fastbn.batch_stats(np.array([[0, 255], [7, 255]], np.uint8), nodata=0)
    >>> stats.count, stats.mean
    (array([1., 2.]), array([  7., 255.]))
    """
    return statistics(x, layout, counted_of(mask, lengths, length_axis), nan_policy, nodata)
