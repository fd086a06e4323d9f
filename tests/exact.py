# SPDX-License-Identifier: BSD-3-Clause
"""Statistics in Python's integers and float64, and comparisons of BatchStats bit by bit."""

import numpy as np


def bits(stats):
    """Everything that BatchStats holds, for ==."""
    return tuple(
        None
        if value is None
        else value
        if isinstance(value, list)
        else (value.dtype, value.tobytes())
        for value in (
            getattr(stats, name)
            for name in ("count", "mean", "m2", "min", "max", "sum", "sum_of_squares")
        )
    )


def numbers(stats):
    """The same of statistics whose NaN may differ in payload."""
    return [np.nan_to_num(getattr(stats, n).astype(float), nan=-7.25).tolist()
            for n in ("count", "mean", "m2", "min", "max")]  # fmt: skip


def assert_exact(stats, x, axis):
    """Statistics of integers are those of Python's integers, rounded once."""
    from fractions import Fraction

    for c, channel in enumerate(np.moveaxis(x, axis, 0)):
        values = [int(v) for v in channel.ravel()]
        n, total, squares = len(values), sum(values), sum(v * v for v in values)
        assert stats.count[c] == n
        assert (stats.sum[c], stats.sum_of_squares[c]) == (total, squares)
        assert stats.mean[c] == float(Fraction(total, n))
        assert stats.m2[c] == float(Fraction(n * squares - total * total, n))
        assert (stats.min[c], stats.max[c]) == (min(values), max(values))
