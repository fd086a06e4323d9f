# SPDX-License-Identifier: BSD-3-Clause
"""Arrays for tests: shapes, memory orders, guarded buffers; half types, and what rounding does."""

import numpy as np

# (shape, layout): lane boundaries, tiny planes, long runs, odd channels, rank 1 to 5.
SHAPES = [
    ((2, 1), None),
    ((15, 3), None),
    ((16, 17), None),
    ((17, 31), None),
    ((64, 33), None),
    ((65, 130), None),
    ((3, 5, 1), None),
    ((4, 3, 7), None),
    ((2, 3, 15), None),
    ((20, 2, 16), None),
    ((18, 5, 31), None),
    ((1, 3, 63), None),
    ((33, 2, 65), None),
    ((5, 4, 7, 7), None),
    ((32, 19, 7, 7), None),
    ((16, 6, 1, 1), None),
    ((3, 4, 33, 32), None),
    ((17, 2, 32, 33), None),
    ((2, 3, 5, 4, 6), None),
    ((1, 2, 150, 151), None),
    ((2, 7, 7, 3), "NHWC"),
    ((4, 14, 15, 64), "NHWC"),
    ((30, 65), "N...C"),
    ((2, 3, 4, 5, 16), "NDHWC"),
    ((9, 8, 1), "NTC"),
    ((31, 17, 1030), "NTC"),
    ((12, 10, 5), "HWC"),
    # Narrow rows, more of them than a small group has.
    ((5, 11, 13, 32), "NHWC"),
    ((611, 48), None),
    # Fewer channels than a row of pixels has room for.
    ((3, 13, 17, 5), "NHWC"),
    ((700, 9), None),
    ((6, 11, 13, 1, 15), "NDHWC"),
    ((6, 2, 9), "CHN"),
]
IDS = [f"{'x'.join(map(str, shape))}-{layout or 'NC...'}" for shape, layout in SHAPES]


def channels_of(shape, layout):
    if layout is None:
        return shape[1]
    return shape[-1] if layout == "N...C" else shape[layout.index("C")]


def in_order(x, order):
    """The same values with other strides."""
    if order == "C":
        return np.ascontiguousarray(x)
    if order == "F":
        return np.asfortranarray(x)
    if order == "channels last" and x.ndim > 2:
        moved = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        return np.moveaxis(moved, -1, 1)
    if order == "sliced":
        wide = np.zeros((2 * x.shape[0], *x.shape[1:]), x.dtype)
        wide[::2] = x
        return wide[::2]
    if order == "second axis sliced" and x.ndim > 1:
        wide = np.zeros((x.shape[0], x.shape[1] + 2, *x.shape[2:]), x.dtype)
        wide[:, 1:-1] = x
        return wide[:, 1:-1]
    if order == "first axes swapped" and x.ndim > 1:
        return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    if order == "reversed":
        return np.ascontiguousarray(x[::-1])[::-1]
    if order == "cropped":
        wide = np.zeros((*x.shape[:-1], x.shape[-1] + 3), x.dtype)
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    if order == "swapped":
        return x.astype(x.dtype.newbyteorder())
    if order == "misaligned":
        raw = np.zeros(x.nbytes + 1, np.uint8)[1:]
        y = np.ndarray(x.shape, x.dtype, raw.data)
        y[...] = x
        return y
    return np.ascontiguousarray(x)


ORDERS = ["C", "F", "channels last", "sliced", "reversed", "cropped", "swapped", "misaligned"]
# Of operations that treat the leading axes alike.
MORE_ORDERS = [*ORDERS, "second axis sliced", "first axes swapped"]
GAPLESS = ["C", "F", "channels last", "first axes swapped"]


def orders_of(dtype, orders=ORDERS):
    """Memory orders that the dtype can have: NumPy knows bfloat16 in one byte order only."""
    return [order for order in orders if not (order == "swapped" and dtype == "bfloat16")]


# Every dtype: explicit binary digits, and the exponent of the smallest normal number.
DIGITS = {
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float32": (23, -126),
    "float64": (52, -1022),
}
DTYPES = [*DIGITS]
HALVES = [dtype for dtype in DTYPES if "16" in dtype]
FLOATS = [dtype for dtype in DTYPES if dtype not in HALVES]


def half_ulp(size, dtype):
    """Half the distance between two neighbours of a dtype, at numbers of that size."""
    digits, smallest = DIGITS[dtype]
    exponent = np.maximum(np.frexp(size)[1] - 1, smallest)
    return np.ldexp(0.5, exponent - digits)


def assert_near(actual, expected, room):
    """Within `room` of the exact number before it was rounded to the dtype of `actual`."""
    assert actual.shape == expected.shape
    assert np.isfinite(room).all(), "in an infinite room nothing is wrong"
    allowed = room + half_ulp(np.abs(expected) + room, actual.dtype.name)
    error = np.abs(actual.astype(np.float64) - expected)
    # Said so that NaN is an error.
    wrong = ~(error <= allowed)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} wrong, first at {where}: got {actual[where]}, "
            f"expected {expected[where]} within {np.broadcast_to(allowed, wrong.shape)[where]}"
        )


def every_half(dtype):
    """All 65,536 numbers of a half type, infinities and NaNs included."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


def same_samples(y, period):
    """Raise unless y is one batch of `period` samples over and over, by its bytes."""
    # As integers, which NumPy compares many times faster than float16.
    patterns = np.ascontiguousarray(y).view(f"u{y.itemsize}")
    assert len(y) > period
    assert (patterns[period:] == patterns[:-period]).all()


def bits(half):
    """The patterns of an array of a half type, with one pattern for all NaNs."""
    patterns = np.ascontiguousarray(half).view(np.uint16).copy()
    nan = 0x7C00 if half.dtype == np.float16 else 0x7F80
    patterns[(patterns & 0x7FFF) > nan] = nan + 1
    return patterns


class Guarded:
    """An array between guard bytes, at any offset from a cache line."""

    GUARD = 256

    def __init__(self, shape, dtype, offset=0):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self.raw = np.full(size + 2 * self.GUARD + 128, 0xA5, np.uint8)
        start = -self.raw.ctypes.data % 64 + self.GUARD + offset
        self.array = np.ndarray(shape, dtype, self.raw.data, start)
        self.inside = slice(start, start + size)

    def intact(self):
        outside = np.delete(self.raw, self.inside)
        return bool((outside == 0xA5).all())


def batch(shape, dtype, seed=0, mean=0.5, std=2.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * std + mean).astype(dtype)
