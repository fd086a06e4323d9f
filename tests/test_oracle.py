# SPDX-License-Identifier: BSD-3-Clause
"""The oracle against finite differences and plain loops: it shares no line with them."""

import itertools

import numpy as np
import oracle
import pytest

# (operation, shape, normalized_shape or num_groups, layout, shape of its parameters)
CASES = [
    ("batch", (2, 3, 3, 2), None, None, 3),
    ("batch", (2, 2, 2, 3), None, "NHWC", 3),
    ("layer", (3, 5), (5,), None, 5),
    ("layer", (2, 3, 2, 4), (2, 4), None, (2, 4)),
    ("layer", (2, 3, 4), 4, None, 4),
    ("rms", (3, 5), 5, None, 5),
    ("rms", (2, 3, 2, 4), (3, 2, 4), None, (3, 2, 4)),
    ("group", (2, 6, 3), 2, None, 6),
    ("group", (2, 4, 2, 3), 4, None, 4),
    ("group", (3, 4), 1, None, 4),
    ("group", (2, 2, 3, 4), 2, "NHWC", 4),
    ("group", (4, 2, 3), 2, "CNL", 4),
    ("group", (3, 2, 4), 2, "LNC", 4),
    ("instance", (2, 3, 5), None, None, 3),
    ("instance", (2, 4, 3), None, "N...C", 3),
    ("instance", (3, 2, 3, 2), None, "CNHW", 3),
    ("instance", (2, 3, 2, 2), None, "HWNC", 2),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("op", "shape", "what", "layout", "parameters"), CASES)
def test_backward_is_the_derivative_of_forward(op, shape, what, layout, parameters, training):
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, *shape))
    weight, bias = rng.standard_normal((2, *np.atleast_1d(parameters)))
    groups = oracle.moments(op, x, what, layout)[0].shape
    fixed = rng.standard_normal(groups) * (op != "rms"), rng.random(groups) + 0.5

    def loss(x, weight, bias):
        mean, var = oracle.moments(op, x, what, layout) if training else fixed
        y = oracle.forward(op, x, mean, var, weight, bias, what=what, layout=layout)
        return (y * dy).sum()

    arguments = [x, weight, bias]
    mean, var = oracle.moments(op, x, what, layout) if training else fixed
    gradients = oracle.gradients(
        op, dy, x, mean, 1 / np.sqrt(var + 1e-5), weight, training, what, layout
    )
    for k, gradient in enumerate(gradients):
        assert gradient.shape == arguments[k].shape
        for index in np.ndindex(gradient.shape):
            step = np.zeros_like(arguments[k])
            step[index] = 1e-6
            up, down = list(arguments), list(arguments)
            up[k], down[k] = arguments[k] + step, arguments[k] - step
            slope = (loss(*up) - loss(*down)) / 2e-6
            assert gradient[index] == pytest.approx(slope, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("op", "shape", "what", "layout", "parameters"), CASES)
def test_backward_through_an_activation_and_a_residual(
    op, shape, what, layout, parameters, training, activation
):
    rng = np.random.default_rng(3)
    x, dy, residual = rng.standard_normal((3, *shape))
    weight, bias = rng.standard_normal((2, *np.atleast_1d(parameters)))
    groups = oracle.moments(op, x, what, layout)[0].shape
    fixed = rng.standard_normal(groups) * (op != "rms"), rng.random(groups) + 0.5

    def before(x, weight, bias, residual):
        mean, var = oracle.moments(op, x, what, layout) if training else fixed
        y = oracle.forward(op, x, mean, var, weight, bias, what=what, layout=layout)
        return y + residual

    arguments = [x, weight, bias, residual]
    z = before(*arguments)
    for kink in oracle.ACTIVATIONS[activation].kinks:
        assert np.abs(z - kink).min() > 1e-4  # none is nearer than a step
    mean, var = oracle.moments(op, x, what, layout) if training else fixed
    dz = dy * oracle.slope(z, activation, 0.2)
    gradients = oracle.gradients(
        op, dz, x, mean, 1 / np.sqrt(var + 1e-5), weight, training, what, layout
    )
    for k, gradient in enumerate([*gradients, dz]):
        for index in np.ndindex(gradient.shape):
            step = np.zeros_like(arguments[k])
            step[index] = 1e-6
            up, down = list(arguments), list(arguments)
            up[k], down[k] = arguments[k] + step, arguments[k] - step
            rise = [(oracle.activated(before(*a), activation, 0.2) * dy).sum() for a in (up, down)]
            expected = (rise[0] - rise[1]) / 2e-6
            assert gradient[index] == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_activations_at_their_kink_and_far_out():
    z = np.array([0.0, -0.0, 2.0, -2.0, 1e3, -1e3, 1e300, -1e300])
    for name, steep in (("relu", 0), ("leaky_relu", 0.25)):
        y = [0, 0, 2, -2 * steep, 1e3, -1e3 * steep, 1e300, -1e300 * steep]
        np.testing.assert_array_equal(oracle.activated(z, name, 0.25), y)
        slopes = [steep, steep] + [1, steep] * 3
        np.testing.assert_array_equal(oracle.slope(z, name, 0.25), slopes)
    np.testing.assert_array_equal(oracle.activated(z, "relu6"), [0, 0, 2, 0, 6, 0, 6, 0])
    around = np.array([-1, 0, 3, 6, 7.0])
    np.testing.assert_array_equal(oracle.slope(around, "relu6"), [0, 0, 1, 0, 0])
    half = 1 / (1 + np.e**2)
    y = [0, 0, 2 - 2 * half, -2 * half, 1e3, 0, 1e300, 0]
    np.testing.assert_allclose(oracle.activated(z, "silu"), y, rtol=1e-15)
    outside = [1, 0, 1, 0]
    inside = [(1 - half) * (1 + 2 * half), half * (1 - 2 * (1 - half))]
    np.testing.assert_allclose(oracle.slope(z, "silu"), [0.5, 0.5, *inside, *outside], rtol=1e-15)
    y = [0, 0, 5 / 3, -1 / 3, 1e3, 0, 1e300, 0]
    np.testing.assert_allclose(oracle.activated(z, "hardswish"), y, rtol=1e-15)
    y = [1 / 2, 1 / 2, 5 / 6, 1 / 6, 1, 0, 1, 0]
    np.testing.assert_allclose(oracle.activated(z, "hardsigmoid"), y, rtol=1e-15)
    around = np.array([-4, -3, -1.5, 0, 1.5, 3, 4])
    slopes = [0, 0, 0, 1 / 2, 1, 1, 1]
    np.testing.assert_allclose(oracle.slope(around, "hardswish"), slopes, rtol=1e-15)
    slopes = [0, 0, 1 / 6, 1 / 6, 1 / 6, 0, 0]
    np.testing.assert_array_equal(oracle.slope(around, "hardsigmoid"), slopes)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_slopes_are_those_of_the_values(activation):
    # On both sides of each kink, and far from any.
    value, slope, kinks = oracle.ACTIVATIONS[activation]
    z = np.concatenate([np.linspace(-9.97, 9.98, 400), *([k - 1e-3, k + 1e-3] for k in kinks)])
    rise = (value(z + 1e-6, 0.2) - value(z - 1e-6, 0.2)) / 2e-6
    np.testing.assert_allclose(slope(z, 0.2), rise, rtol=1e-8, atol=1e-8)
    # A kink is one: the slopes of its two sides differ, and it is one of them.
    for kink in kinks:
        left, at, right = slope(np.array([kink - 1e-3, kink, kink + 1e-3]), 0.2)
        assert abs(left - right) > 0.1
        assert np.abs([left - at, right - at]).min() < 1e-3
    assert (np.abs(np.diff(slope(z[:400], 0.2))) > 0.1).sum() == len(kinks)


@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_infinities_are_limits_and_nan_stays(activation):
    value, slope, _ = oracle.ACTIVATIONS[activation]
    far, ends = np.array([-1e300, 1e300]), np.array([-np.inf, np.inf])
    np.testing.assert_array_equal(slope(ends, 0.2), slope(far, 0.2))
    limits = value(far, 0.2)
    limits[np.abs(limits) > 1e200] *= np.inf
    np.testing.assert_array_equal(value(ends, 0.2), limits)
    assert np.isnan(value(np.array([np.nan]), 0.2)).all()


def plain(values, weight, bias, eps, rms):
    # One group, given as three lists of numbers.
    centre = 0 if rms else sum(values) / len(values)
    square = sum((value - centre) ** 2 for value in values) / len(values)
    return [
        (v - centre) / (square + eps) ** 0.5 * w + b
        for v, w, b in zip(values, weight, bias, strict=True)
    ]


@pytest.mark.parametrize(("op", "shape", "what", "layout", "parameters"), CASES)
def test_forward_is_the_formula_for_each_group(op, shape, what, layout, parameters):
    rng = np.random.default_rng(2)
    x = rng.standard_normal(shape)
    weight, bias = rng.standard_normal((2, *np.atleast_1d(parameters)))
    # Which group each element is in, and which parameter it meets, said letter by letter.
    letters = {None: "NCHW", "N...C": "NLC"}.get(layout, layout)[: len(shape)]
    group, parameter = {}, {}
    for index in itertools.product(*map(range, shape)):
        at = dict(zip(letters, index, strict=True))
        parameter[index] = at["C"]
        if op == "batch":
            key = at["C"]
        elif op in ("layer", "rms"):
            cut = len(shape) - weight.ndim
            key, parameter[index] = index[:cut], index[cut:]
        else:
            size = 1 if op == "instance" else weight.size // what
            key = at["N"], at["C"] // size
        group.setdefault(key, []).append(index)
    expected = np.empty(shape)
    for members in group.values():
        values = plain(
            [x[i] for i in members],
            [weight[parameter[i]] for i in members],
            [0 if op == "rms" else bias[parameter[i]] for i in members],
            0.01,
            op == "rms",
        )
        for i, value in zip(members, values, strict=True):
            expected[i] = value
    mean, var = oracle.moments(op, x, what, layout)
    assert mean.size == len(group)
    bias = None if op == "rms" else bias
    y = oracle.forward(op, x, mean, var, weight, bias, 0.01, what, layout)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
