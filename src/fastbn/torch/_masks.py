# SPDX-License-Identifier: BSD-3-Clause
"""Masks: what is checked of them, and what they mean by PyTorch's own operators.

The operators are for what the kernels do not do, as in `_formulas`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from fastbn.torch._call import Call, Tensors


def mask_of(x: Tensor, mask: Tensor | None, lengths: Any) -> Tensor | None:
    """Return a checked mask, which lengths are turned into; or None."""
    if mask is None and lengths is None:
        return None
    if not isinstance(x, Tensor) or x.ndim < 2:
        raise ValueError(f"input: expected a tensor (N, C, ...) beside a mask, got {x!r}")
    if mask is not None and lengths is not None:
        raise ValueError("mask, lengths: expected at most one of them, got both")
    if lengths is not None:
        return _mask_of_lengths(x, lengths)
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a tensor of dtype torch.bool, got {got}")
    wanted = (x.shape[0], *x.shape[2:])
    if mask.ndim != len(wanted) or any(
        m not in (1, n) for m, n in zip(mask.shape, wanted, strict=True)
    ):
        raise ValueError(
            f"mask: expected the shape of input without its channel axis, {wanted}, or 1 in "
            f"place of a size, got {tuple(mask.shape)}"
        )
    return mask


def _mask_of_lengths(x: Tensor, lengths: Any) -> Tensor:
    if x.ndim != 3:
        raise ValueError(
            f"lengths: expected an input (N, C, T), got shape {tuple(x.shape)}; pass a mask"
        )
    lengths = torch.as_tensor(lengths, device=x.device)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype is torch.bool:
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    n, _, size = x.shape
    if lengths.shape != (n,):
        raise ValueError(f"lengths: expected shape ({n},), got {tuple(lengths.shape)}")
    if n and _has_values() and not (lengths.min() >= 0 and lengths.max() <= size):
        raise ValueError(f"lengths: expected integers from 0 to {size}, got {lengths.tolist()}")
    return torch.arange(size, device=x.device) < lengths.unsqueeze(1)


def _has_values() -> bool:
    # In a graph, and under a transformation, nothing may depend on them.
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is None


def select(counts: Tensor, value: Tensor) -> Tensor:
    """Return `value` where it counts, else 0, whatever is there; so no NaN has a derivative."""
    return torch.where(counts, value, 0)


def normalised(call: Call, t: Tensors, counts: Tensor) -> Tensor:
    """Return `x` with its affine part, in float32 or float64; update the running statistics."""
    x = select(counts, t.x)
    x = x.double() if x.dtype is torch.float64 else x.float()
    shape = -1, *[1] * (x.ndim - 2)
    if call.training:
        z = _centred(call, t, x, counts.expand_as(x))
    elif t.running_mean is None or t.running_var is None:
        raise ValueError("running_mean, running_var: expected tensors in evaluation, got None")
    else:
        var = t.running_var.to(x.dtype).view(shape) + call.eps
        z = (x - t.running_mean.to(x.dtype).view(shape)) * var.rsqrt()
    if t.weight is not None:
        z = z * t.weight.to(x.dtype).view(shape)
    return z if t.bias is None else z + t.bias.to(x.dtype).view(shape)


def _centred(call: Call, t: Tensors, x: Tensor, counts: Tensor) -> Tensor:
    # As (owners of statistics, their values).
    n, c = x.shape[:2]
    rows = (c,) if call.norm == "batch" else (n, call.sizes[0] if call.norm == "group" else c)
    apart = x.movedim(0, 1) if call.norm == "batch" else x
    pick = counts.movedim(0, 1) if call.norm == "batch" else counts
    length = apart.numel() // max(1, math.prod(rows))
    values, pick = (v.reshape(*rows, length) for v in (apart, pick))
    number = pick.sum(-1, keepdim=True).to(x.dtype)
    if call.norm == "batch" and _has_values() and bool((number == 1).any()):
        raise ValueError(
            "input: expected more than one value per channel when training, got one that counts, "
            f"shape {tuple(x.shape)}"
        )
    mean = values.sum(-1, keepdim=True) / number.clamp(min=1)
    centred = select(pick, values - mean)
    squares = centred.square().sum(-1, keepdim=True)
    _update(call, t, mean.detach().squeeze(-1), squares.detach().squeeze(-1), number.squeeze(-1))
    z = centred * (squares / number.clamp(min=1) + call.eps).rsqrt()
    z = z.reshape(apart.shape)
    return z.movedim(0, 1) if call.norm == "batch" else z


def _update(call: Call, t: Tensors, mean: Tensor, squares: Tensor, number: Tensor) -> None:
    # Running statistics, by the instances that have a variance.
    var = squares / (number - 1).clamp(min=1)
    some = number > 1
    if call.norm == "instance":
        share = some.to(mean.dtype) / some.sum(0).clamp(min=1)
        mean, var, some = (mean * share).sum(0), (var * share).sum(0), some.any(0)
    for kept, new in (t.running_mean, mean), (t.running_var, var):
        if kept is not None:
            moved = (1 - call.momentum) * kept.detach() + call.momentum * new
            kept.detach().copy_(torch.where(some, moved, kept.detach()))
