# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm folded into the layer before it, for inference without normalisation.

Arithmetic on parameters alone, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastbn import _view

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Float64, Floating, Kept, Vector


def _wide(array: Vector | None, name: str, channels: int, missing: float) -> Float64:
    if array is None:
        return np.full(channels, missing)
    return _view.check_vector(array, name, channels).astype(np.float64)


def _channels(running_mean: Kept) -> int:
    if _view.check_array(running_mean, "running_mean").ndim != 1:
        raise ValueError(f"running_mean: expected shape (C,), got {running_mean.shape}")
    return running_mean.shape[0]


def scale_shift(
    running_mean: Kept,
    running_var: Kept,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
) -> tuple[Float64, Float64]:
    r"""Return what batch norm in inference multiplies by and adds.

    .. math:: scale = weight / \sqrt{running\_var + eps} \qquad
              shift = bias - running\_mean \cdot scale

    so that ``batch_norm(x, ...)`` is ``x * scale + shift``, but for rounding:
    where the mean is large beside the deviation, the sum loses digits that
    `batch_norm` keeps.

    Parameters
    ----------
    running_mean, running_var, weight, bias, eps
        As for `batch_norm`.

    Returns
    -------
    scale, shift : ndarray of float64, shape (C,)

    Raises
    ------
    ValueError, TypeError
        As `batch_norm`.

    References
    ----------
    Ioffe & Szegedy 2015, algorithm 2, line 11.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.scale_shift(np.array([1.0]), np.array([4.0]), eps=0.0)
    (array([0.5]), array([-0.5]))
    """
    channels = _channels(running_mean)
    mean = _wide(running_mean, "running_mean", channels, 0.0)
    var = _view.check_vector(running_var, "running_var", channels).astype(np.float64)
    with np.errstate(all="ignore"):
        scale = _wide(weight, "weight", channels, 1.0) / np.sqrt(var + _view.check_eps(eps))
        return scale, _wide(bias, "bias", channels, 0.0) - mean * scale


def _factors(kernel: NDArray, layout: str, scale: Float64) -> Float64:
    # The scale of each element's output channel, in a shape that broadcasts.
    axis = layout.index("O")
    size = kernel.shape[axis]
    groups = scale.size // size if size else 0
    grouped = (
        layout.startswith("IO")
        and groups > 1
        and groups * size == scale.size
        and kernel.shape[0] % groups == 0
    )
    if size != scale.size and not grouped:
        raise ValueError(
            f"kernel: expected {scale.size} output channels, as running_mean has, on axis {axis} "
            f"of layout {layout!r}, got shape {kernel.shape}"
        )
    shape = [1] * kernel.ndim
    shape[axis] = size
    if grouped:  # transposed: each group of inputs has output channels of its own
        scale = np.repeat(scale.reshape(groups, -1), kernel.shape[0] // groups, axis=0)
        shape[0] = kernel.shape[0]
    return scale.reshape(shape)


def fold_batch_norm(
    kernel: NDArray[Floating],
    kernel_bias: Vector | None,
    running_mean: Kept,
    running_var: Kept,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    kernel_layout: str = "OIHW",
) -> tuple[NDArray[Floating], NDArray[Floating]]:
    r"""Return kernel and bias of a layer that includes the batch norm behind it.

    .. math:: kernel' = kernel \cdot scale \qquad
              kernel\_bias' = (kernel\_bias - running\_mean) \cdot scale + bias

    with the scale of `scale_shift` for each output channel.

    Parameters
    ----------
    kernel : ndarray of float16, bfloat16, float32 or float64
        Of a convolution, a transposed one or a linear layer.
    kernel_bias : ndarray of shape (C,), or None
        The layer's bias.
    running_mean, running_var, weight, bias, eps
        As for `batch_norm` in inference; C is the number of output channels.
    kernel_layout : str, default "OIHW"
        A letter for each axis of `kernel`, ``O`` for the output channels:
        ``"OIHW"``, ``"HWIO"``, ``"OIDHW"``, ``"OI"`` for a linear layer. A
        convolution in groups, or depthwise, is no exception. Transposed:
        ``"IOHW"``, where in groups ``O`` counts the channels of one group.

    Returns
    -------
    kernel : ndarray
        New, of the shape and dtype of `kernel`.
    kernel_bias : ndarray of shape (C,)
        New, of the dtype of `kernel`.

    Raises
    ------
    ValueError, TypeError
        For arrays that `batch_norm` would refuse; for a layout that does not
        fit `kernel`, and output channels that do not fit C.

    Notes
    -----
    Computed in float64 and rounded once. The folded layer is no batch norm any
    more: it cannot be trained as one. Zero padding is as exact as elsewhere,
    since the padding comes before the kernel.

    References
    ----------
    Ioffe & Szegedy 2015, section 3.1: inference is a fixed linear transform.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> kernel = np.array([[1.0, 2.0]])  # one output, two inputs
    >>> mean, var = np.array([3.0]), np.array([4.0])
    >>> fastbn.fold_batch_norm(kernel, None, mean, var, eps=0.0, kernel_layout="OI")
    (array([[0.5, 1. ]]), array([-1.5]))
    """
    _view.check_array(kernel, "kernel")
    _view.check_kernel_layout(kernel_layout, kernel)
    scale, _ = scale_shift(running_mean, running_var, weight, bias, eps)
    old_bias = _wide(kernel_bias, "kernel_bias", scale.size, 0.0)
    factors = _factors(kernel, kernel_layout, scale)
    with np.errstate(all="ignore"):
        new_bias = (old_bias - running_mean) * scale + _wide(bias, "bias", scale.size, 0.0)
        folded = kernel.astype(np.float64) * factors
        return folded.astype(kernel.dtype), new_bias.astype(kernel.dtype)
