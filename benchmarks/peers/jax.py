# SPDX-License-Identifier: BSD-3-Clause
"""JAX: the formula, in float32 for 16 bits, compiled for the shape, its output's memory
given back to it at each call.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
from jax import numpy as jnp

from benchmarks.cases import EPS, MOMENTUM, OPERATIONS, Arrays
from benchmarks.contenders import Contender, first, python_calls

jax.config.update("jax_enable_x64", True)


def contenders(a: Arrays) -> Iterator[Contender]:
    case = a.case
    reduced, summed, both = (case.axes(letters) for letters in (case.reduced, "NS", case.both))
    count = int(np.prod([case.split[axis] for axis in reduced]))

    def inference(old, x, weight, bias, running_mean, running_var):
        scale = weight * jax.lax.rsqrt(running_var + EPS)
        y = x.astype(a.kept) * scale + (bias - running_mean * scale)
        return y.astype(x.dtype)

    def normalised(x, weight, bias):
        wide = x.astype(a.kept)
        mean = wide.mean(reduced, keepdims=True) if case.centred else 0
        centred = wide - mean
        var = jnp.square(centred).mean(reduced, keepdims=True)
        y = centred * (weight * jax.lax.rsqrt(var + EPS))
        return (y + bias if case.centred else y).astype(x.dtype), mean, var

    def training(old, x, weight, bias, running_mean, running_var):
        y, mean, var = normalised(x, weight, bias)
        new_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        new_var = (1 - MOMENTUM) * running_var + MOMENTUM * var * count / (count - 1)
        return y, new_mean, new_var

    def forward(old, x, weight, bias):
        return normalised(x, weight, bias)[0]

    def backward(old, dy, x, weight, mean, invstd):
        wide = dy.astype(a.kept)
        xhat = (x.astype(a.kept) - mean) * invstd
        slopes, levels = (v.sum(both, keepdims=True) for v in (wide * xhat, wide))
        slope, level = ((v * weight).sum(reduced, keepdims=True) / count for v in (slopes, levels))
        dxhat = wide * weight - xhat * slope
        dx = invstd * (dxhat - level if case.centred else dxhat)
        gradients = (slopes, levels) if case.centred else (slopes,)
        return dx.astype(dy.dtype), *(v.sum(summed) for v in gradients)

    x, dy = (jnp.asarray(a.split(v)) for v in (a.x, a.dy))
    weight, bias, *running = (
        jnp.asarray(a.along(v)) for v in (a.weight, a.bias, a.running_mean, a.running_var)
    )
    arguments = {"forward": (x, weight, bias)}.get(case.op, (x, weight, bias, *running))
    if case.op == "backward":
        mean, var = (jnp.asarray(v, a.kept) for v in a.moments)
        arguments = (dy, x, weight, mean, jax.lax.rsqrt(var + EPS))
    operation = (inference, training, forward, backward)[OPERATIONS.index(case.op)]
    compiled = jax.jit(operation, donate_argnums=0, keep_unused=True)
    last = [compiled(jnp.empty_like(x), *arguments)]

    def function() -> None:
        last[0] = jax.block_until_ready(compiled(first(last[0]), *arguments))

    def result() -> np.ndarray:
        return np.asarray(first(last[0])).reshape(a.x.shape)

    yield Contender("JAX", "peer", python_calls(function), result, own_threads=a.case.threads > 1)
