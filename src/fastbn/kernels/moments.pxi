# SPDX-License-Identifier: BSD-3-Clause
# Forward statistics: (count, mean, M2) of each channel, M2 = sum (x - mean)^2.
# Blocks are summed around a pivot and merged in their order (Chan, Golub,
# LeVeque 1983); docs/numerics.md has the bound. May not write a tensor.

cdef extern from "float.h" nogil:
    double DBL_MAX

cdef enum:
    PROBES = 5      # the pivot is the median of so many elements of the block
    SPREAD = 4      # sums are trusted while sum (x - pivot)^2 <= SPREAD * M2

cdef struct BlockMoments:
    double s[COLUMNS]
    double q[COLUMNS]
    double mean[COLUMNS]
    double m2[COLUMNS]
    real pivot[COLUMNS + PADDING]
    elem probe[PROBES][COLUMNS]


cdef inline lanes median(lanes a, lanes b, lanes c, lanes d, lanes e) noexcept nogil:
    cdef lanes f = larger(smaller(a, b), smaller(c, d))
    cdef lanes g = smaller(larger(a, b), larger(c, d))
    return larger(smaller(f, g), smaller(e, larger(f, g)))


cdef inline lanes load_upto(const elem* p, Py_ssize_t n) noexcept nogil:
    return load(p) if n >= WIDTH else load_part(p, n)


cdef inline void choose_pivots(const Job* job, const Block* block, Py_ssize_t channel,
                               Py_ssize_t channels, BlockMoments* m) noexcept nogil:
    # An element of the block, never a rounded mean: a constant channel then has
    # differences of exactly 0. The median, since one probe can be an outlier.
    cdef const elem* probe[PROBES]
    cdef Py_ssize_t i, c, at, n = block.runs * block.length
    cdef lanes pivot
    for i in range(PROBES):
        at = i * (n - 1) // (PROBES - 1)
        probe[i] = element(job, &job.x, channel, block.run + at // block.length,
                           block.offset + at % block.length)
        if job.x.channel != 1:
            for c in range(channels):
                m.probe[i][c] = probe[i][c * job.x.channel]
            probe[i] = m.probe[i]
    for i in range(steps(channels, WIDTH)):
        c = i * WIDTH
        pivot = median(load_upto(probe[0] + c, channels - c), load_upto(probe[1] + c, channels - c),
                       load_upto(probe[2] + c, channels - c), load_upto(probe[3] + c, channels - c),
                       load_upto(probe[4] + c, channels - c))
        store_real(m.pivot + c, pivot)


cdef inline void fold_columns(const Columns* columns, Py_ssize_t channels, Py_ssize_t width,
                              double* s, double* q) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(channels):
        s[c] = fold(columns.s + c * width, width)
        q[c] = fold(columns.q + c * width, width)


cdef void sum_wide(const Job* job, const Block* block, Py_ssize_t channel, bint gradient,
                   double scale, double pivot, double invstd, Columns* columns,
                   double* s, double* q) noexcept nogil:
    # One channel of a block once more, in float64. It is still in the cache.
    cdef Matrix x, dy
    cdef Py_ssize_t run, width = columns_per_channel(job)
    memset(columns.s, 0, width * sizeof(double))
    memset(columns.q, 0, width * sizeof(double))
    if job.plan.long_runs:
        for run in range(block.run, block.run + block.runs):
            x = long_matrix(job, &job.x, block, channel, run)
            if gradient:
                dy = long_matrix(job, &job.dy, block, channel, run)
            wide_matrix(&x, &dy, gradient, scale, pivot, invstd, columns)
            x = remainder_matrix(x, block.length)
            if gradient:
                dy = remainder_matrix(dy, block.length)
            wide_matrix(&x, &dy, gradient, scale, pivot, invstd, columns)
    else:
        x = short_matrix(job, &job.x, block, channel, 1)
        if gradient:
            dy = short_matrix(job, &job.dy, block, channel, 1)
        wide_matrix(&x, &dy, gradient, scale, pivot, invstd, columns)
    fold_columns(columns, 1, width, s, q)


cdef inline double squares(double s, double q, double n) noexcept nogil:
    # M2 from sums around a pivot. Rounding can leave it below 0; NaN stays.
    cdef double m2 = q - s * (s / n)
    return 0.0 if m2 < 0.0 else m2


cdef inline bint trusted(double q, double m2, double n) noexcept nogil:
    # False too where q is NaN.
    return (q >= n * SMALLEST_SQUARE) & (q <= SPREAD * m2) & (q <= DBL_MAX)


cdef inline void close_block(const Job* job, const Block* block, Py_ssize_t channel,
                             Py_ssize_t channels, Columns* columns,
                             BlockMoments* m) noexcept nogil:
    cdef Py_ssize_t c, width = columns_per_channel(job)
    cdef double n = <double>block.runs * <double>block.length
    cdef double pivot
    cdef int good = 1
    fold_columns(columns, channels, width, m.s, m.q)
    for c in range(channels):
        m.mean[c] = <double>m.pivot[c] + m.s[c] / n
        m.m2[c] = squares(m.s[c], m.q[c], n)
        good &= trusted(m.q[c], m.m2[c], n)
    if good:
        return
    for c in range(channels):
        if not trusted(m.q[c], m.m2[c], n):
            pivot = m.mean[c] if m.mean[c] - m.mean[c] == 0.0 else 0.0
            sum_wide(job, block, channel + c, False, 1.0, pivot, 1.0, columns, &m.s[c], &m.q[c])
            m.mean[c] = pivot + m.s[c] / n
            m.m2[c] = squares(m.s[c], m.q[c], n)


cdef inline void merge(Py_ssize_t channels, double n_a, double* mean_a, double* m2_a,
                       double n_b, const double* mean_b, const double* m2_b) noexcept nogil:
    # a += b. An empty a is overwritten, so that its zeros round nothing.
    cdef Py_ssize_t c
    cdef double n = n_a + n_b
    cdef double weight = n_b / n
    cdef double cross = n_a * weight
    cdef double delta, near, far
    if n_a == 0.0:
        memcpy(mean_a, mean_b, channels * sizeof(double))
        memcpy(m2_a, m2_b, channels * sizeof(double))
        return
    for c in range(channels):
        delta = mean_b[c] - mean_a[c]
        near = mean_a[c] + delta * weight
        far = (mean_a[c] * n_a + mean_b[c] * n_b) / n   # an infinite mean stays infinite
        mean_a[c] = near if delta - delta == 0.0 else far
        m2_a[c] += m2_b[c] + delta * delta * cross


cdef inline void segment_moments(const Job* job, Py_ssize_t tile, Py_ssize_t segment,
                                 Columns* columns, BlockMoments* m) noexcept nogil:
    cdef Py_ssize_t channel = first_channel(job, tile)
    cdef Py_ssize_t channels = count_channels(job, tile)
    cdef Py_ssize_t width = columns_per_channel(job)
    cdef Py_ssize_t at = segment * job.view.channels + channel
    cdef Py_ssize_t b
    cdef double count = 0.0, n
    cdef Block block
    for b in range(segment * job.plan.segment_blocks,
                   minimum((segment + 1) * job.plan.segment_blocks, job.plan.blocks)):
        block = block_at(job, b)
        n = <double>block.runs * <double>block.length
        choose_pivots(job, &block, channel, channels, m)
        spread(columns.pivot, m.pivot, channels, width, channels * width)
        memset(columns.s, 0, channels * width * sizeof(double))
        memset(columns.q, 0, channels * width * sizeof(double))
        sum_block(job, &block, channel, channels, columns, False)
        close_block(job, &block, channel, channels, columns, m)
        merge(channels, count, job.partial[0] + at, job.partial[1] + at, n, m.mean, m.m2)
        count += n


cdef void moments(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                  Py_ssize_t s0, Py_ssize_t s1) noexcept nogil:
    cdef Columns columns
    cdef BlockMoments m
    cdef Py_ssize_t tile, segment
    cdef fp_state saved = fp_enter()
    for tile in range(t0, t1):
        for segment in range(s0, s1):
            segment_moments(job, tile, segment, &columns, &m)
    fp_leave(saved)


cdef void merge_moments(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # The channels [c0, c1) of all segments, in the order of the segments.
    cdef Py_ssize_t segment, at, c
    cdef double count = 0.0, n
    cdef fp_state saved = fp_enter()
    for segment in range(job.plan.segments):
        at = segment * job.view.channels + c0
        n = <double>count_in_segment(job, segment)
        merge(c1 - c0, count, job.mean + c0, job.m2 + c0,
              n, job.partial[0] + at, job.partial[1] + at)
        count += n
    if job.var != NULL:
        for c in range(c0, c1):
            job.var[c] = job.m2[c] / count
    fp_leave(saved)


cdef void update_running(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    # The running variance is unbiased, as in the paper's algorithm 2.
    cdef Py_ssize_t segment, c
    cdef double count = 0.0
    cdef fp_state saved = fp_enter()
    for segment in range(job.plan.segments):
        count += <double>count_in_segment(job, segment)
    for c in range(c0, c1):
        if job.running_mean != NULL:
            job.running_mean[c] = ((1.0 - job.momentum) * job.running_mean[c]
                                   + job.momentum * job.mean[c])
        if job.running_var != NULL:
            job.running_var[c] = ((1.0 - job.momentum) * job.running_var[c]
                                  + job.momentum * (job.m2[c] / (count - 1.0)))
    fp_leave(saved)
