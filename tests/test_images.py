# SPDX-License-Identifier: BSD-3-Clause
"""normalize and denormalize: exact values, layouts, strides, types, bits, errors."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from everywhere import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import _threads

INTEGERS = ("uint8", "int8", "uint16", "int16")
FLOATS = ("float32", "float64", "float16", "bfloat16")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def values(shape, dtype, seed=0):
    """Return anything that integers may be, or floats about as large."""
    rng = np.random.default_rng(seed)
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        x = rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)
        x.flat[:1], x.flat[-1:] = limits.min, limits.max
        return x
    return rng.normal(0.5, 2, shape).astype(dtype_of(dtype))


def along(numbers, axis, ndim):
    numbers = np.asarray(numbers, np.float64)
    return numbers.reshape([-1 if i == axis else 1 for i in range(ndim)] if numbers.ndim else ())


def ulp(y, dtype):
    """Return the distance from each |y| to the next number of the dtype."""
    digits = {"float32": 23, "float64": 52}[dtype]
    least = {"float32": -149, "float64": -1074}[dtype]
    return np.ldexp(1.0, np.maximum(np.frexp(np.abs(y))[1] - 1 - digits, least))


def longer(x, mean, std, max_value, axis):
    """Return the result in about 64 bits."""
    wide = np.longdouble
    numbers = [along(n, axis, x.ndim).astype(wide) for n in (mean, std)]
    return (x.astype(np.float64).astype(wide) / wide(max_value) - numbers[0]) / numbers[1]


def check_in_fractions(y, x, mean, std, max_value, axis):
    """The same for float64 results of integers, which 64 bits are too few for."""
    channels = x.shape[axis]
    numbers = zip(np.broadcast_to(mean, channels).tolist(), np.broadcast_to(std, channels).tolist(),
                  np.moveaxis(x, axis, 0), np.moveaxis(y, axis, 0), strict=True)  # fmt: skip
    for m, s, integers, results in numbers:
        a = 1 / (Fraction(max_value) * Fraction(s))
        shift = Fraction(m) * Fraction(max_value)
        room = a / 2**51
        for v, result in set(zip(integers.ravel().tolist(), results.ravel().tolist(), strict=True)):
            exact = (v - shift) * a
            assert abs(Fraction(result) - exact) <= room + Fraction(math.ulp(float(exact)))


def check(y, x, mean, std, max_value, axis, dtype):
    """Check y, in the axes of x, against the bounds of the documentation."""
    if x.dtype.name in INTEGERS and dtype == "float64":
        check_in_fractions(y, x, mean, std, max_value, axis)
        return
    exact = longer(x, mean, std, max_value, axis)
    wide = "float64" if dtype == "float64" else "float32"
    rest = 2.0**-51 if dtype == "float64" else 2.0**-22
    if x.dtype.name in INTEGERS:
        rest = rest * np.abs(1 / (max_value * along(std, axis, x.ndim)))
    else:
        rest = rest * np.abs(along(mean, axis, x.ndim) / along(std, axis, x.ndim))
    room = ulp(exact.astype(np.float64), wide) + rest
    if dtype in ("float32", "float64"):
        assert (np.abs(y.astype(np.longdouble) - exact) <= room).all()
        return
    # Between the ends of the room, rounded: rounding keeps order.
    ends = [(exact + sign * room).astype(np.float64).astype(np.float32) for sign in (-1, 1)]
    low, high = (end.astype(dtype_of(dtype)).astype(np.float32) for end in ends)
    assert ((low <= y.astype(np.float32)) & (y.astype(np.float32) <= high)).all()


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_values(dtype, to):
    for layout, out_layout in itertools.product(("NHWC", "NCHW"), repeat=2):
        shape = (2, 5, 67, 3) if layout == "NHWC" else (2, 3, 5, 67)
        x = values(shape, dtype)
        largest = np.iinfo(dtype).max if dtype in INTEGERS else 1.5
        y = fastbn.normalize(x, MEAN, STD, layout=layout, out_layout=out_layout,
                             max_value=largest, dtype=dtype_of(to))  # fmt: skip
        assert y.dtype == dtype_of(to)
        assert y.flags.c_contiguous
        moved = y.transpose([out_layout.index(letter) for letter in layout])
        check(moved, x, MEAN, STD, largest, layout.index("C"), to)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_value_of_8_bits_and_hard_ones_of_16(dtype):
    limits = np.iinfo(dtype)
    x = np.arange(limits.min, limits.max + 1, 1 if limits.bits == 8 else 97).astype(dtype)
    for mean, std, largest in itertools.product(
        (0.0, 1.0, -0.3, 0.485, 1e-9, 1e6, 1e12), (1.0, 0.229, 1e-4, 3e5), (1.0, 255.0, 65535.0)
    ):
        for to in ("float32", "float64"):
            y = fastbn.normalize(x[:, None], mean, std, max_value=largest, dtype=to)
            check(y[:, 0], x, mean, std, largest, 0, to)


@pytest.mark.parametrize("to", ["float32", "float64"])
def test_results_are_exact_where_they_have_few_digits(to):
    # Everything is a power of 2, or an integer.
    x = values((50, 4), "int16")
    y = fastbn.normalize(x, [0, 0.5, -2, 8], [0.5, 2, 1, 0.25], max_value=16, dtype=to)
    exact = [[(Fraction(int(v)) / 16 - m) / s for v, m, s in zip(
        row, (0, Fraction(1, 2), -2, 8), (Fraction(1, 2), 2, 1, Fraction(1, 4)), strict=True)]
        for row in x]  # fmt: skip
    assert y.tolist() == [[float(v) for v in row] for row in exact]


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_numbers(dtype):
    x = np.array([[np.nan, np.inf, -np.inf, 0.0, -0.0]], dtype_of(dtype))
    for to in FLOATS:
        y = fastbn.normalize(x, 0.0, 2.0, layout="CN", dtype=dtype_of(to)).astype(np.float64)
        np.testing.assert_array_equal(y, [[np.nan, np.inf, -np.inf, 0, 0]])
    assert np.isfinite(fastbn.normalize(np.float64([[1e300, 1]]), 1e300, 1e300, max_value=1e-5,
                                        dtype=np.float64)[0, 1])  # fmt: skip


# ---- layouts and strides -------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13, 64, 512])
@pytest.mark.parametrize(("layout", "out_layout"), [
    ("NHWC", "NCHW"), ("NCHW", "NHWC"), ("NHWC", "NHWC"), ("NCHW", "NCHW"), ("NHWC", "CHWN"),
    ("NHWC", "WCNH"), ("HWC", "CHW"), ("CHW", "HWC"), ("NDHWC", "NCDHW"),
    ("NC", "CN")])  # fmt: skip
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_layouts(channels, layout, out_layout, dtype):
    sizes = {"N": 2, "H": 3, "W": 37, "D": 2, "C": channels}
    x = values([sizes[letter] for letter in layout], dtype)
    mean, std = np.linspace(0.2, 0.6, channels), np.linspace(0.1, 0.3, channels)
    y = fastbn.normalize(x, mean, std, layout=layout, out_layout=out_layout, max_value=255)
    assert y.shape == tuple(sizes[letter] for letter in out_layout)
    moved = y.transpose([out_layout.index(letter) for letter in layout])
    check(moved, x, mean, std, 255, layout.index("C"), "float32")


@st.composite
def conversions(draw):
    letters = draw(st.permutations("CNHW"[: draw(st.integers(1, 4))]))
    sizes = [draw(st.sampled_from([1, 2, 3, 4, 5, 17, 33, 70])) for _ in letters]
    steps = [draw(st.sampled_from([1, 1, -1, 2])) for _ in letters]
    out_steps = [draw(st.sampled_from([1, 1, -1, 2])) for _ in letters]
    memory = draw(st.permutations(range(len(letters))))
    out_letters = draw(st.permutations(letters))
    dtype = draw(st.sampled_from(INTEGERS + FLOATS))
    to = draw(st.sampled_from(FLOATS))
    return letters, sizes, steps, out_steps, memory, out_letters, dtype, to


def strided(sizes, steps, dtype, memory=None):
    """Return an array of these sizes, whose axes have these steps and this memory order."""
    order = range(len(sizes)) if memory is None else memory
    whole = values([sizes[i] * abs(steps[i]) for i in order], dtype)
    whole = whole.transpose(np.argsort(order))
    return whole[tuple(slice(None, None, step) for step in steps)]


@settings(max_examples=150, deadline=None)
@given(conversions())
def test_any_strides_on_both_sides(case):
    letters, sizes, steps, out_steps, memory, out_letters, dtype, to = case
    layout, out_layout = "".join(letters), "".join(out_letters)
    if np.prod(sizes) > 10000:
        sizes = [min(size, 5) for size in sizes]
    x = strided(sizes, steps, dtype, memory)
    x.flags.writeable = False
    axis = layout.index("C")
    mean, std = np.linspace(0.2, 0.6, sizes[axis]), np.linspace(0.1, 0.3, sizes[axis])
    options = {"layout": layout, "out_layout": out_layout, "max_value": 200.0,
               "dtype": dtype_of(to)}  # fmt: skip
    y = fastbn.normalize(x, mean, std, **options)
    check(y.transpose([out_layout.index(letter) for letter in layout]), x, mean, std, 200.0, axis,
          to)  # fmt: skip
    sizes_of_out = [sizes[layout.index(letter)] for letter in out_layout]
    out = strided(sizes_of_out, out_steps, to)
    around = out.base.copy() if out.base is not None else None
    assert fastbn.normalize(x, mean, std, **options, out=out) is out
    assert out.tobytes() == y.tobytes()
    if around is not None and out.base.shape == around.shape:  # nothing beside it was written
        again = out.base.copy()
        view = np.ndarray(out.shape, out.dtype, again,
                          out.ctypes.data - out.base.ctypes.data, out.strides)  # fmt: skip
        view[...] = np.ndarray(out.shape, out.dtype, around,
                               out.ctypes.data - out.base.ctypes.data, out.strides)  # fmt: skip
        assert again.tobytes() == around.tobytes()


def test_memory_order_without_a_layout_of_the_output():
    x = values((2, 3, 5, 7), "uint8")
    for order in itertools.permutations(range(4)):
        stored = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
        y = fastbn.normalize(stored, 1.0, 2.0)
        assert y.transpose(order).flags.c_contiguous
        np.testing.assert_array_equal(y, fastbn.normalize(x, 1.0, 2.0))
        back = fastbn.denormalize(y, 1.0, 2.0)
        assert back.transpose(order).flags.c_contiguous
        np.testing.assert_array_equal(back, x)


def test_reversed_channels():
    bgr = values((2, 64, 65, 3), "uint8")
    expected = fastbn.normalize(np.ascontiguousarray(bgr[..., ::-1]), MEAN, STD, layout="NHWC",
                                out_layout="NCHW")  # fmt: skip
    y = fastbn.normalize(bgr[..., ::-1], MEAN, STD, layout="NHWC", out_layout="NCHW")
    assert y.tobytes() == expected.tobytes()


def test_other_bytes_and_misaligned_arrays():
    x = values((2, 5, 7, 3), "uint16")
    expected = fastbn.normalize(x, MEAN, STD, layout="NHWC")
    swapped = x.astype(x.dtype.newbyteorder())
    crooked = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.uint16).reshape(x.shape)
    for other in (swapped, crooked):
        y = fastbn.normalize(other, MEAN, STD, layout="NHWC")
        assert y.tobytes() == expected.tobytes()
    buffer = np.zeros(expected.nbytes + 1, np.uint8)
    out = buffer[1:].view(np.float32).reshape(expected.shape)
    fastbn.normalize(x, MEAN, STD, layout="NHWC", out=out)
    assert out.tobytes() == expected.tobytes()


def test_memory_map(tmp_path):
    x = values((3, 6, 5, 3), "uint8")
    x.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", np.uint8, "r", shape=x.shape)
    y = fastbn.normalize(mapped, MEAN, STD, layout="NHWC")
    assert type(y) is np.ndarray
    assert y.tobytes() == fastbn.normalize(x, MEAN, STD, layout="NHWC").tobytes()


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 4, 4, 0)])
def test_empty(shape):
    x = np.zeros(shape, np.uint8)
    y = fastbn.normalize(x, 0.5, 0.5, layout="NHWC", out_layout="NCHW", dtype=np.float64)
    assert (y.shape, y.dtype) == ((shape[0], shape[3], *shape[1:3]), np.float64)
    assert fastbn.denormalize(y, 0.5, 0.5, layout="NCHW").shape == y.shape


# ---- bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_levels_and_threads_agree(dtype, to):
    x = values((4, 65, 67, 3), dtype)

    def results():
        found = []
        for out_layout in ("NCHW", "NHWC"):
            y = fastbn.normalize(x, MEAN, STD, layout="NHWC", out_layout=out_layout,
                                 max_value=255.0, dtype=dtype_of(to))  # fmt: skip
            back = fastbn.denormalize(y, MEAN, STD, layout=out_layout, max_value=255.0)
            found += [y.tobytes(), back.tobytes()]
        return found

    _threads.always_parallel(True)
    try:
        assert_same(results, (1, 2, 3))
    finally:
        _threads.always_parallel(False)


@pytest.mark.parametrize("to", ["float32", "bfloat16"])
def test_a_result_below_normal_numbers(to):
    x = np.tile(np.arange(3, dtype=np.uint8), (2, 20))
    for digits in (30, 37, 40):

        def result(digits=digits):
            y = fastbn.normalize(x, 1 + 2.0**-digits, 2.0**88, layout="CN", dtype=dtype_of(to))
            return y.astype(np.float64).tolist()

        assert result()[0][1] == -(2.0 ** (-88 - digits))
        assert_same(result)


def test_past_the_cache():
    # Streamed, aligned or not; the cut of the batch does not matter.
    x = values((33, 224, 224, 3), "uint8")
    options = {"layout": "NHWC", "out_layout": "NCHW", "max_value": 255.0}
    whole = fastbn.normalize(x, MEAN, STD, **options)
    buffer = np.empty(whole.size + 16, np.float32)
    for start in (1, 5):
        out = buffer[start:][: whole.size].reshape(whole.shape)
        fastbn.normalize(x, MEAN, STD, **options, out=out)
        assert out.tobytes() == whole.tobytes()
    for i in (0, 17, 32):
        part = fastbn.normalize(x[i : i + 1], MEAN, STD, **options)
        assert part.tobytes() == whole[i : i + 1].tobytes()


# ---- denormalize ---------------------------------------------------------------------


@pytest.mark.parametrize("through", FLOATS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_round_trip(dtype, through):
    if np.iinfo(dtype).bits == 16 and through in ("float16", "bfloat16"):
        return  # too few digits for all integers
    if through == "bfloat16":
        return
    x = values((3, 5, 7, 3), dtype)
    options = {"max_value": float(np.iinfo(dtype).max)}
    y = fastbn.normalize(x, MEAN, STD, layout="NHWC", out_layout="NCHW",
                         dtype=dtype_of(through), **options)  # fmt: skip
    back = fastbn.denormalize(y, MEAN, STD, layout="NCHW", out_layout="NHWC", dtype=dtype,
                              **options)  # fmt: skip
    if through == "float16":
        assert np.abs(back.astype(int) - x).max() <= 1
    else:
        np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_rounding_and_saturation(dtype):
    limits = np.iinfo(dtype)
    y = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 3.49, limits.max + 0.5, limits.max + 0.49, 1e30, -1e30,
                  np.inf, -np.inf, np.nan, limits.min - 0.5, limits.max - 0.5])  # fmt: skip
    expected = [0, 2, 2, 0, max(-2, limits.min), 3, *[limits.max] * 3, limits.min, limits.max,
                limits.min, 0, limits.min, np.rint(limits.max - 0.5)]  # fmt: skip
    for x in (y, y.astype(np.float32)):
        found = fastbn.denormalize(x[None], 0.0, 1.0, layout="CN", dtype=dtype)
        if x.dtype == np.float64:
            assert found[0].tolist() == expected
        else:
            assert found[0, :6].tolist() == expected[:6]
            assert found[0, 8:13].tolist() == expected[8:13]


@pytest.mark.parametrize("to", FLOATS)
def test_denormalize_to_floats(to):
    y = values((40, 3), "float32")
    x = fastbn.denormalize(y, MEAN, STD, max_value=255.0, dtype=dtype_of(to))
    exact = (y.astype(np.longdouble) * np.longdouble(STD) + np.longdouble(MEAN)) * 255
    digits = {"float32": 23, "float64": 52, "float16": 10, "bfloat16": 7}[to]
    assert (np.abs(x.astype(np.longdouble) - exact) <= 2.0**-digits * (abs(exact) + 1)).all()


# ---- errors --------------------------------------------------------------------------

X = np.zeros((2, 4, 5, 3), np.uint8)
Y = np.zeros((2, 4, 5, 3), np.float32)
BAD = {
    "x list": (TypeError, "x: .*ndarray", {"x": [[1]]}),
    "x dtype": (TypeError, "x: .*int32", {"x": X.astype(np.int32)}),
    "x bool": (TypeError, "x: .*bool", {"x": X.astype(bool)}),
    "x masked": (TypeError, "x: ", {"x": np.ma.masked_array(X)}),
    "rank": (ValueError, "layout: expected 3", {"x": X[0]}),
    "layout": (ValueError, "layout: ", {"layout": "NHWW"}),
    "layout type": (TypeError, "layout: ", {"layout": 3}),
    "out_layout alone": (ValueError, "out_layout: ", {"layout": None, "out_layout": "NCHW"}),
    "out_layout dots": (ValueError, "out_layout: ", {"layout": "N...C", "out_layout": "NCHW"}),
    "out_layout of dots": (ValueError, "out_layout: ", {"out_layout": "N...C"}),
    "out_layout letters": (ValueError, "out_layout: ", {"out_layout": "NCHD"}),
    "out_layout twice": (ValueError, "out_layout: ", {"out_layout": "NCHH"}),
    "out_layout type": (TypeError, "out_layout: ", {"out_layout": 1}),
    "mean size": (ValueError, "mean: ", {"mean": [0.1, 0.2]}),
    "mean rank": (ValueError, "mean: ", {"mean": [[0.1, 0.2, 0.3]]}),
    "mean type": (TypeError, "mean: ", {"mean": "a"}),
    "mean none": (TypeError, "mean: ", {"mean": None}),
    "mean complex": (TypeError, "mean: ", {"mean": 1j}),
    "mean nan": (ValueError, "mean: .*channel 1", {"mean": [0, np.nan, 0]}),
    "std zero": (ValueError, "std: .*channel 2", {"std": [1, 1, 0]}),
    "std negative": (ValueError, "std: .*channel 0", {"std": -1}),
    "std inf": (ValueError, "std: .*channel 0", {"std": np.inf}),
    "max_value zero": (ValueError, "max_value: ", {"max_value": 0}),
    "max_value negative": (ValueError, "max_value: ", {"max_value": -1.0}),
    "max_value nan": (ValueError, "max_value: ", {"max_value": np.nan}),
    "max_value type": (TypeError, "max_value: ", {"max_value": "1"}),
    "dtype int": (TypeError, "dtype: ", {"dtype": np.int32}),
    "dtype none": (TypeError, "dtype: ", {"dtype": None}),
    "dtype swapped": (TypeError, "dtype: ", {"dtype": np.dtype(np.float32).newbyteorder()}),
    "dtype nonsense": (TypeError, "dtype: ", {"dtype": "float33"}),
    "out type": (TypeError, "out: ", {"out": 5}),
    "out dtype": (TypeError, "out: ", {"out": np.empty((2, 4, 5, 3))}),
    "out shape": (ValueError, "out: ", {"out": np.empty((2, 3, 4, 5), np.float32)}),
    "out overlaps itself": (ValueError, "out: ", {
        "out": np.lib.stride_tricks.as_strided(np.empty(9, np.float32), X.shape, (0, 0, 4, 4))}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    kind, words, change = BAD[case]
    arguments = {"mean": MEAN, "std": STD, "layout": "NHWC", "x": X} | change
    x = arguments.pop("x")
    with pytest.raises(kind, match=words):
        fastbn.normalize(x, **arguments)


def test_errors_of_out():
    out = Y.copy()
    out.flags.writeable = False
    with pytest.raises(ValueError, match=r"out: .*read-only"):
        fastbn.normalize(X, MEAN, STD, layout="NHWC", out=out)
    with pytest.raises(ValueError, match=r"out: .*overlaps x"):
        fastbn.normalize(Y, MEAN, STD, layout="NHWC", out=Y)
    with pytest.raises(ValueError, match=r"out: .*overlaps y"):
        fastbn.denormalize(Y, MEAN, STD, layout="NHWC", out=Y.view(np.uint8)[..., :3])
    with pytest.raises(TypeError, match=r"dtype: .*uint8"):
        fastbn.normalize(Y, MEAN, STD, layout="NHWC", dtype=np.uint8)
    with pytest.raises(TypeError, match="y: "):
        fastbn.denormalize(X, MEAN, STD, layout="NHWC")
