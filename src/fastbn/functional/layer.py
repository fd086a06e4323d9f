# SPDX-License-Identifier: BSD-3-Clause
"""Layer norm and RMS norm: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastbn import _view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Shape, Vector


def layer_norm(
    x: NDArray[Floating],
    normalized_shape: Shape,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> NDArray[Floating]:
    r"""Normalise over the last axes, as ``torch.nn.functional.layer_norm``.

    .. math:: y = (x - mean) / \sqrt{var + eps} \cdot weight + bias

    Mean and variance are those of one sample: of the values that differ in the
    last axes only.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        The input. Any strides, any byte order; it may be read-only.
    normalized_shape : int or sequence of int
        The lengths of the last axes of `x`, over which it is normalised.
    weight, bias : ndarray of shape `normalized_shape`, optional
        The affine part; 1 and 0 if not given. Of any dtype that `x` may have,
        whichever that is; half precision is widened.
    eps : float, default 1e-5
        Added to the variance, inside the root; more than 0.
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
        For a wrong shape, `normalized_shape` or `eps`; for read-only or
        overlapping memory that would be written.
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
    J. Ba, J. Kiros, G. Hinton, "Layer Normalization", 2016: equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]], dtype=np.float32)
    >>> fastbn.layer_norm(x, 2).round(3)
    array([[-1.,  1.],
           [-1.,  1.]], dtype=float32)
    """
    return _view.layer_forward(
        x,
        normalized_shape,
        weight,
        bias,
        eps,
        activation,
        negative_slope,
        residual,
        out,
        True,
        True,
    )


def layer_norm_forward(
    x: NDArray[Floating],
    normalized_shape: Shape,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], Float64, Float64]:
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    x, normalized_shape, weight, bias, eps
        As for `layer_norm`.
    activation, negative_slope, residual, out
        As for `layer_norm`.

    Returns
    -------
    y : ndarray
        As from `layer_norm`.
    mean : ndarray of float64, of the shape of `x` without its last axes
        The mean that was subtracted.
    invstd : ndarray of float64, of the same shape
        ``1 / sqrt(var + eps)``.

    Raises
    ------
    ValueError, TypeError
        As `layer_norm`.

    References
    ----------
    Ba, Kiros & Hinton 2016, equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> y, mean, invstd = fastbn.layer_norm_forward(x, 2)
    >>> mean
    array([ 2., 20.])
    >>> invstd.round(4)
    array([1. , 0.1])
    """
    return _view.layer_forward(
        x,
        normalized_shape,
        weight,
        bias,
        eps,
        activation,
        negative_slope,
        residual,
        out,
        True,
        False,
    )


def layer_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    normalized_shape: Shape,
    weight: Vector | None = None,
    *,
    bias: Vector | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    r"""Return the gradients with respect to `x`, weight and bias.

    With :math:`\hat x = (x - mean) \cdot invstd`, :math:`g = dy \cdot weight` and
    means over a sample,

    .. math:: dx = invstd \cdot (g - \overline{g} - \hat x \, \overline{g \hat x})

    The gradients of the parameters are sums over all samples.

    Parameters
    ----------
    dy : ndarray of the shape and dtype of `x`
        The gradient of the loss with respect to `y`; its memory order may
        differ from that of `x`, at the price of a copy.
    x : ndarray of float16, bfloat16, float32 or float64
        The input of the forward pass.
    mean, invstd : ndarray of float64 or float32
        What `layer_norm_forward` returned. float32 costs accuracy where the
        mean is large.
    normalized_shape : int or sequence of int
        As in the forward pass.
    weight, bias : ndarray of shape `normalized_shape`, optional
        As in the forward pass; the bias matters to an activation only.
    activation, negative_slope, residual : optional
        As in the forward pass; what the activation had before it is computed again.
    out : ndarray of the shape and dtype of `x`, optional
        Where to write `dx`: `dy` or `x` itself, or memory apart from all inputs.

    Returns
    -------
    dx : ndarray
        `out`, or a new array of the shape, dtype and memory order of `x`.
    dweight, dbias : ndarray of shape `normalized_shape`
        Of the dtype of `weight`; without it float64 for a float64 `x`, else
        float32.
    dresidual : ndarray
        Only with a residual: its gradient, a new array like `dx`.

    Raises
    ------
    ValueError, TypeError
        As `layer_norm`.

    References
    ----------
    Ba, Kiros & Hinton 2016, equation 3, differentiated.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> y, mean, invstd = fastbn.layer_norm_forward(x, 3)
    >>> dy = np.array([[1.0, 0.0, 0.0]])
    >>> dx, dweight, dbias = fastbn.layer_norm_backward(dy, x, mean, invstd, 3)
    >>> dx.round(3).ravel().tolist()
    [0.176, -0.22, 0.044]
    >>> dbias
    array([1., 0., 0.])
    """
    return _view.layer_backward(
        dy,
        x,
        mean,
        invstd,
        normalized_shape,
        weight,
        bias,
        activation,
        negative_slope,
        residual,
        out,
        True,
    )


def rms_norm(
    x: NDArray[Floating],
    normalized_shape: Shape,
    weight: Vector | None = None,
    eps: float | None = None,
    *,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> NDArray[Floating]:
    r"""Divide by the root of the mean square, as ``torch.nn.functional.rms_norm``.

    .. math:: y = x / \sqrt{\overline{x^2} + eps} \cdot weight

    The mean is over one sample: over the values that differ in the last axes only.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64
        The input. Any strides, any byte order; it may be read-only.
    normalized_shape : int or sequence of int
        The lengths of the last axes of `x`, over which it is normalised.
    weight : ndarray of shape `normalized_shape`, optional
        1 if not given. Of any dtype that `x` may have, whichever that is; half
        precision is widened.
    eps : float, optional
        Added to the mean square, inside the root. Without it, the machine
        epsilon of what is computed with: float64 for float64 `x`, else float32.
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
    ValueError, TypeError
        As `layer_norm`.

    Notes
    -----
    On empty input and half precision see `layer_norm`.

    References
    ----------
    B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019:
    equation 4.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 7.0], [-10.0, 70.0]], dtype=np.float32)
    >>> fastbn.rms_norm(x, 2).round(3)
    array([[ 0.2,  1.4],
           [-0.2,  1.4]], dtype=float32)
    """
    return _view.layer_forward(
        x,
        normalized_shape,
        weight,
        None,
        eps,
        activation,
        negative_slope,
        residual,
        out,
        False,
        True,
    )


def rms_norm_forward(
    x: NDArray[Floating],
    normalized_shape: Shape,
    weight: Vector | None = None,
    eps: float | None = None,
    *,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> tuple[NDArray[Floating], Float64]:
    """Normalise, and return what the backward pass needs beside `x`.

    Parameters
    ----------
    x, normalized_shape, weight, eps
        As for `rms_norm`.
    activation, negative_slope, residual, out
        As for `rms_norm`.

    Returns
    -------
    y : ndarray
        As from `rms_norm`.
    invrms : ndarray of float64, of the shape of `x` without its last axes
        ``1 / sqrt(mean(x**2) + eps)``.

    Raises
    ------
    ValueError, TypeError
        As `layer_norm`.

    References
    ----------
    Zhang & Sennrich 2019, equation 4.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 7.0], [-10.0, 70.0]])
    >>> y, invrms = fastbn.rms_norm_forward(x, 2)
    >>> invrms.round(4)
    array([0.2 , 0.02])
    """
    return _view.layer_forward(
        x,
        normalized_shape,
        weight,
        None,
        eps,
        activation,
        negative_slope,
        residual,
        out,
        False,
        False,
    )


def rms_norm_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    invrms: Kept,
    normalized_shape: Shape,
    weight: Vector | None = None,
    *,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    residual: NDArray[Floating] | None = None,
    out: NDArray[Floating] | None = None,
) -> Gradients[Floating]:
    r"""Return the gradients with respect to `x` and weight.

    With :math:`\hat x = x \cdot invrms`, :math:`g = dy \cdot weight` and means over
    a sample,

    .. math:: dx = invrms \cdot (g - \hat x \, \overline{g \hat x})

    The gradient of the weight is a sum over all samples.

    Parameters
    ----------
    dy : ndarray of the shape and dtype of `x`
        The gradient of the loss with respect to `y`; its memory order may
        differ from that of `x`, at the price of a copy.
    x : ndarray of float16, bfloat16, float32 or float64
        The input of the forward pass.
    invrms : ndarray of float64 or float32
        What `rms_norm_forward` returned.
    normalized_shape : int or sequence of int
        As in the forward pass.
    weight : ndarray of shape `normalized_shape`, optional
        As in the forward pass.
    activation, negative_slope, residual : optional
        As in the forward pass; what the activation had before it is computed again.
    out : ndarray of the shape and dtype of `x`, optional
        Where to write `dx`: `dy` or `x` itself, or memory apart from all inputs.

    Returns
    -------
    dx : ndarray
        `out`, or a new array of the shape, dtype and memory order of `x`.
    dweight : ndarray of shape `normalized_shape`
        Of the dtype of `weight`; without it float64 for a float64 `x`, else
        float32.
    dresidual : ndarray
        Only with a residual: its gradient, a new array like `dx`.

    Raises
    ------
    ValueError, TypeError
        As `layer_norm`.

    References
    ----------
    Zhang & Sennrich 2019, equation 4, differentiated.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[1.0, 7.0]])
    >>> y, invrms = fastbn.rms_norm_forward(x, 2)
    >>> dx, dweight = fastbn.rms_norm_backward(np.array([[1.0, 0.0]]), x, invrms, 2)
    >>> dx.round(3)
    array([[ 0.196, -0.028]])
    >>> dweight.round(3)
    array([0.2, 0. ])
    """
    return _view.layer_backward(
        dy,
        x,
        None,
        invrms,
        normalized_shape,
        weight,
        None,
        activation,
        negative_slope,
        residual,
        out,
        False,
    )
