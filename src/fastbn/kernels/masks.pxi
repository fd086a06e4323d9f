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


cdef Py_ssize_t copy_counted_runs(const Job* job, const Block* block, Py_ssize_t channel,
                                  Py_ssize_t length, Py_ssize_t step, Py_ssize_t most, int terms,
                                  Py_ssize_t* run, RowsCopy* copy) noexcept nogil:
    # The next runs of a block that count, at most so many, `length` elements of each. Returns
    # how many these are; `run` is then past them. Meanwhile those are fetched that come then.
    cdef ChosenRuns now, then
    cdef Py_ssize_t i, at, end = job.problem.view.outer * job.problem.view.middle
    run[0] = choose_runs(job, run[0], block.run + block.runs, most, &now)
    if job.plan.bytes < LARGE:      # it is near
        end = run[0]
    choose_runs(job, run[0], minimum(end, run[0] + SEARCHED * now.count), now.count, &then)
    for i in range(now.count):
        if i < then.count:
            at = then.first + then.at[i]
            fetch_row(job, &job.buffers.x, channel, length, at)
            if terms != MOMENTS:
                fetch_row(job, &job.buffers.dy, channel, length, at)
        at = now.first + now.at[i]
        copy_row(job, &job.buffers.x, channel, length, at, copy.x + i * step)
        if terms != MOMENTS:
            copy_row(job, &job.buffers.dy, channel, length, at, copy.dy + i * step)
    return now.count


cdef Py_ssize_t copy_masked_runs(const Job* job, const Block* block, Py_ssize_t channel,
                                 Py_ssize_t channels, Py_ssize_t step, Py_ssize_t most, int terms,
                                 Py_ssize_t* run, const real* pivot, RowsCopy* copy) noexcept nogil:
    # The next runs of a block, at most so many, of some neighbouring channels, where the mask
    # is set. Returns how many these are; `run` is then past them.
    cdef const Mask* mask = &job.buffers.mask
    cdef signed char repeated[COLUMNS + PADDING]
    cdef elem fill[COLUMNS + PADDING]
    cdef elem zeros[PADDING]
    cdef const elem* instead = &zeros[0]
    cdef size_t instead_bits = WIDTH - 1
    cdef Py_ssize_t i, row, length = channels * block.length
    cdef Py_ssize_t rows = minimum(most, block.run + block.runs - run[0])
    store(zeros, set1(0))
    if terms == MOMENTS:
        instead, instead_bits = &fill[0], <size_t>-1
        for i in range(step // WIDTH):
            store(fill + i * WIDTH, load_real(pivot + i * WIDTH))
    for row in range(rows):
        repeat_mask(mask.bytes + (run[0] + row) * mask.period, mask.period, 0, length, repeated)
        select_elements(element(job, &job.buffers.x, channel, run[0] + row, 0), repeated, length,
                        instead, instead_bits, copy.x + row * step)
        if terms != MOMENTS:
            select_elements(element(job, &job.buffers.dy, channel, run[0] + row, 0), repeated,
                            length, zeros, WIDTH - 1, copy.dy + row * step)
    run[0] += rows
    return rows
