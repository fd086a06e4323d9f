# SPDX-License-Identifier: BSD-3-Clause
"""An activation and a residual in the same pass: against the oracle, and what is exact of them.

No element lies where rounding could decide on which side of a kink it is: `fused_case`
moves those of x away. The exponential is in test_exponential.py.
"""

import itertools
import tracemalloc

import bounds
import numpy as np
import oracle
import pytest
from arrays import (
    GAPLESS,
    MORE_ORDERS,
    assert_near,
    batch,
    in_order,
    orders_of,
    same_samples,
)
from cases import ACTIVATIONS, EACH_ONCE, Case, Expected

import fastbn
from fastbn import _dispatch

SLOPE = 0.2
FUSED = [(a, adds) for a in (None, *ACTIVATIONS) for adds in (False, True) if a or adds]
FUSED_IDS = [f"{a}{' and residual' * adds}" for a, adds in FUSED]
fused = pytest.mark.parametrize(("activation", "adds"), FUSED, ids=FUSED_IDS)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def options_of(case, dtype, activation, adds):
    options = {"activation": activation, "negative_slope": SLOPE}
    return options | ({"residual": case.batch(dtype, 6, 0.3, 1.0)} if adds else {})


def frozen_statistics(case):
    mean, var = case.parameters("float32", 5)
    return mean, var + 2


def fused_case(case, dtype, activation, adds, x=None, parameters=None, frozen=False, **options):
    """What the oracle says, of an x that is near no kink."""
    if parameters is None:
        parameters = "float64" if dtype == "float64" else "float32"
    weight, bias = case.parameters(parameters)
    kinks = oracle.ACTIVATIONS[activation].kinks
    if any(kinks):
        weight *= 4  # for some elements to be beyond those that are not at 0
    x, dy = case.batch(dtype) if x is None else x, case.gradient(dtype)
    step = x.astype(np.float64).std() / 8
    options |= options_of(case, dtype, activation, adds)
    while True:
        expected = Expected(
            case, x, dy, weight, bias,
            frozen=frozen_statistics(case) if frozen else None, **options,
        )  # fmt: skip
        near = np.zeros(case.shape, bool)
        for kink in kinks:
            near |= np.abs(expected.z - kink) <= expected.room_y
        if not near.any():
            return expected
        x[near] += np.array(step, x.dtype)


def backward_options(case, bias, options):
    return options | ({"bias": bias} if case.has_mean else {})


def everything(case, x, dy, bias_too=True, out=None, dx_out=None, **options):
    """[y, dx, dweight, ...] of forward and backward with parameters, as arrays."""
    weight, bias = case.parameters("float32")
    y, saved = case.forward(x, weight, bias, eps=1e-5, out=out, **options)
    y = y.copy(order="K")
    if bias_too:
        options = backward_options(case, bias, options)
    return [y, *case.backward(dy, x, saved, weight, out=dx_out, **options)]


def same_bytes(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


# Each operation in each layout, with all that may follow.
CASES = [
    Case("batch", (17, 31)),
    Case("batch", (9, 7, 7, 7)),
    Case("batch", (5, 6, 7, 3), layout="NHWC"),
    Case("batch", (2, 5, 6, 24), layout="NHWC"),
    Case("layer", (9, 130), 130),
    Case("layer", (2, 3, 5, 7), (5, 7)),
    Case("rms", (9, 130), 130),
    Case("rms", (2, 5, 6, 7), (5, 6, 7)),
    Case("group", (3, 12, 7, 7), 3),
    Case("group", (3, 7, 3, 30), 5, "NHWC"),
    Case("group", (12, 3, 5, 6), 4, "CNHW"),
    Case("instance", (3, 5, 7, 7)),
    Case("instance", (3, 7, 9, 10), layout="NHWC"),
    Case("instance", (13, 4, 24), layout="LNC"),
]
# Other ways through the kernels: tiles, long runs, 14x14, one channel, rows of many
# channels, pixels of 15, one element in a group, groups of one channel.
MORE = [
    Case("batch", (2, 1)),
    Case("batch", (700, 1)),
    Case("batch", (65, 130)),
    Case("batch", (5, 3, 14, 14)),
    Case("batch", (3, 4, 33, 32)),
    Case("batch", (2, 1, 60, 61)),
    Case("batch", (2, 14, 15, 64), layout="NHWC"),
    Case("batch", (3, 5, 1030), layout="NTC"),
    Case("batch", (6, 11, 13, 1, 15), layout="NDHWC"),
    Case("layer", (5, 1), 1),
    Case("layer", (40, 30, 17), 17),
    Case("layer", (9, 768), 768),
    Case("layer", (3, 4, 14, 15), (4, 14, 15)),
    Case("rms", (5, 1), 1),
    Case("rms", (3, 1030), 1030),
    Case("rms", (40, 30, 17), 17),
    Case("group", (2, 64, 1, 1), 4),
    Case("group", (2, 8, 14, 14), 8),
    Case("group", (2, 8, 14, 14), 1),
    Case("group", (2, 6, 33, 32), 3),
    Case("group", (5, 20), 4),
    Case("instance", (2, 9, 14, 14)),
    Case("instance", (2, 3, 60, 61)),
]


@fused
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_that_may_follow(any_dtype, case, activation, adds, always_parallel):
    fused_case(case, any_dtype, activation, adds).check_everywhere(threads=[2])


@fused
@pytest.mark.parametrize("case", [case for case in CASES if case.op == "batch"], ids=str)
def test_frozen_statistics(any_dtype, case, activation, adds, always_parallel):
    fused_case(case, any_dtype, activation, adds, frozen=True).check_everywhere(threads=[2])


@pytest.mark.parametrize(("activation", "adds"), EACH_ONCE)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_more_shapes(any_dtype, case, activation, adds, always_parallel):
    fused_case(case, any_dtype, activation, adds).check_everywhere(threads=[2])
    if case.op == "batch":
        fused_case(case, any_dtype, activation, adds, frozen=True).check()


@fused
@pytest.mark.parametrize("layout", [None, "NHWC"])
def test_instances_with_running_statistics(level, any_dtype, activation, adds, layout):
    case = Case("instance", (3, 6, 5, 7), layout=layout)
    as_batch = Case("batch", case.shape, layout=layout)
    expected = fused_case(as_batch, any_dtype, activation, adds, frozen=True)
    options = dict(zip(("running_mean", "running_var"), expected.frozen, strict=True))
    options |= expected.fused | {"use_input_stats": False}
    y, _ = case.forward(expected.x, expected.weight, expected.bias, **options)
    assert_near(y, expected.y, expected.room_y)
    assert case.only_y(expected.x, expected.weight, expected.bias, **options).tobytes() == (
        y.tobytes()
    )


@each_activation
@pytest.mark.parametrize("op", ["batch", "layer", "rms", "group", "instance"])
def test_every_length(level, any_dtype, op, activation):
    # The last register of a run is a part of one in each of four tensors.
    for length in range(2, 70):
        case = Case(op, (2, 4, length), {"layer": length, "rms": length, "group": 2}.get(op))
        fused_case(case, any_dtype, activation, True).check()


@each_activation
@pytest.mark.parametrize("op", ["batch", "group", "instance"])
def test_every_number_of_channels_last(level, op, activation):
    for channels in range(1, 70):
        groups = max(k for k in (1, 2, 3, 5, 7) if channels % k == 0)
        case = Case(op, (2, 5, channels), groups if op == "group" else None, "NLC")
        fused_case(case, "float32", activation, True).check()


ONE_EACH = [
    Case("batch", (6, 5, 9)),
    Case("layer", (6, 5, 9), (5, 9)),
    Case("rms", (6, 5, 9), 9),
    Case("group", (4, 6, 9), 2),
    Case("instance", (4, 6, 9)),
]


@each_activation
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_parameters_of_any_dtype(any_dtype, case, activation, parameters):
    fused_case(case, any_dtype, activation, True, parameters=parameters).check()


@each_activation
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_without_parameters(any_dtype, case, activation):
    expected = fused_case(case, any_dtype, activation, False)
    x, dy = expected.x, expected.dy
    ones, zeros = np.ones(case.parameter_shape), np.zeros(case.parameter_shape)
    options = options_of(case, any_dtype, activation, False)
    y, saved = case.forward(x, ones, zeros, **options)
    assert case.forward(x, **options)[0].tobytes() == y.tobytes()
    explicit = case.backward(dy, x, saved, ones, **backward_options(case, zeros, options))
    assert case.backward(dy, x, saved, **options)[0].tobytes() == explicit[0].tobytes()


# ---- exactly what the plain operation does -------------------------------------------

EXACT = [
    Case("batch", (9, 7, 7, 7)),
    Case("batch", (3, 4, 33, 32)),
    Case("batch", (5, 6, 7, 3), layout="NHWC"),
    Case("batch", (40, 130)),
    Case("layer", (9, 130), 130),
    Case("layer", (2, 3, 5, 7), (5, 7)),
    Case("rms", (9, 130), 130),
    Case("group", (3, 12, 7, 7), 3),
    Case("group", (3, 7, 9, 30), 5, "NHWC"),
    Case("instance", (2, 9, 14, 14)),
    Case("instance", (3, 7, 9, 30), layout="NHWC"),
]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_what_changes_nothing(level, any_dtype, case):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    plain = everything(case, x, dy, bias_too=False)
    same_bytes(everything(case, x, dy), plain)
    same_bytes(everything(case, x, dy, activation="leaky_relu", negative_slope=1.0), plain)
    # z - 0 is z, where z + 0 would make 0 of -0.
    nothing = np.negative(np.zeros_like(x))
    same_bytes(everything(case, x, dy, residual=nothing), [*plain, dy])


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_relu_is_a_leaky_relu_of_slope_zero(level, any_dtype, case):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    for adds in (False, True):
        options = options_of(case, any_dtype, "relu", adds)
        relu = everything(case, x, dy, **options)
        leaky = everything(
            case, x, dy, **options | {"activation": "leaky_relu", "negative_slope": 0}
        )
        for one, other in zip(relu, leaky, strict=True):
            # As numbers: the product has zeros of either sign.
            np.testing.assert_array_equal(one.astype(float), other.astype(float))


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_where_y_is_zero_no_gradient_passes_relu(level, any_dtype, case):
    x, dy = case.batch(any_dtype), np.ones(case.shape, any_dtype)
    y, *_, dresidual = everything(case, x, dy, **options_of(case, any_dtype, "relu", True))
    np.testing.assert_array_equal(dresidual.astype(float), (y.astype(float) > 0).astype(float))
    assert not np.signbit(y[y == 0].astype(float)).any()


@each_activation
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_at_a_kink_the_gradient_is_that_of_one_side(level, any_dtype, case, activation):
    # weight 0 and bias 0: each z is the residual, and dz is what dbias adds up.
    x, dy = case.batch(any_dtype), np.ones(case.shape, any_dtype)
    zeros = np.zeros(case.parameter_shape)
    saved = case.forward(x)[1]
    places = {0.0, *oracle.ACTIVATIONS[activation].kinks}
    for sign, place in itertools.product((1.0, -1.0), places):
        residual = np.full(case.shape, place + sign * 0.0, any_dtype)
        options = {"activation": activation, "negative_slope": 0.25}
        y = case.forward(x, zeros, zeros, residual=residual, **options)[0]
        assert_near(y, oracle.activated(residual.astype(float), activation, 0.25), 0)
        slope = oracle.slope(np.array(place), activation, 0.25)
        options = backward_options(case, zeros, options)
        found = case.backward(dy, x, saved, zeros, residual=residual, **options)
        assert_near(found[-1], np.broadcast_to(slope, case.shape), 0)
        if case.has_mean:
            exact = float(found[-1].flat[0]) * (x.size // zeros.size)
            room = bounds.roundings(bounds.SUM, any_dtype) * exact
            assert_near(found[2], np.broadcast_to(exact, case.parameter_shape), room)
            if place == 0:
                dbias = case.backward(dy, x, saved, zeros, **options)[2]
                exact = slope * (x.size // zeros.size)
                room = bounds.roundings(bounds.SUM + 1, any_dtype) * exact
                assert_near(dbias, np.broadcast_to(exact, dbias.shape), room)


@pytest.mark.parametrize("slope", [-0.5, 0.0, 1e-3, 1.0, 3, np.float32(0.125), np.int8(-2)])
@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_slopes(any_dtype, case, slope):
    expected = fused_case(case, any_dtype, "leaky_relu", True)
    fused = expected.fused | {"negative_slope": slope}
    Expected(case, expected.x, expected.dy, expected.weight, expected.bias, **fused).check()


def test_the_default_slope(level):
    x = np.array([[-4.0, 2.0]])
    for dtype in ("float32", "float64"):
        zeros, ones = np.zeros(2), np.ones(2)
        y = fastbn.batch_norm(x.astype(dtype), zeros, ones, eps=0, activation="leaky_relu")
        np.testing.assert_array_equal(
            y, np.array([[-4.0, 2.0]], dtype) * np.array([[0.01, 1]], dtype)
        )


@fused
@pytest.mark.parametrize("kept", ["float32", "float64"])
def test_statistics_are_those_of_the_plain_operation(level, any_dtype, activation, adds, kept):
    for case in (Case("batch", (5, 6, 9, 7)), Case("instance", (5, 6, 9, 7)),
                 Case("batch", (40, 33)), Case("instance", (5, 9, 6), layout="NLC")):  # fmt: skip
        x = case.batch(any_dtype)
        found = []
        for options in ({}, options_of(case, any_dtype, activation, adds)):
            running = case.parameters(kept, 4)
            options |= dict(zip(("running_mean", "running_var"), running, strict=True))
            _, saved = case.forward(x, **options)
            found.append([a.tobytes() for a in (*running, *saved)])
        assert found[0] == found[1]
    for case in (Case("layer", (7, 40), 40), Case("rms", (7, 40), 40), Case("group", (4, 6, 9), 2)):
        x = case.batch(any_dtype)
        plain, other = (
            case.forward(x, **options)[1]
            for options in ({}, options_of(case, any_dtype, activation, adds))
        )
        same_bytes(other, plain)


# ---- where a residual may be ----------------------------------------------------------

PLACED = [
    Case("batch", (6, 5, 4, 9)),
    Case("batch", (4, 7, 5, 6), layout="NHWC"),
    Case("batch", (33, 20)),
    Case("layer", (6, 5, 4, 33), 33),
    Case("layer", (4, 5, 6, 7), (5, 6, 7)),
    Case("rms", (6, 5, 40), 40),
    Case("group", (4, 6, 7, 5), 2),
    Case("group", (4, 7, 5, 6), 3, "NHWC"),
    Case("instance", (4, 6, 9, 8)),
    Case("instance", (4, 9, 8, 6), layout="NHWC"),
]


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_memory_orders_of_a_residual(level, any_dtype, case):
    expected = fused_case(case, any_dtype, "leaky_relu", True)
    expected.check()
    options = dict(expected.fused)
    for x_order in GAPLESS:
        x, dy = in_order(expected.x, x_order), expected.dy
        residual = in_order(options["residual"], x_order)
        plain = everything(case, x, dy, **options | {"residual": residual})
        for array in (plain[0], plain[1], plain[-1]):
            assert array.strides == np.empty_like(x).strides
        for order in orders_of(any_dtype, MORE_ORDERS):
            options["residual"] = in_order(expected.fused["residual"], order)
            options["residual"].flags.writeable = False
            same_bytes(everything(case, x, dy, **options), plain)


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_every_tensor_in_an_order_of_its_own(level, any_dtype, case):
    expected = fused_case(case, any_dtype, "silu", True, parameters="float32")
    residual = expected.fused["residual"]
    orders = orders_of(any_dtype, MORE_ORDERS)
    for k in range(len(orders)):
        x, dy, other = (
            in_order(a, orders[(k + i) % len(orders)])
            for i, a in ((0, expected.x), (3, expected.dy), (5, residual))
        )
        out, dx_out = (in_order(np.zeros_like(x), orders[(k + i) % len(orders)]) for i in (1, 7))
        found = everything(
            case, x, dy, out=out, dx_out=dx_out, **expected.fused | {"residual": other}
        )
        assert_near(found[0], expected.y, expected.room_y)
        assert found[1] is dx_out
        expected.assert_gradients(found[1:], exact=False)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_a_broadcast_residual(level, any_dtype, case):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    pieces = [batch(shape, any_dtype, 7) for shape in ((), (9,), (case.shape[1], 1), (1, 9))]
    pieces.append(batch((case.shape[0], 1, 1), any_dtype, 7))
    for piece in pieces:
        residual = np.broadcast_to(piece, case.shape)
        options = {"activation": "silu"}
        found = everything(case, x, dy, residual=residual, **options)
        same_bytes(found, everything(case, x, dy, residual=residual.copy(), **options))


@each_activation
@pytest.mark.parametrize("case", PLACED, ids=str)
def test_tensors_that_are_the_same(level, any_dtype, case, activation):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    for residual in (case.batch(any_dtype, 6), x, dy):
        for taken in ("x", "dy", "residual"):
            check_same(case, x, dy, residual, taken, activation)


@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (40, 300, 7, 7)),
        Case("batch", (4, 3, 130, 131)),
        Case("batch", (3000, 5)),
        Case("batch", (4, 60, 61, 40), layout="NHWC"),
        Case("layer", (300, 1003), 1003),
        Case("rms", (5000, 40), 40),
        Case("group", (4, 8, 130, 131), 2),
    ],
    ids=str,
)
def test_large_tensors_that_are_the_same(case):
    x, dy = case.batch("float32"), case.gradient("float32")
    for residual, taken in ((case.batch("float32", 6), "residual"), (x, "x"), (dy, "dy")):
        check_same(case, x, dy, residual, taken, "silu")


@pytest.mark.parametrize("taken", ["x", "dy"])
@each_activation
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_into_what_it_reads(case, any_dtype, activation, taken):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    weight, bias = case.parameters(any_dtype)
    _, saved = case.forward(x, weight, bias)
    options = backward_options(case, bias, {"activation": activation})
    expected = case.backward(dy, x, saved, weight, **options)
    out = {"x": x, "dy": dy}[taken]
    found = case.backward(dy, x, saved, weight, out=out, **options)
    assert found[0] is out
    same_bytes(found, expected)


def check_same(case, x, dy, residual, taken, activation):
    """`out` is the tensor named so; the others may be the same, too."""
    weight, bias = case.parameters("float32")
    options = {"activation": activation}
    backward = backward_options(case, bias, options)
    y, saved = case.forward(x, weight, bias, residual=residual, **options)
    gradients = case.backward(dy, x, saved, weight, residual=residual, **backward)
    # Copies that are one where the originals are.
    copies = {id(a): a.copy() for a in (x, dy, residual)}
    x, dy, residual = (copies[id(a)] for a in (x, dy, residual))
    out = {"x": x, "dy": dy, "residual": residual}[taken]
    if taken != "dy":
        before = out.copy()
        found = case.forward(x, weight, bias, residual=residual, out=out, **options)[0]
        assert found is out
        assert found.tobytes() == y.tobytes()
        out[...] = before
    found = case.backward(dy, x, saved, weight, residual=residual, out=out, **backward)
    assert found[0] is out
    same_bytes(found, gradients)
    for array in (x, dy, residual):
        assert not np.shares_memory(found[-1], array)


@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (8, 32, 64, 64)),
        Case("batch", (8, 64, 64, 32), layout="NHWC"),
        Case("layer", (1000, 1000), 1000),
        Case("rms", (1000, 1000), 1000),
        Case("group", (8, 32, 64, 64), 4),
        Case("instance", (8, 64, 64, 32), layout="NHWC"),
    ],
    ids=str,
)
def test_no_second_tensor_is_kept_or_made(case):
    # Whether something is copied cannot be told by values, but by memory.
    x, dy, residual = (case.batch("float32", seed) for seed in (0, 1, 2))
    out = np.empty_like(x)
    for activation, adds in itertools.product(ACTIVATIONS, (False, True)):
        options = {"activation": activation} | ({"residual": residual} if adds else {})
        tracemalloc.start()
        _, saved = case.forward(x, out=out, **options)
        forward = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        case.backward(dy, x, saved, out=out, **options)
        backward = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert forward < x.nbytes // 4
        assert backward < x.nbytes // 4 + adds * x.nbytes


def test_inputs_are_left_alone(any_dtype):
    for case, activation in itertools.product(ONE_EACH, ACTIVATIONS):
        x, dy, residual = (case.batch(any_dtype, seed) for seed in (0, 1, 2))
        before = [a.tobytes() for a in (x, dy, residual)]
        everything(case, x, dy, activation=activation, residual=residual)
        assert [a.tobytes() for a in (x, dy, residual)] == before


# ---- few and many elements ------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (0, 3, 4)),
        Case("batch", (2, 0, 4)),
        Case("batch", (2, 3, 0)),
        Case("layer", (3, 0, 5), 5),
        Case("layer", (3, 0), 0),
        Case("rms", (0, 5), 5),
        Case("rms", (3, 0), 0),
        Case("group", (0, 4, 3), 2),
        Case("group", (2, 0, 3), 1),
        Case("group", (2, 4, 0), 2),
        Case("instance", (2, 0, 3)),
        Case("instance", (2, 4, 0)),
    ],
    ids=str,
)
@fused
def test_empty(any_dtype, case, activation, adds):
    x = np.empty(case.shape, any_dtype)
    options = options_of(case, any_dtype, activation, adds)
    y, dx, *rest = everything(case, x, x, **options)
    assert y.shape == dx.shape == case.shape
    assert y.dtype == dx.dtype == any_dtype
    if adds:
        dresidual = rest.pop()
        assert dresidual.shape == case.shape
        assert dresidual.dtype == any_dtype
    assert len(rest) == (2 if case.has_mean else 1)
    for gradient in rest:
        assert gradient.shape == case.parameter_shape
        assert not gradient.any()


@pytest.mark.parametrize("sign", [1, -1])
def test_one_element(any_dtype, sign):
    # Of layer norm z is bias and residual; frozen batch norm takes one element, too.
    x, dy = np.array([[5.0]], any_dtype), np.array([[2.0]], any_dtype)
    residual = np.array([[sign * 2.0]], any_dtype)
    z = np.array([[sign * 2 + 0.5]])
    for activation in ACTIVATIONS:
        options = {"activation": activation, "negative_slope": 0.25, "residual": residual}
        for case, frozen in (
            (Case("layer", (1, 1), 1), None),
            (Case("batch", (1, 1)), (np.array([5.0]), np.array([1.0]))),
        ):
            expected = Expected(
                case, x, dy, None, np.array([0.5]), eps=1e-5 if frozen is None else 0.0,
                frozen=frozen, **options,
            )  # fmt: skip
            np.testing.assert_array_equal(expected.z, z)
            expected.check()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("batch", (2, 60, 57, 59)), "float32"),
        (Case("batch", (16, 130, 7, 7)), "float32"),
        (Case("batch", (4, 57, 31, 24), layout="NHWC"), "float32"),
        (Case("batch", (999, 5)), "float32"),
        (Case("layer", (90, 1003), 1003), "float32"),
        (Case("layer", (90, 1024), 1024), "float16"),
        (Case("rms", (20_000, 40), 40), "float32"),
        (Case("group", (2, 32, 57, 59), 4), "float32"),
        (Case("instance", (2, 57, 59, 32), layout="NHWC"), "float32"),
    ],
    ids=str,
)
def test_larger_than_the_cache(case, dtype, always_parallel):
    # Copies of a few samples: the oracle sees the few.
    for activation, adds in FUSED:
        expected = fused_case(case, dtype, activation, adds)
        copies = -(-34_000_000 // expected.x.nbytes)
        x, dy = (np.concatenate([a] * copies) for a in (expected.x, expected.dy))
        statistics = [expected.mean, expected.invstd]
        if case.op != "batch":
            statistics = [np.concatenate([s] * copies) for s in statistics]
        options = dict(expected.fused)
        if adds:
            options["residual"] = np.concatenate([options["residual"]] * copies)
        for level in _dispatch.runnable():
            with _dispatch.using(level), fastbn.threads(2):
                check_copies(expected, x, dy, statistics, options)


def check_copies(expected, x, dy, statistics, options):
    case, few = expected.case, len(expected.x)
    copies = len(x) // few
    vectors = expected.weight, expected.bias
    y, _ = case.forward(x, *vectors, eps=expected.eps, out=np.empty_like(x), **options)
    assert_near(y[:few], expected.y, expected.room_y)
    same_samples(y, few)
    statistics = statistics if case.has_mean else statistics[1:]
    options = backward_options(case, expected.bias, options)
    found = case.backward(dy, x, statistics, expected.weight, out=y, **options)
    for k in (0, -1) if expected.adds else (0,):  # the tensors
        same_samples(found[k], few)
        found[k] = found[k][:few]
    expected.assert_gradients(found, copies=copies)


# ---- extreme numbers ------------------------------------------------------------------


@pytest.mark.parametrize("mean", [1e3, 1e5])
@each_activation
@pytest.mark.parametrize("case", [c for c in (*CASES, *MORE) if c.values > 8], ids=str)
def test_large_means(level, case, activation, mean):
    x = case.batch("float32", 1, mean, 1.0)
    if case.op == "rms":
        # z is near 1 everywhere.
        x = case.batch("float32", 1, 0.0, mean)
    fused_case(case, "float32", activation, True, x).check()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 1e37])
@each_activation
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_any_scale(level, case, activation, scale):
    x = (case.batch("float64", 3, 0.0, 1.0) * scale).astype(np.float32)
    for adds in (False, True):
        expected = fused_case(case, "float32", activation, adds, x.copy(), eps=1e-100)
        weight = expected.weight.astype(np.float64)
        options = backward_options(case, expected.bias, expected.fused)
        y, saved = case.forward(expected.x, weight, expected.bias, eps=1e-100, **expected.fused)
        assert_near(y, expected.y, expected.room_y)
        found = case.backward(expected.dy, expected.x, saved, weight, **options)
        # dx is as large as 1 / scale: compared where float32 has such numbers.
        exact, *others = expected.gradients
        small = np.abs(exact) < 1e38
        assert small.any()
        found[0], exact = np.where(small, found[0], np.float32(0)), np.where(small, exact, 0)
        error = np.abs(found[0] - exact)
        room = np.broadcast_to(expected.rooms[0], exact.shape) + 2e-45
        assert (error <= room)[small].all()
        # Less than that, but where a slope of up to 1.5 has roundings of its own.
        if activation != "hardswish":
            assert error.max() <= np.abs(exact).max() * 1e-6 + 2e-45
        expected.gradients = exact, *others
        expected.assert_gradients(found, exact=False)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each_activation
@pytest.mark.parametrize("case", [case for case in EXACT if case.op == "batch"], ids=str)
def test_frozen_statistics_of_any_scale(level, case, activation, scale):
    x = (case.batch("float64", 3, 0.0, 1.0) * scale).astype(np.float32)
    zeros, ones = np.zeros(case.parameter_shape), np.ones(case.parameter_shape)
    options = {"activation": activation}
    expected = Expected(
        case, x, case.gradient("float32"), *case.parameters("float32"), eps=0.0,
        frozen=(zeros, scale**2 * ones), **options,
    )  # fmt: skip
    running = {"running_mean": zeros, "running_var": scale**2 * ones, "training": False}
    vectors = expected.weight, expected.bias
    y, saved = case.forward(x, *vectors, eps=0.0, **running, **options)
    assert_near(y, expected.y, expected.room_y)
    options |= {"bias": expected.bias, "training": False}
    found = case.backward(expected.dy, x, saved, expected.weight, **options)
    expected.assert_gradients(found)


@each_activation
@pytest.mark.parametrize("case", [case for case in EXACT if case.op not in ("layer", "rms")],
                         ids=str)  # fmt: skip
def test_gradients_whose_sums_overflow(level, case, activation):
    # Sums of so large terms are beyond float32, and taken again in float64.
    expected = fused_case(case, "float32", activation, False)
    dy = expected.dy * np.float32(1e38 / np.abs(expected.dy).max())
    weight = expected.weight.astype(np.float64)
    expected = Expected(case, expected.x, dy, weight, expected.bias, **expected.fused)
    options = backward_options(case, expected.bias, expected.fused)
    statistics = expected.mean, expected.invstd
    with np.errstate(over="ignore"):
        _, dweight, dbias = case.backward(dy, expected.x, statistics, weight, **options)
    for found, k in ((dweight, 1), (dbias, 2)):
        assert_near(found, expected.gradients[k], expected.rooms[k])


def through(z, activation, residual=None, **options):
    """y of numbers that normalisation leaves alone."""
    channels = z.shape[-1]
    zeros, ones = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    return fastbn.batch_norm(
        z, zeros, ones, eps=0.0, layout="N...C", activation=activation, residual=residual, **options
    )


def slope_through(z, activation, **options):
    """dy / dz of the same numbers."""
    channels = z.shape[-1]
    zeros, ones = np.zeros(channels), np.ones(channels)
    return fastbn.batch_norm_backward(
        np.ones_like(z), z, zeros, ones, training=False, layout="N...C",
        activation=activation, **options,
    )[0]  # fmt: skip


FAR = np.array([0.0, -0.0, 1.0, -1.0, 5e4, -5e4, np.inf, -np.inf, np.nan])


@each_activation
@pytest.mark.parametrize("width", [1, 5, 16, 33])
def test_values_far_out(level, any_dtype, activation, width):
    z = np.repeat(FAR[:, None], width, 1).astype(any_dtype)
    wide = z.astype(np.float64)
    near = np.nan_to_num(wide, nan=0, posinf=0, neginf=0)
    with_slope = any_dtype, activation, 0.25
    triples = (
        (through(z, activation, negative_slope=0.25), oracle.activated,
         bounds.of_y(near, 0.0, *with_slope)),
        (slope_through(z, activation, negative_slope=0.25), oracle.slope,
         bounds.of_dz(near, 0.0, np.ones_like(z), *with_slope)),
    )  # fmt: skip
    for found, function, room in triples:
        exact = function(wide, activation, 0.25)
        # What ends in a few binary digits is exact; the rest, near 0, is rounded.
        few = (exact * 16 == np.round(exact * 16)) | ~np.isfinite(exact)
        assert few[4:8].all()
        np.testing.assert_array_equal(found.astype(float)[few], exact[few])
        assert_near(found[~few], exact[~few], room[~few])


@each_activation
@pytest.mark.parametrize("largest", [1e30, 3e38])
def test_values_so_far_out_that_squares_overflow(level, activation, largest):
    z = np.array([[largest, -largest]] * 3, np.float32)
    for far in (z, z.astype(np.float64) * 1e250):
        exact = oracle.activated(far.astype(np.float64), activation, 0.25)
        y = through(far, activation, negative_slope=0.25)
        np.testing.assert_array_equal(y, exact)
        slope = oracle.slope(far.astype(np.float64), activation, 0.25)
        found = slope_through(far, activation, negative_slope=0.25)
        np.testing.assert_array_equal(found, slope)


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_residual_stays_where_it_is(any_dtype, case, activation, bad):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    residual = case.batch(any_dtype, 6)
    clean = everything(case, x, dy, activation=activation, residual=residual)
    at = (2, 3, 4)
    residual[at] = bad
    y, *gradients = everything(case, x, dy, activation=activation, residual=residual)
    np.testing.assert_array_equal(float(y[at]), oracle.activated(bad, activation))
    others = np.ones(case.shape, bool)
    others[at] = False
    assert y[others].tobytes() == clean[0][others].tobytes()
    dresidual = gradients[-1]
    assert dresidual[others].tobytes() == clean[-1][others].tobytes()
    if activation is None:
        same_bytes(gradients, clean[1:])
    slope = oracle.slope(np.array(bad), activation)
    exact = float(slope) * float(dy[at])
    if np.isnan(exact):
        assert np.isnan(float(dresidual[at]))
    else:
        # Twice: the slope, and the product.
        assert_near(dresidual[at], np.array(exact), bounds.roundings(1, any_dtype) * abs(exact))


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_in_x_survives(level, any_dtype, case, activation):
    x, residual = case.batch(any_dtype), case.batch(any_dtype, 6)
    x[1, 2, 3] = np.nan
    plain = case.forward(x)[0]
    y = case.forward(x, activation=activation, residual=residual)[0]
    np.testing.assert_array_equal(np.isnan(y.astype(float)), np.isnan(plain.astype(float)))
    assert np.isnan(y.astype(float)).any()


@pytest.mark.parametrize("shape", [(33, 5), (3, 33, 7), (64, 16), (3, 4, 40)])
def test_a_neighbours_nan_changes_nothing(level, any_dtype, shape):
    # Channels next to each other in a register, or in neighbouring runs.
    case = Case("batch", shape)
    x, dy, residual = (case.batch(any_dtype, seed) for seed in (0, 1, 2))
    spoiled = x.copy()
    spoiled[0, 2] = np.nan
    for activation in ACTIVATIONS:
        options = {"activation": activation, "residual": residual}
        clean, found = everything(case, x, dy, **options), everything(case, spoiled, dy, **options)
        clean_channels = np.arange(shape[1]) != 2
        for k, (one, other) in enumerate(zip(clean, found, strict=True)):
            # y, dx and dresidual are tensors, dweight and dbias are vectors.
            some = (slice(None), clean_channels) if k in (0, 1, 4) else clean_channels
            assert one[some].tobytes() == other[some].tobytes()
