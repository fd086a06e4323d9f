# SPDX-License-Identifier: BSD-3-Clause
"""The bars of docs/numerics.md, on the data that has broken other implementations."""

import bounds
import numpy as np
import oracle
import pytest
from arrays import assert_near
from bounds import WRITTEN
from cases import Case, Expected
from datasets import datasets, layouts

import fastbn

VARIANCE = bounds.VARIANCE["float32"]
N, C = 1568, 40


def variance_error(x, layout=None):
    """The largest relative error of a channel's variance; a constant must give 0."""
    axis = oracle.channel_axis(x.ndim, layout)
    wide = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.longdouble)
    exact = wide.var(1)
    found = fastbn.batch_stats(x, layout=layout).var()
    assert (found[exact == 0] == 0).all()
    return float((np.abs(found - exact) / np.where(exact == 0, 1, exact)).max())


@pytest.mark.parametrize("mean", [0, 1, 1e3, 1e5])
@pytest.mark.parametrize("n", [2, 3, 8, 33, 64, 100, 513, N, 40_000])
def test_variance(level, n, mean):
    channels = 1000 if n <= 64 else C if n < 5000 else 8
    for name, data in datasets(n, channels, mean):
        for x in layouts(data.astype(np.float32)):
            assert variance_error(x) <= VARIANCE, (name, x.shape)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e18, 1e30, 1e37])
def test_variance_at_any_scale(level, scale):
    for name, data in datasets(N, C, 0):
        with np.errstate(over="ignore", under="ignore"):
            x = (np.clip(data, -9, 9) * scale).astype(np.float32)
        for array in layouts(x):
            assert variance_error(array) <= VARIANCE, name


def test_float64_to_rounding(level):
    for mean in 0, 1e5, 1e10:
        for name, data in datasets(N, C, mean):
            for x in layouts(data):
                assert variance_error(x) <= bounds.VARIANCE["float64"], name


@pytest.mark.parametrize("mean", [0, 1, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(64, 40), (8, 40, 14, 14), (2, 8, 100, 100)])
def test_writes(level, mean, shape):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(shape) + mean).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    for array, gradient, layout in (
        (x, dy, None),
        (np.ascontiguousarray(np.moveaxis(x, 1, -1)), np.moveaxis(dy, 1, -1), "N...C"),
    ):
        expected = Expected(Case("batch", array.shape, layout=layout), array, gradient)
        y, *saved = fastbn.batch_norm_forward(array, layout=layout)
        assert np.abs(y - expected.y).max() <= WRITTEN
        assert_near(y, expected.y, expected.room_y)
        found = fastbn.batch_norm_backward(gradient, array, *saved, layout=layout)
        assert np.abs(found[0] - expected.gradients[0]).max() <= WRITTEN
        expected.assert_gradients(found, exact=False)


def test_a_mean_of_dy_costs_no_more_than_its_own_rounding(level):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((8, 40, 14, 14)).astype(np.float32)
    mean, var = oracle.stats(x)
    invstd = 1 / np.sqrt(var + 1e-5)
    for size in 1, 100, 1e4:
        dy = (rng.standard_normal(x.shape) + size).astype(np.float32)
        dx, _, _ = fastbn.batch_norm_backward(dy, x, mean, invstd)
        error = np.abs(dx - oracle.backward(dy, x, mean, invstd)[0]).max()
        assert error <= 2**-22 * (size + 4)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e37])
@pytest.mark.parametrize("shape", [(64, 40), (64, 1300), (8, 40, 14, 14)])
def test_writes_at_any_scale(level, scale, shape):
    rng = np.random.default_rng(2)
    x = (rng.standard_normal(shape) * scale).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    # dx is as large as 1 / scale: kept where float32 has such numbers.
    weight = np.full(shape[1], min(1.0, scale * 1e10))
    expected = Expected(Case("batch", shape), x, dy, weight, eps=1e-100)
    y, *saved = fastbn.batch_norm_forward(x, eps=1e-100)
    exact = oracle.normalise(x, expected.mean, expected.var, eps=1e-100)
    assert np.abs(y - exact).max() <= WRITTEN
    found = fastbn.batch_norm_backward(dy, x, *saved, weight)
    size = np.abs(expected.gradients[0]).max()
    assert np.abs(found[0] - expected.gradients[0]).max() <= size * 1e-6 + 2e-45
    expected.assert_gradients(found, exact=False)


def test_constant_channels_are_exact(level, dtype):
    for shape in [(2, 3), (200, 3), (30, 3, 7, 7), (2, 3, 60, 61)]:
        for value in (0.1, -3.3, 1e-30, 1e30, 12345.678):
            x = np.full(shape, value, dtype)
            bias = np.array([1.5, -2.0, 0.1])
            stats = fastbn.batch_stats(x)
            assert (stats.var() == 0).all()
            assert (stats.mean == x.flat[0]).all()
            y, _, _ = fastbn.batch_norm_forward(x, bias=bias)
            assert (np.moveaxis(y, 1, -1) == bias.astype(dtype)).all()


@pytest.mark.parametrize("shape", [(40, 6), (5, 6, 7, 7), (32, 6, 7, 7), (2, 6, 50, 50)])
def test_infinities_and_nans_as_numpy(level, dtype, shape):
    x = np.random.default_rng(3).standard_normal(shape).astype(dtype)
    x[0, 0], x[1, 1], x[0, 2], x[1, 2], x[1, 3] = np.inf, -np.inf, np.inf, -np.inf, np.nan
    stats = fastbn.batch_stats(x)
    axes = tuple(i for i in range(len(shape)) if i != 1)
    with np.errstate(invalid="ignore"):
        mean = x.mean(axes, dtype=np.float64)
    np.testing.assert_allclose(stats.mean, mean, atol=1e-7)
    assert np.isnan(stats.var()[:4]).all()
    assert np.isfinite(stats.var()[4:]).all()


def test_data_that_rounds_alike_comes_near_the_bar(level):
    """Channels of a few values each: equal terms are rounded alike, all of them.

    The worst that a search has found; docs/numerics.md has the proven bound for
    any data, which needs every rounding of a block to be maximal and of one sign.
    """
    proven = (4 * 4 + 2 * 2 + 6 * 12**0.5) * 2.0**-24
    worst = 0.0
    for seed in (14, 37, 49):
        rng = np.random.default_rng(seed)
        k = rng.integers(2, 6)
        values = (rng.random((k, 512)) + 1) * rng.choice([1, 2, 0.5], size=(k, 1))
        which = rng.choice(k, size=(2048, 512), p=rng.dirichlet(np.ones(k)))
        x = np.take_along_axis(values.astype(np.float32), which, 0)
        worst = max(worst, variance_error(x))
    assert 0.8 * VARIANCE <= worst <= VARIANCE < proven


def test_float32_running_variance_of_huge_data_is_infinite():
    x = np.random.default_rng(5).standard_normal((8, 2)).astype(np.float32) * np.float32(1e30)
    running_var = np.ones(2, np.float32)
    fastbn.batch_norm_forward(x, running_var=running_var)  # and without a warning
    assert np.isinf(running_var).all()
