# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm of float16 and bfloat16: every conversion, then values, memory and arguments."""

import bounds
import numpy as np
import oracle
import pytest
from arrays import (
    GAPLESS,
    IDS,
    ORDERS,
    SHAPES,
    Guarded,
    assert_near,
    batch,
    bits,
    every_half,
    half_ulp,
    in_order,
    orders_of,
    same_samples,
)
from cases import BatchNorm, Case, Expected
from datasets import datasets, layouts

import fastbn
from fastbn import _dispatch, _selftest

# Ways to lay out 65,536 numbers: planes, rows, runs that end within a register.
ARRANGEMENTS = [(1, 1, 2**16), (2**16, 1), (256, 256), (2, 128, 256), (1024, 64), (64, 64, 4, 4)]


def single(half):
    with np.errstate(all="ignore"):
        return half.astype(np.float32)


def rounded(values, dtype):
    with np.errstate(all="ignore"):
        return values.astype(dtype)


def affine(x, weight=1.0, bias=0.0):
    """What float32 arithmetic and one rounding make of x."""
    with np.errstate(all="ignore"):
        return rounded(single(x) * np.float32(weight) + np.float32(bias), x.dtype)


def padded(x, length):
    """x, then its first elements again, as rows of so many."""
    return np.resize(x, -(-x.size // length) * length).reshape(-1, length)


def infer(x, weight=1.0, bias=0.0, layout=None):
    """(x - 0) * weight + bias, which two float32 operations compute."""
    channels = x.shape[oracle.channel_axis(x.ndim, layout)]
    zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    return fastbn.batch_norm(
        x, zeros, ones, ones * np.float32(weight), zeros + np.float32(bias), eps=0.0, layout=layout
    )


@pytest.mark.parametrize("shape", ARRANGEMENTS)
def test_every_number_survives(level, half, shape):
    x = every_half(half).reshape(shape)
    # Adding 0 makes 0 of -0; everything else comes back, NaN as some NaN.
    expected = affine(x)
    assert (bits(expected) == bits(x)).sum() == 2**16 - 1
    np.testing.assert_array_equal(bits(infer(x)), bits(expected))
    # The gradient of frozen statistics adds nothing: -0 survives, too.
    channels = shape[1]
    dx, _, _ = fastbn.batch_norm_backward(
        x, np.ones_like(x), np.zeros(channels), np.ones(channels), training=False
    )
    np.testing.assert_array_equal(bits(dx), bits(x))


@pytest.mark.parametrize("length", [1, 3, 7, 8, 9, 15, 17, 31, 33, 63, 65])
def test_every_number_survives_wherever_a_register_ends(level, half, length):
    flat = padded(every_half(half), length)
    expected = bits(affine(flat))
    np.testing.assert_array_equal(bits(infer(flat)), expected)
    np.testing.assert_array_equal(bits(infer(flat[:, None])), expected[:, None])
    images = padded(flat, 5 * length).reshape(-1, 5, length)
    np.testing.assert_array_equal(bits(infer(images)), bits(affine(images)))


# Factors and summands whose results tie, overflow, vanish and are subnormal, for both types.
WEIGHTS = [1 + 2.0**-k for k in (1, 7, 8, 9, 10, 11, 12, 13)] + [
    -1.0, 0.1, 3.0, 5.96e-8, 2.0**-10, 2.0**-14, 2.0**-24, 2.0**-25, 1024.0, 3e4, 65520.0,
    2.0**-120, 1e-38, 1e30,
]  # fmt: skip
BIASES = [0.0, 1.0, -1.0, 2.0**-12, 2.0**-24, 2.0**-9, 0.3, 2049.0, 65519.996, 1e-39, 3e38]


def test_rounding_to_nearest_even(level, half):
    x = every_half(half).reshape(256, 256)
    wide = single(x)
    ties = subnormal = overflow = 0
    for weight in WEIGHTS:
        for bias in BIASES if weight == 1 + 2.0**-9 else BIASES[:4]:
            with np.errstate(all="ignore"):
                exact = wide * np.float32(weight) + np.float32(bias)
            expected = rounded(exact, half)
            actual = infer(x, weight, bias)
            np.testing.assert_array_equal(bits(actual), bits(expected), f"{weight} {bias}")
            # That the numbers are the ones this test is about.
            finite = np.isfinite(exact) & np.isfinite(single(expected))
            size = np.abs(exact[finite].astype(np.float64))
            off = np.abs(single(expected)[finite].astype(np.float64) - exact[finite])
            ties += (off == half_ulp(size, half)).sum()
            smallest = 2.0 ** (-14 if half == "float16" else -126)
            subnormal += ((size > 0) & (size < smallest)).sum()
            overflow += (np.isfinite(wide) & np.isinf(single(expected))).sum()
    assert min(ties, subnormal, overflow) > 10_000


def test_halfway_between_two_numbers(level, half):
    # Each positive number, and half its distance to the next, exactly and a little off.
    values = single(every_half(half)[: 2**15])
    values = values[np.isfinite(values)].astype(np.float64)
    for off in (-1, 0, 1):
        bias = ((values[:-1] + values[1:]) / 2).astype(np.float32)
        if half == "bfloat16" and off:
            # Below this, a float32 has no digit more than a bfloat16 and its half.
            bias = bias[bias > 2.0**-110]
        bias = np.nextafter(bias, np.float32(off * np.inf)) if off else bias
        x = np.zeros((1, bias.size), half)
        for sign in (1, -1):
            y = fastbn.batch_norm(
                x, np.zeros(bias.size), np.ones(bias.size), None, sign * bias, eps=0.0
            )
            np.testing.assert_array_equal(bits(y)[0], bits(rounded(sign * bias, half)))


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=IDS)
def test_shapes(half, shape, layout, always_parallel):
    case = Case("batch", shape, layout=layout)
    x, dy = case.batch(half), case.gradient(half)
    BatchNorm(case, x, dy, "float32").check_everywhere(threads=[1, 2, 3])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(6, 5, 4, 9), (20, 3, 5, 6), (4, 8), (3, 2, 40, 41)])
def test_memory_orders(level, half, order, shape):
    if order not in orders_of(half):
        pytest.skip("NumPy knows bfloat16 in one byte order only")
    case = Case("batch", shape)
    dy, strided = case.gradient(half), in_order(case.batch(half), order)
    for dy_order in ("C", "channels last", "cropped"):
        y, dx = BatchNorm(case, strided, in_order(dy, dy_order), "float32").check()
        if order in GAPLESS:
            assert y.strides == dx.strides == np.empty_like(strided).strides
    # What is read may be read-only.
    strided.flags.writeable = False
    assert fastbn.batch_norm_forward(strided)[0].dtype == half


def test_every_length_of_a_run(level, half):
    for length in range(1, 140):
        case = Case("batch", (3, 2, length))
        BatchNorm(case, case.batch(half), case.gradient(half), "float32").check()


def test_every_number_of_narrow_columns(level, half):
    for channels in range(1, 70):
        case = Case("batch", (5, 9, channels), layout="NLC")
        Expected(case, case.batch(half), case.gradient(half)).check()


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 34, 130, 131), None), ((10, 150, 120, 34), "NHWC"), ((900, 1003), None)],
)
def test_larger_than_the_cache(half, shape, layout):
    # Copies of a few images have the moments of the few, and the oracle little to do.
    copies = -(-40_000_000 // (2 * int(np.prod(shape))))
    few, few_dy = batch(shape, half), batch(shape, half, 1, 0.1, 1.0)
    case = Case("batch", shape, layout=layout)
    weight, bias = case.parameters("float32")
    expected = Expected(case, few, few_dy, weight, bias)
    x, dy = np.concatenate([few] * copies), np.concatenate([few_dy] * copies)
    out = np.empty_like(x)
    for level in _dispatch.runnable():
        with _dispatch.using(level):
            y, _, invstd = fastbn.batch_norm_forward(x, weight, bias, layout=layout, out=out)
            assert_near(invstd, expected.invstd, bounds.of_invstd(half) * expected.invstd)
            assert_near(y[: len(few)], expected.y, expected.room_y)
            same_samples(y, len(few))
            dx, *sums = fastbn.batch_norm_backward(
                dy, x, expected.mean, expected.invstd, weight, layout=layout, out=out
            )
            same_samples(dx, len(few))
            expected.assert_gradients([dx[: len(few)], *sums], copies=copies)
            y = infer(x, 1.5, layout=layout)
            np.testing.assert_array_equal(bits(y[: len(few)]), bits(affine(few, 1.5)))
            same_samples(y, len(few))


def test_dtypes_of_parameters_are_free(any_dtype, parameters):
    case = Case("batch", (8, 3, 5))
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    weight, bias = case.parameters(parameters)
    Expected(case, x, dy, weight, bias).check()
    Expected(case, x, dy, weight, bias.astype(np.float64)).check()
    Expected(case, x, dy).check()
    Expected(case, x, dy, weight, bias, frozen=oracle.stats(x)).check()
    # In steps and reversed: a parameter is whatever array holds it.
    wide = np.zeros(6, parameters)
    wide[::2] = weight[::-1]
    y, _, _ = fastbn.batch_norm_forward(x, wide[::2][::-1], bias)
    assert y.tobytes() == fastbn.batch_norm_forward(x, weight, bias)[0].tobytes()


def test_running_statistics_are_single_or_double(half, kept):
    case = Case("batch", (6, 3, 7))
    expected = BatchNorm(case, case.batch(half), case.gradient(half), kept)
    for momentum in (0.25, 0.0, 1.0):
        expected.check_running(momentum)


@pytest.mark.parametrize("mean", [0, 1, 1e3, 1e5])
@pytest.mark.parametrize("n", [2, 7, 33, 100, 513, 1568, 20_000])
def test_statistics_are_those_of_the_numbers_as_they_are(half, n, mean):
    channels = 400 if n <= 64 else 40 if n < 5000 else 8
    for name, data in datasets(n, channels, mean):
        if half == "float16":
            data = np.clip(data, -65504, 65504)
        x = data.astype(np.float32).astype(half)
        exact = x.astype(np.float64).T
        exact_mean, exact_var = exact.mean(1), exact.var(1)
        # Of equal numbers NumPy's mean may be off by a digit, and its variance not be 0.
        exact_var[exact.min(1) == exact.max(1)] = 0
        for level in _dispatch.runnable():
            with _dispatch.using(level):
                for array in layouts(x):
                    stats = fastbn.batch_stats(array)
                    error = np.abs(stats.var() - exact_var)
                    room = bounds.VARIANCE["float32"] * exact_var
                    assert (error <= room).all(), (name, array.shape, level)
                    room = bounds.of_mean(exact_mean, exact_var, half)
                    assert (np.abs(stats.mean - exact_mean) <= room).all(), (name, level)


def test_constant_channels_are_exact(level, half):
    for shape in [(2, 3), (200, 3), (30, 3, 7, 7), (2, 3, 60, 61)]:
        for value in (0.1, -3.3, 6e4, 6e-8):
            x = np.full(shape, value, half)
            bias = np.array([1.5, -2.0, 0.1])
            y, mean, invstd = fastbn.batch_norm_forward(x, bias=bias, eps=0.25)
            assert (mean == float(x.flat[0])).all()
            assert (invstd == 2).all()
            assert (np.moveaxis(y, 1, -1) == bias.astype(np.float32).astype(half)).all()


def test_results_that_overflow_are_infinite(level, half):
    largest = float(every_half(half)[0x7BFF if half == "float16" else 0x7F7F])
    x = np.array([[largest], [-largest], [0.0], [0.0]], half)
    y, mean, invstd = fastbn.batch_norm_forward(x, np.full(1, largest))
    assert mean == 0
    np.testing.assert_allclose(invstd, 2**0.5 / largest, rtol=bounds.of_invstd(half))
    np.testing.assert_array_equal(single(y)[:, 0], [np.inf, -np.inf, 0, 0])


@pytest.mark.parametrize("shape", [(40, 6), (5, 6, 7, 7), (32, 6, 7, 7), (2, 6, 50, 50)])
def test_infinities_and_nans_stay_in_their_channel(level, half, shape):
    x = batch(shape, half)
    clean, mean, invstd = fastbn.batch_norm_forward(x)
    spoiled = x.copy()
    spoiled[0, 0], spoiled[1, 1], spoiled[0, 2], spoiled[1, 2] = np.inf, -np.inf, np.inf, -np.inf
    spoiled[1, 3] = np.nan
    y, spoiled_mean, spoiled_invstd = fastbn.batch_norm_forward(spoiled)
    np.testing.assert_array_equal(spoiled_mean[:4], [np.inf, -np.inf, np.nan, np.nan])
    assert np.isnan(spoiled_invstd[:4]).all()
    assert np.isnan(single(y[:, :4])).all()
    assert spoiled_mean[4:].tobytes() == mean[4:].tobytes()
    assert spoiled_invstd[4:].tobytes() == invstd[4:].tobytes()
    assert y[:, 4:].tobytes() == clean[:, 4:].tobytes()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(half, shape):
    x = np.empty(shape, half)
    y, mean, invstd = fastbn.batch_norm_forward(x)
    assert y.shape == shape
    assert y.dtype == half
    dx, dweight, dbias = fastbn.batch_norm_backward(x, x, mean, invstd)
    assert dx.dtype == half
    assert dweight.dtype == dbias.dtype == np.float32
    assert not dweight.any()
    assert not dbias.any()
    assert (fastbn.batch_stats(x).count == 0).all()


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((5, 6, 21, 21), None), ((5, 21, 21, 6), "NHWC"), ((70, 100), None), ((8, 200, 7, 7), None)],
)
def test_out_in_place_and_guards(level, half, shape, layout):
    x, dy = batch(shape, half), batch(shape, half, 1)
    y, mean, invstd = fastbn.batch_norm_forward(x, layout=layout)
    dx = fastbn.batch_norm_backward(dy, x, mean, invstd, layout=layout)[0]
    for offset in (0, 2, 14, 34, 62):
        moved, moved_dy, out = (Guarded(shape, half, offset) for _ in range(3))
        moved.array[...], moved_dy.array[...] = x, dy
        found = fastbn.batch_norm_forward(moved.array, layout=layout, out=out.array)
        assert found[0] is out.array
        assert found[0].tobytes() == y.tobytes()
        for into in (out, moved_dy, moved):
            moved.array[...], moved_dy.array[...] = x, dy
            found = fastbn.batch_norm_backward(
                moved_dy.array, moved.array, mean, invstd, layout=layout, out=into.array
            )
            assert found[0] is into.array
            assert found[0].tobytes() == dx.tobytes()
        moved.array[...] = x
        fastbn.batch_norm_forward(moved.array, layout=layout, out=moved.array)
        assert moved.array.tobytes() == y.tobytes()
        assert all(guarded.intact() for guarded in (moved, moved_dy, out))


def test_out_in_another_order(level, half):
    x = batch((6, 5, 4, 9), half)
    y, mean, invstd = fastbn.batch_norm_forward(x)
    dx = fastbn.batch_norm_backward(x, x, mean, invstd)[0]
    for order in orders_of(half):
        out = in_order(np.zeros_like(x), order)
        assert fastbn.batch_norm_forward(x, out=out)[0] is out
        np.testing.assert_array_equal(single(out), single(y))
        assert fastbn.batch_norm_backward(x, x, mean, invstd, out=out)[0] is out
        np.testing.assert_array_equal(single(out), single(dx))


def test_patterns_without_their_type_are_refused():
    # What PyTorch's bfloat16 becomes on its way through uint16.
    x = np.zeros((4, 3), np.uint16)
    message = r"^x: (?=.*uint16)(?=.*\.view\()(?=.*ml_dtypes)"
    for call in (
        lambda: fastbn.batch_norm(x, np.zeros(3), np.ones(3)),
        lambda: fastbn.batch_norm_forward(x),
        lambda: fastbn.batch_norm_backward(x, x, np.zeros(3), np.ones(3)),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_half_statistics_are_refused(half):
    x = batch((4, 3), half)
    for name in ("running_mean", "running_var"):
        running = {"running_mean": np.zeros(3), "running_var": np.ones(3)}
        running[name] = running[name].astype(half)
        for training in (True, False):
            with pytest.raises(TypeError, match=f"^{name}: .*float32.*{half}"):
                fastbn.batch_norm(x, **running, training=training)
    for name in ("mean", "invstd"):
        saved = {"mean": np.zeros(3), "invstd": np.ones(3)}
        saved[name] = saved[name].astype(half)
        with pytest.raises(TypeError, match=f"^{name}: .*float32.*{half}"):
            fastbn.batch_norm_backward(x, x, **saved)


def test_dtypes_must_agree(half):
    x = batch((4, 3), half)
    before = x.copy()
    for other in _selftest.dtypes():
        if other == half:
            continue
        wrong = np.zeros(x.shape, other)
        with pytest.raises(TypeError, match=f"^out: expected the dtype of x, {half}, got {other}"):
            fastbn.batch_norm_forward(x, out=wrong)
        with pytest.raises(TypeError, match=f"^dy: expected the dtype of x, {half}, got {other}"):
            fastbn.batch_norm_backward(wrong, x, np.zeros(3), np.ones(3), out=x)
        assert not wrong.any()
    assert x.tobytes() == before.tobytes()


def test_a_layer_takes_half_types(half):
    bn = fastbn.BatchNorm(3)
    x, dy = batch((6, 3, 4, 4), half), batch((6, 3, 4, 4), half, 1)
    assert bn(x).dtype == half
    assert bn.backward(dy).dtype == half
    expected = Expected(Case("batch", x.shape), x, dy, bn.weight, bn.bias)
    assert bn.weight_grad.dtype == np.float32
    expected.assert_gradients([bn.backward(dy), bn.weight_grad, bn.bias_grad], exact=False)
    room = bounds.of_mean(expected.mean, expected.var, half)
    room = bounds.of_running(np.zeros(3), expected.mean, room, 0.1)
    assert_near(bn.running_mean, 0.1 * expected.mean, room)
    assert bn.eval()(x).dtype == half
