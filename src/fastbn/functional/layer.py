# SPDX-License-Identifier: BSD-3-Clause
"""Layer norm and RMS norm: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastbn._docs import filled
from fastbn._numpy import CENTRED, ONLY_Y, UNCENTRED, WITH_STATISTICS, binding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Shape, Vector


@filled
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
    {x}
    {normalized_shape}
    {affine: `normalized_shape`}
    {eps}
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
        For a wrong shape, `normalized_shape` or `eps`; for read-only or
        overlapping memory that would be written.
    TypeError
        For anything that is not an array of such a dtype.

    Notes
    -----
    {empty}

    {half}

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
    return binding.layer_forward(
        x, weight, bias, residual, out, normalized_shape, eps, activation, negative_slope,
        CENTRED, ONLY_Y
    )  # fmt: skip


@filled
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
    {x}
    {normalized_shape}
    {affine: `normalized_shape`}
    {eps}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}
    {mean_and_invstd: of the shape of `x` without its last axes}

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
    return binding.layer_forward(
        x, weight, bias, residual, out, normalized_shape, eps, activation, negative_slope,
        CENTRED, WITH_STATISTICS
    )  # fmt: skip


@filled
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
    {dy}
    {forward_x}
    {forward_statistics: of the shape of `x` without its last axes}
    {forward_shape}
    {forward_affine: `normalized_shape`}
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
    return binding.layer_backward(
        dy, x, mean, invstd, weight, bias, residual, out, normalized_shape, activation,
        negative_slope, CENTRED
    )  # fmt: skip


@filled
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
    {x}
    {normalized_shape}
    {rms_weight}
    {rms_eps}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}

    Raises
    ------
    ValueError, TypeError
        As `layer_norm`.

    Notes
    -----
    {empty}

    {half}

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
    return binding.layer_forward(
        x, weight, None, residual, out, normalized_shape, eps, activation, negative_slope,
        UNCENTRED, ONLY_Y
    )  # fmt: skip


@filled
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
    {x}
    {normalized_shape}
    {rms_weight}
    {rms_eps}
    {activation}
    {negative_slope}
    {residual}
    {out}

    Returns
    -------
    {y}
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
    return binding.layer_forward(
        x, weight, None, residual, out, normalized_shape, eps, activation, negative_slope,
        UNCENTRED, WITH_STATISTICS
    )  # fmt: skip


@filled
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
    {dy}
    {forward_x}
    invrms : ndarray of the shape of `x` without its last axes, float64 or float32
        What the forward pass returned.
    {forward_shape}
    weight : ndarray of shape `normalized_shape`, optional
        As in the forward pass.
    {forward_fusion}
    {dx_out}

    Returns
    -------
    {dx}
    {dparameters: dweight}
    {dresidual}

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
    return binding.layer_backward(
        dy, x, None, invrms, weight, None, residual, out, normalized_shape, activation,
        negative_slope, UNCENTRED
    )  # fmt: skip
