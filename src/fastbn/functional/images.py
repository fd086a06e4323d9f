# SPDX-License-Identifier: BSD-3-Clause
"""Images to what a network takes, and back: names, defaults, documentation. No arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn._numpy import binding

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray


def normalize(
    x: NDArray[Any],
    mean: ArrayLike,
    std: ArrayLike,
    *,
    layout: str | None = None,
    out_layout: str | None = None,
    max_value: float = 1.0,
    dtype: DTypeLike = np.float32,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    r"""Return images as floats of mean 0 and deviation 1, in any layout, in one pass.

    .. math:: y = (x / max\_value - mean) / std

    Parameters
    ----------
    x : ndarray of uint8, int8, uint16, int16, float16, bfloat16, float32 or float64
        The images. Any strides, any byte order; it may be read-only.
    mean, std : float or array_like of shape (C,)
        Of each channel, in units of `max_value`; ``std`` is more than 0. Those of
        `batch_stats` are in units of 1.
    layout : str, optional
        A letter for each axis of `x`, with one ``C`` for the channels, such as ``"NHWC"``; or
        ``"N...C"``: channels last at any rank. Without it, channels are axis 1.
    out_layout : str, optional
        The letters of `layout` in another order, such as ``"NCHW"``: that of the axes of `y`.
    max_value : float, default 1.0
        What stands for 1, such as 255.
    dtype : dtype, default float32
        Of `y`: float32, float64, float16 or bfloat16.
    out : ndarray, optional
        Where to write `y`: of its shape and dtype, of any strides, apart from `x`.

    Returns
    -------
    y : ndarray
        `out`, or a new array: C-contiguous with an `out_layout`, else in the memory order of
        `x`.

    Raises
    ------
    ValueError
        For a wrong shape or layout; for numbers that are not finite, or not more than 0; for
        an `out` that is read-only or overlaps `x`.
    TypeError
        For another dtype, and for what is no array or number.

    Notes
    -----
    The error is at most one unit in the last place of `y`, plus 2**-22 (float64: 2**-51)
    times ``1 / (max_value * std)`` for integers, or ``mean / std`` for floats. Half types are
    the float32 result, rounded.

    See Also
    --------
    denormalize : The inverse.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> image = np.array([[[0, 51], [102, 255]]], np.uint8)
    >>> y = fastbn.normalize(image, 0.5, [0.5, 0.25], layout="HWC", out_layout="CHW",
    ...                      max_value=255)
    >>> y.round(2).tolist()
    [[[-1.0, -0.20000000298023224]], [[-1.2000000476837158, 2.0]]]
    """
    return binding.convert_image(x, mean, std, layout, out_layout, max_value, dtype, out, False)


def denormalize(
    y: NDArray[Any],
    mean: ArrayLike,
    std: ArrayLike,
    *,
    layout: str | None = None,
    out_layout: str | None = None,
    max_value: float = 1.0,
    dtype: DTypeLike = np.uint8,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    r"""Return what `normalize` made floats of: images, in any layout, in one pass.

    .. math:: x = (y \cdot std + mean) \cdot max\_value

    Parameters
    ----------
    y : ndarray of float16, bfloat16, float32 or float64
        What `normalize` returned. Any strides, any byte order; it may be read-only.
    mean, std, layout, out_layout, max_value
        As for `normalize`; `layout` is that of `y`.
    dtype : dtype, default uint8
        Of `x`: any that `normalize` takes. Integers are rounded to the nearest, of two to the
        even one; what is beyond their range, infinity too, becomes its end, and NaN 0.
    out : ndarray, optional
        Where to write `x`: of its shape and dtype, of any strides, apart from `y`.

    Returns
    -------
    x : ndarray
        `out`, or a new array: C-contiguous with an `out_layout`, else in the memory order of
        `y`.

    Raises
    ------
    ValueError, TypeError
        As `normalize`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y = np.array([[-1.0, 0.0, 1.0, 9.0, np.nan]], np.float32)
    >>> fastbn.denormalize(y, 0.5, 0.5, layout="CN", max_value=255)
    array([[  0, 128, 255, 255,   0]], dtype=uint8)
    """
    return binding.convert_image(y, mean, std, layout, out_layout, max_value, dtype, out, True)
