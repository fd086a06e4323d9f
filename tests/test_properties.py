# SPDX-License-Identifier: BSD-3-Clause
"""Laws that hold for any batch, searched by Hypothesis.

Two results that a law makes equal are each within the room of bounds.py of the exact one.
"""

import bounds
import numpy as np
from arrays import assert_near, half_ulp
from cases import Case, Expected
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import fastbn

settings.register_profile("fastbn", deadline=None, max_examples=60)
settings.load_profile("fastbn")

NUMBERS = st.floats(-1e3, 1e3, width=32)


def arrays(shapes, dtype=np.float32):
    return hnp.arrays(dtype, shapes, elements=NUMBERS)


def batches(dtype=np.float32):
    """More than one value in each channel."""
    shapes = hnp.array_shapes(min_dims=2, max_dims=5, min_side=1, max_side=19)
    return arrays(shapes.filter(lambda shape: np.prod(shape) > shape[1]), dtype)


def planes():
    """More than one value in each channel of each sample."""
    shapes = hnp.array_shapes(min_dims=3, max_dims=5, min_side=1, max_side=19)
    return arrays(shapes.filter(lambda shape: np.prod(shape[2:]) > 1))


def rows():
    return arrays(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=33))


def all_but_channels(x):
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def spread(x):
    """The size of each channel's values, or 1."""
    return np.maximum(1.0, np.abs(x.astype(np.float64)).max(all_but_channels(x)))


def assert_both_near(one, other, room):
    """Each within its share of a room around the same exact number, and rounded."""
    exact = other.astype(np.float64)
    assert_near(one, exact, room + half_ulp(np.abs(exact) + room, one.dtype.name))


def of_gradients(expected):
    return expected.rooms_of(expected.dz, exact=False)


def gradient_like(x, random):
    rng = np.random.default_rng(random.randrange(2**32))
    return rng.standard_normal(x.shape).astype(np.float32)


def assert_sums_vanish(dx, expected, axes):
    """Sums of numbers that each have a room, where exact ones have a sum of 0."""
    room = of_gradients(expected)[0]
    room = room + half_ulp(np.abs(expected.gradients[0]) + room, "float32")
    assert (np.abs(dx.sum(axes, dtype=np.float64)) <= room.sum(axes)).all()


@given(batches(), st.integers(-64, 64))
def test_a_shift_moves_the_mean_and_nothing_else(x, shift):
    # On a grid on which the shift is exact.
    x = np.round(x * 16) / 16
    a, b = fastbn.batch_stats(x), fastbn.batch_stats(x + np.float32(shift))
    room = bounds.of_mean(a.mean, a.var(), x.dtype) + bounds.of_mean(b.mean, b.var(), x.dtype)
    assert_near(b.mean, a.mean + shift, room)
    assert_near(b.var(), a.var(), 2 * bounds.of_variance(x.dtype) * a.var())


@given(batches(), st.integers(-20, 20))
def test_a_power_of_two_scales_exactly(x, exponent):
    scale = np.float32(2.0**exponent)
    x = np.round(x * 16) / 16
    a, b = fastbn.batch_stats(x), fastbn.batch_stats(x * scale)
    np.testing.assert_array_equal(b.mean, a.mean * scale)
    expected = a.m2 * float(scale) ** 2
    assert_near(b.m2, expected, 2 * bounds.of_variance(x.dtype) * expected)


@given(batches(np.float64), st.data())
def test_any_split_merges_to_the_whole(x, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    whole = fastbn.batch_stats(x)
    merged = fastbn.BatchStats.merge(map(fastbn.batch_stats, np.split(x, cuts)))
    np.testing.assert_array_equal(merged.count, whole.count)
    assert_near(merged.mean, whole.mean, 1e-13 * spread(x))
    assert_near(merged.m2, whole.m2, 1e-11 * whole.m2 + 1e-12 * spread(x) ** 2)


@given(batches())
def test_output_has_mean_bias_and_variance_weight_squared(x):
    channels = x.shape[1]
    weight, bias = np.full(channels, 3.0), np.full(channels, -2.0)
    y, _, invstd = fastbn.batch_norm_forward(x, weight, bias)
    y = y.astype(np.float64)
    var = 1 / invstd**2 - 1e-5
    np.testing.assert_allclose(y.mean(all_but_channels(x)), -2, atol=1e-5)
    expected = 9 * var / (var + 1e-5)
    np.testing.assert_allclose(y.var(all_but_channels(x)), expected, rtol=1e-4, atol=1e-4)


@given(batches(), st.randoms(use_true_random=False))
def test_gradients_are_orthogonal_to_what_is_normalised_away(x, random):
    dy = gradient_like(x, random)
    _, mean, invstd = fastbn.batch_norm_forward(x, eps=1e-3)
    dx, _, _ = fastbn.batch_norm_backward(dy, x, mean, invstd)
    expected = Expected(Case("batch", x.shape), x, dy, eps=1e-3)
    assert_sums_vanish(dx, expected, all_but_channels(x))


@given(batches(), st.permutations(range(5)))
def test_the_order_of_axes_in_memory_changes_values_by_rounding_only(x, order):
    order = [axis for axis in order if axis < x.ndim]
    view = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    a, b = fastbn.batch_stats(x), fastbn.batch_stats(view)
    assert_near(b.mean, a.mean, 2 * bounds.of_mean(a.mean, a.var(), x.dtype))
    assert_near(b.var(), a.var(), 2 * bounds.of_variance(x.dtype) * a.var())
    y = fastbn.batch_norm(view, None, None, training=True)
    # The stride of an axis of one element says nothing.
    strides = [
        [stride for stride, n in zip(array.strides, x.shape, strict=True) if n > 1]
        for array in (y, np.empty_like(view))
    ]
    assert strides[0] == strides[1]


@given(rows(), st.integers(-64, 64), st.integers(-20, 20))
def test_layer_norm_does_not_see_a_shift_or_a_scale(x, shift, exponent):
    # On a grid on which both are exact. eps is scaled along.
    x, scale = np.round(x * 16) / 16, 2.0**exponent
    n = x.shape[-1]
    y, mean, invstd = fastbn.layer_norm_forward(x, n)
    moved = (x + np.float32(shift)) * np.float32(scale)
    y2, mean2, invstd2 = fastbn.layer_norm_forward(moved, n, eps=1e-5 * scale**2)
    case = Case("layer", x.shape, n)
    one, two = Expected(case, x, x), Expected(case, moved, x, eps=1e-5 * scale**2)
    assert_both_near(y2, y, one.room_y + two.room_y)
    room = bounds.of_mean(one.mean, one.var, x.dtype) * scale
    room = room + bounds.of_mean(two.mean, two.var, x.dtype)
    assert_near(mean2, (mean + shift) * scale, room)
    assert_near(invstd2 * scale, invstd, 2 * bounds.of_invstd(x.dtype) * invstd)


@given(rows(), st.integers(-20, 20))
def test_rms_norm_does_not_see_a_scale(x, exponent):
    # On a grid on which it is exact.
    x, scale = np.round(x * 16) / 16, 2.0**exponent
    y, invrms = fastbn.rms_norm_forward(x, x.shape[-1], eps=1e-5)
    scaled = x * np.float32(scale)
    y2, invrms2 = fastbn.rms_norm_forward(scaled, x.shape[-1], eps=1e-5 * scale**2)
    assert_both_near(y2, y, 2 * Expected(Case("rms", x.shape, x.shape[-1]), x, x).room_y)
    assert_near(invrms2 * scale, invrms, 2 * bounds.of_invstd(x.dtype) * invrms)


@given(rows())
def test_layer_norm_is_rms_norm_of_what_has_mean_zero(x):
    # Each value beside its negative: the mean is 0, and the variance the mean square.
    both = np.stack([x, -x], axis=-1)
    what = both.shape[-2:]
    y = fastbn.layer_norm(both, what)
    rms = fastbn.rms_norm(both, what, eps=1e-5)
    rooms = [Expected(Case(op, both.shape, what), both, both).room_y for op in ("layer", "rms")]
    assert_both_near(y, rms, sum(rooms))


@given(planes())
def test_one_group_is_layer_norm_and_one_channel_each_is_instance_norm(x):
    one = fastbn.group_norm_forward(x, 1)
    layer = fastbn.layer_norm_forward(x, x.shape[1:])
    expected = Expected(Case("group", x.shape, 1), x, x)
    assert_same_forward(
        one, [a.reshape(b.shape) for a, b in zip(layer, one, strict=True)], expected
    )
    vectors = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    each = fastbn.group_norm_forward(x, x.shape[1], *vectors)
    instance = fastbn.instance_norm_forward(x, *vectors)
    expected = Expected(Case("instance", x.shape), x, x, *vectors)
    assert_same_forward(each, instance, expected)


def assert_same_forward(one, other, expected):
    """y, mean and invstd by two ways."""
    assert_both_near(one[0], other[0], 2 * expected.room_y)
    room = bounds.of_mean(expected.mean, expected.var, expected.x.dtype)
    assert_near(one[1], other[1], 2 * room)
    assert_near(one[2], other[2], 2 * bounds.of_invstd(expected.x.dtype) * expected.invstd)


@given(planes())
def test_batch_norm_of_each_sample_is_instance_norm(x):
    vectors = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    y, mean, invstd = fastbn.instance_norm_forward(x, *vectors)
    dx, *sums = fastbn.instance_norm_backward(x, x, mean, invstd, vectors[0])
    added = np.zeros((2, x.shape[1]))
    for n in range(len(x)):
        one = x[n : n + 1]
        expected = Expected(Case("batch", one.shape), one, one, *vectors)
        found = fastbn.batch_norm_forward(one, *vectors)
        assert_same_forward((y[n : n + 1], mean[n], invstd[n]), found, expected)
        gradients = fastbn.batch_norm_backward(one, one, *found[1:], vectors[0])
        assert_both_near(dx[n : n + 1], gradients[0], 2 * of_gradients(expected)[0])
        added += gradients[1:]
    rooms = of_gradients(Expected(Case("instance", x.shape), x, x, *vectors))
    for mine, other, room in zip(sums, added, rooms[1:], strict=True):
        assert_near(mine, other, 2 * room)


@given(rows(), st.randoms(use_true_random=False))
def test_gradients_of_a_row_are_orthogonal_to_what_is_normalised_away(x, random):
    dy, n = gradient_like(x, random), x.shape[-1]
    _, mean, invstd = fastbn.layer_norm_forward(x, n, eps=1e-3)
    dx, _, dbias = fastbn.layer_norm_backward(dy, x, mean, invstd, n)
    expected = Expected(Case("layer", x.shape, n), x, dy, eps=1e-3)
    assert_sums_vanish(dx, expected, -1)
    assert_near(dbias, dy.reshape(-1, n).sum(0, dtype=float), of_gradients(expected)[2])
