# SPDX-License-Identifier: BSD-3-Clause
# The smallest and the largest number of each channel; NaN, if it has one. What is found in
# which order does not matter, but for zeros: they lose their sign.
#
# May: compare. May not: sum.

cdef struct Extremes:
    # Of the columns of a tile.
    lanes aligned               # unused: the arrays begin where a register may
    real low[COLUMNS + PADDING]
    real high[COLUMNS + PADDING]
    real nan[COLUMNS + PADDING]     # or 0


cdef inline void matrix_extremes(const Matrix* m, Py_ssize_t first, Extremes* e) noexcept nogil:
    # Of columns from `first` on.
    cdef Py_ssize_t i, at, n, row
    cdef lanes v, low, high, nan, was_low, was_high, was_nan
    for i in range(ceil_div(m.columns, WIDTH)):
        at, n = first + i * WIDTH, minimum(WIDTH, m.columns - i * WIDTH)
        low = was_low = load_real(e.low + at)
        high = was_high = load_real(e.high + at)
        nan = was_nan = load_real(e.nan + at)
        for row in range(m.rows):
            if n == WIDTH:
                v = load(row_at(m, row) + i * WIDTH)
            else:
                v = load_n_or(row_at(m, row) + i * WIDTH, n, set1(0))
            low = min_lanes(v, low)     # which stays where v is NaN; so does the next one
            high = max_lanes(high, v)
            nan = select_le(v, v, nan, v)
        store_real(e.low + at, blend_at(low, was_low, n))
        store_real(e.high + at, blend_at(high, was_high, n))
        store_real(e.nan + at, blend_at(nan, was_nan, n))


cdef void one_run_extremes(const elem* x, Py_ssize_t length, Py_ssize_t first,
                           Extremes* e) noexcept nogil:
    cdef Matrix m = matrix_of_run(<elem*>x, length)
    cdef int part
    for part in range(2):
        matrix_extremes(&m, first, e)
        m = remainder_matrix(m, length)


cdef inline void run_extremes(const Job* job, const Block* block, Py_ssize_t channel,
                              Py_ssize_t channels, Extremes* e) noexcept nogil:
    cdef Py_ssize_t run, c
    for run in range(block.run, block.run + block.runs):
        for c in range(channels):
            one_run_extremes(element(job, &job.buffers.x, channel + c, run, block.offset),
                             block.length, c * RUN_COLUMNS, e)


cdef inline void block_extremes(const Job* job, const Block* block, Py_ssize_t channel,
                                Py_ssize_t channels, Extremes* e) noexcept nogil:
    cdef Py_ssize_t i, c, together = neighbours(job, &job.buffers.x, channels)
    cdef Matrix m
    cdef int part
    if block.mask != NULL:
        counted_extremes(job, block, channel, channels, e)
    elif job.plan.long_runs:
        run_extremes(job, block, channel, channels, e)
    elif job.plan.pixels > 1 and gapless_runs(job, &job.buffers.x):
        m = pixel_matrix(job, element(job, &job.buffers.x, 0, block.run, 0), block.runs)
        for part in range(2):
            matrix_extremes(&m, 0, e)
            m = remainder_matrix(m, block.runs * channels)
    else:
        for i in range(channels // together):
            c = i * together
            m = short_matrix(job, &job.buffers.x, block, channel + c, together)
            matrix_extremes(&m, c * job.problem.view.inner, e)


cdef void fill_with_counted(const Job* job, const Block* block, Py_ssize_t channel,
                            Py_ssize_t channels, real* fill) noexcept nogil:
    # An element that counts in the place of those that do not: it changes no extreme.
    cdef Py_ssize_t c, j, width = columns_per_channel(job), at = block.mask.probes[0]
    cdef elem* one
    for c in range(channels):
        one = element(job, &job.buffers.x, channel + c, block.run + at // block.length,
                      block.offset + at % block.length)
        for j in range(width):
            fill[c * width + j] = as_real(as_double(one[0]))


cdef void counted_run_extremes(const Job* job, const Block* block, Py_ssize_t channel,
                               Py_ssize_t channels, const real* fill,
                               Extremes* e) noexcept nogil:
    # Of what counts in long runs.
    cdef ChunkCopy copy
    cdef Run chunk
    cdef Py_ssize_t run, c, i, at, extent
    cdef const Mask* mask = &job.buffers.mask
    for run in range(block.run, block.run + block.runs):
        extent = extent_of_run(job, block, run)
        for c in range(channels):
            if extent >= 0:
                one_run_extremes(element(job, &job.buffers.x, channel + c, run, block.offset),
                                 extent, c * RUN_COLUMNS, e)
                continue
            for i in range(ceil_div(block.length, RUN_COPIED)):
                at = block.offset + i * RUN_COPIED
                chunk = Run(element(job, &job.buffers.x, channel + c, run, at), NULL,
                            no_features(), minimum(RUN_COPIED, block.length - i * RUN_COPIED),
                            c * RUN_COLUMNS, mask.bytes + run * mask.period, mask.period, at)
                copy_chunk(&chunk, fill[c * RUN_COLUMNS], &copy)
                one_run_extremes(copy.x, chunk.length, chunk.first, e)


cdef void counted_row_extremes(const Job* job, const Block* block, Py_ssize_t channel,
                               Py_ssize_t channels, Py_ssize_t first, const real* fill,
                               Extremes* e) noexcept nogil:
    # Of what counts in rows and short runs.
    cdef RowsCopy copy
    cdef Copying next = copying_of(block, channel, channels, MOMENTS)
    cdef Matrix m = copied_matrix(copy.x, next.length, next.step)
    while True:
        m.rows = copy_runs(job, &next, fill + first, &copy)
        if m.rows == 0:
            return
        matrix_extremes(&m, first, e)


cdef void counted_extremes(const Job* job, const Block* block, Py_ssize_t channel,
                           Py_ssize_t channels, Extremes* e) noexcept nogil:
    # Of a block of which a part counts.
    cdef real fill[COLUMNS + PADDING]
    cdef Py_ssize_t i, first, together = neighbours(job, &job.buffers.x, channels)
    fill_with_counted(job, block, channel, channels, fill)
    if job.plan.long_runs:
        counted_run_extremes(job, block, channel, channels, fill, e)
        return
    if job.problem.view.inner == 1:     # rows are copied, from wherever channels are
        together = channels
    for i in range(channels // together):
        first = i * together * job.problem.view.inner
        counted_row_extremes(job, block, channel + i * together, together, first, fill, e)


cdef inline void segment_extremes(const Job* job, Py_ssize_t tile, Py_ssize_t segment,
                                  Extremes* e) noexcept nogil:
    cdef Py_ssize_t channel = first_channel(job, tile), channels = count_channels(job, tile)
    cdef Py_ssize_t at = segment * job.problem.view.channels + channel
    cdef Py_ssize_t b, c, j, width = columns_per_channel(job)
    cdef real low, high, nan
    cdef Block block
    for j in range(COLUMNS + PADDING):
        e.low[j], e.high[j], e.nan[j] = INFINITY, -INFINITY, 0
    for b in range(segment * job.plan.segment_blocks,
                   minimum((segment + 1) * job.plan.segment_blocks, job.plan.blocks)):
        block = counted_block(job, b)
        if values_in(&block) > 0:
            block_extremes(job, &block, channel, channels, e)
    for c in range(channels):
        low, high, nan = INFINITY, -INFINITY, 0
        for j in range(width):      # of pixels: the columns of the first pixel, of the next ...
            fold_extremes(e, c * width + j, &low, &high, &nan)
        for j in range(1, job.plan.pixels):
            fold_extremes(e, j * channels + c, &low, &high, &nan)
        job.buffers.low[at + c] = <double>low if nan == 0 else <double>nan
        job.buffers.high[at + c] = <double>high if nan == 0 else <double>nan


cdef inline void fold_extremes(const Extremes* e, Py_ssize_t column, real* low, real* high,
                               real* nan) noexcept nogil:
    if e.low[column] < low[0]:
        low[0] = e.low[column]
    if e.high[column] > high[0]:
        high[0] = e.high[column]
    if e.nan[column] != 0:
        nan[0] = e.nan[column]


cdef void extremes(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t s0,
                   Py_ssize_t s1) noexcept nogil:
    cdef Extremes e
    cdef Py_ssize_t tile, segment
    cdef fp_state saved = fp_enter()
    for tile in range(t0, t1):
        for segment in range(s0, s1):
            segment_extremes(job, tile, segment, &e)
    fp_leave(saved)


cdef void merge_extremes(const Job* job, Py_ssize_t c0, Py_ssize_t c1) noexcept nogil:
    cdef Py_ssize_t c, segment, at
    cdef const Buffers* b = &job.buffers
    cdef fp_state saved = fp_enter()
    for c in range(c0, c1):
        b.minimum[c], b.maximum[c] = b.low[c], b.high[c]
        for segment in range(1, job.plan.segments):
            at = segment * job.problem.view.channels + c
            if b.low[at] < b.minimum[c] or b.low[at] != b.low[at]:
                b.minimum[c] = b.low[at]
            if b.high[at] > b.maximum[c] or b.high[at] != b.high[at]:
                b.maximum[c] = b.high[at]
        b.minimum[c] += 0.0     # -0 becomes 0
        b.maximum[c] += 0.0
    fp_leave(saved)
