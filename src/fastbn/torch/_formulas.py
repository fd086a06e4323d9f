# SPDX-License-Identifier: BSD-3-Clause
"""The same with PyTorch's own operators: differentiable as often as one likes, and mapped.

For what the kernels do not do: graphs (`torch.compile`, `torch.export`, traces), second
derivatives, forward mode, `torch.func`, other devices and dtypes, and arguments that fastbn
refuses (PyTorch takes a negative momentum, or has its own words for the error).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastbn._numpy import binding
from fastbn._types import ACTIVATIONS
from fastbn.torch import _masks
from fastbn.torch._call import Call, Tensors

# PyTorch has a function of each name.
FUNCTIONS = {name: getattr(functional, name) for name in ACTIVATIONS if name}


def normalise(call: Call, t: Tensors) -> Tensor:
    """Return `y`."""
    # Errors of what follows come before running statistics change.
    if call.activation is not None and call.activation not in FUNCTIONS:
        binding.check_activation(call.activation)
    if isinstance(t.x, Tensor) and isinstance(t.residual, Tensor):
        torch.broadcast_shapes(t.x.shape, t.residual.shape)
    if t.mask is None:
        return ended(call, t.residual, _normalised(call, t))
    counts = t.mask.unsqueeze(1)
    residual = None if t.residual is None else _masks.select(counts, t.residual)
    y = ended(call, residual, _masks.normalised(call, t, counts))
    return _masks.select(counts, y).to(t.x.dtype)


def ended(call: Call, residual: Tensor | None, y: Tensor) -> Tensor:
    """Return `y` with what is fused elsewhere: the residual, then the activation."""
    if residual is not None:
        y = y + residual
    if call.activation is None:
        return y
    options = (call.negative_slope,) if call.activation == "leaky_relu" else ()
    return FUNCTIONS[call.activation](y, *options)


def gradients(call: Call, t: Tensors, dy: Tensor, statistics: Tensor) -> list[Tensor | None]:
    """Return dx, dweight, dbias and dresidual; in a graph where gradients are recorded."""
    call = Call(*call)
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: derivatives of the result reach x, but not what x was computed from.
        given = [_alias(tensor) for tensor in t[:4]]
        aliased = Tensors(*given)._replace(mask=t.mask)
        if call.norm == "batch" and not call.training:
            y = _scaled_and_ended(call, aliased, statistics)
        else:
            y = normalise(call, aliased)
        wanted = [tensor for tensor in given if tensor is not None]
        found = iter(torch.autograd.grad(y, wanted, dy, create_graph=recorded))
    return [None if tensor is None else next(found) for tensor in given]


def _scaled_and_ended(call: Call, t: Tensors, statistics: Tensor) -> Tensor:
    if t.mask is None:
        return ended(call, t.residual, _scaled(t, *statistics))
    counts = t.mask.unsqueeze(1)
    selected = t._replace(x=_masks.select(counts, t.x))
    residual = None if t.residual is None else _masks.select(counts, t.residual)
    return _masks.select(counts, ended(call, residual, _scaled(selected, *statistics)))


def _alias(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()


def _normalised(call: Call, t: Tensors) -> Tensor:
    if call.norm == "batch":
        return functional.batch_norm(
            t.x, t.running_mean, t.running_var, t.weight, t.bias,
            call.training, call.momentum, call.eps,
        )  # fmt: skip
    if call.norm == "layer":
        return functional.layer_norm(t.x, call.sizes, t.weight, t.bias, call.eps)
    if call.norm == "rms":
        return functional.rms_norm(t.x, call.sizes, t.weight, call.eps)
    if call.norm == "group":
        return functional.group_norm(t.x, call.sizes[0], t.weight, t.bias, call.eps)
    return functional.instance_norm(
        t.x, t.running_mean, t.running_var, t.weight, t.bias, True, call.momentum, call.eps
    )


def _scaled(t: Tensors, mean: Tensor, invstd: Tensor) -> Tensor:
    # Batch norm with fixed statistics.
    shape = -1, *[1] * (t.x.ndim - 2)
    y = (t.x - mean.view(shape)) * invstd.view(shape)
    if t.weight is not None:
        y = y * t.weight.view(shape)
    if t.bias is not None:
        y = y + t.bias.view(shape)
    return y.to(t.x.dtype)
