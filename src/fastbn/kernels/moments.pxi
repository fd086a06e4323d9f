# SPDX-License-Identifier: BSD-3-Clause
# Forward statistics: (count, mean, M2) of each channel of a segment, M2 = sum (x - mean)^2.
# Blocks are summed around a pivot, and merged. May not write a tensor.

cdef enum:
    SPREAD = 4      # sums are trusted while sum (x - pivot)^2 <= SPREAD * M2 ...
    SMALLEST_BLOCK = 32     # narrower elements, if no more, are summed in float64 at once


cdef struct BlockMoments:
    double s[COLUMNS]
    double q[COLUMNS]
    double origin[COLUMNS]
    double start[COLUMNS]   # what was subtracted: the pivot, or a first mean
    double mean[COLUMNS]    # less the origin
    double m2[COLUMNS]
    int trusted[COLUMNS]
    real pivot[COLUMNS + PADDING]


cdef inline lanes median(lanes a, lanes b, lanes c, lanes d, lanes e) noexcept nogil:
    cdef lanes f = max_lanes(min_lanes(a, b), min_lanes(c, d))
    cdef lanes g = min_lanes(max_lanes(a, b), max_lanes(c, d))
    return max_lanes(min_lanes(f, g), min_lanes(e, max_lanes(f, g)))


cdef inline void choose_pivots(const Job* job, const Block* block, Py_ssize_t channel,
                               Py_ssize_t channels, BlockMoments* m) noexcept nogil:
    # An element of the block, never a rounded mean: a constant channel then has
    # differences of exactly 0. The median, since one probe can be an outlier.
    cdef elem scratch[PROBES][COLUMNS + PADDING]
    cdef const elem* probes[PROBES]
    cdef lanes value[PROBES]
    cdef Py_ssize_t i, k, c, n, at, run
    if not job.problem.centred:
        memset(m.pivot, 0, (channels + PADDING) * sizeof(real))
        return
    for k in range(PROBES):
        at = (block.mask.probes[k] if block.mask != NULL
              else k * (block.runs * block.length - 1) // (PROBES - 1))
        run = at // block.length if block.runs > 1 else 0
        probes[k] = one_of_each(job, channel, channels, block.run + run,
                                block.offset + at - run * block.length, scratch[k])
    for i in range(ceil_div(channels, WIDTH)):
        c = i * WIDTH
        n = channels - c
        for k in range(PROBES):
            value[k] = load(probes[k] + c) if n >= WIDTH else load_n_or(probes[k] + c, n, set1(0))
        store_real(m.pivot + c, median(value[0], value[1], value[2], value[3], value[4]))


cdef inline double squares(double s, double q, double n) noexcept nogil:
    # M2 from sums around a pivot. Rounding can leave it below 0; NaN stays.
    cdef double m2 = q - s * (s / n)
    return 0.0 if m2 < 0.0 else m2


cdef inline bint are_trusted(double q, double m2, double n) noexcept nogil:
    # False too where q is NaN.
    return (q >= n * SMALLEST_SQUARE) & (q <= SPREAD * m2) & (q <= DBL_MAX)


cdef inline void close_channels(const Job* job, Py_ssize_t c0, Py_ssize_t c1, double n,
                                BlockMoments* m) noexcept nogil:
    cdef Py_ssize_t c
    if not job.problem.centred:     # the mean is taken to be 0
        memset(m.mean + c0, 0, (c1 - c0) * sizeof(double))
        memcpy(m.m2 + c0, m.q + c0, (c1 - c0) * sizeof(double))
        return
    for c in range(c0, c1):
        m.mean[c] = (m.start[c] - m.origin[c]) + m.s[c] / n
        m.m2[c] = squares(m.s[c], m.q[c], n)


cdef void sum_counted_float64(const Job* job, const Block* block, Py_ssize_t channel, Py_ssize_t c0,
                              Py_ssize_t c1, Columns* columns, BlockMoments* m) noexcept nogil:
    # One channel after the other.
    cdef WideColumns wide
    cdef Py_ssize_t c, j
    for c in range(c0, c1):
        for j in range(RUN_COLUMNS):
            wide.pivot[j] = m.start[c]
        reduce_counted_f64(job, block, channel + c, &wide, columns, MOMENTS)
        reduce_columns(columns, 1, RUN_COLUMNS, m.s + c, m.q + c)


cdef inline void sum_float64(const Job* job, const Block* block, Py_ssize_t channel, Py_ssize_t c0,
                             Py_ssize_t c1, double n, Columns* columns,
                             BlockMoments* m) noexcept nogil:
    # Channels [c0, c1) of a block in float64, around `start`.
    cdef WideColumns wide
    cdef Py_ssize_t c, j, width = columns_per_channel(job)
    if block.mask != NULL:
        sum_counted_float64(job, block, channel, c0, c1, columns, m)
        close_channels(job, c0, c1, n, m)
        return
    if width == 1:
        memcpy(wide.pivot, m.start + c0, (c1 - c0) * sizeof(double))
    else:
        for c in range(c0, c1):
            for j in range(width):
                wide.pivot[(c - c0) * width + j] = m.start[c]
    reduce_block_f64(job, block, channel + c0, c1 - c0, &wide, columns, MOMENTS)
    reduce_columns(columns, c1 - c0, width, m.s + c0, m.q + c0)
    close_channels(job, c0, c1, n, m)


cdef void sum_untrusted(const Job* job, const Block* block, Py_ssize_t channel,
                        Py_ssize_t channels, double n, Columns* columns,
                        BlockMoments* m) noexcept nogil:
    # Each run of channels that are not to be trusted.
    cdef Py_ssize_t c = 0, end
    while c < channels:
        end = c + 1
        if not m.trusted[c]:
            while end < channels and not m.trusted[end]:
                end += 1
            sum_float64(job, block, channel, c, end, n, columns, m)
        c = end


cdef inline void sum_few(const Job* job, const Block* block, Py_ssize_t channel,
                         Py_ssize_t channels, double n, Columns* columns,
                         BlockMoments* m) noexcept nogil:
    # Few values: around the origin. It is one of the channel's, so their squares are
    # at most twice as many times the channel's M2 as there are values: nothing to
    # float64, but too much for elements that are float64 themselves.
    memcpy(m.start, m.origin, channels * sizeof(double))
    memset(m.trusted, 0, channels * sizeof(int))
    sum_untrusted(job, block, channel, channels, n, columns, m)


cdef inline void close_block(const Job* job, const Block* block, Py_ssize_t channel,
                             Py_ssize_t channels, double n, Columns* columns,
                             BlockMoments* m) noexcept nogil:
    # Sums -> mean and M2; where the sums are not trusted, once more in float64 around the
    # first mean, if there is one.
    cdef Py_ssize_t c
    cdef int all_trusted = 1
    reduce_channels(job, columns, channels, m.s, m.q)
    for c in range(channels):
        m.start[c] = <double>m.pivot[c]
    close_channels(job, 0, channels, n, m)
    for c in range(channels):
        m.trusted[c] = are_trusted(m.q[c], m.m2[c], n)
        all_trusted &= m.trusted[c]
    if all_trusted:
        return
    for c in range(channels):
        if not m.trusted[c]:
            m.start[c] = m.origin[c] + m.mean[c] if m.mean[c] - m.mean[c] == 0.0 else 0.0
    sum_untrusted(job, block, channel, channels, n, columns, m)


cdef inline void segment_moments(const Job* job, Py_ssize_t tile, Py_ssize_t segment,
                                 Columns* columns, BlockMoments* m) noexcept nogil:
    cdef Py_ssize_t channel = first_channel(job, tile)
    cdef Py_ssize_t channels = count_channels(job, tile)
    cdef Py_ssize_t at = segment * job.problem.view.channels + channel
    cdef Py_ssize_t b
    cdef double count = 0.0, n
    cdef Block block
    load_origins(job, channel, channels, m.origin)
    for b in range(segment * job.plan.segment_blocks,
                   minimum((segment + 1) * job.plan.segment_blocks, job.plan.blocks)):
        block = counted_block(job, b)
        n = <double>values_in(&block)
        if n == 0.0:
            continue
        if HALVES > 1 and n <= SMALLEST_BLOCK:
            sum_few(job, &block, channel, channels, n, columns, m)
        else:
            choose_pivots(job, &block, channel, channels, m)
            broadcast_channels(job, columns.pivot, m.pivot, channels)
            reduce_block(job, &block, channel, channels, columns, MOMENTS)
            close_block(job, &block, channel, channels, n, columns, m)
        merge(channels, count, job.buffers.partial[0] + at, job.buffers.partial[1] + at, n, m.mean,
              m.m2)
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
