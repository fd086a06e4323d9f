# SPDX-License-Identifier: BSD-3-Clause
"""Functions with autograd: names, defaults, documentation; which way a call goes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastbn._docs import filled
from fastbn.torch import _direct, _formulas, _masks
from fastbn.torch._call import Call, Tensors


@filled
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Normalise each channel of a batch, as ``torch.nn.functional.batch_norm``.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, on the CPU
        Anything else is left to PyTorch's function. It need not be contiguous.
    running_mean, running_var : Tensor of shape (C,), or None
        Running statistics, updated in place in training, but not while autograd runs
        backward: what a checkpoint computes again has been counted.
    weight, bias : Tensor of shape (C,), optional
        The affine part; 1 and 0 if not given.
    training : bool, default False
        Normalise with the statistics of the batch.
    momentum : float, default 0.1
        The share of the new value in the running statistics.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    {activation}
    negative_slope : float, default 0.01
        Of ``"leaky_relu"``.
    residual : Tensor of the shape and dtype of `input`, optional
        Added before the activation. Of another shape or dtype, it is added as PyTorch adds
        it; the result is then what the addition gives.
    {counted_tensors}

    Returns
    -------
    Tensor
        Of the shape and dtype of `input`, in the memory format in which PyTorch's
        function returns it.

    Raises
    ------
    ValueError, RuntimeError, TypeError
        As PyTorch's function; ValueError for an unknown activation.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch Normalization".

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]], requires_grad=True)
    >>> fastbn.torch.batch_norm(x, None, None, training=True, eps=1e-12).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    """
    if training and not is_first_time():
        running_mean = running_var = None
    counted = _masks.mask_of(input, mask, lengths)
    call = "batch", (), training, momentum, eps, activation, negative_slope
    return _normalise(call, (input, weight, bias, residual, running_mean, running_var, counted))


@filled
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise over the last axes, as ``torch.nn.functional.layer_norm``.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, on the CPU
        Anything else is left to PyTorch's function. It need not be contiguous.
    normalized_shape : sequence of int
        The lengths of the last axes of `input`, over which it is normalised.
    weight, bias : Tensor of shape `normalized_shape`, optional
        The affine part; 1 and 0 if not given.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    {activation}
    negative_slope : float, default 0.01
        Of ``"leaky_relu"``.
    residual : Tensor of the shape and dtype of `input`, optional
        Added before the activation. Of another shape or dtype, it is added as PyTorch adds
        it; the result is then what the addition gives.

    Returns
    -------
    Tensor
        Of the shape and dtype of `input`, in the memory format in which PyTorch's
        function returns it.

    Raises
    ------
    ValueError, RuntimeError, TypeError
        As PyTorch's function; ValueError for an unknown activation.

    References
    ----------
    Ba, Kiros & Hinton 2016, "Layer Normalization".

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    >>> fastbn.torch.layer_norm(x, [2], eps=1e-12).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    call = "layer", tuple(normalized_shape), True, 0.0, eps, activation, negative_slope
    return _normalise(call, (input, weight, bias, residual, None, None, None))


@filled
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Divide by the root mean square, as ``torch.nn.functional.rms_norm``.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, on the CPU
        Anything else is left to PyTorch's function. It need not be contiguous.
    normalized_shape : sequence of int
        The lengths of the last axes of `input`, over which it is normalised.
    weight : Tensor of shape `normalized_shape`, optional
        The factor of each feature; 1 if not given.
    eps : float, optional
        Added to the mean square, inside the root; if not given, the smallest step of the
        dtype of `input`, of half types that of float32.
    {activation}
    negative_slope : float, default 0.01
        Of ``"leaky_relu"``.
    residual : Tensor of the shape and dtype of `input`, optional
        Added before the activation. Of another shape or dtype, it is added as PyTorch adds
        it; the result is then what the addition gives.

    Returns
    -------
    Tensor
        Of the shape and dtype of `input`, in the memory format in which PyTorch's
        function returns it.

    Raises
    ------
    ValueError, RuntimeError, TypeError
        As PyTorch's function; ValueError for an unknown activation.

    References
    ----------
    Zhang & Sennrich 2019, "Root Mean Square Layer Normalization".

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.rms_norm(torch.tensor([[2.0, -2.0]]), [2], eps=1e-12).tolist()
    [[1.0, -1.0]]
    """
    call = "rms", tuple(normalized_shape), True, 0.0, eps, activation, negative_slope
    return _normalise(call, (input, weight, None, residual, None, None, None))


@filled
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Normalise groups of channels, as ``torch.nn.functional.group_norm``.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, on the CPU
        Anything else is left to PyTorch's function. It need not be contiguous.
    num_groups : int
        Into how many groups the channels are divided.
    weight, bias : Tensor of shape (C,), optional
        The affine part; 1 and 0 if not given.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    {activation}
    negative_slope : float, default 0.01
        Of ``"leaky_relu"``.
    residual : Tensor of the shape and dtype of `input`, optional
        Added before the activation. Of another shape or dtype, it is added as PyTorch adds
        it; the result is then what the addition gives.
    {counted_tensors}

    Returns
    -------
    Tensor
        Of the shape and dtype of `input`, in the memory format in which PyTorch's
        function returns it.

    Raises
    ------
    ValueError, RuntimeError, TypeError
        As PyTorch's function; ValueError for an unknown activation.

    References
    ----------
    Wu & He 2018, "Group Normalization".

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[[1.0, 3.0], [10.0, 30.0]]])
    >>> fastbn.torch.group_norm(x, 2, eps=1e-12).tolist()
    [[[-1.0, 1.0], [-1.0, 1.0]]]
    """
    counted = _masks.mask_of(input, mask, lengths)
    call = "group", (num_groups,), True, 0.0, eps, activation, negative_slope
    return _normalise(call, (input, weight, bias, residual, None, None, counted))


@filled
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Normalise each channel of each sample, as ``torch.nn.functional.instance_norm``.

    Parameters
    ----------
    input : Tensor of float32, float64, float16 or bfloat16, on the CPU
        Anything else is left to PyTorch's function. It need not be contiguous.
    running_mean, running_var : Tensor of shape (C,), or None
        Running statistics, updated in place with `use_input_stats`, but not while autograd
        runs backward.
    weight, bias : Tensor of shape (C,), optional
        The affine part; 1 and 0 if not given.
    use_input_stats : bool, default True
        Normalise with the statistics of each sample; otherwise with the running ones.
    momentum : float, default 0.1
        The share of the new value in the running statistics.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    {activation}
    negative_slope : float, default 0.01
        Of ``"leaky_relu"``.
    residual : Tensor of the shape and dtype of `input`, optional
        Added before the activation. Of another shape or dtype, it is added as PyTorch adds
        it; the result is then what the addition gives.
    {counted_tensors}

    Returns
    -------
    Tensor
        Of the shape and dtype of `input`, in the memory format in which PyTorch's
        function returns it.

    Raises
    ------
    ValueError, RuntimeError, TypeError
        As PyTorch's function; ValueError for an unknown activation.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky 2016, "Instance Normalization".

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> x = torch.tensor([[[1.0, 3.0], [10.0, 30.0]]])
    >>> fastbn.torch.instance_norm(x, eps=1e-12).tolist()
    [[[-1.0, 1.0], [-1.0, 1.0]]]
    """
    if use_input_stats and not is_first_time():
        running_mean = running_var = None
    norm = "instance"
    if not use_input_stats and isinstance(input, Tensor):
        # With the same statistics for all samples this is batch norm, which wants them typed.
        norm = "batch"
        kind = torch.float64 if input.dtype is torch.float64 else torch.float32
        running_mean, running_var = (
            v.to(kind) if isinstance(v, Tensor) and v.dtype is not kind else v
            for v in (running_mean, running_var)
        )
    counted = _masks.mask_of(input, mask, lengths)
    call = norm, (), use_input_stats, momentum, eps, activation, negative_slope
    return _normalise(call, (input, weight, bias, residual, running_mean, running_var, counted))


def is_first_time() -> bool:
    """Say whether autograd is not running backward, as it is where a checkpoint recomputes."""
    return is_compiling() or torch._C._current_graph_task_id() == -1


def _normalise(call: tuple, t: tuple) -> Tensor:
    # Plain tuples: to name their parts would take longer than the call may.
    if not is_compiling():
        try:
            return _direct.normalise(call, t)
        except _direct.RefusedError:
            pass  # PyTorch's function takes it, or has its own words for the error
    # Graphs, transformations and subclasses see PyTorch's public functions.
    return _formulas.normalise(Call(*call), Tensors(*t))
