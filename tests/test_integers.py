# SPDX-License-Identifier: BSD-3-Clause
"""batch_stats of integers, exactly; what masks, nodata and NaN leave out; merging; extremes."""

import pickle
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from everywhere import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import BatchStats, _dispatch, _threads

INTEGERS = ("uint8", "int8", "uint16", "int16")
FLOATS = ("float32", "float64", "float16", "bfloat16")


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def integers(shape, dtype, seed=0):
    limits = np.iinfo(dtype)
    x = np.random.default_rng(seed).integers(limits.min, limits.max, shape, endpoint=True)
    return x.astype(dtype)


def exactly(x, axis, mask=None, nodata=None):
    """(count, mean, M2, min, max, sum, sum of squares) of each channel, in Python's integers."""
    limits = np.iinfo(x.dtype)
    found = []
    for c in range(x.shape[axis]):
        some = np.take(x, c, axis)
        some = some.ravel() if mask is None else some[np.broadcast_to(mask, some.shape)]
        numbers = [v for v in some.tolist() if nodata is None or v != nodata[c]]
        n, s1, s2 = len(numbers), sum(numbers), sum(v * v for v in numbers)
        mean = float(Fraction(s1, n)) if n else 0.0
        m2 = float(Fraction(n * s2 - s1 * s1, n)) if n else 0.0
        low = min(numbers, default=limits.max)
        found.append((n, mean, m2, low, max(numbers, default=limits.min), s1, s2))
    return found


def members(stats):
    return list(zip(stats.count.tolist(), stats.mean.tolist(), stats.m2.tolist(),
                    stats.min.tolist(), stats.max.tolist(), stats.sum,
                    stats.sum_of_squares, strict=True))  # fmt: skip


SHAPES = [
    ((5, 1), "NC"), ((40, 3), "NC"), ((7, 4), "NC"), ((300, 13), "NC"), ((70, 64), "NC"),
    ((3, 700), "NC"), ((2, 5, 7, 3), "NHWC"), ((2, 3, 5, 7), "NCHW"), ((3, 2, 60, 70), "NCHW"),
    ((2, 3, 61, 4), "NHWC"), ((9, 8, 3), "HWC"), ((3, 9, 8), "CHW"), ((2, 2, 3, 4, 2), "NDHWC"),
    ((1001, 4), "NC"), ((403, 8), "NC"), ((701, 13), "NC"), ((303, 64), "NC"), ((130, 131), "NC"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(("shape", "layout"), SHAPES)
def test_exact(shape, layout, dtype):
    x = integers(shape, dtype)
    stats = fastbn.batch_stats(x, layout=layout)
    assert members(stats) == exactly(x, layout.index("C"))
    assert stats.min.dtype == stats.max.dtype == x.dtype
    assert all(type(number) is int for number in stats.sum + stats.sum_of_squares)


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("layout", ["NC", "CN"])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 16, 70])
def test_extreme_values(dtype, layout, channels):
    # More than a register holds without being added up.
    n = 700_000 // channels
    for number in (np.iinfo(dtype).min, np.iinfo(dtype).max):
        x = np.full((n, channels) if layout == "NC" else (channels, n), number, dtype)
        stats = fastbn.batch_stats(x, layout=layout)
        assert stats.sum == [n * number] * channels
        assert stats.sum_of_squares == [n * number**2] * channels
        assert stats.mean.tolist() == [number] * channels
        assert stats.m2.tolist() == [0] * channels


@pytest.mark.parametrize("dtype", INTEGERS)
def test_2_to_the_33_elements(dtype):
    few = integers((5, 3), dtype)
    x = np.broadcast_to(few, (1 << 33, 5, 3))
    n = 5 << 33
    stats = fastbn.batch_stats(x, layout="NHC")
    for c in range(3):
        s1 = int(few[:, c].sum(dtype=int)) << 33
        s2 = int((few[:, c].astype(int) ** 2).sum()) << 33
        assert (stats.sum[c], stats.sum_of_squares[c]) == (s1, s2)
        assert stats.mean[c] == float(Fraction(s1, n))
        assert stats.m2[c] == float(Fraction(n * s2 - s1 * s1, n))
    inner = np.broadcast_to(few.T[:, :, None], (3, 5, 1 << 33))
    assert members(fastbn.batch_stats(inner, layout="CHN")) == members(stats)
    assert stats.count.tolist() == [n] * 3


@st.composite
def cases(draw):
    ndim = draw(st.integers(1, 4))
    sizes = [draw(st.sampled_from([1, 2, 3, 4, 7, 13, 65])) for _ in range(ndim)]
    if np.prod(sizes) > 20000:
        sizes = [min(size, 7) for size in sizes]
    steps = [draw(st.sampled_from([1, 1, -1, 2, 0])) for _ in sizes]
    memory = draw(st.permutations(range(ndim)))
    axis = draw(st.integers(0, ndim - 1))
    dtype = draw(st.sampled_from(INTEGERS))
    masked, nodata = draw(st.booleans()), draw(st.booleans())
    narrow = [draw(st.booleans()) for _ in range(ndim - 1)]
    return sizes, steps, memory, axis, dtype, masked, nodata, narrow, draw(st.integers(0, 99))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_any_strides_masks_and_nodata(case):
    sizes, steps, memory, axis, dtype, masked, without, narrow, seed = case
    x = integers([sizes[i] * max(1, abs(steps[i])) for i in memory], dtype, seed)
    if without:
        x = x % np.array(7).astype(dtype)
    x = x.transpose(np.argsort(memory))
    x = x[tuple(slice(None, None, step or 1) for step in steps)]
    strides = [0 if step == 0 else stride for step, stride in zip(steps, x.strides, strict=True)]
    x = np.lib.stride_tricks.as_strided(x, sizes, strides, writeable=False)
    layout = "".join("C" if i == axis else letter for i, letter in enumerate("NDHW"[: x.ndim]))
    mask = nodata = None
    if masked:
        others = [size for i, size in enumerate(sizes) if i != axis]
        others = [1 if one else size for one, size in zip(narrow, others, strict=True)]
        mask = np.asarray(np.random.default_rng(seed).random(others) < 0.6)
    if without:
        nodata = [int(v) for v in np.random.default_rng(seed).integers(-1, 8, sizes[axis])]
    stats = fastbn.batch_stats(x, layout=layout, mask=mask, nodata=nodata)
    assert members(stats) == exactly(x, axis, mask, nodata)


def test_large_masked():
    x = integers((3, 90, 91, 3), "uint8")
    mask = np.random.default_rng(1).random((3, 90, 91)) < 0.5
    for some in (mask, np.broadcast_to(mask[:1], mask.shape), mask[:, ::-1]):
        assert members(fastbn.batch_stats(x, layout="NHWC", mask=some)) == exactly(x, 3, some)
    planes = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    assert members(fastbn.batch_stats(planes, mask=mask)) == exactly(x, 3, mask)


@pytest.mark.parametrize("level", _dispatch.runnable())
@pytest.mark.parametrize("dtype", INTEGERS)
def test_masked_pixels_of_three(dtype, level):
    # Registers of 16 to 64 pixels, panels of some thousand, and what is left over.
    for n in (*range(1, 70), 127, 128, 129, 191, 193, 22000):
        x = integers((n, 3), dtype, n)
        mask = np.random.default_rng(n).random(n) < 0.6
        for y, kept in ((x, mask), (x[:, ::-1], mask), (x[::-1], mask[::-1]), (x, mask & False)):
            with _dispatch.using(level):
                stats = fastbn.batch_stats(y, layout="NC", mask=kept)
            assert members(stats) == exactly(y, 1, kept)


def test_levels_and_threads_agree():
    x = integers((4, 65, 67, 3), "uint8")
    mask = np.random.default_rng(1).random((4, 65, 67)) < 0.5

    def results():
        views = (x, x.view(np.int8), x[..., :2], x[..., ::-1])
        return [
            members(fastbn.batch_stats(view, layout="NHWC", mask=some))
            for view in views
            for some in (None, mask)
        ]

    _threads.always_parallel(True)
    try:
        assert_same(results, (1, 2, 3))
    finally:
        _threads.always_parallel(False)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_any_cut_has_the_bits_of_the_whole(dtype):
    x = integers((60, 5, 3), dtype)
    whole = fastbn.batch_stats(x, layout="NHC")
    for cuts in ([7], [1, 2, 3], [10, 10, 20], list(range(1, 60))):
        parts = [fastbn.batch_stats(part, layout="NHC") for part in np.split(x, cuts)]
        for some in (parts, parts[::-1]):
            assert members(BatchStats.merge(some)) == members(whole)


def test_empty_integers():
    stats = fastbn.batch_stats(np.zeros((0, 2), np.int16))
    assert members(stats) == [(0, 0, 0, 32767, -32768, 0, 0)] * 2
    assert fastbn.batch_stats(np.zeros((5, 0), np.uint8)).sum == []


# ---- extremes of floats --------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "layout"), [
    *SHAPES, ((3100, 24), "NC"), ((2, 4, 190, 191), "NCHW"), ((20, 5, 7, 7), "NCHW")])  # fmt: skip
def test_extremes(shape, layout, dtype):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype_of(dtype))
    axis = layout.index("C")
    x[tuple(slice(None) if i == axis else -1 for i in range(x.ndim))][...] = 0.5
    others = tuple(i for i in range(x.ndim) if i != axis)

    def results():
        stats = fastbn.batch_stats(x, layout=layout)
        assert stats.min.dtype == stats.max.dtype == x.dtype
        assert stats.sum is None
        return stats.min.tobytes(), stats.max.tobytes()

    expected = x.min(others).tobytes(), x.max(others).tobytes()
    assert_same(results, (1, 2))
    assert results() == expected
    x[tuple(0 if i == axis else s // 2 for i, s in enumerate(shape))] = np.nan
    stats = fastbn.batch_stats(x, layout=layout)
    assert np.isnan(stats.min.astype(float)).tolist() == [True] + [False] * (shape[axis] - 1)
    assert np.isnan(stats.max.astype(float)).tolist() == [True] + [False] * (shape[axis] - 1)


def test_extremes_of_nothing_and_of_zeros():
    empty = fastbn.batch_stats(np.zeros((0, 2), np.float32))
    assert empty.min.dtype == np.float32
    assert np.isnan([empty.min, empty.max]).all()
    zeros = fastbn.batch_stats(np.array([[0.0], [-0.0]]))
    assert not np.signbit([zeros.min, zeros.max]).any()
    infinite = fastbn.batch_stats(np.array([[np.inf, -np.inf]]))
    assert infinite.min.tolist() == infinite.max.tolist() == [np.inf, -np.inf]


# ---- what is left out of floats ------------------------------------------------------


def floats(dtype="float32"):
    return np.random.default_rng(0).normal(5, 2, (6, 5, 7, 3)).astype(dtype_of(dtype))


def same(a, b):
    names = ("count", "mean", "m2", "min", "max")
    return all(getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in names)


def check_selected(x, kept, stats):
    """Check statistics of the channels, the last axis, against NumPy's of what is kept."""
    for c in range(x.shape[-1]):
        some = x[..., c][kept[..., c]].astype(np.float64)
        assert stats.count[c] == some.size
        np.testing.assert_allclose(stats.mean[c], some.mean(), rtol=1e-6)
        np.testing.assert_allclose(stats.var()[c], some.var(), rtol=1e-5)
        assert (stats.min[c], stats.max[c]) == (some.min(), some.max())


@pytest.mark.parametrize("dtype", FLOATS)
def test_masks_of_floats(dtype):
    x = floats(dtype)
    mask = np.random.default_rng(1).random(x.shape[:3]) < 0.5
    spoiled = x.copy()
    spoiled[~mask] = np.nan
    whole = fastbn.batch_stats(x, layout="NHWC")
    for some in (mask, mask[:, :1], mask[:1, :, :1]):
        kept = np.broadcast_to(some[..., None], x.shape)
        check_selected(x, kept, fastbn.batch_stats(x, layout="NHWC", mask=some))
    assert same(fastbn.batch_stats(spoiled, layout="NHWC", mask=mask),
                fastbn.batch_stats(x, layout="NHWC", mask=mask))  # fmt: skip
    everything = np.ones((1, 1, 1), bool)
    assert same(fastbn.batch_stats(x, layout="NHWC", mask=everything), whole)
    nothing = fastbn.batch_stats(x, layout="NHWC", mask=~everything)
    assert nothing.count.tolist() == [0] * 3
    assert np.isnan(nothing.min.astype(float)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_policies(dtype):
    x = floats(dtype)
    clean = fastbn.batch_stats(x, layout="NHWC")
    for policy in ("omit", "raise"):
        assert same(fastbn.batch_stats(x, layout="NHWC", nan_policy=policy), clean)
    x[1, 2, 3, 1] = x[0, 0, 0, 1] = np.nan
    stats = fastbn.batch_stats(x, layout="NHWC", nan_policy="omit")
    check_selected(x, ~np.isnan(x), stats)
    for name in ("count", "mean", "m2", "min", "max"):  # of channels without NaN
        assert getattr(stats, name)[::2].tobytes() == getattr(clean, name)[::2].tobytes()
    with pytest.raises(ValueError, match=r"x: .*NaN.*channels \[1\]"):
        fastbn.batch_stats(x, layout="NHWC", nan_policy="raise")
    mask = np.ones(x.shape[:3], bool)
    mask[1, 2, 3] = mask[0, 0, 0] = False
    fastbn.batch_stats(x, layout="NHWC", nan_policy="raise", mask=mask)
    fastbn.batch_stats(x, layout="NHWC", nan_policy="raise", nodata=np.nan)
    spread = fastbn.batch_stats(x, layout="NHWC")
    assert np.isnan(spread.mean).tolist() == [False, True, False]
    x[0, 0, 0, 0] = np.inf  # is not concerned
    stats = fastbn.batch_stats(x, layout="NHWC", nan_policy="raise", nodata=np.nan)
    assert stats.mean[0] == stats.max[0] == np.inf


@pytest.mark.parametrize("dtype", FLOATS)
def test_nodata_of_floats(dtype):
    x = floats(dtype)
    clean = fastbn.batch_stats(x, layout="NHWC")
    for absent in (-9999.0, 1e300, 10**400, 0.1, [7777, -1.5e10, np.nan]):
        if dtype == "float64" and absent == 0.1:
            continue
        assert same(fastbn.batch_stats(x, layout="NHWC", nodata=absent), clean)
    x[0, :2] = -8
    x[1, :2, 0, 2] = np.nan
    kept = x.astype(float) != -8
    kept[..., 2] = ~np.isnan(x[..., 2])
    stats = fastbn.batch_stats(x, layout="NHWC", nodata=(-8, -8.0, np.nan))
    check_selected(x, kept, stats)
    x[:] = 0
    assert fastbn.batch_stats(x, layout="NHWC", nodata=-0.0).count.tolist() == [0] * 3


def test_nodata_that_integers_cannot_hold():
    x = integers((50, 3), "uint8")
    expected = members(fastbn.batch_stats(x))
    for absent in (-1, 256, 0.5, np.nan, np.inf, -np.inf, 10**40, 1e300):
        assert members(fastbn.batch_stats(x, nodata=absent)) == expected
    mixed = fastbn.batch_stats(x, nodata=[7.0, np.float16(9), 300])
    assert members(mixed) == exactly(x, 1, nodata=[7, 9, 300])


X = np.zeros((2, 3, 4, 5), np.float32)
BAD = {
    "mask list": (TypeError, "mask: ", {"mask": [[True]]}),
    "mask dtype": (TypeError, "mask: .*uint8", {"mask": np.ones((2, 4, 5), np.uint8)}),
    "mask masked": (TypeError, "mask: ", {"mask": np.ma.masked_array(np.ones((2, 4, 5), bool))}),
    "mask rank": (ValueError, "mask: ", {"mask": np.ones((2, 3, 4, 5), bool)}),
    "mask of few axes": (ValueError, "mask: ", {"mask": np.ones((4, 5), bool)}),
    "mask shape": (ValueError, "mask: ", {"mask": np.ones((2, 4, 6), bool)}),
    "policy": (ValueError, "nan_policy: ", {"nan_policy": "ignore"}),
    "policy type": (TypeError, "nan_policy: ", {"nan_policy": None}),
    "nodata size": (ValueError, "nodata: ", {"nodata": [1, 2]}),
    "nodata type": (TypeError, "nodata: ", {"nodata": "a"}),
    "nodata rank": (TypeError, "nodata: ", {"nodata": np.zeros((3, 1))}),
    "nodata complex": (TypeError, "nodata: ", {"nodata": 1j}),
    "nodata bool": (TypeError, "nodata: ", {"nodata": True}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("case", BAD)
def test_errors(case, dtype):
    kind, words, arguments = BAD[case]
    with pytest.raises(kind, match=words):
        fastbn.batch_stats(X.astype(dtype), **arguments)


def test_errors_of_x():
    for bad in (X.astype(np.int32), X.astype(bool), X.astype(complex), None, [[1]]):
        with pytest.raises(TypeError, match="x: "):
            fastbn.batch_stats(bad)
    with pytest.raises(ValueError, match="x: "):
        fastbn.batch_stats(np.zeros(3, np.uint8))


# ---- BatchStats ----------------------------------------------------------------------


def test_merging_integers_with_floats():
    pixels, numbers = integers((9, 3), "uint8"), floats()[0, 0, :, :]
    a, b = fastbn.batch_stats(pixels), fastbn.batch_stats(numbers)
    both = a + b
    assert both.sum is both.sum_of_squares is None
    together = np.concatenate([pixels.astype(np.float32), numbers])
    np.testing.assert_allclose(both.var(), together.var(0), rtol=1e-6)
    assert both.min.dtype == np.float32
    np.testing.assert_array_equal(both.max, together.max(0))


def test_merging_two_types_of_integers():
    a, b = integers((9, 2), "uint8"), integers((7, 2), "int16")
    both = fastbn.batch_stats(a) + fastbn.batch_stats(b)
    assert members(both) == exactly(np.concatenate([a.astype(np.int16), b]), 1)
    assert both.min.dtype == np.int16
    assert (fastbn.batch_stats(a) + fastbn.batch_stats(a.view(np.int8))).min.dtype == np.int16


def test_parts_without_values_are_the_identity():
    full = fastbn.batch_stats(integers((9, 2), "uint8"))
    for empty in (fastbn.batch_stats(np.zeros((0, 2))), BatchStats(0, [0, 0], [0, 0]),
                  fastbn.batch_stats(np.zeros((0, 2), np.int16))):  # fmt: skip
        for both in (full + empty, empty + full):
            assert members(both) == members(full)
            assert both.min.dtype == np.uint8
    nothing = BatchStats(0, [0, 0], [0, 0]) + fastbn.batch_stats(np.zeros((0, 2), np.int16))
    assert nothing.min.tolist() == [32767] * 2


def test_a_channel_without_values():
    x = np.array([[3, 9], [5, 9]], np.uint8)
    a, b = fastbn.batch_stats(x, nodata=[-1, 9]), fastbn.batch_stats(x.astype(np.int16) * 2)
    assert members(a)[1] == (0, 0, 0, 255, 0, 0, 0)
    for both in (a + b, b + a):
        assert both.min.tolist() == [3, 18]
        assert both.max.tolist() == [10, 18]
    assert (a + a).min.tolist() == [3, 255]


def test_none_with_anything_is_none():
    bare, full = BatchStats(2, [1], [1]), fastbn.batch_stats(np.array([[3], [5]], np.uint8))
    for both in (bare + full, full + bare):
        assert both.min is both.max is both.sum is both.sum_of_squares is None


def test_nan_in_extremes_survives_merging():
    a = fastbn.batch_stats(np.array([[1.0], [np.nan]]))
    b = fastbn.batch_stats(np.array([[2.0]]))
    for both in (a + b, b + a):
        assert np.isnan([both.min, both.max]).all()


def test_pickles_carry_everything():
    for x in (integers((9, 2), "uint8"), floats()[0, 0]):
        stats = fastbn.batch_stats(x)
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            again = pickle.loads(pickle.dumps(stats, protocol))
            assert same(again, stats)
            assert (again.sum, again.sum_of_squares) == (stats.sum, stats.sum_of_squares)
    merged = BatchStats.merge([fastbn.batch_stats(integers((9, 2), "uint8"))])
    assert merged.sum is not None
    assert BatchStats.from_array(merged.to_array()).sum is None


def test_wrong_members():
    with pytest.raises(ValueError, match="min: "):
        BatchStats(1, [1], [0], min=[1, 2])
    with pytest.raises(TypeError, match="max: "):
        BatchStats(1, [1], [0], max=["a"])
    with pytest.raises(TypeError, match="sum: "):
        BatchStats(1, [1], [0], sum=[1.5], sum_of_squares=[1])
    with pytest.raises(ValueError, match="sum_of_squares: "):
        BatchStats(1, [1], [0], sum=[1], sum_of_squares=[1, 2])
    with pytest.raises(ValueError, match="both"):
        BatchStats(1, [1], [0], sum=[1])
    with pytest.raises(ValueError, match="count: "):
        BatchStats(1.5, [1], [0], sum=[1], sum_of_squares=[1])
