# SPDX-License-Identifier: BSD-3-Clause
# What a mask leaves of a block, as copies that sums of whole blocks can read: in L1, some
# rows or a part of a run at a time. Where runs count or do not as a whole, those that do lie
# side by side; else what does not count is replaced by what adds nothing: by the pivot in
# moments, by 0 in gradients. So a masked sum needs no loop of its own.
#
# May: select, copy. May not: add.

cdef enum:
    IN_L1 = 1024            # elements of a run; a whole number of row groups
    # Elements of copies, at most. A thread may have a stack of 128 KB, of which sums of float64
    # need most.
    ROWS_COPIED = 32768 / (sizeof(real) * sizeof(real))
    RUN_COPIED = 512        # a whole number of row groups
    AHEAD = 16              # rows from one that is copied to one that is fetched

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
        prefetch(given + i, RUN_COPIED)
        store(to + i, select_bits(mask_bits(mask + i), load(given + i),
                                  load(fill + (<size_t>i & fill_bits))))
        i += WIDTH
    if i < n:
        store(to + i, select_bits(mask_bits(mask + i), load_n_or(given + i, n - i, set1(0)),
                                  load(fill + (<size_t>i & fill_bits))))


cdef void copy_chunk(Run* chunk, real pivot, int terms, ChunkCopy* copy) noexcept nogil:
    # At most RUN_COPIED elements of a run, where the mask is set.
    cdef signed char repeated[RUN_COPIED + PADDING]
    cdef elem fill[PADDING]
    cdef elem zeros[PADDING]
    cdef Py_ssize_t at = chunk.at % chunk.period
    cdef const signed char* mask = chunk.mask + at
    if at + chunk.length > chunk.period:
        repeat_mask(chunk.mask, chunk.period, at, chunk.length, repeated)
        mask = repeated
    store(zeros, set1(0))
    store(fill, set1(pivot if terms == MOMENTS else 0))
    select_elements(chunk.x, mask, chunk.length, fill, WIDTH - 1, copy.x)
    if terms != MOMENTS:
        select_elements(chunk.dy, mask, chunk.length, zeros, WIDTH - 1, copy.dy)
    chunk.x, chunk.dy = copy.x, copy.dy


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
    cdef ptrdiff_t ahead = AHEAD * operand.middle if job.buffers.mask.bytes[run + AHEAD] else 0
    if length > inner != operand.channel:       # pixels of few channels, which are apart
        for i in range(length):
            to[i] = row[i * operand.channel]
        return
    while i + WIDTH <= length:
        prefetch(row + i, ahead)
        store(to + i, load(row + i))
        i += WIDTH
    if i < length:
        store(to + i, load_n_or(row + i, length - i, set1(0)))


cdef Py_ssize_t copy_counted_runs(const Job* job, const Block* block, Py_ssize_t channel,
                                  Py_ssize_t length, Py_ssize_t step, Py_ssize_t most, int terms,
                                  Py_ssize_t* run, RowsCopy* copy) noexcept nogil:
    # The next runs of a block that count, at most so many, `length` elements of each. Returns
    # how many these are; `run` is then past them.
    cdef Py_ssize_t rows = 0
    while rows < most and run[0] < block.run + block.runs:
        if job.buffers.mask.bytes[run[0]]:
            copy_row(job, &job.buffers.x, channel, length, run[0], copy.x + rows * step)
            if terms != MOMENTS:
                copy_row(job, &job.buffers.dy, channel, length, run[0], copy.dy + rows * step)
            rows += 1
        run[0] += 1
    return rows


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
