# SPDX-License-Identifier: BSD-3-Clause
"""The same bits of the siblings, and of batch norm in half types, wherever and however they run.

Over levels, threads, alignment, `out=`, in place, strides and runs, byte by byte.
"""

import itertools
import sys

import numpy as np
import pytest
from arrays import GAPLESS, MORE_ORDERS, Guarded, in_order, orders_of, same_samples
from cases import SIBLINGS, Case
from everywhere import assert_same
from processes import run

import fastbn
from fastbn import _dispatch


def results(case, x, dy, out=None, parameters=None):
    weight, bias = parameters or case.parameters("float64")
    arrays = []
    options = {}
    if case.op in ("batch", "instance"):
        running = np.zeros(case.parameter_shape, np.float32), np.ones(case.parameter_shape)
        options = {"running_mean": running[0], "running_var": running[1]}
        arrays += running
    y, saved = case.forward(x, weight, bias, out=out, **options)
    arrays += [y.copy(), *saved, *case.backward(dy, x, saved, weight)]
    if case.op == "batch":
        stats = fastbn.batch_stats(x, layout=case.layout)
        arrays += [stats.mean, stats.m2, fastbn.batch_norm(x, *running, layout=case.layout)]
        arrays += case.backward(dy, x, saved, weight, training=False)
    if case.op == "instance":
        arrays += case.forward(x, weight, use_input_stats=False, **options)[:1]
    return [np.ascontiguousarray(array).tobytes() for array in arrays]


def nasty(case, dtype):
    """With outliers, where blocks are summed a second time."""
    x = case.batch(dtype)
    flat = x.reshape(-1)
    flat[0] = 1e4
    flat[flat.size // 2] = -6e4 if dtype == "float16" else -1e9
    return x


def same_everywhere(case, dtype, threads=(1, 2, 3, 64)):
    x, dy = nasty(case, dtype), case.gradient(dtype)
    assert_same(lambda: results(case, x, dy), threads)


BATCHES = [
    Case("batch", (2, 1)),
    Case("batch", (17, 31)),
    Case("batch", (65, 130)),
    Case("batch", (20, 2, 16)),
    Case("batch", (18, 5, 31)),
    Case("batch", (32, 19, 7, 7)),
    Case("batch", (3, 4, 33, 32)),
    Case("batch", (1, 2, 150, 151)),
    Case("batch", (2, 7, 7, 3), layout="NHWC"),
    Case("batch", (4, 14, 15, 64), layout="NHWC"),
    Case("batch", (31, 17, 1030), layout="NTC"),
]
WIDE = [
    Case(op, shape, shape[-1])
    for op in ("layer", "rms")
    for shape in [(100, 7), (9, 65), (33, 768), (3, 4100), (100, 1024), (2, 20_000)]
]


@pytest.mark.parametrize("case", [*SIBLINGS, *WIDE], ids=str)
def test_levels_and_threads(any_dtype, case, always_parallel):
    same_everywhere(case, any_dtype)


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_levels_and_threads_of_batches(half, case, always_parallel):
    same_everywhere(case, half)


MANY = [
    Case("layer", (3000, 1030), 1030),
    Case("layer", (90_000, 24), 24),
    Case("layer", (3, 600_000), 600_000),
    Case("rms", (40, 30_011), 30_011),
    Case("group", (6, 32, 120, 121), 4),
    Case("group", (12, 50, 51, 48), 6, "NHWC"),
    Case("group", (1, 2, 900, 901), 1),
    Case("instance", (9, 30, 90, 91)),
    Case("instance", (7, 90, 91, 34), layout="NHWC"),
]


@pytest.mark.parametrize("case", MANY, ids=str)
def test_levels_and_threads_where_tasks_are_many(any_dtype, case):
    same_everywhere(case, any_dtype, threads=(1, 2, 3))


@pytest.mark.parametrize("case", [Case("batch", (6, 5, 130, 131)), Case("batch", (40, 300, 7, 7))],
                         ids=str)  # fmt: skip
def test_levels_and_threads_where_tasks_of_batches_are_many(half, case):
    same_everywhere(case, half, threads=(1, 2, 3))


def test_runs(level, any_dtype, always_parallel):
    for case in (Case("layer", (300, 133), 133), Case("group", (20, 32, 15, 15), 4)):
        x, dy = nasty(case, any_dtype), case.gradient(any_dtype)
        with fastbn.threads(2):
            assert len({tuple(results(case, x, dy)) for _ in range(6)}) == 1


PLACED = [
    Case("layer", (7, 65), 65),
    Case("layer", (3, 5, 7, 9), (7, 9)),
    Case("layer", (2, 1027), 1027),
    Case("rms", (7, 65), 65),
    Case("rms", (2, 1027), 1027),
    Case("group", (3, 6, 7, 7), 2),
    Case("group", (3, 7, 5, 12), 3, "NHWC"),
    Case("group", (2, 4, 21, 21), 2),
    Case("instance", (3, 5, 21, 21)),
    Case("instance", (3, 9, 5), layout="NLC"),
]


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_alignment_and_out(level, any_dtype, case):
    x, dy = nasty(case, any_dtype), case.gradient(any_dtype)
    expected = results(case, x, dy)
    for offset in range(0, 64, {2: 6, 4: 4, 8: 8}[x.itemsize]):
        moved, moved_dy, out = (Guarded(case.shape, any_dtype, offset) for _ in range(3))
        moved.array[...], moved_dy.array[...] = x, dy
        assert results(case, moved.array, moved_dy.array, out.array) == expected
        assert moved.intact()
        assert moved_dy.intact()
        assert out.intact()


@pytest.mark.parametrize("case", PLACED, ids=str)
def test_guards_around_vectors(level, case, parameters):
    x, dy = case.batch("float32"), case.gradient("float32")
    _, plain = case.forward(x)
    for offset in (0, 8, 24):
        vectors = [Guarded(case.parameter_shape, parameters, offset) for _ in range(2)]
        saved = [Guarded(case.statistics_shape, np.float64, offset) for _ in plain]
        running = [Guarded(case.parameter_shape, np.float32, offset + 4) for _ in range(2)]
        for vector in (*vectors, *running):
            vector.array[...] = 1
        for guarded, statistic in zip(saved, plain, strict=True):
            guarded.array[...] = statistic
        weight, bias = (vector.array for vector in vectors)
        options = {}
        if case.op == "instance":
            options = {"running_mean": running[0].array, "running_var": running[1].array}
        case.forward(x, weight, bias, **options)
        case.backward(dy, x, [guarded.array for guarded in saved], weight)
        assert all(vector.intact() for vector in (*vectors, *saved, *running))
        assert (weight == 1).all()
        assert (bias == 1).all()


@pytest.mark.parametrize(
    "case",
    [
        *PLACED,
        Case("layer", (300, 1003), 1003),
        Case("rms", (5000, 40), 40),
        Case("layer", (3, 200_001), 200_001),
        Case("group", (4, 8, 130, 131), 2),
        Case("group", (4, 60, 61, 40), 5, "NHWC"),
        Case("instance", (4, 8, 130, 131)),
    ],
    ids=str,
)
def test_in_place(level, any_dtype, case):
    x, dy = nasty(case, any_dtype), case.gradient(any_dtype)
    weight, bias = case.parameters("float32")
    y, saved = case.forward(x, weight, bias)
    z = x.copy()
    assert case.forward(z, weight, bias, out=z)[0] is z
    assert z.tobytes() == y.tobytes()
    dx = case.backward(dy, x, saved, weight)[0]
    for overwritten in (0, 1):
        operands = [dy.copy(), x.copy()]
        found = case.backward(*operands, saved, weight, out=operands[overwritten])
        assert found[0] is operands[overwritten]
        assert found[0].tobytes() == dx.tobytes()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("layer", (100, 600), 600), "float32"),
        (Case("layer", (100, 600), 600), "float16"),
        (Case("layer", (1, 120_001), 120_001), "float32"),
        (Case("layer", (100, 56), 56), "float32"),
        (Case("layer", (99, 64), 64), "bfloat16"),
        (Case("layer", (99, 200), 200), "float32"),
        (Case("rms", (1000, 30), 30), "float32"),
        (Case("rms", (1000, 5), 5), "float16"),
        (Case("group", (1, 32, 130, 131), 4), "float32"),
        (Case("group", (1, 32, 130, 131), 4), "float16"),
        (Case("group", (1, 40, 41, 64), 8, "NHWC"), "float32"),
        (Case("instance", (1, 32, 130, 131)), "float32"),
    ],
    ids=str,
)
def test_alignment_of_streamed_output(case, dtype):
    # A few samples, so many times over that they are past the cache: all have the same bits.
    few = case.batch(dtype)
    copies = -(-36_000_000 // few.nbytes)
    x = np.concatenate([few] * copies)
    weight, bias = case.parameters("float32")
    expected = None
    for level, offset in itertools.product(_dispatch.runnable(), (0, 20)):
        with _dispatch.using(level):
            out = Guarded(x.shape, dtype, offset)
            _, saved = case.forward(x, weight, bias, out=out.array)
            same_samples(out.array, len(few))
            first = out.array[: len(few)].tobytes()
            dx = case.backward(out.array, x, saved, weight, out=out.array)[0]
            same_samples(dx, len(few))
        assert out.intact()
        actual = first, dx[: len(few)].tobytes()
        expected = expected or actual
        assert actual == expected, (level, offset)


@pytest.mark.parametrize("gap", [0, 1, 16])
@pytest.mark.parametrize("features", [40, 64, 130])
def test_streamed_rows_with_gaps(level, gap, features):
    rows = 7_000_000 // (150 * features)
    x = np.random.default_rng(0).standard_normal((150, rows, features), np.float32)
    whole = np.full((150, rows + gap, features), 7, np.float32)
    out = whole[:, :rows]
    y, mean, invstd = fastbn.layer_norm_forward(x, features, out=out)
    assert y is out
    dx = np.full_like(whole, 7)[:, :rows]
    fastbn.layer_norm_backward(x, x, mean, invstd, features, out=dx)
    for i in (0, 77, 149):
        # A few rows are not streamed.
        few, m, s = fastbn.layer_norm_forward(x[i], features)
        assert y[i].tobytes() == few.tobytes()
        gradient = fastbn.layer_norm_backward(x[i], x[i], m, s, features)[0]
        assert dx[i].tobytes() == gradient.tobytes()
    assert (whole[:, rows:] == 7).all()
    assert (dx.base[:, rows:] == 7).all()


STRIDED = [
    Case("layer", (6, 5, 4, 33), 33),
    Case("layer", (4, 5, 6, 7), (5, 6, 7)),
    Case("rms", (40, 3, 21), 21),
    Case("group", (6, 8, 9, 8), 2),
    Case("group", (6, 7, 9, 8), 4, "NHWC"),
    Case("instance", (3, 2, 40, 41)),
]


@pytest.mark.parametrize("memory", GAPLESS)
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strides_do_not_matter_but_their_order(level, any_dtype, case, memory):
    x, dy = (in_order(a, memory) for a in (nasty(case, any_dtype), case.gradient(any_dtype)))
    expected = results(case, x, dy)
    # The same axes, slowest first, so that gaps come where `in_order` puts them.
    slowest_first = np.argsort([-stride for stride in x.strides], kind="stable")
    for order in orders_of(any_dtype, MORE_ORDERS):
        if order in GAPLESS:
            continue
        strided = [
            in_order(a.transpose(slowest_first), order).transpose(np.argsort(slowest_first))
            for a in (x, dy)
        ]
        assert results(case, *strided) == expected, order


NEIGHBOURS = [
    Case("layer", (40, 37), 37),
    Case("layer", (9, 4100), 4100),
    Case("rms", (40, 37), 37),
    Case("group", (6, 12, 7, 7), 4),
    Case("group", (6, 7, 7, 12), 4, "NHWC"),
    Case("group", (3, 4, 50, 50), 2),
    Case("instance", (6, 12, 7, 7)),
    Case("instance", (6, 49, 12), layout="NLC"),
]


@pytest.mark.parametrize("case", NEIGHBOURS, ids=str)
def test_a_neighbours_nan_changes_nothing(level, any_dtype, case):
    x = case.batch(any_dtype)
    spoiled = x.copy()
    spoiled[2, 1], spoiled[4 % len(x), 0] = np.nan, np.inf
    a, saved_a = case.forward(x)
    b, saved_b = case.forward(spoiled)
    grads_a, grads_b = case.backward(x, x, saved_a), case.backward(spoiled, spoiled, saved_b)
    # Samples that hold no such number; the spoiled one is nobody's neighbour's concern.
    clean = np.delete(np.arange(len(x)), [2, 4 % len(x)])
    assert a[clean].tobytes() == b[clean].tobytes()
    assert grads_a[0][clean].tobytes() == grads_b[0][clean].tobytes()
    for one, other in zip(saved_a, saved_b, strict=True):
        assert one[clean].tobytes() == other[clean].tobytes()
    if case.layout is None and case.op in ("group", "instance"):
        # Channels whose groups hold none, in all samples: not the first group, or two instances.
        first = max(2, x.shape[1] // (case.what or x.shape[1]))
        assert first < x.shape[1]
        assert a[:, first:].tobytes() == b[:, first:].tobytes()
        for one, other in zip(grads_a[1:], grads_b[1:], strict=True):
            assert one[first:].tobytes() == other[first:].tobytes()


def test_a_sum_of_gradients_keeps_to_its_channel(level, any_dtype):
    # dweight and dbias are sums over samples; NaN in one channel is in one sum of each.
    x, dy = (Case("group", (5, 12, 9), 4).batch(any_dtype, seed) for seed in (0, 1))
    _, mean, invstd = fastbn.group_norm_forward(x, 4)
    clean = fastbn.group_norm_backward(dy, x, mean, invstd, 4)
    dy[3, 7, 2] = np.nan
    spoiled = fastbn.group_norm_backward(dy, x, mean, invstd, 4)
    for one, other in zip(clean[1:], spoiled[1:], strict=True):
        np.testing.assert_array_equal(np.nonzero(one != other)[0], [7])
    _, mean, invstd = fastbn.layer_norm_forward(x, 9)
    clean = fastbn.layer_norm_backward(np.nan_to_num(dy), x, mean, invstd, 9)
    spoiled = fastbn.layer_norm_backward(dy, x, mean, invstd, 9)
    for one, other in zip(clean[1:], spoiled[1:], strict=True):
        assert np.isnan(other[2])
        np.testing.assert_array_equal(np.nonzero(one != other)[0], [2])


@pytest.mark.parametrize("subnormal", [False, True])
def test_the_floating_point_environment_of_the_caller(
    level, any_dtype, subnormal, flushing, always_parallel
):
    tiny = {"float16": 1e-7, "bfloat16": 1e-39, "float32": 1e-40, "float64": 1e-310}[any_dtype]
    cases = [Case("layer", (30, 133), 133), Case("rms", (30, 133), 133),
             Case("group", (6, 8, 40), 2), Case("instance", (6, 8, 40)),
             Case("batch", (30, 133))]  # fmt: skip
    for case, threads in itertools.product(cases, [1, 2]):
        x = case.batch("float64")
        x = (x * tiny if subnormal else x).astype(any_dtype)
        dy, parameters = case.gradient(any_dtype), case.parameters("float64")
        found = []
        with fastbn.threads(threads):
            for on in (False, True):
                flushing(on)
                try:
                    found.append(results(case, x, dy, parameters=parameters))
                finally:
                    flushing(False)
        assert found[0] == found[1]


BEFORE_A_GUARD_PAGE = """
import ctypes, mmap
import numpy as np, fastbn
from fastbn import _dispatch

memory = mmap.mmap(-1, 3 * 4096)
place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(place + 8192), 4096, 0) == 0
pages = np.frombuffer(memory, np.uint8)
raw = np.zeros(9000 * 1024 * 4 + 64, np.uint8)
for level in _dispatch.runnable():
    with _dispatch.using(level):
        for features, dtype in (
            (1024, "float32"), (512, "float64"), (1024, "float16"), (16, "float32"), (19, "float32")
        ):
            kind = "float64" if dtype == "float64" else "float32"
            size = features * np.dtype(kind).itemsize
            weight = pages[8192 - size : 8192].view(kind)
            weight[:] = 1
            rows = 9000 if features == 1024 else 9
            offset = 4 * np.dtype(dtype).itemsize
            x = raw[offset : offset + rows * features * np.dtype(dtype).itemsize]
            x = x.view(dtype).reshape(rows, features)
            y, mean, invstd = fastbn.layer_norm_forward(x, features, weight, weight, out=x)
            assert (y == 1).all()
            fastbn.layer_norm_backward(y, x, mean, invstd, features, weight, out=x)
            x[:] = 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
def test_nothing_is_read_past_the_parameters():
    run(BEFORE_A_GUARD_PAGE)
