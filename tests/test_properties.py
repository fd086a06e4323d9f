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


def rows(dtype=np.float32):
    shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=33)
    return hnp.arrays(dtype, shapes, elements=NUMBERS)


@given(rows(), st.integers(-64, 64), st.integers(-20, 20))
def test_layer_norm_does_not_see_a_shift_or_a_scale(x, shift, exponent):
    # On a grid on which both are exact. eps is scaled along.
    x, scale = np.round(x * 16) / 16, 2.0**exponent
    n = x.shape[-1]
    y, mean, invstd = fastbn.layer_norm_forward(x, n)
    moved = (x + np.float32(shift)) * np.float32(scale)
    y2, mean2, invstd2 = fastbn.layer_norm_forward(moved, n, eps=1e-5 * scale**2)
    np.testing.assert_allclose(y2, y, atol=1e-5)
    np.testing.assert_allclose(mean2, (mean + shift) * scale, atol=1e-6 * spread(x) * scale)
    np.testing.assert_allclose(invstd2 * scale, invstd, rtol=6e-7)


@given(rows(), st.integers(-20, 20))
def test_rms_norm_does_not_see_a_scale(x, exponent):
    scale = 2.0**exponent
    y, invrms = fastbn.rms_norm_forward(x, x.shape[-1], eps=1e-5)
    scaled = x * np.float32(scale)
    y2, invrms2 = fastbn.rms_norm_forward(scaled, x.shape[-1], eps=1e-5 * scale**2)
    np.testing.assert_allclose(y2, y, atol=1e-5)
    np.testing.assert_allclose(invrms2 * scale, invrms, rtol=6e-7)


@given(rows())
def test_layer_norm_is_rms_norm_of_what_has_mean_zero(x):
    # Each value beside its negative: the mean is 0, and the variance the mean square.
    both = np.stack([x, -x], axis=-1)
    y = fastbn.layer_norm(both, both.shape[-2:])
    expected = fastbn.rms_norm(both, both.shape[-2:], eps=1e-5)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@given(batches())
def test_one_group_is_layer_norm_and_one_channel_each_is_instance_norm(x):
    if x[0].size > 1:
        one = fastbn.group_norm_forward(x, 1)
        layer = fastbn.layer_norm_forward(x, x.shape[1:])
        for mine, other in zip(one, layer, strict=True):
            np.testing.assert_allclose(mine.ravel(), other.ravel(), rtol=1e-5, atol=1e-5)
    if x[0, 0].size > 1:
        weight, bias = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
        each = fastbn.group_norm_forward(x, x.shape[1], weight, bias)
        instance = fastbn.instance_norm_forward(x, weight, bias)
        for mine, other in zip(each, instance, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)


@given(batches())
def test_batch_norm_of_each_sample_is_instance_norm(x):
    if x[0, 0].size == 1:
        return
    weight, bias = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    y, mean, invstd = fastbn.instance_norm_forward(x, weight, bias)
    dx, dweight, dbias = fastbn.instance_norm_backward(x, x, mean, invstd, weight)
    sums = np.zeros((2, x.shape[1]))
    for n in range(len(x)):
        one = x[n : n + 1]
        expected, m, i = fastbn.batch_norm_forward(one, weight, bias)
        np.testing.assert_allclose(y[n : n + 1], expected, atol=1e-5)
        np.testing.assert_allclose(mean[n], m, rtol=1e-6, atol=1e-6 * spread(x))
        gradients = fastbn.batch_norm_backward(one, one, m, i, weight)
        room = 1e-5 * (1 + spread(x) * float(i.max()))
        np.testing.assert_allclose(dx[n : n + 1], gradients[0], atol=room)
        sums += gradients[1:]
    room = 1e-5 * float(np.abs(x).sum()) + 1e-6
    np.testing.assert_allclose(dweight, sums[0], atol=room * (1 + float(np.abs(y).max())))
    np.testing.assert_allclose(dbias, sums[1], atol=room)


@given(rows(), st.randoms(use_true_random=False))
def test_gradients_of_a_row_are_orthogonal_to_what_is_normalised_away(x, random):
    rng = np.random.default_rng(random.randrange(2**32))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    n = x.shape[-1]
    _, mean, invstd = fastbn.layer_norm_forward(x, n, eps=1e-3)
    dx, _, dbias = fastbn.layer_norm_backward(dy, x, mean, invstd, n)
    room = 1e-5 * n * (1 + float(invstd.max()))
    np.testing.assert_allclose(dx.sum(-1, dtype=np.float64), 0, atol=room)
    np.testing.assert_allclose(dbias, dy.reshape(-1, n).sum(0, dtype=float), atol=1e-4 * x.size)
