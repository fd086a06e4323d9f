# SPDX-License-Identifier: BSD-3-Clause
# Forward statistics of parts, (count, mean, M2), -> those of the whole, and running
# statistics. Parts are merged in their order (Chan, Golub, LeVeque 1983);
# docs/numerics.md has the bound.
#
# May not: read a tensor, but for one element of each channel.

cdef inline const elem* one_of_each(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                                    Py_ssize_t run, Py_ssize_t offset,
                                    elem* scratch) noexcept nogil:
    # The same element of some channels, side by side: in x, or in `scratch`.
    cdef const elem* first = element(job, &job.buffers.x, channel, run, offset)
    cdef Py_ssize_t c
    if job.buffers.x.channel == 1 and not job.problem.view.features:
        return first
    if job.problem.view.features and channel % job.problem.period + channels > job.problem.period:
        for c in range(channels):
            scratch[c] = element(job, &job.buffers.x, channel + c, run, offset)[0]
    else:
        for c in range(channels):
            scratch[c] = first[c * job.buffers.x.channel]
    return scratch


cdef inline void load_origins(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                              double* origin) noexcept nogil:
    # Means are kept and merged as differences from an element of the channel: so
    # they do not lose in float64 what the elements still have.
    cdef elem scratch[COLUMNS]
    cdef const elem* first
    cdef Py_ssize_t c
    cdef Py_ssize_t run = 0, at = 0
    if not job.problem.centred or counts_nothing(job):
        memset(origin, 0, channels * sizeof(double))
        return
    if is_masked(job):      # the first that counts
        run = job.buffers.mask.first // job.buffers.mask.period
        at = job.buffers.mask.first % job.buffers.mask.period
    first = one_of_each(job, channel, channels, run, at, scratch)
    for c in range(channels):
        origin[c] = as_double(first[c])
        origin[c] = origin[c] if origin[c] - origin[c] == 0.0 else 0.0


cdef inline void merge(Py_ssize_t channels, double n_a, double* mean_a, double* m2_a,
                       double n_b, const double* mean_b, const double* m2_b) noexcept nogil:
    # a += b. An empty a is overwritten, so that its zeros round nothing.
    cdef Py_ssize_t c
    cdef double n = n_a + n_b
    cdef double weight = n_b / n
    cdef double cross = n_a * weight
    cdef double delta
    cdef long infinite = 0
    if n_a == 0.0:
        memcpy(mean_a, mean_b, channels * sizeof(double))
        memcpy(m2_a, m2_b, channels * sizeof(double))
        return
    for c in range(channels):
        delta = mean_b[c] - mean_a[c]
        infinite += delta - delta != 0.0
        m2_a[c] += m2_b[c] + delta * delta * cross
    if not infinite:
        for c in range(channels):
            mean_a[c] += (mean_b[c] - mean_a[c]) * weight
        return
    for c in range(channels):
        delta = mean_b[c] - mean_a[c]
        if delta - delta == 0.0:
            mean_a[c] += delta * weight
        else:       # an infinite mean stays infinite
            mean_a[c] = (mean_a[c] * n_a + mean_b[c] * n_b) / n


cdef void merge_moments(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # The channels [c0, c1) of all segments, in the order of the segments.
    cdef double origin[COLUMNS]
    cdef double* mean = job.buffers.mean
    cdef double* m2 = job.buffers.m2
    cdef Py_ssize_t segment, at, i, c, n_channels
    cdef double count = 0.0, n
    cdef fp_state saved = fp_enter()
    if counts_nothing(job):        # else the first part makes them
        memset(mean + c0, 0, (c1 - c0) * sizeof(double))
        memset(m2 + c0, 0, (c1 - c0) * sizeof(double))
    for segment in range(job.plan.segments):
        at = segment * job.problem.view.channels + c0
        n = <double>count_in_segment(job, segment)
        if n == 0.0:
            continue
        merge(c1 - c0, count, mean + c0, m2 + c0, n, job.buffers.partial[0] + at,
              job.buffers.partial[1] + at)
        count += n
    for i in range(ceil_div(c1 - c0, COLUMNS)):
        n_channels = minimum(COLUMNS, c1 - c0 - i * COLUMNS)
        load_origins(job, c0 + i * COLUMNS, n_channels, origin)
        for c in range(n_channels):
            mean[c0 + i * COLUMNS + c] += origin[c]
    if job.buffers.var != NULL:
        for c in range(c0, c1):
            job.buffers.var[c] = m2[c] / count
        if count == 1.0 and job.problem.eps == 0.0:     # of a mask: any finite deviation will do
            for c in range(c0, c1):
                job.buffers.var[c] = 1.0
    fp_leave(saved)


cdef inline void counted_averages(const Job* job, const double* vectors, Py_ssize_t c0,
                                  Py_ssize_t n, bint squares, double* averages) noexcept nogil:
    # Of means, or of variances, of n channels over the instances that have one.
    cdef Py_ssize_t i, instance, instances = 0
    cdef double part
    memset(averages, 0, n * sizeof(double))
    for instance in range(job.problem.instances):
        if job.buffers.mask.counts[instance] < 2:
            continue
        instances += 1
        part = 1.0 / (<double>job.buffers.mask.counts[instance] - 1.0) if squares else 1.0
        for i in range(n):
            averages[i] += part * vectors[instance * job.problem.view.channels + c0 + i]
    for i in range(n):
        averages[i] /= <double>instances


cdef inline bint any_variance(const Job* job) noexcept nogil:
    # Of masked instances, has any more than one value for each channel?
    cdef Py_ssize_t instance
    for instance in range(job.problem.instances):
        if job.buffers.mask.counts[instance] > 1:
            return True
    return False


cdef inline const double* averages(const Job* job, const double* vectors, Py_ssize_t c0,
                                   Py_ssize_t n, bint squares, double* scratch) noexcept nogil:
    # Means, or M2, or of masked instances variances, of n channels over the instances.
    cdef Py_ssize_t i, instance
    if job.problem.instances == 1:
        return vectors + c0
    if is_masked(job):
        counted_averages(job, vectors, c0, n, squares, scratch)
        return scratch
    memcpy(scratch, vectors + c0, n * sizeof(double))
    for instance in range(1, job.problem.instances):
        for i in range(n):
            scratch[i] += vectors[instance * job.problem.view.channels + c0 + i]
    for i in range(n):
        scratch[i] /= <double>job.problem.instances
    return scratch


cdef void update_running(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # The running variance is unbiased, as in the paper's algorithm 2.
    cdef double scratch[COLUMNS]
    cdef const double* average
    cdef double* running_mean
    cdef double* running_var
    cdef double new = job.problem.momentum, old = 1.0 - job.problem.momentum
    cdef double freedom = count_of_batch(job) - 1.0
    cdef Py_ssize_t i, k, c, n
    cdef fp_state saved = fp_enter()
    if is_masked(job) and job.problem.instances > 1:
        freedom = 1.0           # the averages are of variances
        if not any_variance(job):
            fp_leave(saved)
            return
    for k in range(ceil_div(c1 - c0, COLUMNS)):
        c = c0 + k * COLUMNS
        n = minimum(COLUMNS, c1 - c)
        if job.buffers.running_mean != NULL:
            running_mean = job.buffers.running_mean + c
            average = averages(job, job.buffers.mean, c, n, False, scratch)
            for i in range(n):
                running_mean[i] = old * running_mean[i] + new * average[i]
        if job.buffers.running_var != NULL:
            running_var = job.buffers.running_var + c
            average = averages(job, job.buffers.m2, c, n, True, scratch)
            for i in range(n):
                running_var[i] = old * running_var[i] + new * (average[i] / freedom)
    fp_leave(saved)
