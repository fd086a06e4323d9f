# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastbn import _view
from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Vector


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
    x : ndarray of float16, bfloat16, float32 or float64
        The batch. Any strides, any byte order; it may be read-only.
    running_mean, running_var : ndarray of shape (C,), float32 or float64, or None
        Running statistics. Updated in place in training, where given; needed
        otherwise. The variance kept here is unbiased (divided by n - 1).
    weight, bias : ndarray of shape (C,), optional
        The affine part; 1 and 0 if not given. Of any dtype that `x` may have,
        whichever that is; half precision is widened.
    training : bool, default False
        Normalise with the statistics of the batch.
    momentum : float, default 0.1
        The share of the new value: ``(1 - momentum) * running + momentum * batch``.
    eps : float, default 1e-5
        Added to the variance, inside the root. In training more than 0.
    layout : str, optional
        A letter for each axis of `x`, with one ``C`` for the channels, such as
        ``"NHWC"``; or ``"N...C"``: channels last at any rank. Without it,
        channels are axis 1.
    activation : {"relu", "relu6", "leaky_relu", "silu"}, optional
        What `y` goes through, in the same pass. NaN stays NaN.
    negative_slope : float, default 0.01
        Of the leaky ReLU, below 0.
    residual : ndarray of the shape and dtype of `x`, optional
        Added before the activation. Its memory order may differ from that of `x`,
        at the price of a copy.
    out : ndarray of the shape and dtype of `x`, optional
        Where to write `y`: `x` itself, or memory apart from all inputs.

    Returns
    -------
    y : ndarray
        `out`, or a new array of the shape, dtype and memory order of `x`.

    Raises
    ------
    ValueError
        For a wrong shape, rank, layout, `eps` or `momentum`; for read-only or
        overlapping memory that would be written; in training, for a batch with
        one value per channel.
    TypeError
        For anything that is not an array of such a dtype, and for running
        arrays that are missing when `training` is False.

    Notes
    -----
    An empty batch gives an empty `y` and leaves the running arrays alone. All
    arguments are checked before anything is written.

    bfloat16 is ``ml_dtypes.bfloat16``. Both half types are computed in float32,
    and statistics in float64, whatever `x` is; `y` is rounded at the end.

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
    return _view.forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        layout,
        activation,
        negative_slope,
        residual,
        out,
        True,
    )


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
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    x, weight, bias, running_mean, running_var, training, momentum, eps, layout
        As for `batch_norm`, but by keyword from `running_mean` on: four arrays
        of shape (C,), two of them written, are easily mixed up.
    activation, negative_slope, residual, out
        As for `batch_norm`.

    Returns
    -------
    y : ndarray
        As from `batch_norm`.
    mean : ndarray of float64, shape (C,)
        The mean that was subtracted.
    invstd : ndarray of float64, shape (C,)
        ``1 / sqrt(var + eps)``. With ``training=False`` these two are of the
        running statistics, as the backward of a frozen layer needs them.

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`.

    Notes
    -----
    Of an empty batch in training, mean is 0 and invstd NaN.

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
    return _view.forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        training,
        momentum,
        eps,
        layout,
        activation,
        negative_slope,
        residual,
        out,
        False,
    )


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
    dy : ndarray of the shape and dtype of `x`
        The gradient of the loss with respect to `y`; its memory order may
        differ from that of `x`, at the price of a copy.
    x : ndarray of float16, bfloat16, float32 or float64
        The input of the forward pass.
    mean, invstd : ndarray of shape (C,), float64 or float32
        What `batch_norm_forward` returned. float32 costs accuracy where the
        mean is large.
    weight, bias : ndarray of shape (C,), optional
        As in the forward pass; the bias matters to an activation only.
    training : bool, default True
        Whether the forward pass used the statistics of the batch.
    layout : str, optional
        As in the forward pass.
    activation, negative_slope, residual : optional
        As in the forward pass; what the activation had before it is computed again.
    out : ndarray of the shape and dtype of `x`, optional
        Where to write `dx`: `dy` or `x` itself, or memory apart from all inputs.

    Returns
    -------
    dx : ndarray
        `out`, or a new array of the shape, dtype and memory order of `x`.
    dweight, dbias : ndarray of shape (C,)
        Of the dtype of `weight`; without it float64 for a float64 `x`, else
        float32.
    dresidual : ndarray
        Only with a residual: its gradient, a new array like `dx`.

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
    return _view.backward(
        dy,
        x,
        mean,
        invstd,
        weight,
        bias,
        training,
        layout,
        activation,
        negative_slope,
        residual,
        out,
        False,
    )


def batch_stats(x: NDArray[Floating], *, layout: str | None = None) -> BatchStats:
    """Return count, mean and M2 of each channel, in float64.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        The batch, or a part of one: statistics of parts can be merged.
    layout : str, optional
        As for `batch_norm`.

    Returns
    -------
    BatchStats

    Raises
    ------
    ValueError, TypeError
        For a wrong rank, layout or dtype, as `batch_norm`.

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
    """
    count, mean, m2 = _view.statistics(x, layout)
    return BatchStats(count, mean, m2)
