# SPDX-License-Identifier: BSD-3-Clause
"""The normalisations in float64 NumPy, in the order of the formulas: the specification.

One reference for all of them. An operation sees x as groups: its `reduced` axes
share a mean and a variance, and its parameters vary along some other (or the same)
axes. "batch", "layer", "rms", "group" and "instance" differ in nothing else, but
that "rms" has no mean.

Checked against finite differences in test_oracle.py. Knows nothing of fastbn.
"""

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


def moments(op, x, what=None, layout=None):
    """Mean and biased variance of each group, two passes; for rms 0 and the mean square."""
    seen, reduced, _ = see(op, x, what, layout)
    mean = np.asarray(seen.mean(reduced))
    if op == "rms":
        mean = np.zeros_like(mean)
    return mean, np.asarray(((seen - np.expand_dims(mean, reduced)) ** 2).mean(reduced))


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
    dbias = dy.sum(others)
    dweight = (dy * xhat).sum(others)
    if op in ("group", "instance"):
        dweight, dbias = dweight.reshape(-1), dbias.reshape(-1)
    dxhat = dy * along(weight, seen, varying, 1)
    dx = dxhat
    if training:
        dx = dx - xhat * (dxhat * xhat).mean(reduced, keepdims=True)
        if op != "rms":
            dx = dx - dxhat.mean(reduced, keepdims=True)
    return unsee(invstd * dx, op, x, layout), dweight, dbias


# What may follow a normalisation: z is what it returned, and the residual if there is one.


def activated(z, activation=None, negative_slope=0.01):
    """Return y, of finite z."""
    if activation is None:
        return z
    if activation == "silu":
        return z * sigmoid(z)
    if activation == "relu6":
        return np.clip(z, 0, 6)
    return np.where(z > 0, z, z * (0 if activation == "relu" else negative_slope))


def slope(z, activation=None, negative_slope=0.01):
    """Return dy / dz; at the kink that of its left side, at the 6 of relu6 its right one."""
    if activation is None:
        return np.ones_like(z)
    if activation == "silu":
        return sigmoid(z) * (1 + z * (1 - sigmoid(z)))
    if activation == "relu6":
        return np.where((z > 0) & (z < 6), 1.0, 0)
    return np.where(z > 0, 1.0, 0 if activation == "relu" else negative_slope)


def sigmoid(z):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-z))


def running(old, new, momentum):
    return (1 - momentum) * old.astype(np.float64) + momentum * new


# Batch norm by its own names.


def stats(x, layout=None):
    return moments("batch", x, layout=layout)


def normalise(x, mean, var, weight=None, bias=None, eps=1e-5, layout=None):
    return forward("batch", x, mean, var, weight, bias, eps, layout=layout)


def backward(dy, x, mean, invstd, weight=None, training=True, layout=None):
    return gradients("batch", dy, x, mean, invstd, weight, training, layout=layout)
