# SPDX-License-Identifier: BSD-3-Clause
"""The normalisations in float64 NumPy, in the order of the formulas: the specification.

One reference for all of them. An operation sees x as groups: its `reduced` axes
share a mean and a variance, and its parameters vary along some other (or the same)
axes. "batch", "layer", "rms", "group" and "instance" differ in nothing else, but
that "rms" has no mean.

Checked against finite differences in test_oracle.py. Knows nothing of fastbn.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


def channel_axis(ndim, layout):
    if layout is None:
        return 1
    return ndim - 1 if layout == "N...C" else layout.index("C")


def batch_axis(layout):
    return 0 if layout in (None, "N...C") else layout.index("N")


def first_axes(x, layout):
    """A view with the axes N, C first."""
    return np.moveaxis(x, (batch_axis(layout), channel_axis(x.ndim, layout)), (0, 1))


def see(op, x, what=None, layout=None):
    """x as the operation sees it: (float64 array, reduced axes, axes of its parameters).

    `what` is the normalized_shape of layer and rms norm, the num_groups of group norm.
    """
    x = x.astype(np.float64)
    if op == "batch":
        axis = channel_axis(x.ndim, layout)
        return x, tuple(i for i in range(x.ndim) if i != axis), (axis,)
    if op in ("layer", "rms"):
        trailing = tuple(range(x.ndim - np.size(what), x.ndim))
        return x, trailing, trailing
    # Channel c is number c % (C / G) of group c // (C / G); an instance is a group of one.
    x = first_axes(x, layout)
    groups = x.shape[1] if op == "instance" else what
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups if groups else 1, *x.shape[2:])
    return x, tuple(range(2, x.ndim)), (1, 2)


def unsee(seen, op, x, layout=None):
    """What was computed from `see(x)`, in the shape of x."""
    if op in ("batch", "layer", "rms"):
        return seen
    axes = batch_axis(layout), channel_axis(x.ndim, layout)
    return np.moveaxis(seen.reshape(first_axes(x, layout).shape), (0, 1), axes)


def along(vector, seen, axes, missing):
    """A parameter, so that it meets its elements of `seen`; `missing` stands for None."""
    if vector is None:
        return np.float64(missing)
    others = tuple(i for i in range(seen.ndim) if i not in axes)
    vector = np.asarray(vector).astype(np.float64)
    return np.expand_dims(vector.reshape([seen.shape[i] for i in axes]), others)


def total(terms, axes, keepdims=False):
    """The sum, added pairwise: along neighbours in memory NumPy does so, across them not."""
    rows = np.moveaxis(terms, axes, range(-len(axes), 0))
    kept = rows.shape[: rows.ndim - len(axes)]
    rows = np.ascontiguousarray(rows).reshape(*kept, math.prod(rows.shape[len(kept) :]))
    return np.expand_dims(rows.sum(-1), axes) if keepdims else rows.sum(-1)


def average(terms, axes, keepdims=False):
    with np.errstate(invalid="ignore"):  # of nothing
        count = np.float64(math.prod(terms.shape[axis] for axis in axes))
        return np.asarray(total(terms, axes, keepdims) / count)


def moments(op, x, what=None, layout=None):
    """Mean and biased variance of each group, two passes; for rms 0 and the mean square."""
    seen, reduced, _ = see(op, x, what, layout)
    mean = average(seen, reduced)
    if op == "rms":
        mean = np.zeros_like(mean)
    return mean, average((seen - np.expand_dims(mean, reduced)) ** 2, reduced)


def forward(op, x, mean, var, weight=None, bias=None, eps=1e-5, what=None, layout=None):
    """Return y."""
    seen, reduced, varying = see(op, x, what, layout)
    mean, var = (np.expand_dims(np.asarray(v, np.float64), reduced) for v in (mean, var))
    weight, bias = along(weight, seen, varying, 1), along(bias, seen, varying, 0)
    return unsee((seen - mean) / np.sqrt(var + eps) * weight + bias, op, x, layout)


def gradients(op, dy, x, mean, invstd, weight=None, training=True, what=None, layout=None):
    """Return the gradients with respect to x, weight and bias."""
    seen, reduced, varying = see(op, x, what, layout)
    dy = see(op, dy, what, layout)[0]
    mean, invstd = (np.expand_dims(np.asarray(v, np.float64), reduced) for v in (mean, invstd))
    xhat = (seen - mean) * invstd
    others = tuple(i for i in range(seen.ndim) if i not in varying)
    dbias = total(dy, others)
    dweight = total(dy * xhat, others)
    if op in ("group", "instance"):
        dweight, dbias = dweight.reshape(-1), dbias.reshape(-1)
    dxhat = dy * along(weight, seen, varying, 1)
    dx = dxhat
    if training:
        dx = dx - xhat * average(dxhat * xhat, reduced, keepdims=True)
        if op != "rms":
            dx = dx - average(dxhat, reduced, keepdims=True)
    return unsee(invstd * dx, op, x, layout), dweight, dbias


# What may follow a normalisation: z is what it returned, and the residual if there is one.


class Activation(NamedTuple):
    """Both of z and the negative slope: y, whose limit stands for it at infinity; dy / dz."""

    value: Callable
    slope: Callable
    kinks: tuple = ()  # where y has no derivative, and the slope is that of one side


def sigmoid(z):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def times(z, factor):
    """The product, but 0 where the factor is: of -Inf, too."""
    with np.errstate(invalid="ignore"):
        return np.where(factor == 0, 0.0, z * factor)


def ramp(z):
    """A sixth of relu6(z + 3)."""
    return np.clip(z / 6 + 0.5, 0, 1)


ACTIVATIONS = {
    None: Activation(lambda z, a: z, lambda z, a: np.ones_like(z)),
    "relu": Activation(lambda z, a: np.maximum(z, 0), lambda z, a: np.where(z <= 0, 0.0, 1), (0,)),
    "relu6": Activation(
        lambda z, a: np.clip(z, 0, 6), lambda z, a: np.where((z <= 0) | (z >= 6), 0.0, 1), (0, 6)
    ),
    "leaky_relu": Activation(
        lambda z, a: np.where(z > 0, z, z * a), lambda z, a: np.where(z <= 0, a, 1.0), (0,)
    ),
    "silu": Activation(
        lambda z, a: times(z, sigmoid(z)),
        lambda z, a: times(1 + times(z, sigmoid(-z)), sigmoid(z)),
    ),
    "hardswish": Activation(
        lambda z, a: times(z, ramp(z)),
        lambda z, a: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, z / 3 + 0.5)),
        (-3, 3),
    ),
    "hardsigmoid": Activation(
        lambda z, a: ramp(z), lambda z, a: np.where((z <= -3) | (z >= 3), 0.0, 1 / 6), (-3, 3)
    ),
}


def activated(z, activation=None, negative_slope=0.01):
    """Return y."""
    return ACTIVATIONS[activation].value(z, negative_slope)


def slope(z, activation=None, negative_slope=0.01):
    """Return dy / dz. NaN is at most no number."""
    return ACTIVATIONS[activation].slope(z, negative_slope)


def running(old, new, momentum):
    return (1 - momentum) * old.astype(np.float64) + momentum * new


# Batch norm by its own names.


def stats(x, layout=None):
    return moments("batch", x, layout=layout)


def normalise(x, mean, var, weight=None, bias=None, eps=1e-5, layout=None):
    return forward("batch", x, mean, var, weight, bias, eps, layout=layout)


def backward(dy, x, mean, invstd, weight=None, training=True, layout=None):
    return gradients("batch", dy, x, mean, invstd, weight, training, layout=layout)


# Masks: what counts is picked by boolean indexing, and nothing else is looked at.


def counting(shape, layout=None, mask=None, lengths=None, length_axis=None):
    """Return a bool for each element."""
    axis, n = channel_axis(len(shape), layout), batch_axis(layout)
    if lengths is not None:
        others = [i for i in range(len(shape)) if i not in (axis, n)]
        along = others[0] if length_axis is None else layout.index(length_axis)
        index = np.indices(shape)
        return index[along] < np.asarray(lengths)[index[n]]
    return np.broadcast_to(np.expand_dims(mask, axis), shape)


def owners(op, shape, what=None, layout=None):
    """Return for each element the number of those that it shares its statistics with."""
    axis, n = channel_axis(len(shape), layout), batch_axis(layout)
    index = np.indices(shape)
    if op == "batch":
        return index[axis]
    groups = what if op == "group" else shape[axis]
    return index[n] * groups + index[axis] // (shape[axis] // groups)


class Masked(NamedTuple):
    """Of elements what they are written as; of owners count, mean and variance."""

    y: object
    count: object
    mean: object
    var: object
    dx: object
    dweight: object
    dbias: object
    dresidual: object


def masked(op, x, counts, what=None, layout=None, weight=None, bias=None, eps=1e-5, dy=None,
           residual=None, activation=None, negative_slope=0.01, fixed=None):  # fmt: skip
    """Forward and backward of what counts; `fixed` are the mean and variance of channels."""
    owner, axis = owners(op, x.shape, what, layout), channel_axis(x.ndim, layout)
    channels = np.indices(x.shape)[axis]
    n, c = int(owner.max()) + 1, x.shape[axis]
    weight = np.ones(c) if weight is None else np.asarray(weight, np.float64)
    bias = np.zeros(c) if bias is None else np.asarray(bias, np.float64)
    y, dx, dz = (np.zeros(x.shape) for _ in range(3))
    count, mean, var = (np.zeros(n) for _ in range(3))
    dweight, dbias = np.zeros(c), np.zeros(c)
    for k in range(n):
        pick = counts & (owner == k)
        count[k], which = pick.sum(), channels[pick]
        values = x[pick].astype(np.float64)
        if fixed is not None:
            mean[k], var[k] = fixed[0][k], fixed[1][k]
        elif values.size:
            mean[k], var[k] = values.mean(), values.var()
        invstd = 1 / np.sqrt(var[k] + eps)
        xhat = (values - mean[k]) * invstd
        z = xhat * weight[which] + bias[which]
        if residual is not None:
            z = z + residual[pick].astype(np.float64)
        y[pick] = activated(z, activation, negative_slope)
        if dy is None:
            continue
        dz[pick] = dy[pick].astype(np.float64) * slope(z, activation, negative_slope)
        np.add.at(dweight, which, dz[pick] * xhat)
        np.add.at(dbias, which, dz[pick])
        g = dz[pick] * weight[which]
        if fixed is None and values.size:
            g = g - g.mean() - xhat * (g * xhat).mean()
        dx[pick] = invstd * g
    return Masked(y, count, mean, var, dx, dweight, dbias, dz)
