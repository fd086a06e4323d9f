# SPDX-License-Identifier: BSD-3-Clause
# What follows the normalisation of an element, z, in the same pass:
#
#   relu          z if z > 0 else 0
#   leaky_relu    z if z > 0 else z * slope
#   silu          z / (1 + exp(-z))
#
# and how a gradient passes it. The first two are one, `bent`: NaN stays NaN, and the
# part below 0 is a product that relu then drops, since 0 * Inf would be NaN. The
# exponential is a polynomial: that of libm depends on the CPU.
#
# May: arithmetic in registers. May not: load or store.

cdef struct Activation:
    bint silu
    bint inverted           # x is what the activation made of z
    bint adds               # a residual
    bint frozen             # backward: statistics do not depend on x
    lanes slope
    lanes inverse_slope
    lanes kept              # all bits, or none


cdef inline Activation activation_of(const Job* job) noexcept nogil:
    cdef Activation a
    cdef bint relu = job.activation == RELU
    cdef bint leaky = job.activation == LEAKY_RELU
    a.silu = job.activation == SILU
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
    # e**x for x in [-FAR, 0]: of x - n * log(2), Taylor's series.
    cdef lanes n = rounded(x * splat(LOG2_E))
    cdef lanes r = (x - n * splat(LOG_2)) - n * splat(REST_OF_LOG_2)
    cdef lanes series = splat(reciprocal_factorial[TERMS])
    cdef int k
    for k in range(TERMS):
        series = series * r + splat(reciprocal_factorial[TERMS - 1 - k])
    return times_power_of_two(series, n)


cdef inline lanes exp_of_minus_size(lanes z) noexcept nogil:
    # Of |z|, and 0 from FAR on: without a quotient of infinities. NaN stays.
    return exponential(larger(smaller(z, splat(0) - z), splat(-FAR)))


cdef inline lanes silu(lanes z) noexcept nogil:
    cdef lanes e = exp_of_minus_size(z)
    return if_at_most(z, splat(0), larger(z, splat(-FAR)) * e, z) / (splat(1) + e)


cdef inline lanes silu_slope(lanes z) noexcept nogil:
    # s + z * s * (1 - s) for the sigmoid s, of which `near` is the one or the other.
    cdef lanes e = exp_of_minus_size(z)
    cdef lanes near = splat(1) / (splat(1) + e)
    cdef lanes far = e * near
    cdef lanes bounded = larger(smaller(splat(FAR), z), splat(-FAR))
    return if_at_most(z, splat(0), far, near) + bounded * (near * far)


cdef inline lanes activated(const Activation* a, lanes z) noexcept nogil:
    return silu(z) if a.silu else bent(a, z, z)


cdef inline lanes passed(const Activation* a, lanes z, lanes dy) noexcept nogil:
    # The gradient of z, from that of what the activation makes of z.
    return dy * silu_slope(z) if a.silu else bent(a, z, dy)
