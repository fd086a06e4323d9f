# SPDX-License-Identifier: BSD-3-Clause
"""Operators for compiled, exported and traced programs: forward, backward, their shapes.

They write to none of their arguments: running statistics come out as new tensors, and
are copied to where they belong by an operator of PyTorch's, which a graph can see.

May: describe. May not: compute; `_direct` does, when the program runs, or `_formulas`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastbn.torch import _direct, _formulas
from fastbn.torch._call import Call, Tensors, empty_output, statistics_shape


def normalise(call: Call, t: Tensors) -> Tensor:
    """Return `y`, and update the running statistics."""
    y, _, running_mean, running_var = _forward(*t, *call)
    if call.training:
        for kept, new in (t.running_mean, running_mean), (t.running_var, running_var):
            if kept is not None:
                kept.detach().copy_(new)
    return y


@torch.library.custom_op("fastbn::normalise", mutates_args=(), device_types="cpu")
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: str,
    sizes: Sequence[int],
    training: bool,
    momentum: float,
    eps: float | None,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(norm, tuple(sizes), training, momentum, eps, activation, negative_slope)
    running = [None if kept is None else kept.clone() for kept in (running_mean, running_var)]
    t = Tensors(x, weight, bias, residual, *running)
    try:
        y, statistics = _direct.forward(call, t)
    except _direct.RefusedError:
        y, statistics = _formulas.normalise(call, t), _formulas.statistics(call, t)
    return y, statistics, *(_nothing(x) if kept is None else kept for kept in running)


@_forward.register_fake
def _(x, weight, bias, residual, running_mean, running_var, norm, sizes, *options):
    statistics = x.new_empty(statistics_shape(norm, x, sizes), dtype=torch.float64)
    running = (
        _nothing(x) if kept is None else torch.empty_like(kept)
        for kept in (running_mean, running_var)
    )
    return empty_output(norm, x), statistics, *running


@torch.library.custom_op("fastbn::normalise_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    statistics: Tensor,
    norm: str,
    sizes: Sequence[int],
    training: bool,
    momentum: float,
    eps: float | None,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = Call(norm, tuple(sizes), training, momentum, eps, activation, negative_slope)
    t = Tensors(x, weight, bias, residual)
    try:
        gradients = _direct.backward(call, t, dy, statistics)
    except _direct.RefusedError:
        if x.numel():
            raise  # below autograd there is no other way
        gradients = [None if given is None else torch.zeros_like(given) for given in t[:4]]
    dx, dweight, dbias, dresidual = (_nothing(x) if g is None else g for g in gradients)
    return dx, dweight, dbias, dresidual


@_backward.register_fake
def _(dy, x, weight, bias, residual, statistics, norm, *options):
    dx = empty_output(norm, x)
    parameters = (_nothing(x) if p is None else p.new_empty(p.shape) for p in (weight, bias))
    return dx, *parameters, _nothing(x) if residual is None else torch.empty_like(dx)


def _nothing(x: Tensor) -> Tensor:
    # An operator cannot return None.
    return x.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, _, _, *ctx.call = inputs
    ctx.activated = ctx.call[5] is not None
    ctx.has = [p is not None for p in (weight, bias, residual)]
    ctx.save_for_backward(x, weight, bias, residual if ctx.activated else None, output[1])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, *rest = _backward(dy, *ctx.saved_tensors, *ctx.call)
    if not ctx.activated:
        rest[2] = dy
    given = (g if has else None for g, has in zip(rest, ctx.has, strict=True))
    return dx, *given, *[None] * 9


_forward.register_autograd(_differentiate, setup_context=_keep)
