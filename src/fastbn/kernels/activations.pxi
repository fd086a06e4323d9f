# SPDX-License-Identifier: BSD-3-Clause
# What follows the normalisation of an element, z, in the same pass:
#
#   relu          z if z > 0 else 0
#   relu6         the same, at most 6
#   leaky_relu    z if z > 0 else z * slope
#   silu          z / (1 + exp(-z))
#
# and how a gradient passes it. The first three are one, `bent`, but for the 6: NaN stays
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
    a.slope = splat(as_real(job.negative_slope) if leaky else 1)
    a.inverse_slope = splat(as_real(1.0 / job.negative_slope) if leaky else 1)
    a.kept = no_bits() if relu else all_bits()
    return a


cdef inline lanes bent(const Activation* a, lanes z, lanes value) noexcept nogil:
    # The value, or what is left of it where z is not above 0.
    return if_at_most(z, splat(0), masked(value * a.slope, a.kept), value)


cdef inline lanes unbent(const Activation* a, lanes y) noexcept nogil:
    return if_at_most(y, splat(0), y * a.inverse_slope, y)


cdef inline lanes exponential(lanes x) noexcept nogil:
    # e**x for x in [-FAR, 0]: of x - n * log(2), a polynomial.
    cdef lanes n = rounded(x * splat(LOG2_E))
    cdef lanes r = (x - n * splat(LOG_2)) - n * splat(REST_OF_LOG_2)
    cdef lanes series = splat(POLYNOMIAL[TERMS])
    cdef int k
    for k in range(TERMS):
        series = series * r + splat(POLYNOMIAL[TERMS - 1 - k])
    return times_power_of_two(series, n)


cdef inline lanes minus_size(lanes z) noexcept nogil:
    # -|z|, but not below -FAR, where an exponential is 0: no infinity is divided. NaN stays.
    return larger(negative(z), splat(-FAR))


cdef inline lanes silu(lanes z) noexcept nogil:
    cdef lanes m = minus_size(z)
    cdef lanes e = exponential(m)
    return if_at_most(z, splat(0), m * e, z) / (splat(1) + e)


cdef inline lanes silu_slope(lanes z) noexcept nogil:
    # s + z * s * (1 - s) for the sigmoid s; of -z it is what that of z leaves of 1.
    cdef lanes m = minus_size(z)
    cdef lanes e = exponential(m)
    cdef lanes rest = splat(1) / (splat(1) + e)
    cdef lanes slope = e * rest * (splat(1) + m * rest)
    return if_at_most(z, splat(0), slope, splat(1) - slope)


cdef inline lanes activated(const Activation* a, lanes z) noexcept nogil:
    if a.silu:
        return silu(z)
    return bent(a, z, smaller(splat(6), z) if a.capped else z)


cdef inline lanes passed_bent(const Activation* a, lanes z, lanes dy) noexcept nogil:
    return bent(a, z, if_at_most(splat(6), z, splat(0), dy) if a.capped else dy)


cdef inline lanes passed(const Activation* a, lanes z, lanes dy) noexcept nogil:
    # The gradient of z, from that of what the activation makes of z.
    return dy * silu_slope(z) if a.silu else passed_bent(a, z, dy)


cdef inline lanes passed_again(const Activation* a, lanes z, lanes dy) noexcept nogil:
    # The same, where silu's is seldom needed, so that its code need not be in every loop.
    return dy * apart(silu_slope, z) if a.silu else passed_bent(a, z, dy)
