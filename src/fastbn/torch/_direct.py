# SPDX-License-Identifier: BSD-3-Clause
"""Eager calls: arrays over the memory of tensors, and the functions of fastbn on them.

May: allocate what is returned. May not: copy a tensor, check an argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

import fastbn
from fastbn import _tensors
from fastbn._tensors import array
from fastbn.torch import _formulas
from fastbn.torch._call import Call, Tensors, empty_output, is_plain

_tensors.use(torch.Tensor.__dlpack_c_exchange_api__)


def normalise(call: Call, t: Tensors) -> Tensor:
    """Return `y`."""
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in t[:4]
    ):
        return _Normalise.apply(call, *t)
    return forward(call, t)[0]


def forward(call: Call, t: Tensors) -> tuple[Any, ...]:
    """Return `y`, and as arrays what backward needs: mean (not of rms) and invstd."""
    follow_threads()
    y = empty_output(call.norm, t.x)
    x, weight, bias, out = array(t.x), array(t.weight), array(t.bias), array(y)
    fused = fusion(call, t)
    if call.norm == "batch":
        _, *saved = fastbn.batch_norm_forward(
            x, weight, bias,
            running_mean=array(t.running_mean), running_var=array(t.running_var),
            training=call.training, momentum=call.momentum, eps=call.eps, out=out, **fused,
        )  # fmt: skip
    elif call.norm == "layer":
        _, *saved = fastbn.layer_norm_forward(
            x, call.sizes, weight, bias, call.eps, out=out, **fused
        )
    elif call.norm == "rms":
        _, *saved = fastbn.rms_norm_forward(x, call.sizes, weight, call.eps, out=out, **fused)
    elif call.norm == "group":
        _, *saved = fastbn.group_norm_forward(
            x, call.sizes[0], weight, bias, call.eps, out=out, **fused
        )
    else:
        _, *saved = fastbn.instance_norm_forward(
            x, weight, bias,
            running_mean=array(t.running_mean), running_var=array(t.running_var),
            momentum=call.momentum, eps=call.eps, out=out, **fused,
        )  # fmt: skip
    return y, *saved


def backward(call: Call, t: Tensors, dy: Tensor, saved: list[Any]) -> list[Tensor | None]:
    """Return dx, dweight, dbias and dresidual; None for what the call had not."""
    follow_threads()
    dx = empty_output(call.norm, t.x)
    given, weight, out = (array(dy), array(t.x), *saved), array(t.weight), array(dx)
    fused = fusion(call, t)
    if fused and call.norm != "rms":
        fused["bias"] = array(t.bias)
    if call.norm == "batch":
        _, *rest = fastbn.batch_norm_backward(
            *given, weight, training=call.training, out=out, **fused
        )
    elif call.norm == "layer":
        _, *rest = fastbn.layer_norm_backward(*given, call.sizes, weight, out=out, **fused)
    elif call.norm == "rms":
        _, dweight, *dresidual = fastbn.rms_norm_backward(
            *given, call.sizes, weight, out=out, **fused
        )
        rest = [dweight, None, *dresidual]
    elif call.norm == "group":
        _, *rest = fastbn.group_norm_backward(*given, call.sizes[0], weight, out=out, **fused)
    else:
        _, *rest = fastbn.instance_norm_backward(*given, weight, out=out, **fused)
    gradients = zip(t[1:4], [*rest, None], strict=False)
    return [dx, *(None if like is None else _like(found, like) for like, found in gradients)]


def follow_threads() -> None:
    """Make OpenMP's number of threads, in this Python thread, the one of PyTorch."""
    torch.get_num_threads()


def fusion(call: Call, t: Tensors) -> dict[str, Any]:
    """Return the arguments of the fused functions, where something is fused."""
    if call.activation is None and t.residual is None:
        return {}
    return {
        "activation": call.activation,
        "negative_slope": call.negative_slope,
        "residual": array(t.residual),
    }


def _like(gradient: Any, tensor: Tensor) -> Tensor:
    # A gradient as a tensor of the dtype of what it belongs to.
    if tensor.dtype == torch.bfloat16 and gradient.dtype.itemsize == 2:
        return torch.from_numpy(gradient.view("uint16")).view(torch.bfloat16)
    return torch.from_numpy(gradient).to(tensor.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *tensors: Any) -> Tensor:  # type: ignore[override]
        t = Tensors(*tensors)
        y, *ctx.statistics = forward(call, t)
        ctx.call, ctx.has_residual = call, t.residual is not None
        # Only for an activation does backward compute its argument again.
        ctx.save_for_backward(*t[:3], None if call.activation is None else t.residual)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        t = Tensors(*ctx.saved_tensors)
        if torch.is_grad_enabled() or not is_plain(dy) or is_legacy_batchedtensor(dy):
            statistics = [torch.from_numpy(a) for a in ctx.statistics]
            gradients = _formulas.gradients(ctx.call, t, dy, statistics)
        else:
            gradients = backward(ctx.call, t, dy, ctx.statistics)
        if ctx.has_residual and t.residual is None:
            gradients[3] = dy
        return None, *gradients, None, None
