# SPDX-License-Identifier: BSD-3-Clause
"""The bars of docs/numerics.md for layer, RMS, group and instance norm, on the same data."""

import bounds
import numpy as np
import oracle
import pytest
from arrays import assert_near
from bounds import WRITTEN
from cases import Case, Expected
from datasets import datasets

from fastbn import _dispatch

VARIANCE = bounds.VARIANCE["float32"]
# An eps that leaves the variance readable from invstd, and a variance of 0 a number.
TINY = 1e-300


def arrangements(rows):
    """The same groups of values as (operation, array), each row being a group."""
    groups, n = rows.shape
    yield Case("layer", rows.shape, n), rows
    yield Case("layer", rows.shape, n), np.asfortranarray(rows)
    yield Case("instance", (groups // 4, 4, n)), rows.reshape(-1, 4, n)
    parts = next(k for k in range(2, n + 1) if n % k == 0)
    x = rows.reshape(-1, 4 * parts, n // parts)
    yield Case("group", x.shape, 4), x
    last = np.ascontiguousarray(x.swapaxes(1, 2))
    yield Case("group", last.shape, 4, "NLC"), last
    last = np.ascontiguousarray(rows.reshape(-1, 4, n).swapaxes(1, 2))
    yield Case("instance", last.shape, layout="NLC"), last


def squares(case, x):
    """Variance, or mean square, of each group as backward would get it."""
    saved = case.forward(x, eps=TINY)[1]
    found = 1 / saved[-1].reshape(-1) ** 2
    return np.where(found > 1.5 * TINY, found, 0)


def check(rows, name):
    """Each operation's variance at each level, and the mean square of rms norm."""
    wide = rows.astype(np.float64)
    variance = wide.var(1)
    # Of equal numbers NumPy's mean may be off by a digit, and its variance not be 0.
    variance[wide.min(1) == wide.max(1)] = 0
    mean_square = (wide**2).mean(1)
    for level in _dispatch.runnable():
        with _dispatch.using(level):
            for case, x in arrangements(rows):
                error = np.abs(squares(case, x) - variance)
                assert (error <= VARIANCE * variance).all(), (name, str(case), level)
            for x in (rows, np.asfortranarray(rows)):
                case = Case("rms", rows.shape, rows.shape[1])
                error = np.abs(squares(case, x) - mean_square)
                assert (error <= VARIANCE * mean_square).all(), (name, "rms", level)


@pytest.mark.parametrize("mean", [0, 1, 1e3, 1e5])
@pytest.mark.parametrize("n", [2, 7, 33, 64, 100, 513, 1568, 20_000])
def test_variance(n, mean):
    for name, data in datasets(n, 200 if n <= 64 else 40 if n < 5000 else 8, mean):
        check(np.ascontiguousarray(data.T).astype(np.float32), name)


@pytest.mark.parametrize("n", [64, 768])
def test_variance_of_half_types(half, n):
    for name, data in datasets(n, 40, 1):
        data = np.clip(data.T, -6e4, 6e4).astype(np.float32)
        check(np.ascontiguousarray(data).astype(half), name)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e18, 1e30, 1e37])
def test_variance_at_any_scale(scale):
    for name, data in datasets(768, 40, 0):
        with np.errstate(over="ignore", under="ignore"):
            x = (np.clip(data.T, -9, 9) * scale).astype(np.float32)
        check(np.ascontiguousarray(x), name)


def test_float64_to_rounding(level):
    # 2e-15 as of batch statistics, and the roundings of a root and two quotients.
    for mean in 0, 1e5, 1e10:
        for name, data in datasets(1568, 40, mean):
            rows = np.ascontiguousarray(data.T)
            wide = rows.astype(np.longdouble)
            variance, mean_square = wide.var(1), (wide**2).mean(1)
            for case, x in arrangements(rows):
                error = np.abs(squares(case, x) - variance)
                assert (error <= 3e-15 * variance).all(), (name, str(case))
            error = np.abs(squares(Case("rms", rows.shape, 1568), rows) - mean_square)
            assert (error <= 3e-15 * mean_square).all(), name


WRITES = [
    Case("layer", (64, 768), 768),
    Case("layer", (9, 4100), 4100),
    Case("layer", (4, 40, 14, 15), (40, 14, 15)),
    Case("layer", (500, 30), 30),
    Case("rms", (64, 768), 768),
    Case("rms", (9, 4100), 4100),
    Case("group", (8, 40, 14, 14), 8),
    Case("group", (2, 8, 100, 100), 4),
    Case("group", (8, 14, 14, 40), 8, "NHWC"),
    Case("group", (64, 240), 4),
    Case("instance", (8, 40, 14, 14)),
    Case("instance", (8, 196, 40), layout="NLC"),
]


@pytest.mark.parametrize("mean", [0, 1, 1e3, 1e5])
@pytest.mark.parametrize("case", WRITES, ids=str)
def test_writes(level, mean, case):
    x = case.batch("float32", 1, mean, 1.0)
    dy = case.batch("float32", 2, 0.0, 1.0)
    expected = Expected(case, x, dy)
    y, saved = case.forward(x, eps=1e-5)
    assert np.abs(y - expected.y).max() <= WRITTEN
    assert_near(y, expected.y, expected.room_y)
    found = case.backward(dy, x, saved)
    assert np.abs(found[0] - expected.gradients[0]).max() <= WRITTEN
    expected.assert_gradients(found, exact=False)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("case", WRITES, ids=str)
def test_writes_at_any_scale(level, scale, case):
    x = (case.batch("float64", 3, 0.0, 1.0) * scale).astype(np.float32)
    dy = case.batch("float32", 4, 0.0, 1.0)
    # dx is as large as 1 / scale: kept where float32 has such numbers.
    weight = np.full(case.parameter_shape, min(1.0, scale * 1e10))
    expected = Expected(case, x, dy, weight, eps=1e-100)
    y, saved = case.forward(x, eps=1e-100)
    exact = oracle.forward(case.op, x, expected.mean, expected.var, eps=1e-100, **expected.where)
    assert np.abs(y - exact).max() <= WRITTEN
    found = case.backward(dy, x, saved, weight)
    size = np.abs(expected.gradients[0]).max()
    assert np.abs(found[0] - expected.gradients[0]).max() <= size * 1e-6 + 2e-45
    expected.assert_gradients(found, exact=False)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e20, 1e36])
@pytest.mark.parametrize("case", [*WRITES, Case("batch", (8, 40, 14, 14))], ids=str)
def test_bfloat16_at_any_scale(level, scale, case):
    pytest.importorskip("ml_dtypes")
    x = (case.batch("float64", 3, 0.0, 1.0) * scale).astype("bfloat16")
    expected = Expected(case, x, x, eps=1e-100)
    y, saved = case.forward(x, eps=1e-100)
    assert_near(y, expected.y, np.minimum(WRITTEN, expected.room_y))
    assert_near(saved[-1], expected.invstd, bounds.of_invstd("bfloat16") * expected.invstd)


@pytest.mark.parametrize("case", [case for case in WRITES if case.has_mean], ids=str)
def test_a_mean_of_dy_costs_no_more_than_its_own_rounding(level, case):
    where = {"what": case.what, "layout": case.layout}
    x = case.batch("float32", 5, 0.0, 1.0)
    mean, var = oracle.moments(case.op, x, **where)
    invstd = 1 / np.sqrt(var + 1e-5)
    for size in 1, 100, 1e4:
        dy = case.batch("float32", 6, size, 1.0)
        dx = case.backward(dy, x, [mean, invstd])[0]
        error = np.abs(dx - oracle.gradients(case.op, dy, x, mean, invstd, **where)[0]).max()
        assert error <= 2**-22 * (size + 4) * invstd.max()
