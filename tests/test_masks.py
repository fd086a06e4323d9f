# SPDX-License-Identifier: BSD-3-Clause
"""Masks and lengths: what does not count changes no bit of anything, and is written as 0."""

import capi
import numpy as np
import oracle
import pytest
from cases import Case
from everywhere import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run

import fastbn

# Rows and planes of each kind: few channels and many, short runs and long ones, runs that are
# cut, several tiles, several blocks, groups of both, axes between instances and channels.
CASES = [
    Case("batch", (37, 5)),
    Case("batch", (9, 3, 7), layout="NTC"),
    Case("batch", (6, 90, 40), layout="NTC"),
    Case("batch", (3, 50, 600), layout="NTC"),
    Case("batch", (4, 3, 5, 6)),
    Case("batch", (40, 11, 7, 7)),
    Case("batch", (5, 70, 13, 14)),
    Case("batch", (3, 5, 300)),
    Case("batch", (2, 2, 151, 150)),
    Case("batch", (4, 9, 8, 33), layout="NHWC"),
    Case("batch", (5, 3, 6, 20), layout="HCNW"),
    Case("instance", (4, 6, 45)),
    Case("instance", (3, 40, 20), layout="NTC"),
    Case("instance", (5, 3, 4, 5)),
    Case("instance", (2, 3, 2, 200), layout="HNWC"),
    Case("group", (3, 12, 40), 3),
    Case("group", (4, 8, 7, 7), 2),
    Case("group", (2, 64, 30, 31), 8),
    Case("group", (3, 25, 32), 4, layout="NTC"),
    Case("group", (2, 9, 600), 2, layout="NTC"),
    Case("group", (4, 6, 9), 6),
]
IDS = list(map(str, CASES))
LENGTHS = [case for case in CASES if len(case.shape) == 3]


def mask_shape(case):
    axis = oracle.channel_axis(len(case.shape), case.layout)
    return case.shape[:axis] + case.shape[axis + 1 :]


def a_mask(case, density=0.5, seed=0):
    return np.random.default_rng(seed).random(mask_shape(case)) < density


def some_lengths(case):
    """From none to all, of each instance."""
    n = case.shape[oracle.batch_axis(case.layout)]
    axes = {oracle.channel_axis(len(case.shape), case.layout), oracle.batch_axis(case.layout)}
    (along,) = set(range(len(case.shape))) - axes
    size = case.shape[along]
    return np.linspace(0, size, n + 1).round().astype(int)[1:] if n > 2 else np.array([size, 2])


def poisoned(x, counts, *values):
    """With other things where nothing counts."""
    x = x.copy()
    rest = np.resize(np.array(values, x.dtype), x.shape)
    x[~counts] = rest[~counts]
    return x


def near(actual, wanted, tolerance, rounding=0.0):
    np.testing.assert_allclose(actual, wanted, rtol=rounding, atol=tolerance)


def every_result(case, x, dy, residual=None, activation=None, out_is_x=False, **counted):
    """Of forward, inference and backward, by name."""
    weight, bias = case.parameters(np.float32)
    fused = {"activation": activation, "residual": residual, **counted}
    channels = case.parameter_shape
    running = {}
    if case.op != "group":
        running = {"running_mean": np.zeros(channels, np.float32),
                   "running_var": np.ones(channels, np.float32)}  # fmt: skip
    given = x.copy() if out_is_x else x
    y, saved = case.forward(given, weight, bias, **fused, **running,
                            out=given if out_is_x else None)  # fmt: skip
    gradients = case.backward(dy, x, saved, weight, bias=bias, **fused,
                              out=x.copy() if out_is_x else None)  # fmt: skip
    results = {"y": y, "mean": saved[0], "invstd": saved[1], **running}
    names = ("dx", "dweight", "dbias", "dresidual")
    results |= dict(zip(names, gradients, strict=False))
    if case.op == "batch":
        results["inferred"] = case.only_y(
            x, weight, bias, training=False, running_mean=np.linspace(-1, 1, *channels),
            running_var=np.linspace(0.5, 2, *channels), **fused
        )  # fmt: skip
        dx, *_ = case.backward(dy, x, saved, weight, bias=bias, training=False, **fused)
        results["frozen"] = dx
        stats = fastbn.batch_stats(x, layout=case.layout, **counted)
        results |= {"count": stats.count, "stats_mean": stats.mean, "m2": stats.m2,
                    "min": stats.min, "max": stats.max}  # fmt: skip
    return results


def bits(results):
    return {name: np.ascontiguousarray(array).tobytes() for name, array in results.items()}


def check(case, dtype, counted, activation=None, adds=False):
    weight, bias = case.parameters(np.float32)
    x, dy = case.batch(dtype), case.gradient(dtype)
    residual = case.batch(dtype, 5) if adds else None
    counts = oracle.counting(case.shape, case.layout, **counted)
    actual = every_result(case, x, dy, residual, activation, **counted)
    wanted = oracle.masked(
        case.op, x, counts, case.what, case.layout, weight, bias, dy=dy, residual=residual,
        activation=activation
    )  # fmt: skip
    half = np.dtype(dtype).itemsize == 2
    room = (0.02, 2.0**-8) if half else (2e-5,)  # a step of bfloat16
    some = wanted.count.reshape(case.statistics_shape) > 0
    near(actual["mean"][some], wanted.mean.reshape(some.shape)[some], 1e-6)
    near((1 / actual["invstd"] ** 2 - 1e-5)[some], wanted.var.reshape(some.shape)[some], 1e-4)
    near(actual["y"].astype(np.float64), wanted.y, *room)
    near(actual["dx"].astype(np.float64), wanted.dx, *room)
    size = max(1.0, np.sqrt(counts.sum()))
    near(actual["dweight"], wanted.dweight, (0.02 if half else 2e-5) * size)
    near(actual["dbias"], wanted.dbias, (0.02 if half else 2e-5) * size)
    if adds:
        near(actual["dresidual"].astype(np.float64), wanted.dresidual, *room)
    for name in ("y", "dx", "inferred", "frozen", "dresidual"):
        if name in actual:
            outside = np.ascontiguousarray(actual[name][~counts])
            assert outside.tobytes() == bytes(outside.nbytes), name


#: More than 4 MB, from which on kernels fetch what comes later.
LARGE = [
    Case("batch", (9, 64, 2000)),
    Case("batch", (9, 2000, 64), layout="NTC"),
    Case("batch", (9, 9000, 14), layout="NTC"),
    Case("batch", (99, 128, 100)),
    Case("group", (9, 64, 2000), 8),
]


@pytest.mark.parametrize("case", LARGE, ids=map(str, LARGE))
@pytest.mark.parametrize("by", ["half", "few", "lengths"])
def test_values_of_large_tensors(case, by, level):
    n, along = case.shape[0], case.shape[1 if case.layout == "NTC" else 2]
    counted = {"mask": a_mask(case, 0.5 if by == "half" else 0.01)}
    if by == "lengths":
        counted = {"lengths": [0, 1, along, 0, along // 2, *[7] * (n - 6), 0]}
    check(case, "float32", counted)


@pytest.mark.parametrize("gap", [1, 16])
def test_bits_of_runs_with_gaps(gap):
    # Runs of a larger tensor have those of runs side by side.
    wide = np.random.default_rng(0).normal(size=(9, 64, 2000 + gap)).astype(np.float32)
    x = wide[:, :, :2000]
    found, wanted = (fastbn.batch_norm_forward(a) for a in (x, x.copy()))
    assert all(map(assert_same_bits, found, wanted))
    for result in (found, wanted):
        dx = fastbn.batch_norm_backward(x, x, *result[1:])
        assert_same_bits(dx[0], fastbn.batch_norm_backward(x.copy(), x.copy(), *result[1:])[0])


def assert_same_bits(a, b):
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
    return True


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_values_of_a_mask(case, dtype):
    check(case, dtype, {"mask": a_mask(case)})


@pytest.mark.parametrize("case", LENGTHS, ids=list(map(str, LENGTHS)))
def test_values_of_lengths(case, dtype):
    lengths = some_lengths(case)
    check(case, dtype, {"lengths": lengths})
    counts = oracle.counting(case.shape, case.layout, lengths=lengths)
    axis = oracle.channel_axis(3, case.layout)
    x, dy = case.batch(dtype), case.gradient(dtype)
    assert bits(every_result(case, x, dy, lengths=lengths.tolist())) == bits(
        every_result(case, x, dy, mask=np.take(counts, 0, axis))
    )


@pytest.mark.parametrize("activation", ["relu", "silu", "hardswish"])
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("case", CASES[1::3], ids=IDS[1::3])
def test_values_of_fused_ones(case, activation, adds):
    check(case, np.float32, {"mask": a_mask(case)}, activation, adds)


@pytest.mark.parametrize("case", CASES[2::4], ids=IDS[2::4])
def test_values_of_halves(case, half):
    check(case, half, {"mask": a_mask(case)}, "relu", True)


@pytest.mark.parametrize(("activation", "adds"), [(None, False), ("relu", False), ("silu", True)])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_what_does_not_count_changes_nothing(case, activation, adds):
    # NaN and infinities in every tensor, in place and not.
    mask = a_mask(case, 0.4)
    counts = oracle.counting(case.shape, case.layout, mask)
    tensors = [case.batch(np.float32), case.gradient(np.float32)]
    if adds:
        tensors.append(case.batch(np.float32, 5))
    clean = [poisoned(a, counts, 0.0) for a in tensors]
    foul = [poisoned(a, counts, np.nan, np.inf, -np.inf, 3e38, np.nan) for a in tensors]
    wanted = bits(every_result(case, *clean, activation=activation, mask=mask))
    assert bits(every_result(case, *foul, activation=activation, mask=mask)) == wanted
    assert bits(every_result(case, *foul, activation=activation, mask=mask,
                             out_is_x=True)) == wanted  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_what_counts_may_be_extreme(case):
    # Sums that overflow are made once more in float64, of what counts alone.
    mask = a_mask(case)
    counts = oracle.counting(case.shape, case.layout, mask)
    for scale in (1e-25, 1e30):
        x = case.batch(np.float64) * scale
        x = poisoned(x.astype(np.float32), counts, np.nan)
        dy = poisoned(case.gradient(np.float32), counts, np.nan)
        actual = every_result(case, x, dy, mask=mask)
        wanted = oracle.masked(case.op, x, counts, case.what, case.layout, eps=1e-5, dy=dy,
                               weight=case.parameters(np.float32)[0],
                               bias=case.parameters(np.float32)[1])  # fmt: skip
        some = wanted.count.reshape(case.statistics_shape) > 0
        np.testing.assert_allclose(
            actual["mean"][some], wanted.mean.reshape(some.shape)[some], rtol=1e-5,
            atol=1e-6 * scale
        )  # fmt: skip
        near(actual["y"], wanted.y, 3e-5)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_mask_of_ones(case, dtype):
    x, dy, residual = case.batch(dtype), case.gradient(dtype), case.batch(dtype, 5)
    wanted = bits(every_result(case, x, dy, residual, "relu"))
    ones = np.ones(mask_shape(case), bool)
    for mask in (ones, np.ones((1,) * (len(case.shape) - 1), bool)):
        assert bits(every_result(case, x, dy, residual, "relu", mask=mask)) == wanted


def test_whole_blocks_have_the_bits_of_no_mask():
    # An instance that counts as a whole, beside one that does not.
    for case in CASES:
        if case.op == "batch" or case.shape[oracle.batch_axis(case.layout)] < 2:
            continue
        n = oracle.batch_axis(case.layout)
        mask = a_mask(case)
        at = n - (n > oracle.channel_axis(len(case.shape), case.layout))
        np.moveaxis(mask, at, 0)[0] = True
        x = case.batch(np.float32)
        first = np.take(case.forward(x, mask=mask)[0], 0, n)
        assert first.tobytes() == np.take(case.forward(x)[0], 0, n).tobytes()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_levels_and_threads(case, always_parallel):
    mask = a_mask(case)
    x, dy, residual = (case.batch(np.float32, seed) for seed in range(3))

    def results():
        return (bits(every_result(case, x, dy, mask=mask)),
                bits(every_result(case, x, dy, residual, "silu", mask=mask)))  # fmt: skip

    assert_same(results, threads=[1, 3])


@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (8, 700, 1100), layout="NTC"),
        Case("batch", (400, 350, 3, 3), layout="NHWC"),
        Case("batch", (16, 34, 110, 101)),
        Case("batch", (300, 340, 7, 9)),
    ],
    ids=str,
)
def test_past_the_cache(case):
    # Streaming stores and parallel tasks: the bits of instances apart.
    mask = a_mask(case, 0.6)
    x = case.batch(np.float32)
    counts = oracle.counting(case.shape, case.layout, mask)
    running = [np.linspace(0.5, 2, *case.parameter_shape) for _ in range(2)]
    options = {"training": False, "running_mean": running[0], "running_var": running[1]}
    plain = case.only_y(x, **options)
    plain[~counts] = 0.0
    out = np.full(x.size + 16, np.nan, np.float32)[3 : x.size + 3].reshape(x.shape)
    assert case.only_y(x, **options, mask=mask, out=out).tobytes() == plain.tobytes()
    y, (mean, invstd) = case.forward(x, mask=mask)
    axes = tuple(i for i in range(x.ndim) if i != oracle.channel_axis(x.ndim, case.layout))
    near(mean, np.mean(x, axes, np.float64, where=counts), 1e-6)
    near(y.mean(axes, np.float64, where=counts), 0, 1e-6)
    assert not y[~counts].any()
    dx, *_ = case.backward(x, x, [mean, invstd], mask=mask)
    assert not dx[~counts].any()
    near(dx, 0, 1e-4)  # of a gradient along x there is nothing left


def test_a_mask_is_broadcast_and_of_any_strides():
    case = Case("batch", (6, 5, 8, 9))
    x, dy = case.batch(np.float32), case.gradient(np.float32)
    whole = np.random.default_rng(0).random((12, 16, 18)) < 0.5
    strided = whole[::-2, ::2, 1::2]
    for mask in (strided, strided[:1], strided[:, :1], strided[:, :, :1], strided.T.copy().T):
        full = np.broadcast_to(mask, (6, 8, 9)).copy()
        assert bits(every_result(case, x, dy, mask=mask)) == bits(
            every_result(case, x, dy, mask=full)
        )
    # In another memory order of x, and of x itself.
    nhwc = np.moveaxis(np.moveaxis(x, 1, -1).copy(), -1, 1)
    near(fastbn.batch_norm_forward(nhwc, mask=strided)[0],
         fastbn.batch_norm_forward(x, mask=strided)[0], 1e-5)  # fmt: skip
    sliced = np.repeat(x, 2, axis=0)[::2]
    assert fastbn.batch_norm_forward(sliced, mask=strided)[0].tobytes() == (
        fastbn.batch_norm_forward(x, mask=strided)[0].tobytes())  # fmt: skip


@pytest.mark.parametrize("lengths", [[3, 0, 5, 2], np.array([3, 0, 5, 2], np.uint8)])
def test_lengths_along_any_axis(lengths):
    x = np.random.default_rng(0).normal(size=(4, 5, 6, 3))
    for layout, order in (("NTWC", (0, 1, 2, 3)), ("WCTN", (2, 3, 1, 0)), ("TNCW", (1, 0, 3, 2)),
                          ("CNWT", (3, 0, 2, 1)), ("WNTC", (2, 0, 1, 3))):  # fmt: skip
        turned = np.ascontiguousarray(x.transpose(order))
        counts = oracle.counting(turned.shape, layout, lengths=lengths, length_axis="T")
        y, mean, _ = fastbn.batch_norm_forward(turned, layout=layout, lengths=lengths,
                                               length_axis="T")  # fmt: skip
        near(y, oracle.masked("batch", turned, counts, layout=layout).y, 1e-9)
        stats = fastbn.batch_stats(turned, layout=layout, lengths=lengths, length_axis="T")
        assert stats.mean.tobytes() == mean.tobytes()
        assert stats.count.tolist() == [10 * 6] * 3


# ---- little is left, or nothing ------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "batch"], ids=str)
def test_nothing_counts(case):
    # As an empty batch, but for zeros.
    x, dy = case.batch(np.float32), case.gradient(np.float32)
    mask = np.zeros(mask_shape(case), bool)
    for activation, residual in ((None, None), ("silu", None), ("relu", case.batch(np.float32))):
        results = every_result(case, x, dy, residual, activation, mask=mask)
        for name in ("y", "dx", "dweight", "dbias", "mean", "inferred", "frozen", "m2", "count"):
            assert not results[name].any(), name
        assert np.isnan(results["invstd"]).all()
        assert not results["running_mean"].any()
        assert (results["running_var"] == 1).all()
        if residual is not None:
            assert not results["dresidual"].any()


def test_one_value_is_too_few_for_a_batch():
    x = np.arange(12.0).reshape(2, 2, 3)
    mask = np.zeros((2, 3), bool)
    mask[1, 2] = True
    y = np.full_like(x, 7.0)
    running = [np.zeros(2), np.ones(2)]
    with pytest.raises(ValueError, match="x: expected more than one value per channel"):
        fastbn.batch_norm(x, *running, training=True, mask=mask, out=y)
    assert (y == 7).all()
    assert running[0].tolist() == [0, 0]
    with pytest.raises(ValueError, match="x: expected more than one value per channel"):
        fastbn.batch_norm_backward(x, x, np.zeros(2), np.ones(2), mask=mask)
    assert fastbn.batch_stats(x, mask=mask).count.tolist() == [1, 1]
    assert fastbn.batch_norm(x, *running, mask=mask)[1, :, 2].any()


@pytest.mark.parametrize("op", ["instance", "group"])
@pytest.mark.parametrize(("layout", "dtype"), [("NCT", np.float32), ("NTC", np.float64)])
def test_little_is_left_of_some_instances(op, layout, dtype):
    # 0, 1, 2 and all of the positions: zeros, then what a mean of one value leaves.
    case = Case(op, (4, 3, 300) if layout == "NCT" else (4, 300, 3), 3 if op == "group" else None,
                layout)  # fmt: skip
    counted = {"lengths": [0, 1, 2, 300]}
    for activation, adds in ((None, False), ("relu", True), ("silu", False)):
        check(case, dtype, counted, activation, adds)
    x, dy = case.batch(dtype), case.gradient(dtype)
    counts = oracle.counting(case.shape, layout, **counted)
    results = every_result(case, x, dy, **counted)
    bias = case.parameters(np.float32)[1]
    one = (1, slice(None), 0) if layout == "NCT" else (1, 0)
    assert results["y"][one].tolist() == bias.astype(dtype).tolist()
    assert not results["dx"][1].any()
    assert np.isfinite(results["dweight"]).all()
    residual = case.batch(dtype, 5)
    added = every_result(case, x, dy, residual, **counted)
    near(added["y"][one], bias + residual[one], 1e-6)
    assert added["dresidual"][counts].tobytes() == dy[counts].tobytes()


def test_one_value_with_eps_0():
    x = np.full((2, 4, 3), 7.0, np.float32)
    bias = np.array([1, 2, 3], np.float32)
    y = fastbn.instance_norm(x, bias=bias, eps=0.0, layout="NTC", lengths=[1, 0])
    assert y[0, 0].tolist() == [1, 2, 3]
    assert not y[1].any()


def test_running_statistics_of_instances_that_have_a_variance():
    x = np.random.default_rng(0).normal(3, 2, (4, 50, 3))
    lengths = [50, 1, 0, 7]
    mean, var = np.zeros(3), np.ones(3)
    fastbn.instance_norm(x, mean, var, momentum=1.0, layout="NTC", lengths=lengths)
    near(mean, (x[0].mean(0) + x[3, :7].mean(0)) / 2, 1e-12)
    near(var, (x[0].var(0, ddof=1) + x[3, :7].var(0, ddof=1)) / 2, 1e-12)
    fastbn.instance_norm(x, mean, var, layout="NTC", lengths=[1, 0, 1, 1])
    near(mean, (x[0].mean(0) + x[3, :7].mean(0)) / 2, 1e-12)


def test_running_statistics_of_a_batch():
    x = np.random.default_rng(0).normal(3, 2, (4, 50, 3))
    mean, var = np.zeros(3), np.ones(3)
    fastbn.batch_norm(x, mean, var, training=True, momentum=1.0, layout="NTC",
                      lengths=[50, 1, 0, 7])  # fmt: skip
    values = np.concatenate([x[0], x[1, :1], x[3, :7]])
    near(mean, values.mean(0), 1e-12)
    near(var, values.var(0, ddof=1), 1e-12)


def test_an_empty_batch():
    x = np.empty((0, 5, 3), np.float32)
    y = fastbn.batch_norm(x, None, None, training=True, layout="NTC", lengths=[])
    assert y.shape == x.shape
    assert fastbn.batch_stats(x, layout="NTC", mask=np.ones((0, 1), bool)).count.tolist() == [0] * 3


# ---- instances, one by one -----------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.op != "batch"], ids=str)
def test_an_instance_has_the_bits_that_it_has_alone(case):
    n = oracle.batch_axis(case.layout)
    at = n - (n > oracle.channel_axis(len(case.shape), case.layout))
    mask = a_mask(case)
    x, dy = case.batch(np.float32), case.gradient(np.float32)
    together = every_result(case, x, dy, mask=mask)
    for i in range(case.shape[n]):
        part = [np.take(a, [i], n) for a in (x, dy)]
        alone = every_result(case, *part, mask=np.take(mask, [i], at))
        for name in ("y", "dx"):
            assert alone[name].tobytes() == np.take(together[name], [i], n).tobytes()


# ---- gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[1], CASES[4], Case("instance", (2, 2, 5)),
                                  Case("group", (2, 4, 3), 2)], ids=str)  # fmt: skip
def test_finite_differences(case):
    rng = np.random.default_rng(0)
    x, t, residual = (rng.normal(size=case.shape) for _ in range(3))
    weight, bias = case.parameters(np.float64)
    mask = a_mask(case, 0.6)
    options = {"mask": mask, "residual": residual, "activation": "silu"}

    def loss(x, weight, bias, residual):
        return (case.forward(x, weight, bias, **options | {"residual": residual})[0] * t).sum()

    saved = case.forward(x, weight, bias, **options)[1]
    gradients = case.backward(t, x, saved, weight, bias=bias, **options)
    arguments = [x, weight, bias, residual]
    for k, gradient in enumerate(gradients):
        for i in rng.integers(0, arguments[k].size, 8):
            step = np.zeros(arguments[k].shape)
            step.flat[i] = 1e-5
            moved = [[a + sign * step if j == k else a for j, a in enumerate(arguments)]
                     for sign in (1, -1)]  # fmt: skip
            slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-5
            assert abs(slope - gradient.flat[i]) < 1e-7, (k, i)


@st.composite
def masked_calls(draw):
    ndim = draw(st.integers(2, 4))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=ndim, max_size=ndim)))
    op = draw(st.sampled_from(["batch", "instance", "group"]))
    layout = draw(st.permutations("NCHW"[:ndim])) if draw(st.booleans()) else None
    case = Case(op, shape, None, layout and "".join(layout))
    channels = case.parameter_shape[0]
    if op == "group":
        divisors = [g for g in range(1, channels + 1) if channels % g == 0]
        case = Case(op, shape, draw(st.sampled_from(divisors)), case.layout)
    mask = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=40)))
    return case, np.resize(mask, mask_shape(case))


@settings(max_examples=60, deadline=None)
@given(masked_calls())
def test_any_mask(call):
    case, mask = call
    counts = oracle.counting(case.shape, case.layout, mask)
    few = mask.sum() == 1 if case.op == "batch" else case.values == 1
    x = poisoned(case.batch(np.float32), counts, np.nan, np.inf)
    if few:
        with pytest.raises(ValueError, match="more than one value"):
            case.forward(x, mask=mask)
        return
    y, saved = case.forward(x, mask=mask)
    wanted = oracle.masked(case.op, x, counts, case.what, case.layout, dy=x)
    near(y, wanted.y, 2e-5)
    dy = poisoned(case.gradient(np.float32), counts, np.nan)
    dx, dweight, dbias = case.backward(dy, x, saved, mask=mask)
    wanted = oracle.masked(case.op, x, counts, case.what, case.layout, dy=dy)
    scale = max(1.0, np.abs(wanted.dx).max())
    near(dx, wanted.dx, 1e-4 * scale)
    near(dweight, wanted.dweight, 1e-4)
    near(dbias, wanted.dbias, 1e-4)


# ---- layers --------------------------------------------------------------------------


LAYERS = {
    "batch": lambda: fastbn.BatchNorm(3, layout="NTC"),
    "instance": lambda: fastbn.InstanceNorm(3, affine=True, track_running_stats=True, layout="NTC"),
    "group": lambda: fastbn.GroupNorm(3, 3, layout="NTC"),
}


@pytest.mark.parametrize("op", LAYERS)
def test_layers(op):
    layer, case = LAYERS[op](), Case(op, (4, 9, 3), 3 if op == "group" else None, "NTC")
    x, dy, residual = (case.batch(np.float32, seed) for seed in range(3))
    lengths = np.array([9, 4, 0, 2])
    counts = oracle.counting(case.shape, "NTC", lengths=lengths)
    foul = [poisoned(a, counts, np.nan) for a in (x, dy, residual)]
    y = layer(foul[0], residual=foul[2], lengths=lengths)
    dx, dresidual = layer.backward(foul[1])
    wanted, saved = case.forward(x, layer.weight, layer.bias, residual=residual, lengths=lengths)
    gradients = case.backward(dy, x, saved, layer.weight, bias=layer.bias, residual=residual,
                              lengths=lengths)  # fmt: skip
    actual = (y, dx, layer.weight_grad, layer.bias_grad, dresidual)
    for one, other in zip(actual, (wanted, *gradients), strict=True):
        assert one.tobytes() == other.tobytes()
    layer.eval()
    mask = np.take(counts, 0, -1)
    assert layer(foul[0], mask=mask).tobytes() == layer(foul[0], lengths=lengths).tobytes()
    assert not layer(foul[0], mask=mask)[~counts].any()


def test_layers_count_no_batch_of_which_nothing_counts():
    bn = fastbn.BatchNorm(3, layout="NTC")
    x = np.ones((2, 4, 3), np.float32)
    assert not bn(x, lengths=[0, 0]).any()
    assert bn.num_batches_tracked == 0
    assert not bn.backward(x).any()
    bn(x, mask=np.ones((2, 4), bool))
    assert bn.num_batches_tracked == 1


# ---- beside other arguments ---------------------------------------------------------


BATCHES = [case for case in CASES if case.op == "batch"]
each_batch = pytest.mark.parametrize("case", BATCHES, ids=list(map(str, BATCHES)))


@each_batch
def test_statistics_have_the_extremes_of_what_counts(case, any_dtype):
    mask = a_mask(case, 0.3, 1)
    counts = oracle.counting(case.shape, case.layout, mask)
    x = case.batch(any_dtype)
    stats = fastbn.batch_stats(poisoned(x, counts, np.nan, np.inf), layout=case.layout, mask=mask)
    axis = oracle.channel_axis(len(case.shape), case.layout)
    for c, (low, high) in enumerate(zip(stats.min, stats.max, strict=True)):
        values = np.take(x, c, axis)[np.take(counts, c, axis)].astype(np.float64)
        assert (float(low), float(high)) == (values.min(), values.max())
    x[counts] = np.nan
    assert np.isnan(fastbn.batch_stats(x, layout=case.layout, mask=mask).min.astype(float)).all()


def test_statistics_leave_out_what_several_arguments_name():
    case = BATCHES[2]
    mask, x = a_mask(case), case.batch(np.float32)
    counts = oracle.counting(case.shape, case.layout, mask)
    nodata = float(x[counts][0])
    x[0, :, 5] = np.nan
    stats = fastbn.batch_stats(x, layout=case.layout, mask=mask, nan_policy="omit", nodata=nodata)
    plain = fastbn.batch_stats(x, layout=case.layout, mask=mask)
    for c in range(case.shape[-1]):
        values = x[..., c][counts[..., c]].astype(np.float64)
        values = values[~np.isnan(values) & (values != nodata)]
        assert stats.count[c] == values.size
        assert abs(stats.mean[c] - values.mean()) < 1e-6
        if values.size == plain.count[c]:
            assert stats.mean[c] == plain.mean[c]
    with pytest.raises(ValueError, match=r"x: expected no NaN, got some in channels \[5\]"):
        fastbn.batch_stats(x, layout=case.layout, mask=mask, nan_policy="raise")
    hidden = mask.copy()
    hidden[0] = False
    fastbn.batch_stats(x, layout=case.layout, mask=hidden, nan_policy="raise")


def test_lengths_of_integers():
    x = np.random.default_rng(0).integers(0, 256, (5, 40, 3), np.uint8)
    lengths = [40, 0, 7, 1, 39]
    counts = oracle.counting(x.shape, "NTC", lengths=lengths)[..., 0]
    stats = fastbn.batch_stats(x, layout="NTC", lengths=lengths)
    wanted = fastbn.batch_stats(x, layout="NTC", mask=counts)
    assert stats.count.tolist() == wanted.count.tolist() == [87] * 3
    assert stats.mean.tobytes() == wanted.mean.tobytes()
    assert [int(n) for n in stats.sum] == x[counts].sum(0, dtype=np.int64).tolist()


@pytest.mark.parametrize("by", ["mask", "lengths"])
@pytest.mark.parametrize("size", [1, 2, 4, 7, 100])
def test_ghost_batches_are_calls_of_their_own(by, size):
    case = Case("batch", (11, 30, 6), layout="NTC")
    x, dy, residual = case.batch(np.float32), case.gradient(np.float32), case.batch(np.float32, 9)
    weight, bias = case.parameters(np.float32)
    lengths = np.arange(11) * 3 % 31
    lengths[8:10] = 0
    options = {"layout": "NTC", "activation": "relu"}

    def of(part):
        if by == "lengths":
            return {"lengths": lengths[part]}
        return {"mask": oracle.counting(x[part].shape, "NTC", lengths=lengths[part])[..., 0]}

    running = [np.zeros(6), np.ones(6)]
    everything = slice(None)
    y, mean, invstd = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=running[0], running_var=running[1], residual=residual,
        ghost_batch_size=size, **options, **of(everything)
    )  # fmt: skip
    dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(
        dy, x, mean, invstd, weight, bias=bias, residual=residual, ghost_batch_size=size,
        **options, **of(everything)
    )  # fmt: skip
    own = [np.zeros(6), np.ones(6)]
    sums = np.zeros((2, 6))
    for i, start in enumerate(range(0, 11, size)):
        part = slice(start, start + size)
        wanted, *saved = fastbn.batch_norm_forward(
            x[part], weight, bias, running_mean=own[0], running_var=own[1],
            residual=residual[part], **options, **of(part)
        )  # fmt: skip
        assert y[part].tobytes() == wanted.tobytes()
        assert mean[i].tobytes() == saved[0].tobytes()
        gradients = fastbn.batch_norm_backward(
            dy[part], x[part], *saved, weight, bias=bias, residual=residual[part],
            **options, **of(part)
        )  # fmt: skip
        assert dx[part].tobytes() == gradients[0].tobytes()
        assert dresidual[part].tobytes() == gradients[3].tobytes()
        sums += gradients[1:3]
    assert running[0].tobytes() == own[0].tobytes()
    assert running[1].tobytes() == own[1].tobytes()
    np.testing.assert_array_equal(sums.astype(np.float32), [dweight, dbias])


def test_a_ghost_batch_of_one_value_that_counts():
    x, running = np.ones((4, 3, 2), np.float32), [np.zeros(2), np.ones(2)]
    out = np.full_like(x, 7)
    with pytest.raises(ValueError, match="ghost_batch_size: expected slices of more than one"):
        fastbn.batch_norm(x, *running, training=True, layout="NTC", out=out, ghost_batch_size=2,
                          lengths=[3, 3, 1, 0])  # fmt: skip
    assert running[0].tolist() == [0, 0]
    assert (out == 7).all()


@pytest.mark.parametrize("kind", ["plain", "frozen", "renorm", "ghost", "pooled", "biased"])
def test_layers_of_every_kind(kind):
    make = {
        "plain": lambda: fastbn.BatchNorm(3, layout="NTC", activation="relu"),
        "frozen": lambda: fastbn.BatchNorm(3, layout="NTC", activation="relu").freeze(False),
        "renorm": lambda: fastbn.BatchRenorm(3, layout="NTC", activation="relu"),
        "ghost": lambda: fastbn.BatchNorm(3, layout="NTC", activation="relu", ghost_batch_size=2),
        "pooled": lambda: fastbn.BatchNorm(3, layout="NTC", activation="relu", track="pooled"),
        "biased": lambda: fastbn.BatchNorm(3, layout="NTC", activation="relu", unbiased=False),
    }[kind]
    case = Case("batch", (4, 9, 3), layout="NTC")
    lengths = np.array([9, 4, 2, 2])
    counts = oracle.counting(case.shape, "NTC", lengths=lengths)
    tensors = [case.batch(np.float32, seed) for seed in range(3)]
    results = []
    for values in ((0.0,), (np.nan, np.inf)):
        bn = make()
        x, dy, residual = (poisoned(a, counts, *values) for a in tensors)
        y = bn(x, residual=residual, lengths=lengths)
        dx, dresidual = bn.backward(dy)
        for result in (y, dx, dresidual):
            assert not result[~counts].any()
        results.append([y, dx, dresidual, bn.weight_grad, bn.bias_grad, bn.running_mean,
                        bn.running_var])  # fmt: skip
        assert bn.num_batches_tracked == {"frozen": 0, "ghost": 2}.get(kind, 1)
        if kind == "pooled":
            assert bn.pooled.count.tolist() == [17] * 3
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


def test_renorm_is_batch_norm_without_corrections():
    case = Case("batch", (4, 9, 3), layout="NTC")
    x, dy, lengths = case.batch(np.float32), case.gradient(np.float32), [9, 0, 2, 5]
    plain = fastbn.BatchNorm(3, layout="NTC")
    renorm = fastbn.BatchRenorm(3, r_max=1.0, d_max=0.0, layout="NTC")
    for bn in (plain, renorm):
        bn.y = bn(x, lengths=lengths)
        bn.dx = bn.backward(dy)
    near(renorm.y, plain.y, 1e-6)
    near(renorm.dx, plain.dx, 1e-6)
    assert not renorm(x, lengths=[0] * 4).any()
    assert renorm.num_batches_tracked == 1
    with pytest.raises(ValueError, match="more than one value per channel"):
        renorm(x, lengths=[0, 1, 0, 0])


@pytest.mark.parametrize("lengths", [[9, 4, 0, 2, 7], [0, 0, 5, 1, 9], [1, 0, 0, 1, 1]])
def test_a_batch_of_several_ranks(lengths):
    case = Case("batch", (5, 9, 3), layout="NTC")
    x, dy = case.batch(np.float32), case.gradient(np.float32)
    weight, bias = case.parameters(np.float32)
    counts = oracle.counting(case.shape, "NTC", lengths=lengths)
    x, dy = poisoned(x, counts, np.nan), poisoned(dy, counts, np.nan)
    parts = [slice(0, 2), slice(2, 4), slice(4, 5)]

    def work(rank, group):
        part = parts[rank]
        bn = fastbn.SyncBatchNorm(3, group=group, layout="NTC", activation="relu")
        bn.weight[:], bn.bias[:] = weight, bias
        y = bn(x[part], lengths=lengths[part])
        return y, bn.backward(dy[part]), bn.weight_grad, bn.running_mean, bn.running_var, (
            bn.num_batches_tracked)  # fmt: skip

    results = run(3, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    bn = fastbn.BatchNorm(3, layout="NTC", activation="relu")
    bn.weight[:], bn.bias[:] = weight, bias
    y = bn(x, lengths=lengths)
    dx = bn.backward(dy)
    near(np.concatenate([result[0] for result in results]), y, 1e-5)
    near(np.concatenate([result[1] for result in results]), dx, 1e-5)
    near(sum(result[2] for result in results), bn.weight_grad, 1e-5)
    for result in results:
        near(result[3], bn.running_mean, 1e-6)
        near(result[4], bn.running_var, 1e-5)
        assert result[5] == 1


# ---- what is refused -----------------------------------------------------------------

X = np.zeros((2, 3, 4, 5), np.float32)
REFUSED = [
    ({"mask": np.ones((2, 4, 5))}, TypeError, "mask: expected dtype bool"),
    ({"mask": [[True]]}, TypeError, "mask: expected a numpy.ndarray"),
    ({"mask": np.ma.array(np.ones((2, 4, 5), bool))}, TypeError, "mask: .*masked array"),
    ({"mask": np.ones((2, 3, 4, 5), bool)}, ValueError, "mask: expected the shape of x without"),
    ({"mask": np.ones((4, 5), bool)}, ValueError, "mask: expected the shape of x without"),
    ({"mask": np.ones((2, 3, 5), bool)}, ValueError, "mask: expected the shape of x without"),
    ({"mask": np.ones((2, 4, 5), bool), "lengths": [1, 2], "length_axis": "W", "layout": "NCHW"},
     ValueError, "mask, lengths: expected at most one"),
    ({"lengths": [1, 2]}, ValueError, "length_axis: expected the letter"),
    ({"lengths": [1, 2], "length_axis": "W"}, ValueError, "length_axis: expected a layout"),
    ({"length_axis": "W", "layout": "NCHW"}, ValueError, "length_axis: expected lengths"),
    ({"lengths": [1, 2], "length_axis": 3, "layout": "NCHW"}, TypeError, "length_axis: expected a"),
    *[({"lengths": [1, 2], "length_axis": letter, "layout": "NCHW"}, ValueError,
       "length_axis: expected a letter of layout") for letter in ("N", "C", "T", "HW", "")],
    *[({"lengths": lengths, "length_axis": "W", "layout": "NCHW"}, error, "lengths: expected")
      for lengths, error in (([1, 6], ValueError), ([-1, 2], ValueError), ([1], ValueError),
                             ([[1], [2]], ValueError), (3, ValueError), ([1.0, 2.0], TypeError),
                             ([True, False], TypeError), ("ab", TypeError), ([[1], 2], TypeError),
                             (np.ma.array([1, 2]), TypeError))],
]  # fmt: skip


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refused(options, error, message):
    out = np.full_like(X, 7)
    running = [np.zeros(3), np.ones(3)]
    calls = [
        lambda: fastbn.batch_norm(X, *running, training=True, out=out, **options),
        lambda: fastbn.batch_norm_forward(X, out=out, **options),
        lambda: fastbn.batch_norm_backward(X, X, *running, out=out, **options),
        lambda: fastbn.batch_stats(X, **options),
        lambda: fastbn.instance_norm(X, *running, out=out, **options),
        lambda: fastbn.instance_norm_forward(X, use_input_stats=False, running_mean=running[0],
                                             running_var=running[1], **options),
        lambda: fastbn.group_norm(X, 3, out=out, **options),
        lambda: fastbn.group_norm_forward(X, 3, out=out, **options),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(error, match=message):
            call()
    assert (out == 7).all()
    assert running[0].tolist() == [0] * 3


def test_out_is_apart_from_the_mask():
    memory = np.ones(4 * 24, bool)
    out = memory.view(np.float32).reshape(2, 3, 4)
    with pytest.raises(ValueError, match=r"out: expected memory of its own.*overlaps mask"):
        fastbn.batch_norm_forward(np.zeros((2, 3, 4), np.float32), out=out,
                                  mask=memory[:8].reshape(2, 4))  # fmt: skip


# ---- C -------------------------------------------------------------------------------


def c_mask(case, mask):
    """A tensor of the call, whose channel axis has no stride."""
    axis = oracle.channel_axis(len(case.shape), case.layout)
    strides = [0 if size == 1 else stride for size, stride in
               zip(mask.shape, mask.strides, strict=True)]  # fmt: skip
    return capi.Tensor(mask.ctypes.data, capi.sizes([*strides[:axis], 0, *strides[axis:]]))


def c_axes(case):
    fields = {"channel_axis": oracle.channel_axis(len(case.shape), case.layout),
              "sample_axis": oracle.batch_axis(case.layout)}  # fmt: skip
    return fields | ({"groups": case.what} if case.op == "group" else {})


@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[8], CASES[11], CASES[17]], ids=str)
@pytest.mark.parametrize("runner", [capi.run, lambda call: capi.run_in_tasks(call, 3)])
def test_from_c(case, runner):
    x, dy = case.batch(np.float32), case.gradient(np.float32)
    weight, bias = case.parameters(np.float32)
    mask = a_mask(case)
    y, dx, dweight, dbias = np.empty_like(x), np.empty_like(x), *case.parameters(np.float32)
    mean, invstd = (np.empty(case.statistics_shape) for _ in range(2))
    given = {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd,
             "mask": c_mask(case, mask), **c_axes(case)}  # fmt: skip
    runner(capi.new_call(case.op, capi.FORWARD, x, out=y, **given))
    runner(capi.new_call(case.op, capi.BACKWARD, x, dy=dy, out=dx, dweight=dweight, dbias=dbias,
                         **given))  # fmt: skip
    wanted, saved = case.forward(x, weight, bias, mask=mask)
    assert y.tobytes() == wanted.tobytes()
    gradients = case.backward(dy, x, saved, weight, bias=bias, mask=mask)
    for actual, expected in zip((dx, dweight, dbias), gradients, strict=True):
        assert actual.tobytes() == expected.tobytes()


def code_of(call):
    _memory, place, size = capi.workspace_for(call)
    return capi.API.run(call, 1, place, size)


def test_faults_from_c():
    case = Case("batch", (2, 4, 3), layout="NTC")
    x, y = case.batch(np.float32), np.full((2, 4, 3), 7, np.float32)
    mask = np.zeros((2, 4), bool)
    mask[0, 0] = True
    axes = c_axes(case)
    call = capi.new_call("batch", capi.FORWARD, x, out=y, mask=c_mask(case, mask), **axes)
    assert code_of(call) == capi.ONE_VALUE
    size = capi.c_size_t()
    lengths = np.array([4, 2])
    for fields, code in (
        ({"mask": capi.Tensor(mask.ctypes.data, capi.sizes([4, 1, 1]))}, capi.BAD_MASK),
        ({"mask": capi.Tensor(mask.ctypes.data, None)}, capi.BAD_MASK),
        ({"mask": c_mask(case, mask), "lengths": lengths.ctypes.data, "length_axis": 1},
         capi.BAD_MASK),
        ({"lengths": lengths.ctypes.data, "length_axis": 2}, capi.BAD_AXIS),
        ({"lengths": lengths.ctypes.data, "length_axis": 0}, capi.BAD_AXIS),
        ({"lengths": lengths.ctypes.data, "length_axis": 9}, capi.BAD_AXIS),
        ({"lengths": lengths.ctypes.data + 4, "length_axis": 1}, capi.MISALIGNED),
    ):  # fmt: skip
        call = capi.new_call("batch", capi.FORWARD, x, out=y, **axes, **fields)
        assert capi.API.workspace_size(call, 1, size) == code
    for wrong in ([5, 1], [-1, 2]):
        lengths[:] = wrong
        call = capi.new_call("batch", capi.FORWARD, x, out=y, lengths=lengths.ctypes.data,
                             length_axis=1, **axes)  # fmt: skip
        assert code_of(call) == capi.BAD_MASK
    call = capi.new_call("layer", capi.FORWARD, x, out=y, normalized_ndim=1,
                         mask=c_mask(case, mask))  # fmt: skip
    assert capi.API.workspace_size(call, 1, size) == capi.BAD_MASK
    assert (y == 7).all()


def test_integers_from_c():
    x = np.random.default_rng(0).integers(0, 256, (4, 9, 3), np.uint8)
    case = Case("batch", x.shape, layout="NTC")
    mask = a_mask(case)
    mean, m2 = np.empty(3), np.empty(3)
    low, high = np.empty(3, np.uint8), np.empty(3, np.uint8)
    given = {"mean": mean, "m2": m2, "minimum": low, "maximum": high, **c_axes(case)}
    capi.run(capi.new_call("batch", capi.STATISTICS, x, mask=c_mask(case, mask), **given))
    wanted = fastbn.batch_stats(x, layout="NTC", mask=mask)
    assert mean.tobytes() == wanted.mean.tobytes()
    assert m2.tobytes() == wanted.m2.tobytes()
    assert low.tolist() == wanted.min.tolist()
    assert high.tolist() == wanted.max.tolist()
    lengths = np.array([1, 2, 3, 4])
    call = capi.new_call("batch", capi.STATISTICS, x, lengths=lengths.ctypes.data, length_axis=1,
                         **given)  # fmt: skip
    assert capi.API.workspace_size(call, 1, capi.c_size_t()) == capi.BAD_MASK
