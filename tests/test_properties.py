# SPDX-License-Identifier: BSD-3-Clause
"""Laws that hold for any batch, searched by Hypothesis."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastbn

settings.register_profile("fastbn", deadline=None, max_examples=60)
settings.load_profile("fastbn")

NUMBERS = st.floats(-1e3, 1e3, width=32)


def batches(dtype=np.float32):
    shapes = hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=19).filter(
        lambda shape: np.prod(shape) > shape[1]
    )
    return hnp.arrays(dtype, shapes, elements=NUMBERS)


def spread(x):
    return max(1.0, float(np.abs(x).max()))


@given(batches(), st.integers(-64, 64))
def test_a_shift_moves_the_mean_and_nothing_else(x, shift):
    # On a grid on which the shift is exact.
    x = np.round(x * 16) / 16
    a, b = fastbn.batch_stats(x), fastbn.batch_stats(x + np.float32(shift))
    np.testing.assert_allclose(b.mean, a.mean + shift, atol=1e-6 * spread(x))
    np.testing.assert_allclose(b.var(), a.var(), rtol=6e-7, atol=1e-12)


@given(batches(), st.integers(-20, 20))
def test_a_power_of_two_scales_exactly(x, exponent):
    scale = np.float32(2.0**exponent)
    x = np.round(x * 16) / 16
    a, b = fastbn.batch_stats(x), fastbn.batch_stats(x * scale)
    np.testing.assert_array_equal(b.mean, a.mean * scale)
    np.testing.assert_allclose(b.m2, a.m2 * float(scale) ** 2, rtol=6e-7)


@given(batches(np.float64), st.data())
def test_any_split_merges_to_the_whole(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    whole = fastbn.batch_stats(x)
    merged = fastbn.BatchStats.merge(map(fastbn.batch_stats, np.split(x, cuts)))
    np.testing.assert_array_equal(merged.count, whole.count)
    np.testing.assert_allclose(merged.mean, whole.mean, atol=1e-13 * spread(x))
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-11, atol=1e-12 * spread(x) ** 2)


@given(batches())
def test_output_has_mean_bias_and_variance_weight_squared(x):
    channels = x.shape[1]
    axes = tuple(i for i in range(x.ndim) if i != 1)
    weight, bias = np.full(channels, 3.0), np.full(channels, -2.0)
    y, _, invstd = fastbn.batch_norm_forward(x, weight, bias)
    y = y.astype(np.float64)
    var = 1 / invstd**2 - 1e-5
    np.testing.assert_allclose(y.mean(axes), -2, atol=1e-5)
    np.testing.assert_allclose(y.var(axes), 9 * var / (var + 1e-5), rtol=1e-4, atol=1e-4)


@given(batches(), st.randoms(use_true_random=False))
def test_gradients_are_orthogonal_to_what_is_normalised_away(x, random):
    rng = np.random.default_rng(random.randrange(2**32))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    _, mean, invstd = fastbn.batch_norm_forward(x, eps=1e-3)
    dx, _, _ = fastbn.batch_norm_backward(dy, x, mean, invstd)
    axes = tuple(i for i in range(x.ndim) if i != 1)
    room = 1e-5 * x.size * (1 + float(invstd.max()))
    np.testing.assert_allclose(dx.sum(axes, dtype=np.float64), 0, atol=room)


@given(batches(), st.permutations(range(5)))
def test_the_order_of_axes_in_memory_changes_values_by_rounding_only(x, order):
    order = [axis for axis in order if axis < x.ndim]
    view = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    a, b = fastbn.batch_stats(x), fastbn.batch_stats(view)
    np.testing.assert_allclose(b.mean, a.mean, atol=1e-6 * spread(x))
    np.testing.assert_allclose(b.var(), a.var(), rtol=6e-7, atol=1e-10 * spread(x) ** 2)
    y = fastbn.batch_norm(view, None, None, training=True)
    assert y.strides == np.empty_like(view).strides or min(x.shape) == 1
