# SPDX-License-Identifier: BSD-3-Clause
# The coefficients of every elementwise pass: what the formulas need of a channel, in `real`;
# forward, and for dx. docs/derivation.md has the equations. May not read or write a tensor.
#
# A channel's numbers are scaled by a power of two where their size is extreme,
# so that squares, products and coefficients neither overflow nor vanish. The
# scaling is exact; it is 1 for all usual data.

cdef inline real* coefficient(const Job* job, int which) noexcept nogil:
    return <real*>job.buffers.coefficients + which * (job.problem.view.channels + WRAP)


cdef inline void wrap(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # The first channels once more behind the last one, where whole rows of many
    # channels are written with them.
    cdef int which
    if job.problem.view.inner == 1 and job.plan.tiles > 1 and c1 - c0 == job.problem.view.channels:
        for which in range(COEFFICIENT_KINDS):
            memcpy(coefficient(job, which) + c1, coefficient(job, which), WRAP * sizeof(real))


cdef inline double size_of(double mean, double invstd) noexcept nogil:
    # The size of a channel's data: its mean or its deviation.
    cdef double size = 1.0 / invstd
    return fabs(mean) if fabs(mean) > size else size


cdef inline bint usual(double mean, double invstd) noexcept nogil:
    # Is the size far from any end, said without a division? False too for NaN.
    return ((fabs(mean) < USUAL_SCALE) & (invstd > 1.0 / USUAL_SCALE)
            & ((fabs(mean) > 1.0 / USUAL_SCALE) | (invstd < USUAL_SCALE)))


cdef inline double pow2_scale_for(double size) noexcept nogil:
    # An inverse power of two near the size of the data. NaN, Inf and 0: 1.
    if size > USUAL_SCALE and size <= DBL_MAX:
        return inverse_pow2(size if size < LARGEST_SCALE else LARGEST_SCALE)
    if size < 1.0 / USUAL_SCALE and size > 0.0:
        return inverse_pow2(size if size > 1.0 / LARGEST_SCALE else 1.0 / LARGEST_SCALE)
    return 1.0


cdef inline double weight_of(const Job* job, Py_ssize_t c) noexcept nogil:
    return 1.0 if job.buffers.weight == NULL or job.problem.view.features else job.buffers.weight[c]


cdef inline double bias_of(const Job* job, Py_ssize_t c) noexcept nogil:
    return 0.0 if job.buffers.bias == NULL or job.problem.view.features else job.buffers.bias[c]


cdef void broadcast_features(const Job* job, Py_ssize_t j0, Py_ssize_t j1) noexcept nogil:
    # And zeros, so that a register may reach past the last feature.
    cdef real* weight = <real*>job.buffers.features
    cdef real* bias = weight + job.problem.view.inner + WRAP
    cdef Py_ssize_t j
    cdef fp_state saved = fp_enter()
    if job.buffers.real_weight == NULL:
        for j in range(j0, j1):
            weight[j] = 1.0 if job.buffers.weight == NULL else as_real(job.buffers.weight[j])
        memset(weight + j1, 0, WRAP * sizeof(real))
    if job.buffers.real_bias == NULL:
        for j in range(j0, j1):
            bias[j] = 0.0 if job.buffers.bias == NULL else as_real(job.buffers.bias[j])
        memset(bias + j1, 0, WRAP * sizeof(real))
    fp_leave(saved)


cdef void broadcast_groups(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t c, g
    cdef double invstd
    cdef fp_state saved = fp_enter()
    for g in range(c0 // job.problem.group, c1 // job.problem.group):
        invstd = job.buffers.group_invstd[g]
        if job.buffers.var != NULL:         # in the same place
            invstd = 1.0 / sqrt(invstd + job.problem.eps)
            job.buffers.group_invstd[g] = invstd
        for c in range(g * job.problem.group, (g + 1) * job.problem.group):
            job.buffers.mean[c] = job.buffers.group_mean[g]
            job.buffers.invstd[c] = invstd
    fp_leave(saved)


cdef void unusual_coefficients(const Job* job, Py_ssize_t c) noexcept nogil:
    cdef double pow2_scale = pow2_scale_for(size_of(job.buffers.mean[c], job.buffers.invstd[c]))
    cdef double mean = job.buffers.mean[c] * pow2_scale
    cdef double invstd = job.buffers.invstd[c] / pow2_scale
    cdef double scale = invstd * weight_of(job, c)
    cdef double shift = bias_of(job, c)
    cdef real pivot = as_real(mean)
    if mean != <double>pivot:       # 0 * Inf would be NaN
        shift -= (mean - <double>pivot) * scale
    coefficient(job, POW2_SCALE)[c] = as_real(pow2_scale)
    coefficient(job, PIVOT)[c] = pivot
    coefficient(job, SCALE)[c] = as_real(scale)
    coefficient(job, SHIFT)[c] = as_real(shift)


cdef inline const double* parameter(const Job* job, const double* vector, double without,
                                    Py_ssize_t c0, Py_ssize_t n, double* scratch) noexcept nogil:
    # Of n channels. A loop that has to ask whether there is one would not become vectors.
    cdef Py_ssize_t i
    if vector != NULL and not job.problem.view.features:
        return vector + c0
    for i in range(n):
        scratch[i] = without
    return scratch


cdef inline void channel_coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t n) noexcept nogil:
    # For n channels as if they were usual, in loops that become vectors, and
    # again for those that are not. The pivot is the mean as `real` has it; the
    # rest of the mean goes into the shift.
    cdef double scratch[2][COLUMNS]
    cdef const double* weight = parameter(job, job.buffers.weight, 1.0, c0, n, scratch[0])
    cdef const double* bias = parameter(job, job.buffers.bias, 0.0, c0, n, scratch[1])
    cdef const double* mean = job.buffers.mean + c0
    cdef double* invstd = job.buffers.invstd + c0
    cdef real* pow2_scale = coefficient(job, POW2_SCALE) + c0
    cdef real* pivot = coefficient(job, PIVOT) + c0
    cdef real* scale = coefficient(job, SCALE) + c0
    cdef real* shift = coefficient(job, SHIFT) + c0
    cdef double eps = job.problem.eps
    cdef Py_ssize_t i
    cdef long unusual = 0
    if job.buffers.var != NULL and job.problem.group == 1:
        for i in range(n):
            invstd[i] = 1.0 / sqrt(job.buffers.var[c0 + i] + eps)
    for i in range(n):
        pow2_scale[i] = 1.0
    for i in range(n):
        pivot[i] = as_real(mean[i])
    for i in range(n):
        scale[i] = as_real(invstd[i] * weight[i])
    for i in range(n):
        shift[i] = as_real(bias[i] - (mean[i] - <double>pivot[i]) * (invstd[i] * weight[i]))
    for i in range(n):
        unusual += not usual(mean[i], invstd[i])
    if unusual:
        for i in range(n):
            if not usual(mean[i], invstd[i]):
                unusual_coefficients(job, c0 + i)


cdef void coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t i, c
    cdef fp_state saved = fp_enter()
    for i in range(ceil_div(c1 - c0, COLUMNS)):
        c = c0 + i * COLUMNS
        channel_coefficients(job, c, minimum(COLUMNS, c1 - c))
    wrap(job, c0, c1)
    fp_leave(saved)


# ---- of dx ------------------------------------------------------------------------
#
cdef inline double scaled_invstd(const Job* job, Py_ssize_t c) noexcept nogil:
    return job.buffers.invstd[c] / <double>coefficient(job, POW2_SCALE)[c]


cdef inline double rest_of_mean(const Job* job, Py_ssize_t c) noexcept nogil:
    # What the pivot has left of the mean, and the sums' d therefore lacks.
    return (<double>coefficient(job, PIVOT)[c]
            - job.buffers.mean[c] * <double>coefficient(job, POW2_SCALE)[c])


# Below, names of their own for vectors: through `job`, the compiler would have to
# read each pointer again after every store, and could not use vectors.

cdef inline void gradient_coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t n) noexcept nogil:
    # dx = dy * scale - (d * slope + shift), for n channels
    cdef double scratch[COLUMNS]
    cdef const double* weight = parameter(job, job.buffers.weight, 1.0, c0, n, scratch)
    cdef const double* dbias = job.buffers.dbias + c0
    cdef const double* dweight = job.buffers.dweight + c0
    cdef real* slope = coefficient(job, SLOPE) + c0
    cdef real* shift = coefficient(job, SHIFT) + c0
    cdef double inverse_count = 1.0 / count_of_batch(job)
    cdef Py_ssize_t i
    for i in range(n):
        slope[i] = as_real(weight[i] * dweight[i] * inverse_count
                           * scaled_invstd(job, c0 + i) * scaled_invstd(job, c0 + i))
    for i in range(n):
        shift[i] = as_real(weight[i] * inverse_count * scaled_invstd(job, c0 + i) * (
            dbias[i] + rest_of_mean(job, c0 + i) * dweight[i] * scaled_invstd(job, c0 + i)))
    if not job.problem.centred:
        memset(shift, 0, n * sizeof(real))


cdef void group_coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # The same for sums over all channels of a group.
    cdef Py_ssize_t c, g
    cdef double s, q, invstd
    cdef double inverse_count = 1.0 / <double>(values_per_channel(job) * job.problem.group)
    for g in range(c0 // job.problem.group, c1 // job.problem.group):
        s = q = 0.0
        for c in range(g * job.problem.group, (g + 1) * job.problem.group):
            s += weight_of(job, c) * job.buffers.dbias[c]
            q += weight_of(job, c) * job.buffers.dweight[c]
        for c in range(g * job.problem.group, (g + 1) * job.problem.group):
            invstd = scaled_invstd(job, c)
            coefficient(job, SLOPE)[c] = as_real(q * inverse_count * invstd * invstd)
            coefficient(job, SHIFT)[c] = as_real(
                inverse_count * invstd * (s + rest_of_mean(job, c) * q * invstd))


cdef inline void frozen_coefficients(const Job* job, Py_ssize_t c) noexcept nogil:
    # Fixed statistics: dx = dy * weight * invstd, written by `write_forward`.
    # -0.0 is what can be added without a trace.
    coefficient(job, POW2_SCALE)[c] = 1.0
    coefficient(job, PIVOT)[c] = 0.0
    coefficient(job, SHIFT)[c] = -0.0
    coefficient(job, SCALE)[c] = as_real(job.buffers.invstd[c] * weight_of(job, c))
