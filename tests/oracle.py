# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm in float64 NumPy, in the order of the formulas: the specification.

Checked against finite differences in test_oracle.py. Knows nothing of fastbn.
"""

import numpy as np


def channel_axis(ndim, layout):
    if layout is None:
        return 1
    return ndim - 1 if layout == "N...C" else layout.index("C")


def per_channel(vector, ndim, axis):
    shape = [1] * ndim
    shape[axis] = -1
    return np.asarray(vector, np.float64).reshape(shape)


def stats(x, layout=None):
    """Mean and biased variance of each channel, two passes."""
    axis = channel_axis(x.ndim, layout)
    axes = tuple(i for i in range(x.ndim) if i != axis)
    x = x.astype(np.float64)
    mean = x.mean(axes)
    return mean, ((x - per_channel(mean, x.ndim, axis)) ** 2).mean(axes)


def normalise(x, mean, var, weight=None, bias=None, eps=1e-5, layout=None):
    axis = channel_axis(x.ndim, layout)
    channels = x.shape[axis]
    weight = np.ones(channels) if weight is None else weight
    bias = np.zeros(channels) if bias is None else bias
    mean, var, weight, bias = (per_channel(v, x.ndim, axis) for v in (mean, var, weight, bias))
    return (x.astype(np.float64) - mean) / np.sqrt(var + eps) * weight + bias


def running(old, new, momentum):
    return (1 - momentum) * old.astype(np.float64) + momentum * new


def backward(dy, x, mean, invstd, weight=None, training=True, layout=None):
    """Gradients with respect to x, weight and bias."""
    axis = channel_axis(x.ndim, layout)
    axes = tuple(i for i in range(x.ndim) if i != axis)
    dy = dy.astype(np.float64)
    weight = np.ones(x.shape[axis]) if weight is None else weight
    mean, invstd, weight = (per_channel(v, x.ndim, axis) for v in (mean, invstd, weight))
    xhat = (x.astype(np.float64) - mean) * invstd
    dbias = dy.sum(axes)
    dweight = (dy * xhat).sum(axes)
    dxhat = dy * weight
    if not training:
        return dxhat * invstd, dweight, dbias
    dx = invstd * (
        dxhat - dxhat.mean(axes, keepdims=True) - xhat * (dxhat * xhat).mean(axes, keepdims=True)
    )
    return dx, dweight, dbias
