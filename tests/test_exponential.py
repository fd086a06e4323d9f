# SPDX-License-Identifier: BSD-3-Clause
"""SiLU over all exponents, and what it says of the exponential in it: at most 2 ulp.

A batch norm with mean 0 and variance 1 leaves z as it is. Nothing returns exp(z) itself,
but below -18 (float64: -38) 1 + exp(z) is 1, so that y is the product of z and the
exponential, rounded once. Nearer to 0 there are three more roundings.
"""

import numpy as np
import pytest
from arrays import bits, every_half
from cases import ACTIVATIONS
from everywhere import assert_same

import fastbn

# Digits, and where 1 + exp(z) begins to be 1.
DIGITS = {"float32": (23, -18.0), "float64": (52, -38.0)}
SMALLEST = {"float32": 2.0**-149, "float64": 5e-324}


def silu(z):
    zeros, ones = np.zeros(1, z.dtype), np.ones(1, z.dtype)
    return fastbn.batch_norm(z[:, None], zeros, ones, eps=0.0, activation="silu")[:, 0]


def silu_slope(z):
    one = np.ones(1)
    return fastbn.batch_norm_backward(
        np.ones_like(z)[:, None], z[:, None], 0 * one, one, training=False, activation="silu"
    )[0][:, 0]


def numbers(dtype, first, last, count):
    """So many numbers between two of the same sign, evenly over those that the dtype has."""
    kind = {"float32": np.int32, "float64": np.int64}[dtype]
    ends = np.array([first, last], dtype).view(kind) & np.iinfo(kind).max
    step = (int(ends.max()) - int(ends.min())) // count
    patterns = np.arange(int(ends.min()), int(ends.max()), step | 1, dtype=kind)
    assert count // 2 <= patterns.size <= 2 * count
    return np.copysign(patterns.view(dtype), np.array(last, dtype))


def wide(z):
    if np.finfo(np.longdouble).nmant < 63:
        if z.dtype == np.float64:
            pytest.skip("needs a type with more digits than float64")
        return z.astype(np.float64)
    return z.astype(np.longdouble)


def ulp(size, dtype):
    """The distance of the numbers of a dtype at a size, subnormal or not."""
    digits = DIGITS[dtype][0]
    return np.maximum(np.ldexp(1.0, np.frexp(size)[1] - 1 - digits), SMALLEST[dtype])


def test_the_exponential_is_within_two_ulp(level, dtype):
    lowest = {"float32": -104.0, "float64": -746.0}[dtype]
    z = numbers(dtype, DIGITS[dtype][1], lowest, 150_000)
    y = silu(z)
    exact = np.exp(wide(z))
    # The half of an ulp is that of the product.
    room = 2 * ulp(exact, dtype) + ulp(np.abs(wide(y)), dtype) / 2 / np.abs(wide(z))
    assert (np.abs(wide(y) / wide(z) - exact) <= room).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_silu_over_all_exponents(level, dtype, sign):
    farthest = {"float32": 120.0, "float64": 800.0}[dtype]
    z = numbers(dtype, sign * SMALLEST[dtype], sign * farthest, 120_000)
    y = silu(z)
    unit = 2.0 ** (-DIGITS[dtype][0] - 1)
    with np.errstate(under="ignore"):
        e = np.exp(-np.abs(wide(z)))
        sigmoid = (1 if sign > 0 else e) / (1 + e)
        slope = sigmoid * (1 + wide(z) * (1 if sign < 0 else e) / (1 + e))
        exact = wide(z) * sigmoid
        # 2 ulp of e, four roundings (sum, quotient, two products), and the last ulp of
        # a subnormal e or y.
        of_e = 4 * unit / (1 + e) if sign < 0 else 4 * unit * e / (1 + e)
        room = np.abs(exact) * (of_e + 4.01 * unit) + (2 * np.abs(wide(z)) + 1) * SMALLEST[dtype]
        assert (np.abs(wide(y) - exact) <= room).all()
        # Its slope, a sum of two such numbers.
        parts = sigmoid * (1 + np.abs(wide(z)) * (1 if sign < 0 else e) / (1 + e))
        room = parts * 12 * unit + (4 * np.abs(wide(z)) + 1) * SMALLEST[dtype]
        assert (np.abs(wide(silu_slope(z)) - slope) <= room).all()
    if sign > 0:
        assert ((y >= 0) & (y <= z)).all()
        assert (y[z > -DIGITS[dtype][1]] == z[z > -DIGITS[dtype][1]]).all()
    else:
        assert ((y <= 0) & (y >= z / 2 - SMALLEST[dtype])).all()


def test_the_same_bits_on_all_levels(dtype):
    z = [numbers(dtype, sign * 1e-9, sign * 800.0, 100_000) for sign in (1.0, -1.0)]
    z = np.concatenate([*z, np.array([0, -0.0, np.inf, -np.inf, np.nan, -1e30, 1e30], dtype)])

    def results():
        return [np.nan_to_num(function(z), nan=7).tobytes() for function in (silu, silu_slope)]

    assert_same(results)


def test_no_jump_where_it_is_clamped(level):
    for dtype, far in (("float32", 110), ("float64", 750)):
        z = np.array([-far], dtype)
        for _ in range(2):
            around = np.concatenate([np.nextafter(z, np.array(s, dtype)) for s in (0, -np.inf)])
            assert not silu(around).any()
            assert not silu_slope(around).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_half_is_rounded_from_float32(level, half, activation):
    x = every_half(half).reshape(256, 256)
    zeros, ones = np.zeros(256, np.float32), np.ones(256, np.float32)
    with np.errstate(all="ignore"):
        single = x.astype(np.float32)
        options = {"eps": 0.0, "activation": activation, "negative_slope": 0.1}
        # Adding 1 makes other numbers, which tie, too.
        for residual in (None, np.ones_like(x)):
            added = None if residual is None else residual.astype(np.float32)
            y = fastbn.batch_norm(x, zeros, ones, residual=residual, **options)
            other = fastbn.batch_norm(single, zeros, ones, residual=added, **options)
            np.testing.assert_array_equal(bits(y), bits(other.astype(half)))
            # The gradient of the sum, too, is rounded once.
            if residual is not None:
                dy = np.full_like(x, 0.3)
                del options["eps"]
                found, expected = (
                    fastbn.batch_norm_backward(
                        d, a, zeros, ones, training=False, residual=r, **options
                    )[-1]
                    for d, a, r in ((dy, x, residual), (dy.astype(np.float32), single, added))
                )
                np.testing.assert_array_equal(bits(found), bits(expected.astype(half)))
