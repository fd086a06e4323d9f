# SPDX-License-Identifier: BSD-3-Clause
# What a mask leaves of a block, as copies that sums of whole blocks can read: in L1, some
# rows or a part of a run at a time. Where runs count or do not as a whole, those that do lie
# side by side; else what does not count is replaced by what adds nothing: by the pivot in
# moments, by 0 in gradients. So sums of rows and of short runs need no masked loops; those of
# long runs replace while they read (MASKED).
#
# May: select, copy. May not: add.

cdef enum:
    # Elements of copies, at most. A thread may have a stack of 128 KB, of which sums of float64
    # need most.
    ROWS_COPIED = 32768 / (sizeof(real) * sizeof(real))
    COLUMNS_COPIED = ROWS_COPIED / ROWS     # of which a row group fits
    RUN_COPIED = 512        # a whole number of row groups
    FETCHED = 2048          # elements from what is copied to what is fetched
    SEARCHED = 4            # times as many runs as are copied, for those that come then

cdef struct ChunkCopy:
    # Of a part of a run.
    elem x[RUN_COPIED + PADDING]
    elem dy[RUN_COPIED + PADDING]

cdef struct RowsCopy:
    elem x[ROWS_COPIED + PADDING]
    elem dy[ROWS_COPIED + PADDING]


cdef inline void repeat_mask(const signed char* mask, Py_ssize_t period, Py_ssize_t at,
                             Py_ssize_t n, signed char* to) noexcept nogil:
    # n bytes of a mask that repeats itself, from `at` on.
    cdef Py_ssize_t some, filled = 0
    at %= period
    while filled < n:
        some = minimum(n - filled, period - at)
        memcpy(to + filled, mask + at, some)
        filled += some
        at = 0


cdef void select_elements(const elem* given, const signed char* mask, Py_ssize_t n,
                          const elem* fill, size_t fill_bits, elem* to) noexcept nogil:
    # Elements where the mask is set, else those of `fill`, at `i & fill_bits`. May write, not
    # read, up to the end of a register. What comes next is fetched: it is asked for only when
    # the copy has been summed.
    cdef Py_ssize_t i = 0
    while i + WIDTH <= n:
        prefetch(given + i, FETCHED)
        store(to + i, select_bits(mask_bits(mask + i), load(given + i),
                                  load(fill + (<size_t>i & fill_bits))))
        i += WIDTH
    if i < n:
        store(to + i, select_bits(mask_bits(mask + i), load_n_or(given + i, n - i, set1(0)),
                                  load(fill + (<size_t>i & fill_bits))))


cdef inline const signed char* mask_of_chunk(const Run* chunk,
                                             signed char* repeated) noexcept nogil:
    # A byte for each of its elements: those of the run, unless these begin again within it.
    cdef Py_ssize_t at = chunk.at % chunk.period
    if at + chunk.length <= chunk.period:
        return chunk.mask + at
    repeat_mask(chunk.mask, chunk.period, at, chunk.length, repeated)
    return repeated


cdef void copy_chunk(Run* chunk, real instead, ChunkCopy* copy) noexcept nogil:
    # At most RUN_COPIED elements of a run, where the mask is set.
    cdef signed char repeated[RUN_COPIED + PADDING]
    cdef elem fill[PADDING]
    store(fill, set1(instead))
    select_elements(chunk.x, mask_of_chunk(chunk, repeated), chunk.length, fill, WIDTH - 1, copy.x)
    chunk.x = copy.x


cdef inline Matrix copied_matrix(elem* data, Py_ssize_t columns, Py_ssize_t step) noexcept nogil:
    cdef Matrix m
    m.data, m.columns, m.step = data, columns, step
    m.rows = m.jump = m.rows_before = 0
    m.jump_rows = 1
    return m


cdef inline void copy_row(const Job* job, const Operand* operand, Py_ssize_t channel,
                          Py_ssize_t length, Py_ssize_t run, elem* to) noexcept nogil:
    # One run of each of some channels, `length` elements together. May write up to the end of
    # a register.
    cdef const elem* row = element(job, operand, channel, run, 0)
    cdef Py_ssize_t i = 0, inner = job.problem.view.inner
    if length > inner != operand.channel:       # pixels of few channels, which are apart
        for i in range(length):
            to[i] = row[i * operand.channel]
        return
    while i + WIDTH <= length:
        store(to + i, load(row + i))
        i += WIDTH
    if i < length:
        store(to + i, load_n_or(row + i, length - i, set1(0)))


cdef inline void fetch_row(const Job* job, const Operand* operand, Py_ssize_t channel,
                           Py_ssize_t length, Py_ssize_t run) noexcept nogil:
    cdef const elem* row = element(job, operand, channel, run, 0)
    cdef Py_ssize_t i
    for i in range(ceil_div(length, LINE)):
        prefetch(row, i * LINE)


cdef struct ChosenRuns:
    Py_ssize_t first        # the run from which they are counted
    Py_ssize_t count
    int at[ROWS_COPIED + 1]


cdef Py_ssize_t choose_runs(const Job* job, Py_ssize_t run, Py_ssize_t end, Py_ssize_t most,
                            ChosenRuns* chosen) noexcept nogil:
    # Those of [run, end) that count, at most so many. Returns the run past the last one. Nothing
    # is decided run by run: a CPU could not guess it.
    cdef const signed char* mask = job.buffers.mask.bytes
    cdef Py_ssize_t count = 0, i = run
    while count < most and i < end:
        chosen.at[count] = <int>(i - run)
        count -= mask[i]
        i += 1
    chosen.first, chosen.count = run, count
    return i


cdef struct Copying:
    # Of the runs of a block, some at a time, as rows of a matrix.
    Py_ssize_t channel      # the first ...
    Py_ssize_t length       # ... of these elements of a run
    Py_ssize_t step         # from row to row of the copy
    Py_ssize_t most         # rows at a time
    Py_ssize_t run          # the next one ...
    Py_ssize_t end          # ... before this one
    int terms


cdef inline Copying copying_of(const Block* block, Py_ssize_t channel, Py_ssize_t channels,
                               int terms) noexcept nogil:
    cdef Py_ssize_t length = channels * block.length, step = ceil_div(length, PADDING) * PADDING
    return Copying(channel, length, step, ROWS_COPIED // step, block.run,
                   block.run + block.runs, terms)


cdef Py_ssize_t copy_counted_runs(const Job* job, Copying* next, RowsCopy* copy) noexcept nogil:
    # Those that count. Meanwhile those are fetched that come then.
    cdef ChosenRuns now, then
    cdef Py_ssize_t i, at, end = job.problem.view.outer * job.problem.view.middle
    cdef Py_ssize_t channel = next.channel, length = next.length
    next.run = choose_runs(job, next.run, next.end, next.most, &now)
    if job.plan.bytes < LARGE:      # it is near
        end = next.run
    choose_runs(job, next.run, minimum(end, next.run + SEARCHED * now.count), now.count, &then)
    for i in range(now.count):
        if i < then.count:
            at = then.first + then.at[i]
            fetch_row(job, &job.buffers.x, channel, length, at)
            if next.terms != MOMENTS:
                fetch_row(job, &job.buffers.dy, channel, length, at)
        at = now.first + now.at[i]
        copy_row(job, &job.buffers.x, channel, length, at, copy.x + i * next.step)
        if next.terms != MOMENTS:
            copy_row(job, &job.buffers.dy, channel, length, at, copy.dy + i * next.step)
    return now.count


cdef Py_ssize_t copy_masked_runs(const Job* job, Copying* next, const real* pivot,
                                 RowsCopy* copy) noexcept nogil:
    # All, with what the mask leaves out replaced.
    cdef const Mask* mask = &job.buffers.mask
    cdef signed char repeated[COLUMNS + PADDING]
    cdef elem fill[COLUMNS + PADDING]
    cdef elem zeros[PADDING]
    cdef const elem* instead = &zeros[0]
    cdef size_t instead_bits = WIDTH - 1
    cdef Py_ssize_t i, run, rows = minimum(next.most, next.end - next.run)
    store(zeros, set1(0))
    if next.terms == MOMENTS:
        instead, instead_bits = &fill[0], <size_t>-1
        for i in range(next.step // WIDTH):
            store(fill + i * WIDTH, load_real(pivot + i * WIDTH))
    for i in range(rows):
        run = next.run + i
        repeat_mask(mask.bytes + run * mask.period, mask.period, 0, next.length, repeated)
        select_elements(element(job, &job.buffers.x, next.channel, run, 0), repeated, next.length,
                        instead, instead_bits, copy.x + i * next.step)
        if next.terms != MOMENTS:
            select_elements(element(job, &job.buffers.dy, next.channel, run, 0), repeated,
                            next.length, zeros, WIDTH - 1, copy.dy + i * next.step)
    next.run += rows
    return rows


cdef inline Py_ssize_t copy_runs(const Job* job, Copying* next, const real* pivot,
                                 RowsCopy* copy) noexcept nogil:
    # Returns how many rows the copy has: 0 at the end.
    if job.buffers.mask.period == 1:
        return copy_counted_runs(job, next, copy)
    return copy_masked_runs(job, next, pivot, copy)
