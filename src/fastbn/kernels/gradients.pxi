# SPDX-License-Identifier: BSD-3-Clause
# Backward statistics: the sums of dy and of dy * xhat of each channel, and their merge.
# May not write a tensor.

cdef inline void broadcast_coefficients(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                                        int terms, Columns* columns) noexcept nogil:
    broadcast_channels(job, columns.pow2_scale, coefficient(job, POW2_SCALE) + channel, channels)
    broadcast_channels(job, columns.pivot, coefficient(job, PIVOT) + channel, channels)
    if terms & ACTIVATED:
        broadcast_channels(job, columns.scale, coefficient(job, SCALE) + channel, channels)
        broadcast_channels(job, columns.shift, coefficient(job, SHIFT) + channel, channels)
        columns.activation = activation_of(job)


cdef void sum_gradient_again(const Job* job, const Block* block, Py_ssize_t channel,
                             Columns* columns, double* s, double* q) noexcept nogil:
    # One channel of a block in float64.
    cdef int terms = GRADIENTS | ACTIVATED if job.plan.fused else GRADIENTS
    cdef Columns own
    cdef WideColumns wide
    cdef Py_ssize_t j, width = columns_per_channel(job)
    broadcast_coefficients(job, channel, 1, terms, &own)
    wide.in_real = &own
    if block.mask != NULL:      # each of these columns is the channel's, too
        width = RUN_COLUMNS
    for j in range(width):
        wide.pow2_scale[j] = own.pow2_scale[j]
        wide.pivot[j] = own.pivot[j]
    if block.mask != NULL:
        reduce_counted_f64(job, block, channel, &wide, columns, terms)
    else:
        reduce_block_f64(job, block, channel, 1, &wide, columns, terms)
    reduce_columns(columns, 1, width, s, q)


cdef inline bint not_finite(double s, double q) noexcept nogil:
    return (s - s != 0.0) | (q - q != 0.0)


cdef inline void segment_gradients(const Job* job, Py_ssize_t tile, Py_ssize_t segment,
                                   Columns* columns, double* s, double* q,
                                   int terms) noexcept nogil:
    cdef Py_ssize_t channel = first_channel(job, tile)
    cdef Py_ssize_t channels = count_channels(job, tile)
    cdef double* s_sum = job.buffers.partial[0] + segment * job.problem.view.channels + channel
    cdef double* q_sum = job.buffers.partial[1] + segment * job.problem.view.channels + channel
    cdef Py_ssize_t b, c
    cdef long infinite
    cdef Block block
    memset(s_sum, 0, channels * sizeof(double))
    memset(q_sum, 0, channels * sizeof(double))
    for b in range(segment * job.plan.segment_blocks,
                   minimum((segment + 1) * job.plan.segment_blocks, job.plan.blocks)):
        block = counted_block(job, b)
        if values_in(&block) == 0:
            continue
        reduce_block(job, &block, channel, channels, columns, terms)
        reduce_channels(job, columns, channels, s, q)
        infinite = 0
        for c in range(channels):
            infinite += not_finite(s[c], q[c])
        if infinite:    # sums that overflowed in `real`, or that are truly infinite
            for c in range(channels):
                if not_finite(s[c], q[c]):
                    sum_gradient_again(job, &block, channel + c, columns, &s[c], &q[c])
        for c in range(channels):
            s_sum[c] += s[c]
        for c in range(channels):
            q_sum[c] += q[c]


cdef inline void sum_gradients(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t s0,
                               Py_ssize_t s1, int terms) noexcept nogil:
    cdef Columns columns
    cdef double s[COLUMNS]
    cdef double q[COLUMNS]
    cdef Py_ssize_t tile, segment
    for tile in range(t0, t1):
        broadcast_coefficients(job, first_channel(job, tile), count_channels(job, tile), terms,
                               &columns)
        for segment in range(s0, s1):
            segment_gradients(job, tile, segment, &columns, s, q, terms)


cdef void gradient_sums(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                        Py_ssize_t s0, Py_ssize_t s1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    if job.plan.fused:
        sum_gradients(job, t0, t1, s0, s1, GRADIENTS | ACTIVATED)
    else:
        sum_gradients(job, t0, t1, s0, s1, GRADIENTS)
    fp_leave(saved)


cdef inline void all_gradient_coefficients(const Job* job, Py_ssize_t c0,
                                           Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t i, c
    for i in range(ceil_div(c1 - c0, COLUMNS)):
        c = c0 + i * COLUMNS
        gradient_coefficients(job, c, minimum(COLUMNS, c1 - c))


cdef void batch_coefficients(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # Once more, where x is a part of a batch: with the sums of all of it.
    cdef fp_state saved = fp_enter()
    all_gradient_coefficients(job, c0, c1)
    wrap(job, c0, c1)
    fp_leave(saved)


cdef void merge_gradients(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # -> dbias = sum dy, dweight = sum dy * xhat, and the coefficients of dx.
    cdef const double* s
    cdef const double* q
    cdef double* dbias = job.buffers.dbias
    cdef double* dweight = job.buffers.dweight
    cdef Py_ssize_t c, segment
    cdef fp_state saved = fp_enter()
    memset(dbias + c0, 0, (c1 - c0) * sizeof(double))
    memset(dweight + c0, 0, (c1 - c0) * sizeof(double))
    if counts_nothing(job):        # there is no mean
        fp_leave(saved)
        return
    for segment in range(job.plan.segments):
        s = job.buffers.partial[0] + segment * job.problem.view.channels
        q = job.buffers.partial[1] + segment * job.problem.view.channels
        for c in range(c0, c1):
            dbias[c] += s[c]
        for c in range(c0, c1):
            dweight[c] += q[c]
    for c in range(c0, c1):
        dweight[c] = (dweight[c] + rest_of_mean(job, c) * dbias[c]) * scaled_invstd(job, c)
    memcpy(coefficient(job, OFFSET) + c0, coefficient(job, SHIFT) + c0, (c1 - c0) * sizeof(real))
    if job.problem.group > 1:
        group_coefficients(job, c0, c1)
    elif job.problem.training:
        all_gradient_coefficients(job, c0, c1)
    elif not job.plan.fused:
        for c in range(c0, c1):
            frozen_coefficients(job, c)
    wrap(job, c0, c1)
    fp_leave(saved)


cdef void add_rows(double* rows, Py_ssize_t count, Py_ssize_t length) noexcept nogil:
    # To the first of them.
    cdef Py_ssize_t row, j
    for row in range(1, count):
        for j in range(length):
            rows[j] += rows[row * length + j]


cdef void add_instances(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t instances = job.problem.instances // job.problem.channel_parts
    cdef Py_ssize_t channels = job.problem.view.channels * job.problem.channel_parts
    cdef Py_ssize_t length = job.problem.view.inner + WRAP
    cdef fp_state saved = fp_enter()
    if job.problem.view.features:
        add_rows(job.buffers.feature_sums, job.plan.shares, 2 * length)
        memcpy(job.buffers.dweight, job.buffers.feature_sums,
               job.problem.view.inner * sizeof(double))
        memcpy(job.buffers.dbias, job.buffers.feature_sums + length,
               job.problem.view.inner * sizeof(double))
    else:
        add_rows(job.buffers.dweight, instances, channels)
        add_rows(job.buffers.dbias, instances, channels)
    fp_leave(saved)
