# SPDX-License-Identifier: BSD-3-Clause
# What follows the normalisation of an element, z, in the same pass:
#
#   relu          z if z > 0 else 0
#   relu6         the same, at most 6
#   leaky_relu    z if z > 0 else z * slope
#   silu          z / (1 + exp(-z))
#
# and how a gradient passes it. The first three are one, `leaky_select`, but for the 6: NaN stays
# NaN, and the part below 0 is a product that relu then drops, since 0 * Inf would be NaN.
# The exponential is a polynomial: that of libm depends on the CPU.
#
# May: arithmetic in registers. May not: load or store.

cdef struct Activation:
    bint silu
    bint capped             # relu6
    bint inverted           # x is what the activation made of z
    bint adds               # a residual
    bint frozen             # backward: statistics do not depend on x
    lanes slope
    lanes inverse_slope
    lanes kept              # all bits, or none


cdef inline Activation activation_of(const Job* job) noexcept nogil:
    cdef Activation a
    cdef bint relu = job.activation == RELU or job.activation == RELU6
    cdef bint leaky = job.activation == LEAKY_RELU
    a.silu = job.activation == SILU
    a.capped = job.activation == RELU6
    a.inverted = job.inverted
    a.adds = job.residual.data != NULL
    a.frozen = not job.training
    a.slope = set1(as_real(job.negative_slope) if leaky else 1)
    a.inverse_slope = set1(as_real(1.0 / job.negative_slope) if leaky else 1)
    a.kept = no_bits() if relu else all_bits()
    return a


cdef inline lanes leaky_select(const Activation* a, lanes z, lanes value) noexcept nogil:
    # The value, or what is left of it where z is not above 0.
    return select_le(z, set1(0), and_bits(value * a.slope, a.kept), value)


cdef inline lanes leaky_inverse(const Activation* a, lanes y) noexcept nogil:
    return select_le(y, set1(0), y * a.inverse_slope, y)


cdef inline lanes exponential(lanes x) noexcept nogil:
    # e**x for x in [-FAR, 0]: of x - n * log(2), a polynomial.
    cdef lanes n = round_to_int(x * set1(LOG2_E))
    cdef lanes r = (x - n * set1(LOG_2)) - n * set1(REST_OF_LOG_2)
    cdef lanes series = set1(POLYNOMIAL[TERMS])
    cdef int k
    for k in range(TERMS):
        series = series * r + set1(POLYNOMIAL[TERMS - 1 - k])
    return scale_by_pow2(series, n)


cdef inline lanes neg_abs_clamped(lanes z) noexcept nogil:
    # -|z|, but not below -FAR, where an exponential is 0: no infinity is divided. NaN stays.
    return max_lanes(neg_abs(z), set1(-FAR))


cdef inline lanes silu(lanes z) noexcept nogil:
    cdef lanes m = neg_abs_clamped(z)
    cdef lanes e = exponential(m)
    return select_le(z, set1(0), m * e, z) / (set1(1) + e)


cdef inline lanes silu_slope(lanes z) noexcept nogil:
    # s + z * s * (1 - s) for the sigmoid s; that of -z is 1 minus that of z.
    cdef lanes m = neg_abs_clamped(z)
    cdef lanes e = exponential(m)
    cdef lanes rest = set1(1) / (set1(1) + e)
    cdef lanes slope = e * rest * (set1(1) + m * rest)
    return select_le(z, set1(0), slope, set1(1) - slope)


cdef inline lanes activate(const Activation* a, lanes z) noexcept nogil:
    if a.silu:
        return silu(z)
    return leaky_select(a, z, min_lanes(set1(6), z) if a.capped else z)


cdef inline lanes leaky_grad(const Activation* a, lanes z, lanes dy) noexcept nogil:
    return leaky_select(a, z, select_le(set1(6), z, set1(0), dy) if a.capped else dy)


cdef inline lanes activation_grad(const Activation* a, lanes z, lanes dy) noexcept nogil:
    # The gradient of z, from that of what the activation makes of z.
    return dy * silu_slope(z) if a.silu else leaky_grad(a, z, dy)


cdef inline lanes activation_grad_outlined(const Activation* a, lanes z, lanes dy) noexcept nogil:
    # The same, where silu's is seldom needed, so that its code need not be in every loop.
    return dy * call_noinline(silu_slope, z) if a.silu else leaky_grad(a, z, dy)
