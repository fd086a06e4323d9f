# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm folded into the layer before or behind it, for inference without normalisation.

A kernel of any layout is seen as (groups, outputs of a group, inputs of a group, taps...):

    "OIHW", in any order    a convolution, in groups or not; "OI" is a linear layer
    "IOHW", I and O first   a transposed convolution, in groups or not
    "HWCM", in any order    a depthwise convolution, as Keras and TensorFlow keep it

Arithmetic on parameters alone, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastbn._numpy import binding
from fastbn.functional.rounding import rounded

if TYPE_CHECKING:
    from typing import SupportsIndex

    from numpy.typing import NDArray

    from fastbn._types import Float64, Floating, Kept, Vector


def _wide(array: Vector | None, name: str, channels: int, missing: float) -> Float64:
    if array is None:
        return np.full(channels, missing)
    return binding.check_vector(array, name, channels).astype(np.float64)


def _channels(running_mean: Kept) -> int:
    if binding.check_array(running_mean, "running_mean").ndim != 1:
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
    var = binding.check_vector(running_var, "running_var", channels).astype(np.float64)
    with np.errstate(all="ignore"):
        scale = _wide(weight, "weight", channels, 1.0) / np.sqrt(var + binding.check_eps(eps))
        return scale, _wide(bias, "bias", channels, 0.0) - mean * scale


def _check_layout(layout: str, kernel: NDArray, needed: str) -> None:
    # A letter for each axis of the kernel: with those that are needed, or with C and M.
    if not isinstance(layout, str):
        raise TypeError(
            f"kernel_layout: expected a string such as 'OIHW', got {type(layout).__name__}"
        )
    letters = set(layout)
    distinct = layout.isascii() and layout.isalpha() and len(letters) == len(layout)
    depthwise = letters >= set("CM") and not letters & set("OI")
    if not (distinct and (letters >= set(needed) or depthwise) and len(layout) == kernel.ndim):
        raise ValueError(
            f"kernel_layout: expected {kernel.ndim} distinct letters for kernel of shape "
            f"{kernel.shape}, with exactly one {' and one '.join(map(repr, needed))}, or one 'C' "
            f"and one 'M' (depthwise), got {layout!r}"
        )


def _is_depthwise(layout: str) -> bool:
    return "O" not in layout


def _is_transposed(layout: str) -> bool:
    return layout.startswith("IO")


def _grouped(kernel: NDArray, layout: str, groups: int) -> NDArray:
    # A view (groups, outputs, inputs, taps...); a depthwise kernel has C groups of one input.
    if "I" not in layout:
        kernel, layout = kernel[..., np.newaxis], layout + "I"
    first = "CMI" if _is_depthwise(layout) else "IO" if _is_transposed(layout) else "OI"
    order = [layout.index(letter) for letter in dict.fromkeys(first + layout)]
    moved = kernel.transpose(order)
    if _is_depthwise(layout):
        return moved
    split = moved.reshape(groups, moved.shape[0] // groups, *moved.shape[1:])
    return split.swapaxes(1, 2) if _is_transposed(layout) else split


def _along(vector: Float64, grouped: NDArray, axis: int) -> Float64:
    # A number for each output (axis 1) or input (axis 2) channel, the groups one by one.
    shape = [grouped.shape[0], *(1 for _ in grouped.shape[1:])]
    shape[axis] = grouped.shape[axis]
    return vector.reshape(shape)


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
        ``"IOHW"``, where in groups ``O`` counts the channels of one group. Depthwise in
        Keras and TensorFlow: ``"HWCM"``, where m of channel c is output ``c * M + m``.

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
    binding.check_array(kernel, "kernel")
    _check_layout(kernel_layout, kernel, "O")
    scale, _ = scale_shift(running_mean, running_var, weight, bias, eps)
    channels = scale.size
    mean = _wide(running_mean, "running_mean", channels, 0.0)
    old_bias = _wide(kernel_bias, "kernel_bias", channels, 0.0)
    folded = kernel.astype(np.float64, subok=False)
    grouped = _grouped(folded, kernel_layout, _groups_of_outputs(kernel, kernel_layout, channels))
    outputs = grouped.shape[0] * grouped.shape[1]
    if outputs != channels:
        raise ValueError(
            f"kernel: expected {channels} output channels, as running_mean has, got {outputs}, "
            f"shape {kernel.shape} in layout {kernel_layout!r}"
        )
    with np.errstate(all="ignore"):
        new_bias = (old_bias - mean) * scale + _wide(bias, "bias", channels, 0.0)
        grouped *= _along(scale, grouped, 1)
        return rounded(folded, kernel.dtype), rounded(new_bias, kernel.dtype)


def _groups_of_outputs(kernel: NDArray, layout: str, channels: int) -> int:
    # Only the kernel of a transposed convolution does not show all of its output channels.
    if not _is_transposed(layout):
        return 1
    inputs, outputs = kernel.shape[:2]
    groups = channels // outputs if outputs and channels % outputs == 0 else 1
    return groups if groups and inputs % groups == 0 else 1


def fold_batch_norm_into_next(
    kernel: NDArray[Floating],
    kernel_bias: Vector | None,
    running_mean: Kept,
    running_var: Kept,
    weight: Vector | None = None,
    bias: Vector | None = None,
    eps: float = 1e-5,
    *,
    kernel_layout: str = "OIHW",
    groups: SupportsIndex = 1,
    padded: bool = False,
) -> tuple[NDArray[Floating], NDArray[Floating]]:
    r"""Return kernel and bias of a layer that includes the batch norm before it.

    .. math:: kernel' = kernel \cdot scale \qquad
              kernel\_bias' = kernel\_bias + \sum kernel \cdot shift

    with scale and shift of `scale_shift` for each input channel, and the sum over the
    inputs and the taps of each output channel.

    Parameters
    ----------
    kernel : ndarray of float16, bfloat16, float32 or float64
        Of a convolution, a transposed one or a linear layer, whose input is what the batch
        norm returns, without an activation between.
    kernel_bias : ndarray of shape (number of output channels,), or None
        The layer's bias.
    running_mean, running_var, weight, bias, eps
        As for `batch_norm` in inference; C is the number of input channels.
    kernel_layout : str, default "OIHW"
        A letter for each axis of `kernel`, ``O`` for the output channels and ``I`` for the
        input channels of one group: ``"OIHW"``, ``"HWIO"``, ``"OIDHW"``, ``"OI"`` for a
        linear layer. Transposed: ``"IOHW"``, ``I`` and ``O`` first, where ``I`` counts the
        input channels of all groups and ``O`` the output channels of one. Depthwise in
        Keras and TensorFlow: ``"HWCM"``, where m of channel c is output ``c * M + m``.
    groups : int, default 1
        The number of groups of the convolution; 1 for ``"HWCM"``.
    padded : bool, default False
        Whether the convolution pads with zeros. Padding that repeats or mirrors the input
        is none in this sense.

    Returns
    -------
    kernel : ndarray
        New, of the shape and dtype of `kernel`.
    kernel_bias : ndarray of shape (number of output channels,)
        New, of the dtype of `kernel`.

    Raises
    ------
    ValueError
        For arrays that `batch_norm` would refuse; for a layout or `groups` that do not fit
        `kernel`, and input channels that do not fit C. Where a shift is not 0: for
        `padded`, and for a transposed kernel of more than one tap.
    TypeError
        As `batch_norm`; for `groups` or `padded` of another type.

    Notes
    -----
    Computed in float64 and rounded once.

    The shift becomes part of the bias, which is the same at all places. At the border of a
    convolution that pads with zeros, and at most places of a transposed one, an output
    gets a part of the taps, and so a part of the shift. Where all shifts are 0
    (``bias = running_mean * scale``) that does not matter.

    Only ``IO`` at the beginning says that a convolution is transposed. Pass Keras' kernel
    of a transposed one (``"HWOI"``) as ``kernel.transpose(3, 2, 0, 1)`` with ``"IOHW"``, and
    an ordinary one that is kept as ``"IOHW"`` as ``kernel.swapaxes(0, 1)`` with ``"OIHW"``.

    References
    ----------
    Ioffe & Szegedy 2015, section 3.1: inference is a fixed linear transform.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> kernel = np.array([[1.0, 2.0]])  # one output, two inputs
    >>> mean, var = np.array([3.0, 5.0]), np.array([4.0, 1.0])
    >>> fastbn.fold_batch_norm_into_next(
    ...     kernel, None, mean, var, eps=0.0, kernel_layout="OI")
    (array([[0.5, 2. ]]), array([-11.5]))
    """
    binding.check_array(kernel, "kernel")
    _check_layout(kernel_layout, kernel, "OI")
    groups = binding.check_integer(groups, "groups")
    padded = binding.check_flag(padded, "padded")
    scale, shift = scale_shift(running_mean, running_var, weight, bias, eps)
    _check_groups(kernel, kernel_layout, groups)
    folded = kernel.astype(np.float64, subok=False)
    grouped = _grouped(folded, kernel_layout, groups)
    inputs = grouped.shape[0] * grouped.shape[2]
    if inputs != scale.size:
        raise ValueError(
            f"kernel: expected {scale.size} input channels, as running_mean has, got {inputs}, "
            f"shape {kernel.shape} in layout {kernel_layout!r} with groups={groups}"
        )
    new_bias = _wide(kernel_bias, "kernel_bias", grouped.shape[0] * grouped.shape[1], 0.0)
    _check_reach(grouped, kernel_layout, padded, shift)
    with np.errstate(all="ignore"):
        # In one order of memory, so that the sums have one order, too.
        terms = np.multiply(grouped, _along(shift, grouped, 2), order="C")
        new_bias += terms.sum(tuple(range(2, terms.ndim))).reshape(-1)
        grouped *= _along(scale, grouped, 2)
        return rounded(folded, kernel.dtype), rounded(new_bias, kernel.dtype)


def _check_groups(kernel: NDArray, layout: str, groups: int) -> None:
    if _is_depthwise(layout):
        if groups != 1:
            raise ValueError(
                f"groups: expected 1, since {layout!r} is a depthwise layout, got {groups}"
            )
        return
    axis, side = ("I", "input") if _is_transposed(layout) else ("O", "output")
    channels = kernel.shape[layout.index(axis)]
    if not 1 <= groups < 2**48 or channels % groups:
        raise ValueError(
            f"groups: expected a divisor of the {channels} {side} channels of kernel, got {groups}"
        )


def _check_reach(grouped: NDArray, layout: str, padded: bool, shift: Float64) -> None:
    # Outputs that get a part of the taps get a part of the shift.
    shifted = np.flatnonzero(shift)
    if not shifted.size:
        return
    came = f"a shift of {shift[shifted[0]]:g} for channel {shifted[0]}"
    if padded:
        raise ValueError(
            "padded: expected False where a shift is not 0, since the zeros around the input "
            f"are not shifted, got True and {came}"
        )
    taps = grouped.shape[3:]
    if _is_transposed(layout) and any(size > 1 for size in taps):
        raise ValueError(
            "kernel: expected one tap where a shift is not 0, since the outputs of a transposed "
            f"convolution get different taps, got taps {taps} in layout {layout!r} and {came}"
        )
