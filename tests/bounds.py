# SPDX-License-Identifier: BSD-3-Clause
"""How far off a result may be: the bounds that docs/numerics.md proves, for each element its own.

A room is what a number may err by before it is rounded to its dtype; `arrays.assert_near`
adds half a unit in the last place of that. A sum over rows has the room of its own terms:
what one channel may err by does not grow with what the others hold. Knows nothing of fastbn.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import oracle
from arrays import FLOATS

# What docs/numerics.md says of any data, without a proof: relative, of a variance of the data of
# datasets.py; and absolute, of y (before weight) and dx of data of unit size.
VARIANCE = {"float32": 3e-7, "float64": 2e-15}
WRITTEN = 5e-6

# Half the distance from 1 to the next number of what the kernels compute in.
UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
# The oracle computes in float64 and adds pairwise: no number goes through more additions.
DEPTH = 40
ORACLE = DEPTH * UNIT["float64"]

# How many roundings of the arithmetic meet in a number, at most: docs/numerics.md counts them.
NORMALISED = 6  # xhat, times its weight
SUM = 5  # of dz
PRODUCTS = 9  # the sum of dz * xhat
MEAN = 8  # of x, in standard deviations
# In dx, beside those of its sums: of dz * weight; of the mean of that; of xhat times the mean of
# dz * weight * xhat.
DIRECT, THROUGH_MEAN, THROUGH_VARIANCE = 5, 3, 8


class Follows(NamedTuple):
    """How many roundings an activation adds, and what its slope makes of an error of z."""

    value: int = 0  # relative to y
    slope: Callable = np.zeros_like  # relative to 1
    curved: Callable = np.zeros_like  # |y''|
    argument: int = 0  # of the value, relative to z


def roundings_of_silu_slope(z):
    return 12 * oracle.sigmoid(z) * (1 + np.abs(z) * oracle.sigmoid(-z))


def curved_silu(z):
    s = oracle.sigmoid(z)
    return np.abs(s * (1 - s) * (2 + z * (1 - 2 * s)))


FOLLOWS = {
    None: Follows(),
    "relu": Follows(),
    "relu6": Follows(),
    "leaky_relu": Follows(2),
    "silu": Follows(8, roundings_of_silu_slope, curved_silu),
    "hardswish": Follows(
        3, lambda z: np.full_like(z, 4), lambda z: np.where(np.abs(z) < 3, 1 / 3, 0), 2
    ),
    "hardsigmoid": Follows(3, np.ones_like, argument=1),
}


def arithmetic(dtype):
    """The dtype in which elements of another are computed."""
    dtype = np.dtype(dtype).name
    return dtype if dtype in FLOATS else "float32"


def roundings(count, dtype):
    return count * UNIT[arithmetic(dtype)] + ORACLE


def of_variance(dtype):
    """Relative."""
    return VARIANCE[arithmetic(dtype)] + ORACLE


def of_invstd(dtype):
    """Relative: of a root, and of a variance that eps only adds to."""
    return VARIANCE[arithmetic(dtype)] / 2 + ORACLE


def of_mean(mean, var, dtype):
    return roundings(MEAN, dtype) * np.sqrt(var) + ORACLE * np.abs(mean)


def of_running(old, new, of_new, momentum):
    """Of a running statistic, of which `new` is a share."""
    return momentum * of_new + ORACLE * (np.abs(old.astype(np.float64)) + np.abs(new))


class Bounds:
    """Of one normalisation with these statistics; `exact` if they are given, not computed.

    In the shape in which the operation sees x. `off` is by how much each xhat is another one
    before the kernel rounds it: for errors of the statistics, or because x is not known.
    """

    def __init__(
        self, op, x, mean, invstd, weight=None, bias=None, what=None, layout=None, exact=True
    ):
        self.op, self.x, self.what, self.layout = op, x, what, layout
        self.dtype = arithmetic(x.dtype)
        seen, self.reduced, varying = oracle.see(op, x, what, layout)
        self.others = tuple(i for i in range(seen.ndim) if i not in varying)
        mean, self.invstd = (
            np.expand_dims(np.asarray(v, np.float64), self.reduced) for v in (mean, invstd)
        )
        self.exact, self.far = (seen - mean) * self.invstd, np.abs(mean) * self.invstd
        # The kernel subtracts a rounded mean, and adds later what is left of it.
        self.xhat = np.abs(self.exact) + UNIT[self.dtype] * self.far
        self.of_invstd = self.off = 0.0
        if not exact:
            self.of_invstd = of_invstd(self.dtype)
            self.off = self.of_invstd * np.abs(self.exact)
            if op != "rms":
                values = math.prod(seen.shape[axis] for axis in self.reduced)
                own = min(values, DEPTH) * UNIT["float64"] * self.far
                self.off = self.off + roundings(MEAN, self.dtype) + own
        self.weight = oracle.along(weight, seen, varying, 1)
        self.gain = np.abs(self.weight)
        self.bias = np.abs(oracle.along(bias, seen, varying, 0))

    def of_z(self, z, adds=False):
        """Of what is normalised, or of its sum with a residual."""
        room = self.gain * (self.off + roundings(NORMALISED, self.dtype) * self.xhat)
        room = room + roundings(1, self.dtype) * self.bias
        if adds:  # what was rounded before the sum
            room = room + roundings(1, self.dtype) * (self.gain * self.xhat + self.bias)
        return self._unsee(room) + roundings(1, self.dtype) * np.abs(z)

    def of_gradients(self, dz, of_dz=0.0, frozen=False):
        """Of dx, dweight and dbias."""
        dz, of_dz = self._see(dz), self._see(of_dz) if np.shape(of_dz) else of_dz
        size = np.abs(dz)
        # Of the terms of both sums.
        of_dbias = of_dz + roundings(SUM, self.dtype) * size
        of_dweight = (of_dz + roundings(PRODUCTS, self.dtype) * size) * self.xhat + size * self.off
        of_dx = self.gain * (of_dz + roundings(DIRECT, self.dtype) * size)
        if not frozen:
            of_dx = of_dx + self._through_statistics(self.weight * dz, of_dweight, of_dbias)
        return self._unsee(self.invstd * of_dx), self._sum(of_dweight), self._sum(of_dbias)

    def _through_statistics(self, dxhat, of_dweight, of_dbias):
        mean, product = np.abs(self._mean(dxhat)), np.abs(self._mean(dxhat * self.exact))
        of_mean = self._mean(self.gain * of_dbias) + roundings(THROUGH_MEAN, self.dtype) * mean
        of_product = (
            self._mean(self.gain * of_dweight) + roundings(THROUGH_VARIANCE, self.dtype) * product
        )
        # 1 / std is a factor of all.
        whole = np.abs(dxhat) + mean + self.xhat * product
        return of_mean + self.xhat * of_product + self.off * product + self.of_invstd * whole

    def _see(self, tensor):
        return oracle.see(self.op, tensor, self.what, self.layout)[0]

    def _unsee(self, room):
        full = np.broadcast_to(room, oracle.see(self.op, self.x, self.what, self.layout)[0].shape)
        return oracle.unsee(full, self.op, self.x, self.layout)

    def _mean(self, terms):
        return np.mean(terms, self.reduced, keepdims=True)

    def _sum(self, terms):
        total = np.sum(terms, self.others)
        return total.reshape(-1) if self.op in ("group", "instance") else total


def of_y(z, of_z, dtype, activation=None, negative_slope=0.01):
    """Of what an activation makes of z: nothing, where it is flat as far as z may be."""
    if activation is None:
        return of_z
    steep = [np.abs(oracle.slope(z + s * of_z, activation, negative_slope)) for s in (-1, 1)]
    room, follows = np.maximum(*steep) * of_z, FOLLOWS[activation]
    for count, size in (
        (follows.value, oracle.activated(z, activation, negative_slope)),
        (follows.argument, z),
    ):
        if count:
            room = room + roundings(count, dtype) * np.abs(size)
    return room


def of_dz(z, of_z, dy, dtype, activation=None, negative_slope=0.01):
    """Of the gradient of z, a product."""
    if activation is None:
        return 0.0
    follows, dy = FOLLOWS[activation], np.abs(dy.astype(np.float64))
    dz = dy * np.abs(oracle.slope(z, activation, negative_slope))
    own = follows.slope(z)
    of_slope = follows.curved(z) * of_z + roundings(own, dtype) * (own > 0)
    return dy * of_slope + roundings(2, dtype) * dz
