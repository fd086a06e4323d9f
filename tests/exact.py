# SPDX-License-Identifier: BSD-3-Clause
"""Statistics in Python's integers, and comparisons of BatchStats bit by bit."""

from fractions import Fraction

import numpy as np


def bits(stats):
    """Everything that BatchStats holds, for ==. A NaN is only a NaN."""
    result = []
    for name in ("count", "mean", "m2", "min", "max", "sum", "sum_of_squares"):
        value = getattr(stats, name)
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "f":
                value = np.where(np.isnan(value), value.dtype.type(np.nan), value)
            value = (value.dtype, value.tobytes())
        result.append(value)
    return result


def assert_exact(stats, x, axis):
    """Statistics of integers are those of Python's integers, rounded once."""
    for c, channel in enumerate(np.moveaxis(x, axis, 0)):
        values = [int(v) for v in channel.ravel()]
        n, total, squares = len(values), sum(values), sum(v * v for v in values)
        assert stats.count[c] == n
        assert (stats.sum[c], stats.sum_of_squares[c]) == (total, squares)
        assert stats.mean[c] == float(Fraction(total, n))
        assert stats.m2[c] == float(Fraction(n * squares - total * total, n))
        assert (stats.min[c], stats.max[c]) == (min(values), max(values))
