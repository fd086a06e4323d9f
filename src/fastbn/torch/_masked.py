# SPDX-License-Identifier: BSD-3-Clause
"""Calls with a mask: by fastbn's functions for NumPy, on the memory of the tensors; or, where a
graph is made or transformed, where a derivative is differentiated, and for tensors that NumPy
cannot see, by PyTorch's operators.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

import fastbn
from fastbn.torch._call import Call, Tensors, empty_output
from fastbn.torch._formulas import FUNCTIONS

DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def mask_of(x: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Return a checked mask, which lengths are turned into."""
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
    if n and not torch.compiler.is_compiling() and not (
        bool(lengths.min() >= 0) and bool(lengths.max() <= size)
    ):
        raise ValueError(f"lengths: expected integers from 0 to {size}, got {lengths.tolist()}")
    return torch.arange(size, device=x.device) < lengths.unsqueeze(1)


def normalise(call: Call, t: Tensors, mask: Tensor) -> Tensor:
    """Return `y`, and update the running statistics."""
    if not _is_seen(*t, mask):
        return _formula(call, t, mask)
    return _Normalise.apply(call, mask, *t)


def _is_seen(*tensors: Tensor | None) -> bool:
    # By NumPy, whose functions no graph and no transformation knows.
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0 or (
        torch._C._get_tracing_state() is not None
    ):
        return False
    return all(_is_plain(tensor) for tensor in tensors if tensor is not None)


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) not in (Tensor, Parameter) or not tensor.is_cpu or tensor.is_neg():
        return False
    if tensor.dtype is torch.bfloat16:
        return _bfloat16() is not None
    return tensor.dtype in DTYPES or tensor.dtype is torch.bool


def _bfloat16() -> Any:
    try:
        import ml_dtypes  # noqa: PLC0415 - only where it is needed
    except ImportError:
        return None
    return ml_dtypes.bfloat16


def _array(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(_bfloat16())
    return tensor.numpy()


def _forward(call: Call, t: Tensors, mask: Tensor) -> tuple[Tensor, np.ndarray, np.ndarray]:
    y = empty_output(call.norm, t.x)
    options: dict[str, Any] = {
        "eps": call.eps, "activation": call.activation, "negative_slope": call.negative_slope,
        "residual": _array(t.residual), "out": _array(y), "mask": _array(mask)
    }  # fmt: skip
    x, weight, bias = (_array(v) for v in (t.x, t.weight, t.bias))
    if call.norm == "group":
        forward = fastbn.group_norm_forward
        _, mean, invstd = forward(x, call.sizes[0], weight, bias, **options)
        return y, mean, invstd
    kept = [_kept(v) for v in (t.running_mean, t.running_var)]
    running = dict(zip(("running_mean", "running_var"), map(_array, kept), strict=True))
    options |= running | {"momentum": call.momentum}
    if call.norm == "batch":
        options["training"] = call.training
        _, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, **options)
    else:
        _, mean, invstd = fastbn.instance_norm_forward(x, weight, bias, **options)
    for given, new in zip((t.running_mean, t.running_var), kept, strict=True):
        if call.training and given is not None and given is not new:
            given.detach().copy_(new)
    return y, mean, invstd


def _kept(running: Tensor | None) -> Tensor | None:
    # Half types have too few bits for a mean over time.
    if running is None or running.dtype in (torch.float32, torch.float64):
        return running
    return running.detach().float()


def _backward(call: Call, t: Tensors, mask: Tensor, dy: Tensor, statistics: tuple) -> list:
    dx = empty_output(call.norm, t.x)
    sizes = call.sizes if call.norm == "group" else ()
    options: dict[str, Any] = {
        "bias": _array(t.bias), "activation": call.activation, "out": _array(dx),
        "negative_slope": call.negative_slope, "residual": _array(t.residual),
        "mask": _array(mask)
    }  # fmt: skip
    if call.norm == "batch":
        options["training"] = call.training
    backward = getattr(fastbn, f"{call.norm}_norm_backward")
    _, *gradients = backward(
        _array(dy), _array(t.x), *statistics, *sizes, _array(t.weight), **options
    )
    given = t.weight, t.bias, t.residual
    gradients += [None] * (3 - len(gradients))
    return [dx, *(None if v is None else _tensor(g, v) for g, v in zip(gradients, given,
                                                                      strict=True))]  # fmt: skip


def _tensor(array: Any, like: Tensor) -> Tensor:
    if like.dtype is torch.bfloat16 and array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array).to(like.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, mask: Tensor, *tensors: Tensor | None) -> Tensor:
        t = Tensors(*tensors)
        y, *ctx.statistics = _forward(call, t, mask)
        ctx.call = call
        ctx.save_for_backward(mask, *tensors[:4], *(() if call.training else tensors[4:]))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        mask, *tensors = ctx.saved_tensors
        t = Tensors(*tensors)
        if torch.is_grad_enabled() or not _is_seen(dy):
            gradients = _differentiable_gradients(ctx.call, t, mask, dy)
        else:
            gradients = _backward(ctx.call, t, mask, dy, ctx.statistics)
        return None, None, *gradients, None, None


# ---- PyTorch's operators -------------------------------------------------------------


def _differentiable_gradients(call: Call, t: Tensors, mask: Tensor, dy: Tensor) -> list:
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [
            None if v is None else v.view_as(v) if v.requires_grad
            else v.detach().requires_grad_() for v in t[:4]
        ]  # fmt: skip
        running = (None, None) if call.training else t[4:]
        y = _formula(call, Tensors(*given, *running), mask)
        wanted = [v for v in given if v is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=recorded))
    return [None if v is None else next(found) for v in given]


def _formula(call: Call, t: Tensors, mask: Tensor) -> Tensor:
    # Selected before anything is computed, so that no NaN reaches a derivative.
    counts = mask.unsqueeze(1)
    x = torch.where(counts, t.x, 0)
    x = x.double() if x.dtype is torch.float64 else x.float()
    shape = -1, *[1] * (x.ndim - 2)
    if call.training:
        z = _centred(call, t, x, counts.expand_as(x))
    else:
        assert t.running_mean is not None
        assert t.running_var is not None
        var = t.running_var.to(x.dtype).view(shape) + call.eps
        z = (x - t.running_mean.to(x.dtype).view(shape)) * var.rsqrt()
    if t.weight is not None:
        z = z * t.weight.to(x.dtype).view(shape)
    if t.bias is not None:
        z = z + t.bias.to(x.dtype).view(shape)
    if t.residual is not None:
        z = z + torch.where(counts, t.residual, 0)
    if call.activation is not None:
        options = (call.negative_slope,) if call.activation == "leaky_relu" else ()
        z = FUNCTIONS[call.activation](z, *options)
    return torch.where(counts, z, 0).to(t.x.dtype)


def _centred(call: Call, t: Tensors, x: Tensor, counts: Tensor) -> Tensor:
    # As (owners of statistics, their values).
    n, c = x.shape[:2]
    rows = (c,) if call.norm == "batch" else (n, call.sizes[0] if call.norm == "group" else c)
    apart = x.movedim(0, 1) if call.norm == "batch" else x
    pick = counts.movedim(0, 1) if call.norm == "batch" else counts
    length = apart.numel() // max(1, math.prod(rows))
    values, pick = (v.reshape(*rows, length) for v in (apart, pick))
    number = pick.sum(-1, keepdim=True).to(x.dtype)
    if call.norm == "batch" and not torch.compiler.is_compiling() and bool((number == 1).any()):
        raise ValueError(
            f"input: expected more than one value per channel when training, got one that counts,"
            f" shape {tuple(x.shape)}"
        )
    mean = values.sum(-1, keepdim=True) / number.clamp(min=1)
    centred = torch.where(pick, values - mean, 0)
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
