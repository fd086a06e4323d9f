# SPDX-License-Identifier: BSD-3-Clause
"""Group norm and instance norm: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from fastbn import _view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Vector


def group_norm(
    x: NDArray[Floating],
    num_groups: SupportsIndex,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> NDArray[Floating]:
    r"""Normalise groups of channels, as ``torch.nn.functional.group_norm``.

    .. math:: y = (x - mean) / \sqrt{var + eps} \cdot weight + bias

    Mean and variance are those of one group: of ``C / num_groups`` neighbouring
    channels in one of the N instances, over all other axes.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        The input. Any strides, any byte order; it may be read-only.
    num_groups : int
        G, the number of groups; it divides the number of channels.
    weight, bias : ndarray of shape (C,), optional
        The affine part; 1 and 0 if not given. Of any dtype that `x` may have,
        whichever that is; half precision is widened.
    eps : float, default 1e-5
        Added to the variance, inside the root; more than 0.
    layout : str, optional
        A letter for each axis of `x`, with one ``N`` and one ``C``, such as
        ``"NHWC"``; or ``"N...C"``: channels last at any rank. Without it,
        instances are axis 0 and channels axis 1.
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
        For a wrong shape, rank, layout, `num_groups` or `eps`; for read-only or
        overlapping memory that would be written; for one value per group.
    TypeError
        For anything that is not an array of such a dtype.

    Notes
    -----
    An empty `x` gives an empty `y`. All arguments are checked before anything
    is written.

    bfloat16 is ``ml_dtypes.bfloat16``. Both half types are computed in float32,
    and statistics in float64, whatever `x` is; `y` is rounded at the end.

    References
    ----------
    Y. Wu, K. He, "Group Normalization", 2018: equations 1, 2 and 7.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]], dtype=np.float32)
    >>> fastbn.group_norm(x, 2).round(3)
    array([[-1.,  1., -1.,  1.]], dtype=float32)
    """
    return _view.group_forward(
        x, num_groups, weight, bias, eps, layout, activation, negative_slope, residual, out, True
    )


def group_norm_forward(
    x: NDArray[Floating],
    num_groups: SupportsIndex,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    x, num_groups, weight, bias, eps, layout
        As for `group_norm`.
    activation, negative_slope, residual, out
        As for `group_norm`.

    Returns
    -------
    y : ndarray
        As from `group_norm`.
    mean : ndarray of float64, shape (N, G)
        The mean that was subtracted.
    invstd : ndarray of float64, shape (N, G)
        ``1 / sqrt(var + eps)``.

    Raises
    ------
    ValueError, TypeError
        As `group_norm`.

    References
    ----------
    Wu & He 2018, equations 1, 2 and 7.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 3.0, 10.0, 30.0]])
    >>> y, mean, invstd = fastbn.group_norm_forward(x, 2)
    >>> mean
    array([[ 2., 20.]])
    >>> invstd.round(4)
    array([[1. , 0.1]])
    """
    return _view.group_forward(
        x, num_groups, weight, bias, eps, layout, activation, negative_slope, residual, out, False
    )


def group_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    num_groups: SupportsIndex,
    weight: Vector | None = None,
    *,
    bias: Vector | None = None,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    r"""Return the gradients with respect to `x`, weight and bias.

    With :math:`\hat x = (x - mean) \cdot invstd`, :math:`g = dy \cdot weight` and
    means over a group,

    .. math:: dx = invstd \cdot (g - \overline{g} - \hat x \, \overline{g \hat x})

    The gradients of the parameters are sums over all axes but the channels'.

    Parameters
    ----------
    dy : ndarray of the shape and dtype of `x`
        The gradient of the loss with respect to `y`; its memory order may
        differ from that of `x`, at the price of a copy.
    x : ndarray of float16, bfloat16, float32 or float64
        The input of the forward pass.
    mean, invstd : ndarray of shape (N, G), float64 or float32
        What `group_norm_forward` returned. float32 costs accuracy where the
        mean is large.
    num_groups : int
        As in the forward pass.
    weight, bias : ndarray of shape (C,), optional
        As in the forward pass; the bias matters to an activation only.
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
        As `group_norm`.

    References
    ----------
    Wu & He 2018, equations 1, 2 and 7, differentiated.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> y, mean, invstd = fastbn.group_norm_forward(x, 1)
    >>> dy = np.array([[1.0, 0.0, 0.0]])
    >>> dx, dweight, dbias = fastbn.group_norm_backward(dy, x, mean, invstd, 1)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    >>> dbias
    array([1., 0., 0.])
    """
    return _view.group_backward(
        dy,
        x,
        mean,
        invstd,
        num_groups,
        weight,
        bias,
        layout,
        activation,
        negative_slope,
        residual,
        out,
    )


def instance_norm(
    x: NDArray[Floating],
    running_mean: Kept | None = None,
    running_var: Kept | None = None,
    weight: Vector | None = None,
    bias: Vector | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> NDArray[Floating]:
    r"""Normalise each channel of each instance, as ``torch.nn.functional.instance_norm``.

    .. math:: y = (x - mean) / \sqrt{var + eps} \cdot weight + bias

    With `use_input_stats`, mean and variance are those of one channel in one of
    the N instances, and the running arrays are moved towards their averages
    over the instances; otherwise they are the running arrays.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        The input. Any strides, any byte order; it may be read-only.
    running_mean, running_var : ndarray of shape (C,), float32 or float64, optional
        Running statistics. Updated in place with `use_input_stats`, where given;
        needed otherwise. The variance kept here is unbiased (divided by n - 1).
    weight, bias : ndarray of shape (C,), optional
        The affine part; 1 and 0 if not given. Of any dtype that `x` may have,
        whichever that is; half precision is widened.
    use_input_stats : bool, default True
        Normalise with the statistics of `x`.
    momentum : float, default 0.1
        The share of the new value: ``(1 - momentum) * running + momentum * average``.
    eps : float, default 1e-5
        Added to the variance, inside the root. With `use_input_stats` more than 0.
    layout : str, optional
        As for `group_norm`.
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
        overlapping memory that would be written; with `use_input_stats`, for
        one value per channel of an instance.
    TypeError
        For anything that is not an array of such a dtype, and for running
        arrays that are missing when `use_input_stats` is False.

    Notes
    -----
    An empty `x` leaves the running arrays alone. On half precision see `group_norm`.

    References
    ----------
    D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing
    Ingredient for Fast Stylization", 2016: equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]], dtype=np.float32)
    >>> mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    >>> fastbn.instance_norm(x, mean, var).round(3)
    array([[[-1.,  1.],
            [-1.,  1.]]], dtype=float32)
    >>> mean, var
    (array([0.2, 2. ], dtype=float32), array([ 1.1, 20.9], dtype=float32))
    """
    return _view.instance_forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        use_input_stats,
        momentum,
        eps,
        layout,
        activation,
        negative_slope,
        residual,
        out,
        True,
    )


def instance_norm_forward(
    x: NDArray[Floating],
    weight: Vector | None = None,
    bias: Vector | None = None,
    *,
    running_mean: Kept | None = None,
    running_var: Kept | None = None,
    use_input_stats: bool = True,
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
    x, weight, bias, running_mean, running_var, use_input_stats, momentum, eps, layout
        As for `instance_norm`, but by keyword from `running_mean` on: four arrays
        of shape (C,), two of them written, are easily mixed up.
    activation, negative_slope, residual, out
        As for `instance_norm`.

    Returns
    -------
    y : ndarray
        As from `instance_norm`.
    mean : ndarray of float64, shape (N, C)
        The mean that was subtracted.
    invstd : ndarray of float64, shape (N, C)
        ``1 / sqrt(var + eps)``. With ``use_input_stats=False`` the rows of both
        are all alike.

    Raises
    ------
    ValueError, TypeError
        As `instance_norm`.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky 2016, equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> y, mean, invstd = fastbn.instance_norm_forward(x)
    >>> mean
    array([[ 2., 20.]])
    >>> invstd.round(4)
    array([[1. , 0.1]])
    """
    return _view.instance_forward(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        use_input_stats,
        momentum,
        eps,
        layout,
        activation,
        negative_slope,
        residual,
        out,
        False,
    )


def instance_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None = None,
    *,
    bias: Vector | None = None,
    layout: str | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    """Return the gradients with respect to `x`, weight and bias.

    They are those of `group_norm_backward` with a group for each channel, for
    statistics that are those of `x`.

    Parameters
    ----------
    dy : ndarray of the shape and dtype of `x`
        The gradient of the loss with respect to `y`; its memory order may
        differ from that of `x`, at the price of a copy.
    x : ndarray of float16, bfloat16, float32 or float64
        The input of the forward pass.
    mean, invstd : ndarray of shape (N, C), float64 or float32
        What `instance_norm_forward` returned. float32 costs accuracy where the
        mean is large.
    weight, bias : ndarray of shape (C,), optional
        As in the forward pass; the bias matters to an activation only.
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
        As `instance_norm`.

    Notes
    -----
    After ``use_input_stats=False`` the statistics do not depend on `x`, and
    `batch_norm_backward` with ``training=False`` has the gradients, given one
    row of them.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky 2016, equation 3, differentiated.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[[1.0, 2.0, 6.0]]])
    >>> y, mean, invstd = fastbn.instance_norm_forward(x)
    >>> dy = np.array([[[1.0, 0.0, 0.0]]])
    >>> dx, dweight, dbias = fastbn.instance_norm_backward(dy, x, mean, invstd)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    >>> dbias
    array([1.])
    """
    return _view.instance_backward(
        dy, x, mean, invstd, weight, bias, layout, activation, negative_slope, residual, out
    )
