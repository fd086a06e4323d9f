# SPDX-License-Identifier: BSD-3-Clause
# What follows the normalisation of an element, z, in the same pass, and how a gradient passes
# it. The only place in the kernels that knows activations. A row for each number of fastbn.h:
#
#                 value                           gradient of z
#   identity      z                               dy
#   relu          z if z > 0 else 0               dy if z > 0 else 0
#   relu6         the same, at most 6             the same, 0 from 6 on
#   leaky_relu    z if z > 0 else z * slope       dy if z > 0 else dy * slope
#   silu          z / (1 + exp(-z))               dy * silu_slope(z), which backward writes first
#   hardswish     z * (z + 3) / 6 in (-3, 3),     dy * (2 z + 3) / 6 in (-3, 3),
#                 else 0 or z                     else 0 or dy
#   hardsigmoid   (z + 3) / 6 in (-3, 3),         dy / 6 in (-3, 3),
#                 else 0 or 1                     else 0
#
# The first four are one, `leaky_select`, but for the 6. What is dropped is dropped by a select:
# NaN stays NaN, and 0 * Inf is nowhere. Only a leaky slope can be undone (`leaky_inverse`). The
# exponential is a polynomial: that of libm depends on the CPU.
#
# To add one: its row here, in `traits`, in `activate` and in `curved_grad`.
#
# May: arithmetic in registers. May not: load or store.

cdef enum:
    ACTIVATIONS = FASTBN_HARDSIGMOID + 1

cdef ActivationTraits traits[ACTIVATIONS]


cdef const ActivationTraits* filled_traits() noexcept nogil:
    # Where it is not said, nothing is written first.
    traits[<int>FASTBN_SILU].dz_first = True
    return traits


cdef struct Activation:
    int number              # of fastbn.h
    bint curved             # not one of the first four
    bint capped             # relu6
    bint inverted           # x is what the activation made of z
    bint adds               # a residual
    bint frozen             # backward: statistics do not depend on x
    lanes slope
    lanes inverse_slope
    lanes kept              # all bits, or none


cdef inline Activation activation_of(const Job* job) noexcept nogil:
    cdef Activation a
    cdef int number = job.problem.activation
    cdef bint relu = number == FASTBN_RELU or number == FASTBN_RELU6
    cdef bint leaky = number == FASTBN_LEAKY_RELU
    a.number = number
    a.curved = not (relu or leaky or number == FASTBN_IDENTITY)
    a.capped = number == FASTBN_RELU6
    a.inverted = job.problem.inverted
    a.adds = job.buffers.residual.data != NULL
    a.frozen = not job.problem.training
    a.slope = set1(as_real(job.problem.negative_slope) if leaky else 1)
    a.inverse_slope = set1(as_real(1.0 / job.problem.negative_slope) if leaky else 1)
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


cdef inline lanes within_3(lanes z, lanes below, lanes between, lanes above) noexcept nogil:
    # By where z is: up to -3, from 3 on, or between; NaN is between.
    return select_le(z, set1(-3), below, select_le(set1(3), z, above, between))


cdef inline lanes hardswish(lanes z) noexcept nogil:
    return within_3(z, set1(0), z * (z + set1(3)) * set1(1.0 / 6.0), z)


cdef inline lanes hardsigmoid(lanes z) noexcept nogil:
    return within_3(z, set1(0), (z + set1(3)) * set1(1.0 / 6.0), set1(1))


cdef inline lanes activate(const Activation* a, lanes z) noexcept nogil:
    if not a.curved:
        return leaky_select(a, z, min_lanes(set1(6), z) if a.capped else z)
    if a.number == FASTBN_HARDSWISH:
        return hardswish(z)
    return hardsigmoid(z) if a.number == FASTBN_HARDSIGMOID else silu(z)


cdef inline lanes leaky_grad(const Activation* a, lanes z, lanes dy) noexcept nogil:
    return leaky_select(a, z, select_le(set1(6), z, set1(0), dy) if a.capped else dy)


cdef inline lanes curved_grad(const Activation* a, lanes z, lanes dy) noexcept nogil:
    if a.number == FASTBN_HARDSWISH:
        return within_3(z, set1(0), dy * ((z + z + set1(3)) * set1(1.0 / 6.0)), dy)
    if a.number == FASTBN_HARDSIGMOID:
        return within_3(z, set1(0), dy * set1(1.0 / 6.0), set1(0))
    return dy * silu_slope(z)


cdef inline lanes activation_grad(const Activation* a, lanes z, lanes dy) noexcept nogil:
    # The gradient of z, from that of what the activation makes of z.
    return curved_grad(a, z, dy) if a.curved else leaky_grad(a, z, dy)


cdef lanes curved_grad_of(const void* a, lanes z, lanes dy) noexcept nogil:
    return curved_grad(<const Activation*>a, z, dy)


cdef inline lanes activation_grad_outlined(const Activation* a, lanes z, lanes dy) noexcept nogil:
    # The same, where a curve is seldom: its code need not be in every loop.
    return call_noinline(curved_grad_of, a, z, dy) if a.curved else leaky_grad(a, z, dy)
