# SPDX-License-Identifier: BSD-3-Clause
"""The same bits of fused calls wherever and however they run, and nothing touched beside.

As test_sibling_bits.py, for activations and residuals.
"""

import functools
import itertools
import sys

import numpy as np
import pytest
from arrays import Guarded, same_samples
from cases import ACTIVATIONS, EACH_ONCE, Case
from everywhere import assert_same
from processes import run

import fastbn
from fastbn import _dispatch, _selftest


@functools.cache
def vectors_of(case):
    """Weight, bias, running mean and variance: made once, in the usual environment."""
    running_mean, running_var = case.parameters("float32", 4)
    return *case.parameters("float64"), running_mean, running_var + 2


def results(case, x, dy, residual, activation, out=None, dx_out=None):
    """The bytes of all that forward and backward return, of training and frozen."""
    weight, bias, running_mean, running_var = vectors_of(case)
    options = {"activation": activation, "negative_slope": 0.2, "residual": residual}
    modes = [({}, {})]
    if case.op == "batch":
        frozen = {"running_mean": running_mean, "running_var": running_var, "training": False}
        modes.append((frozen, {"training": False}))
    arrays = []
    for forward, backward in modes:
        y, saved = case.forward(x, weight, bias, out=out, **options, **forward)
        arrays += [y.copy(), *saved]
        if case.has_mean:
            backward = backward | {"bias": bias}
        dx, *rest = case.backward(dy, x, saved, weight, out=dx_out, **options, **backward)
        arrays += [dx.copy(), *rest]
    return [np.ascontiguousarray(array).tobytes() for array in arrays]


def tensors_of(case, dtype):
    """x with outliers, where blocks are summed a second time; dy; residual."""
    x = case.batch(dtype)
    x.reshape(-1)[0] = 1e4
    x.reshape(-1)[x.size // 2] = -6e4 if dtype == "float16" else -1e9
    return x, case.gradient(dtype), case.batch(dtype, 6)


each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
CASES = [
    Case("batch", (17, 31)),
    Case("batch", (65, 130)),
    Case("batch", (18, 5, 31)),
    Case("batch", (32, 19, 7, 7)),
    Case("batch", (3, 4, 33, 32)),
    Case("batch", (2, 7, 7, 3), layout="NHWC"),
    Case("batch", (4, 14, 15, 64), layout="NHWC"),
    Case("batch", (3, 17, 1030), layout="NTC"),
    Case("layer", (100, 7), 7),
    Case("layer", (9, 65), 65),
    Case("layer", (3, 4100), 4100),
    Case("layer", (3, 4, 14, 15), (4, 14, 15)),
    Case("rms", (33, 768), 768),
    Case("rms", (2, 5, 6, 7), (5, 6, 7)),
    Case("group", (3, 12, 7, 7), 3),
    Case("group", (2, 6, 33, 32), 3),
    Case("group", (3, 7, 9, 30), 5, "NHWC"),
    Case("group", (5, 20), 4),
    Case("instance", (3, 5, 7, 7)),
    Case("instance", (2, 3, 60, 61)),
    Case("instance", (3, 7, 9, 30), layout="NHWC"),
]


def same_everywhere(case, dtype, activation, adds, threads):
    x, dy, residual = tensors_of(case, dtype)
    residual = residual if adds else None
    assert_same(lambda: results(case, x, dy, residual, activation), threads)


@pytest.mark.parametrize(
    ("activation", "adds"), [(None, True), *((a, not adds) for a, adds in EACH_ONCE)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_levels_and_threads(any_dtype, case, activation, adds, always_parallel):
    same_everywhere(case, any_dtype, activation, adds, (1, 2, 3))


@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (6, 5, 130, 131)),
        Case("batch", (40, 300, 7, 7)),
        Case("batch", (4, 60, 61, 40), layout="NHWC"),
        Case("batch", (90_000, 5)),
        Case("layer", (3000, 130), 130),
        Case("layer", (3, 200_000), 200_000),
        Case("rms", (40, 10_011), 10_011),
        Case("group", (6, 32, 50, 51), 4),
        Case("group", (1, 2, 500, 501), 1),
        Case("instance", (9, 10, 90, 91)),
    ],
    ids=str,
)
@each_activation
def test_levels_and_threads_where_tasks_are_many(any_dtype, case, activation):
    same_everywhere(case, any_dtype, activation, True, (1, 2, 3))


PLACED = [
    Case("batch", (7, 65)),
    Case("batch", (5, 4, 7, 7)),
    Case("batch", (2, 3, 21, 21)),
    Case("batch", (3, 7, 5, 3), layout="NHWC"),
    Case("layer", (7, 65), 65),
    Case("layer", (2, 1027), 1027),
    Case("rms", (3, 5, 7, 9), (7, 9)),
    Case("group", (3, 6, 7, 7), 2),
    Case("group", (3, 7, 5, 12), 3, "NHWC"),
    Case("instance", (3, 5, 21, 21)),
    Case("instance", (3, 9, 5), layout="NLC"),
]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("case", PLACED, ids=str)
def test_alignment_and_out(level, any_dtype, case, activation):
    arrays = tensors_of(case, any_dtype)
    expected = results(case, *arrays, activation)
    size = arrays[0].itemsize
    for offset in range(0, 64, 5 * size if size < 8 else 16):
        # Each at an offset of its own.
        places = [(offset * k) % 64 for k in (1, 3, 2, 5, 7)]
        *inputs, out, dx = (Guarded(case.shape, any_dtype, place) for place in places)
        for guarded, array in zip(inputs, arrays, strict=True):
            guarded.array[...] = array
        moved = [guarded.array for guarded in inputs]
        assert results(case, *moved, activation, out.array, dx.array) == expected
        for guarded in (*inputs, out, dx):
            assert guarded.intact()
        for array, other in zip(moved, arrays, strict=True):
            assert array.tobytes() == other.tobytes()


@pytest.mark.parametrize("offset", [0, 8, 24])
@pytest.mark.parametrize("case", PLACED, ids=str)
def test_guards_around_vectors(level, case, offset):
    x, dy, residual = tensors_of(case, "float32")
    _, plain = case.forward(x)
    vectors = [Guarded(case.parameter_shape, np.float32, offset + 4) for _ in range(2)]
    saved = [Guarded(case.statistics_shape, np.float64, offset) for _ in plain]
    for vector in vectors:
        vector.array[...] = 1
    for guarded, statistic in zip(saved, plain, strict=True):
        guarded.array[...] = statistic
    weight, bias = (vector.array for vector in vectors)
    for activation, other in itertools.product((None, *ACTIVATIONS), (None, residual)):
        options = {"activation": activation, "residual": other}
        case.forward(x, weight, bias, **options)
        if case.has_mean:
            options["bias"] = bias
        case.backward(dy, x, [guarded.array for guarded in saved], weight, **options)
    assert all(guarded.intact() for guarded in (*vectors, *saved))
    assert (weight == 1).all()
    assert (bias == 1).all()


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case("batch", (1, 32, 130, 131)), "float32"),
        (Case("batch", (40, 300, 7, 7)), "float16"),
        (Case("batch", (40, 301, 5, 5)), "float64"),
        (Case("batch", (60, 300, 4, 4)), "float32"),
        (Case("batch", (60, 300, 4, 8)), "float16"),
        (Case("batch", (60, 300, 2, 4)), "float64"),
        (Case("batch", (20, 301, 7, 7)), "bfloat16"),
        (Case("batch", (1, 40, 41, 64), layout="NHWC"), "float32"),
        (Case("batch", (3001, 5)), "float32"),
        (Case("layer", (100, 600), 600), "float32"),
        (Case("instance", (1, 40, 41, 64), layout="NHWC"), "float16"),
    ],
    ids=str,
)
def test_alignment_of_streamed_output(case, dtype):
    # A few samples, so many times over that they are past the cache: all have the same bits.
    few = tensors_of(case, dtype)
    copies = -(-34_000_000 // few[0].nbytes)
    x, dy, residual = (np.concatenate([a] * copies) for a in few)
    weight, bias = case.parameters("float32")
    options = {"activation": "silu", "residual": residual}
    backward = options | ({"bias": bias} if case.has_mean else {})
    expected = None
    for level, offset in itertools.product(_dispatch.runnable(), (0, 20)):
        out = Guarded(x.shape, dtype, offset)
        with _dispatch.using(level):
            _, saved = case.forward(x, weight, bias, out=out.array, **options)
            same_samples(out.array, len(few[0]))
            first = out.array[: len(few[0])].tobytes()
            dx, *_, dresidual = case.backward(dy, x, saved, weight, out=out.array, **backward)
            same_samples(dx, len(few[0]))
            same_samples(dresidual, len(few[0]))
        assert out.intact()
        actual = first, dx[: len(few[0])].tobytes(), dresidual[: len(few[0])].tobytes()
        expected = expected or actual
        assert actual == expected, (level, offset)


def test_runs(level, any_dtype, always_parallel):
    for case in (Case("batch", (20, 32, 15, 15)), Case("layer", (300, 133), 133),
                 Case("group", (20, 32, 15, 15), 4)):  # fmt: skip
        tensors = tensors_of(case, any_dtype)
        with fastbn.threads(2):
            assert len({tuple(results(case, *tensors, "silu")) for _ in range(4)}) == 1


@each_activation
def test_the_floating_point_environment_of_the_caller(
    level, any_dtype, activation, flushing, always_parallel
):
    tiny = {"float16": 1e-7, "bfloat16": 1e-39, "float32": 1e-40, "float64": 1e-310}[any_dtype]
    for case, threads in itertools.product(
        [Case("batch", (30, 133)), Case("layer", (30, 133), 133), Case("group", (6, 8, 40), 2)],
        [1, 2],
    ):
        x, dy, residual = (case.batch("float64", seed) for seed in (0, 1, 2))
        # exp(z) is subnormal for the one, z and dz for the other.
        for arrays in (
            (40 * x, dy * tiny, -60 * np.abs(residual)),
            (x, dy * tiny, residual * tiny),
        ):
            tensors = [a.astype(any_dtype) for a in arrays]
            found = []
            with fastbn.threads(threads):
                for on in (False, True):
                    flushing(on)
                    try:
                        found.append(results(case, *tensors, activation))
                    finally:
                        flushing(False)
            assert found[0] == found[1]


BETWEEN_GUARD_PAGES = """
import ctypes, itertools, mmap
import numpy as np, fastbn
from fastbn import _dispatch

PAGE = 4096
protect = ctypes.CDLL(None).mprotect
kept = []

def guarded(shape, dtype, at_the_end):
    # An array that ends, or begins, where a page begins, or ends, that nobody may touch.
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(memory)
    raw = np.frombuffer(memory, np.uint8)
    place = raw.ctypes.data
    for page in (0, pages + 1):
        assert protect(ctypes.c_void_p(place + page * PAGE), PAGE, 0) == 0
    start = (pages + 1) * PAGE - size if at_the_end else PAGE
    return raw[start : start + size].view(dtype).reshape(shape)

CALLS = [
    ("batch", (3, 5, 7, 7), (), {}),
    ("batch", (9, 65), (), {}),
    ("batch", (3, 33, 3), (), {"layout": "NLC"}),
    ("batch", (2, 3, 333), (), {}),
    ("layer", (5, 67), (67,), {}),
    ("layer", (5, 64), (64,), {}),
    ("layer", (2, 1040), (1040,), {}),
    ("rms", (5, 67), (67,), {}),
    ("rms", (5, 16), (16,), {}),
    ("group", (3, 6, 7, 7), (2,), {}),
    ("instance", (3, 6, 131), (), {}),
]
for (op, shape, what, layout), dtype, end in itertools.product(
    CALLS, DTYPES, (False, True)
):
    x, dy, residual, out, dx = (guarded(shape, dtype, end) for _ in range(5))
    rng = np.random.default_rng(0)
    for array in (x, dy, residual):
        array[...] = rng.standard_normal(shape)
    kind = "float64" if dtype == "float64" else "float32"
    length = what[0] if op in ("layer", "rms") else shape[-1 if layout else 1]
    weight, bias = (guarded((length,), kind, end) for _ in range(2))
    weight[...] = bias[...] = 0.5
    forward, backward = (getattr(fastbn, f"{op}_norm_{d}") for d in ("forward", "backward"))
    biased = op != "rms"
    for level in _dispatch.runnable():
        with _dispatch.using(level):
            for activation, other in itertools.product(ACTIVATIONS, (None, residual)):
                options = {"activation": activation, "residual": other} | layout
                if biased:
                    options["bias"] = bias
                _, *saved = forward(x, *what, weight, out=out, **options)
                backward(dy, x, *saved, *what, weight, out=dx, **options)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect through ctypes")
def test_nothing_is_touched_beside_the_tensors():
    lists = f"DTYPES, ACTIVATIONS = {_selftest.dtypes()}, {[*ACTIVATIONS]}"
    run(f"{lists}\nif 'bfloat16' in DTYPES: import ml_dtypes\n{BETWEEN_GUARD_PAGES}")
