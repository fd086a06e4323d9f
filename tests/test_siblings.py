# SPDX-License-Identifier: BSD-3-Clause
"""Layer, RMS, group and instance norm against the oracle: dtype x shape x order x threads."""

import tracemalloc

import bounds
import numpy as np
import oracle
import pytest
from arrays import GAPLESS, MORE_ORDERS, assert_near, batch, in_order, orders_of, same_samples
from cases import SIBLINGS, Case, Expected

import fastbn
from fastbn import _dispatch

WIDTHS = [1, 7, 15, 16, 17, 31, 33, 64, 65, 100, 768, 1024, 4100, 20_000]


def as_written(exact, dtype):
    """What becomes of an exact number: half types are rounded from float32."""
    return exact if dtype == "float64" else exact.astype(np.float32).astype(dtype)


def expected_of(case, dtype, parameters=None, **options):
    if parameters is None:
        parameters = "float64" if dtype == "float64" else "float32"
    return Expected(
        case, case.batch(dtype), case.gradient(dtype), *case.parameters(parameters), **options
    )


@pytest.mark.parametrize("op", ["layer", "rms"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows(any_dtype, op, width, always_parallel):
    for rows in (1, 2, 3, 9, 100):
        case = Case(op, (rows, width), width)
        expected_of(case, any_dtype).check_everywhere()


@pytest.mark.parametrize("case", SIBLINGS, ids=str)
def test_shapes(any_dtype, case, always_parallel):
    expected_of(case, any_dtype).check_everywhere()


@pytest.mark.parametrize("op", ["layer", "rms", "group", "instance"])
def test_every_length(level, any_dtype, op):
    # Whole registers, parts of registers, and trees with any number of terms.
    for length in range(2, 140):
        shapes = {"group": (2, 4, length), "instance": (2, 2, length)}
        what = {"group": 2, "instance": None}.get(op, length)
        expected_of(Case(op, shapes.get(op, (3, length)), what), any_dtype).check()


@pytest.mark.parametrize("op", ["group", "instance"])
def test_every_number_of_channels_last(level, op):
    for channels in range(1, 70):
        groups = max(k for k in (1, 2, 3, 5, 7) if channels % k == 0)
        what = groups if op == "group" else None
        expected_of(Case(op, (2, 5, channels), what, "NLC"), "float32").check()


ORDERED = [
    Case("layer", (6, 5, 4, 33), 33),
    Case("layer", (6, 5, 4, 9), (4, 9)),
    Case("layer", (4, 5, 6, 7), (5, 6, 7)),
    Case("layer", (4, 5, 6, 7), (4, 5, 6, 7)),
    Case("layer", (12, 65), 65),
    Case("rms", (6, 5, 40), 40),
    Case("rms", (4, 5, 6, 7), (5, 6, 7)),
    Case("group", (4, 6, 7, 5), 2),
    Case("group", (4, 6, 7, 5), 6),
    Case("group", (6, 8), 2),
    Case("group", (4, 7, 5, 6), 3, "NHWC"),
    Case("group", (6, 4, 9), 2, "CNL"),
    Case("instance", (4, 6, 9, 8)),
    Case("instance", (4, 9, 8, 6), layout="NHWC"),
    Case("instance", (9, 4, 6), layout="LNC"),
]


@pytest.mark.parametrize("case", ORDERED, ids=str)
@pytest.mark.parametrize("dy_order", ["C", "channels last", "cropped"])
def test_memory_orders(any_dtype, case, dy_order, always_parallel):
    plain = expected_of(case, any_dtype)
    x, plain.dy = plain.x, in_order(plain.dy, dy_order)
    # Where dy has an order of its own, what matters of x is its order, not its gaps.
    for order in orders_of(any_dtype, MORE_ORDERS) if dy_order == "C" else GAPLESS:
        plain.x = in_order(x, order)
        # What is read may be read-only.
        plain.x.flags.writeable = False
        plain.check_everywhere(threads=[2])
        if order in GAPLESS:
            y, dx = plain.check()
            assert y.strides == dx.strides == np.empty_like(plain.x).strides


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_out_in_any_order(level, any_dtype, case):
    expected = expected_of(case, any_dtype)
    x, dy = expected.x, expected.dy
    weight, bias = expected.weight, expected.bias
    y, saved = case.forward(x, weight, bias)
    dx = case.backward(dy, x, saved, weight)[0]
    for order in orders_of(any_dtype, MORE_ORDERS):
        out = in_order(np.zeros_like(x), order)
        assert case.forward(x, weight, bias, out=out)[0] is out
        np.testing.assert_array_equal(out.astype(float), y.astype(float))
        out[...] = 0
        assert case.only_y(x, weight, bias, out=out) is out
        np.testing.assert_array_equal(out.astype(float), y.astype(float))
        assert case.backward(dy, x, saved, weight, out=out)[0] is out
        np.testing.assert_array_equal(out.astype(float), dx.astype(float))


ONE_EACH = [
    Case("layer", (6, 5, 9), (5, 9)),
    Case("rms", (6, 5, 9), 9),
    Case("group", (4, 6, 9), 2),
    Case("instance", (4, 6, 9)),
]


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_dtypes_of_parameters_are_free(level, any_dtype, parameters, case):
    expected = expected_of(case, any_dtype, parameters)
    expected.check()
    # Each may have a dtype of its own, and any strides.
    x, weight, bias = expected.x, expected.weight, expected.bias
    y = case.forward(x, weight, bias)[0].tobytes()
    if bias is not None:
        assert case.forward(x, weight, bias.astype(np.float64))[0].tobytes() == y
        y_without_weight = case.forward(x, None, bias)[0]
        ones = np.ones(case.parameter_shape, parameters)
        assert y_without_weight.tobytes() == case.forward(x, ones, bias)[0].tobytes()
    strided = in_order(weight, "reversed" if weight.ndim == 1 else "F")
    assert case.forward(x, strided, bias)[0].tobytes() == y
    Expected(case, x, expected.dy).check()


@pytest.mark.parametrize("case", ONE_EACH, ids=str)
def test_backward_takes_single_precision_statistics(level, any_dtype, case):
    expected = expected_of(case, any_dtype)
    _, saved = case.forward(expected.x, eps=expected.eps)
    single = [statistic.astype(np.float32) for statistic in saved]
    found = case.backward(expected.dy, expected.x, single, expected.weight)
    # Exactly what they are, once they have been rounded.
    mean, expected.invstd = single if case.has_mean else (expected.mean, *single)
    expected.mean = mean
    expected.gradients = expected.gradients_of(expected.dz)
    expected.rooms = expected.rooms_of(expected.dz)
    expected.assert_gradients(found)


@pytest.mark.parametrize("case", [*ONE_EACH, Case("group", (4, 9, 6), 2, "NLC")], ids=str)
def test_weights_of_zero(level, any_dtype, case):
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    weight, bias = case.parameters("float64")
    weight[..., 1::2] = 0
    Expected(case, x, dy, weight, bias).check()
    y, saved = case.forward(x, 0 * weight, bias)
    dx, dweight, *_ = case.backward(dy, x, saved, 0 * weight)
    assert not dx.any()
    assert dweight.all()  # what would move a weight away from 0
    exact = spread_bias(case, bias) if case.has_mean else np.zeros(case.shape)
    np.testing.assert_array_equal(y, as_written(exact, any_dtype))


def spread_bias(case, bias):
    """y where x says nothing."""
    nothing = np.zeros(case.shape)
    zeros = np.zeros(case.statistics_shape)
    return oracle.forward(case.op, nothing, zeros, zeros, None, bias, 1.0, case.what, case.layout)


def test_a_constant_group_gives_exactly_bias(level, any_dtype):
    for case in SIBLINGS:
        if not case.has_mean:
            continue
        # Many values that add up to no multiple of the number in any binary arithmetic.
        for value in (0.1, -3.3, 12345.678):
            x = np.full(case.shape, value, any_dtype)
            _, bias = case.parameters("float32")
            y, (mean, invstd) = case.forward(x, None, bias, eps=0.25)
            assert (mean == float(x.flat[0])).all()
            assert (invstd == 2).all()
            exact = spread_bias(case, bias)
            np.testing.assert_array_equal(y, as_written(exact, any_dtype))


@pytest.mark.parametrize("shape", [(5, 1), (1, 1), (3, 4, 1, 1), (1,)])
def test_layer_norm_of_one_value_is_bias(level, any_dtype, shape):
    normalized = (1, 1) if len(shape) == 4 else 1
    case = Case("layer", shape, normalized)
    x = batch(shape, any_dtype)
    bias = np.full(case.parameter_shape, 0.3)
    y, (mean, invstd) = case.forward(x, None, bias)
    assert (y == as_written(bias, any_dtype)).all()
    np.testing.assert_array_equal(mean, x.astype(np.float64).reshape(mean.shape))
    np.testing.assert_allclose(invstd, 1e-5**-0.5, rtol=1e-15)
    assert (case.forward(x)[0] == 0).all()
    assert (case.backward(x, x, [mean, invstd])[1] == 0).all()


def test_eps_is_inside_the_root(level, any_dtype):
    x = np.array([[1, -1, 1, -1]], any_dtype)
    for case in (Case("layer", (1, 4), 4), Case("rms", (1, 4), 4), Case("group", (1, 4), 1)):
        y, saved = case.forward(x, eps=3.0)
        np.testing.assert_array_equal(y, x / np.array(2, any_dtype))
        assert (saved[-1] == 0.5).all()
    y = fastbn.instance_norm(x[:, None], eps=3.0)
    np.testing.assert_array_equal(y[:, 0], x / np.array(2, any_dtype))


def test_the_eps_of_rms_norm_is_that_of_what_it_is_computed_in(level, any_dtype):
    # As in PyTorch: half types are computed in float32.
    eps = 2.0**-52 if any_dtype == "float64" else 2.0**-23
    for size in (0.0, 2.0**-12, 1.0):
        x = np.full((3, 8), size, any_dtype)
        y, invrms = fastbn.rms_norm_forward(x, 8)
        np.testing.assert_allclose(invrms, (size**2 + eps) ** -0.5, rtol=1e-15)
        assert_near(y, size * invrms[:, None] * np.ones((1, 8)), 1e-7 * size)
        assert fastbn.rms_norm(x, 8).tobytes() == y.tobytes()
        assert fastbn.rms_norm(x, 8, eps=eps).tobytes() == y.tobytes()


def test_default_eps(level):
    x = np.array([[[1.0, 3.0]], [[5.0, 5.0]]])
    for case in (
        Case("layer", (2, 1, 2), 2),
        Case("group", (2, 1, 2), 1),
        Case("instance", (2, 1, 2)),
    ):
        _, (_, invstd) = case.forward(x)
        np.testing.assert_allclose(invstd.ravel(), [(1 + 1e-5) ** -0.5, 1e-5**-0.5], rtol=1e-15)


def test_integers_and_sequences_of_them(level):
    x = batch((4, 3, 5), "float32")
    y = fastbn.layer_norm(x, (5,))
    for shape in (5, [5], np.int64(5), (np.int32(5),)):
        assert fastbn.layer_norm(x, shape).tobytes() == y.tobytes()
        fastbn.rms_norm(x, shape)
    y = fastbn.group_norm(x, 3)
    assert fastbn.group_norm(x, np.uint8(3)).tobytes() == y.tobytes()


@pytest.mark.parametrize(
    "case",
    [
        Case("layer", (0, 5), 5),
        Case("layer", (3, 0, 5), 5),
        Case("layer", (3, 0), 0),
        Case("layer", (2, 3, 0), (3, 0)),
        Case("rms", (0, 5), 5),
        Case("rms", (3, 0), 0),
        Case("group", (0, 4, 3), 2),
        Case("group", (2, 4, 0), 2),
        Case("group", (3, 0, 4), 2, "NLC"),
        Case("instance", (0, 4, 3)),
        Case("instance", (2, 0, 3)),
        Case("instance", (2, 4, 0, 3)),
    ],
    ids=str,
)
def test_empty(level, any_dtype, case):
    x = np.empty(case.shape, any_dtype)
    for weight, bias in ((None, None), case.parameters("float32")):
        y, saved = case.forward(x, weight, bias)
        assert y.shape == case.shape
        assert y.dtype == any_dtype
        assert case.only_y(x, weight, bias).shape == case.shape
        for statistic in saved:
            assert statistic.shape == case.statistics_shape
            assert statistic.dtype == np.float64
        dx, *rest = case.backward(x, x, saved, weight)
        assert dx.shape == case.shape
        assert dx.dtype == any_dtype
        for gradient in rest:
            assert gradient.shape == case.parameter_shape
            assert not gradient.any()


@pytest.mark.parametrize(
    "case",
    [case for case in SIBLINGS if case.op == "instance"],
    ids=str,
)
def test_running_statistics_of_instances(level, any_dtype, case, kept):
    x = case.batch(any_dtype)
    mean, var = oracle.moments("instance", x, layout=case.layout)
    unbiased = var * case.values / (case.values - 1)
    old_mean, old_var = case.parameters(kept, 4)
    old_var += 2
    weight, bias = case.parameters("float32")
    expected, _ = case.forward(x, weight, bias)
    for momentum in (0.3, 0.0, 1.0):
        running_mean, running_var = old_mean.copy(), old_var.copy()
        y = fastbn.instance_norm(
            x, running_mean, running_var, weight, bias, momentum=momentum, layout=case.layout
        )
        assert y.tobytes() == expected.tobytes()
        assert running_mean.dtype == running_var.dtype == kept
        of_mean = bounds.of_mean(mean, var, any_dtype).mean(0)
        of_var = bounds.of_variance(any_dtype) * unbiased.mean(0)
        for found, old, new, room in (
            (running_mean, old_mean, mean.mean(0), of_mean),
            (running_var, old_var, unbiased.mean(0), of_var),
        ):
            room = bounds.of_running(old, new, room, momentum)
            assert_near(found, oracle.running(old, new, momentum), room)
    # One alone, and by the other function.
    for name, other in ("running_mean", running_mean), ("running_var", running_var):
        alone = {"running_mean": old_mean, "running_var": old_var}[name].copy()
        case.forward(x, momentum=1.0, **{name: alone})
        assert alone.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    "case",
    [case for case in SIBLINGS if case.op == "instance"],
    ids=str,
)
def test_instances_with_running_statistics(level, any_dtype, case):
    x = case.batch(any_dtype)
    weight, bias = case.parameters("float32")
    running_mean, running_var = case.parameters("float32", 4)
    running_var += 2
    arrays = running_mean, running_var, weight, bias
    for array in arrays:
        array.flags.writeable = False
    as_batch = Case("batch", case.shape, layout=case.layout)
    expected = Expected(as_batch, x, x, weight, bias, frozen=(running_mean, running_var))
    y = fastbn.instance_norm(x, *arrays, False, layout=case.layout)
    assert_near(y, expected.y, expected.room_y)
    y2, (mean, invstd) = case.forward(
        x, weight, bias, running_mean=running_mean, running_var=running_var, use_input_stats=False
    )
    assert y2.tobytes() == y.tobytes()
    wide = running_mean.astype(np.float64), 1 / np.sqrt(running_var + np.float64(1e-5))
    for found, exact in zip((mean, invstd), wide, strict=True):
        assert found.shape == case.statistics_shape
        np.testing.assert_allclose(found, np.broadcast_to(exact, found.shape), rtol=1e-15)


def test_one_value_is_enough_for_running_statistics(any_dtype):
    x = np.full((3, 2, 1), 5, any_dtype)
    y = fastbn.instance_norm(x, np.ones(2), np.ones(2), use_input_stats=False, eps=0)
    assert (y == 4).all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)])
def test_empty_instances_leave_running_statistics_alone(level, any_dtype, shape):
    running_mean, running_var = np.full(3, 3.0), np.full(3, 4.0)
    fastbn.instance_norm(np.empty(shape, any_dtype), running_mean, running_var)
    assert (running_mean == 3).all()
    assert (running_var == 4).all()


NONFINITE = [
    Case("layer", (5, 4, 40), 40),
    Case("layer", (5, 4, 6, 7), (6, 7)),
    Case("layer", (30, 900), 900),
    Case("rms", (5, 4, 40), 40),
    Case("group", (4, 6, 7, 7), 3),
    Case("group", (4, 7, 7, 6), 3, "NHWC"),
    Case("group", (20, 48), 8),
    Case("instance", (4, 6, 7, 7)),
    Case("instance", (4, 50, 6), layout="NLC"),
    Case("instance", (3, 5, 60, 61)),
]


@pytest.mark.parametrize("case", NONFINITE, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_infinities_and_nans_stay_in_their_group(level, any_dtype, case, bad):
    x = case.batch(any_dtype)
    clean_y, clean = case.forward(x)
    spoiled = x.copy()
    seen, reduced, _ = oracle.see(
        case.op, np.arange(x.size).reshape(x.shape), case.what, case.layout
    )
    group = np.moveaxis(seen, reduced, range(-len(reduced), 0)).reshape(-1, case.values)
    members = group[group.shape[0] // 2].astype(int)
    one = members[case.values // 3]
    spoiled.reshape(-1)[one] = bad
    y, saved = case.forward(spoiled)

    others = np.setdiff1d(np.arange(x.size), members)
    assert y.reshape(-1)[others].tobytes() == clean_y.reshape(-1)[others].tobytes()
    for a, b in zip(saved, clean, strict=True):
        changed = a.reshape(-1) != b.reshape(-1)
        np.testing.assert_array_equal(np.nonzero(changed)[0], [group.shape[0] // 2])
    inside = y.reshape(-1)[members].astype(np.float64)
    if case.op == "rms" and np.isinf(bad):
        # x / Inf, as in PyTorch: 0, but for the infinity itself.
        assert saved[0].reshape(-1)[group.shape[0] // 2] == 0
        assert np.isnan(inside[case.values // 3])
        assert (np.delete(inside, case.values // 3) == 0).all()
    else:
        assert np.isnan(inside).all()
        assert np.isnan(saved[-1]).sum() == 1
    if case.has_mean:
        # The mean is NumPy's: an infinity, or NaN.
        np.testing.assert_array_equal(saved[0].reshape(-1)[group.shape[0] // 2], bad)

    dx, clean_dx = (case.backward(x, v, s)[0] for v, s in ((spoiled, saved), (x, clean)))
    assert dx.reshape(-1)[others].tobytes() == clean_dx.reshape(-1)[others].tobytes()
    assert np.isnan(dx.reshape(-1)[members].astype(np.float64)).any()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("layer", (90, 1003), 1003), "float32"),
        (Case("layer", (90, 1003), 1003), "float16"),
        (Case("layer", (3, 130, 131), (130, 131)), "float32"),
        (Case("rms", (20_000, 40), 40), "float32"),
        (Case("group", (2, 32, 57, 59), 4), "float32"),
        (Case("group", (2, 57, 59, 32), 4, "NHWC"), "float32"),
        (Case("instance", (2, 10, 130, 131)), "float32"),
    ],
    ids=str,
)
def test_larger_than_the_cache(case, dtype, always_parallel):
    # Copies of a few samples: the oracle sees the few.
    expected = expected_of(case, dtype)
    copies = -(-40_000_000 // expected.x.nbytes)
    x, dy = (np.concatenate([a] * copies) for a in (expected.x, expected.dy))
    few = len(expected.x)
    exact = [np.concatenate([s] * copies) for s in (expected.mean, expected.invstd)]
    exact = exact if case.has_mean else exact[1:]
    out = np.empty_like(x)
    for level in _dispatch.runnable():
        with _dispatch.using(level), fastbn.threads(2):
            y, saved = case.forward(x, expected.weight, expected.bias, eps=expected.eps, out=out)
            assert_near(y[:few], expected.y, expected.room_y)
            same_samples(y, few)
            assert_near(saved[-1], exact[-1], bounds.of_invstd(dtype) * exact[-1])
            dx, *rest = case.backward(dy, x, exact, expected.weight, out=out)
            same_samples(dx, few)
            expected.assert_gradients([dx[:few], *rest], copies=copies)


@pytest.mark.parametrize(
    "case",
    [Case("layer", (1, 1_500_000), 1_500_000), Case("rms", (2, 700_001), 700_001),
     Case("group", (1, 4, 600, 601), 2), Case("instance", (1, 2, 900, 901))],
    ids=str,
)  # fmt: skip
def test_few_groups_of_very_many_values(any_dtype, case, always_parallel):
    expected_of(case, any_dtype).check_everywhere(threads=[3])


def test_broadcast_arrays(level, any_dtype):
    row = batch((5,), any_dtype)
    x = np.broadcast_to(row, (4, 3, 5))
    for case in (Case("layer", x.shape, 5), Case("rms", x.shape, 5), Case("layer", x.shape, (3, 5)),
                 Case("group", x.shape, 1), Case("instance", x.shape)):  # fmt: skip
        for dy in (x, case.gradient(any_dtype)):
            Expected(case, x, dy, *case.parameters("float32")).check()


def test_what_runs_without_a_copy():
    # Whether something is copied cannot be told by values, but by memory.
    rows = batch((4000, 1000), "float32")
    planes = batch((16, 32, 64, 64), "float32")
    views = [
        (Case("layer", rows.shape, 1000), rows),
        (Case("rms", rows.shape, 1000), rows),
        (Case("layer", (2000, 1000), 1000), rows[::2]),
        (Case("rms", rows.shape, 1000), rows[::-1]),
        (Case("layer", planes.shape, (32, 64, 64)), planes),
        (Case("group", planes.shape, 4), planes),
        (Case("group", (8, 32, 64, 64), 4), planes[::2]),
        (Case("instance", planes.shape), planes),
    ]
    for case, view in views:
        out = np.empty_like(view)
        tracemalloc.start()
        _, saved = case.forward(view, out=out)
        case.backward(view, view, saved, out=out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < view.nbytes // 4, str(case)


@pytest.mark.parametrize("groups", [1, 3])
def test_no_channels_in_any_number_of_groups(groups):
    x = np.zeros((2, 0, 4), np.float32)
    y, mean, invstd = fastbn.group_norm_forward(x, groups)
    assert y.shape == x.shape
    assert mean.shape == invstd.shape == (2, groups)
    dx, dweight, dbias = fastbn.group_norm_backward(x, x, mean, invstd, groups)
    assert dx.shape == x.shape
    assert dweight.shape == dbias.shape == (0,)
