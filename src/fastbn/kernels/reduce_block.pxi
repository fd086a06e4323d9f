# SPDX-License-Identifier: BSD-3-Clause
# The sums of a block: as matrices, runs or pixels, whichever the plan says.
#
# May: decide how a block is walked through. May not: decide what its sums mean.

cdef inline void reduce_matrix_of(const Inputs* m, Columns* columns,
                                  const ReduceTuning* tuning, int terms) noexcept nogil:
    cdef Py_ssize_t size = tuning.group_rows, chunk = tuning.at_once * tuning.group_rows
    cdef Py_ssize_t k, row, rows, row_groups, i
    if tuning.rowwise and fits_registers(m, terms):
        reduce_rowwise(m, columns, terms)
        return
    for k in range(ceil_div(m.x.rows, chunk)):
        row = k * chunk
        rows = minimum(chunk, m.x.rows - row)
        row_groups = rows // size
        if m.x.columns < WIDTH or any_jumps(m, row, row_groups * size, terms):
            row_groups = 0
        elif size == ROWS:
            reduce_whole_groups(m, columns, row, row_groups, tuning.ahead, ROWS, terms)
        else:
            reduce_whole_groups(m, columns, row, row_groups, tuning.ahead, SMALL_GROUP,
                                terms)
        for i in range(row_groups, ceil_div(rows, size)):
            reduce_odd_group(m, columns, row + i * size, minimum(size, rows - i * size),
                             terms)


# Functions of their own: the code is long.

cdef void reduce_matrix_moments(const Inputs* m, Columns* columns,
                                const ReduceTuning* tuning) noexcept nogil:
    reduce_matrix_of(m, columns, tuning, MOMENTS)


cdef void reduce_matrix_gradients(const Inputs* m, Columns* columns,
                                  const ReduceTuning* tuning) noexcept nogil:
    reduce_matrix_of(m, columns, tuning, GRADIENTS)


cdef void reduce_matrix_activated(const Inputs* m, Columns* columns,
                                  const ReduceTuning* tuning) noexcept nogil:
    reduce_matrix_of(m, columns, tuning, GRADIENTS | ACTIVATED)


cdef inline void reduce_matrix(const Inputs* m, Columns* columns,
                               const ReduceTuning* tuning, int terms) noexcept nogil:
    if terms == MOMENTS:
        reduce_matrix_moments(m, columns, tuning)
    elif terms & ACTIVATED:
        reduce_matrix_activated(m, columns, tuning)
    else:
        reduce_matrix_gradients(m, columns, tuning)


cdef inline elem* gather_pixels(const Job* job, const Operand* operand, Py_ssize_t run,
                                Py_ssize_t runs, elem* to) noexcept nogil:
    cdef const elem* pixel
    cdef Py_ssize_t i, c, channels = job.problem.view.channels
    for i in range(runs):
        pixel = element(job, operand, 0, run + i, 0)
        for c in range(channels):
            to[i * channels + c] = pixel[c * operand.channel]
    return to


cdef inline void reduce_adjacent_pixels(const Job* job, elem* x, elem* dy, Py_ssize_t runs,
                                        Columns* columns, const ReduceTuning* tuning,
                                        int terms) noexcept nogil:
    # As a matrix, and what remains of it as one more row. A loop, since the code of a sum is
    # long.
    cdef Inputs m = Inputs(pixel_matrix(job, x, runs), pixel_matrix(job, dy, runs), 0)
    cdef int part
    for part in range(2):
        reduce_matrix(&m, columns, tuning, terms)
        m = remainder_of(&m, runs * job.problem.view.channels)


cdef void reduce_counted_pixels(const Job* job, const Block* block, Columns* columns,
                                const ReduceTuning* given, int terms) noexcept nogil:
    # Some of those that count at a time, side by side.
    cdef RowsCopy copy
    cdef ReduceTuning tuning = given[0]
    cdef Py_ssize_t runs, channels = job.problem.view.channels
    cdef Copying next = copying_of(block, 0, channels, terms)
    next.step, next.most = channels, ROWS_COPIED // channels // PIXELS * PIXELS
    tuning.ahead, tuning.rowwise = 0, False
    while True:
        runs = copy_counted_runs(job, &next, &copy)
        if runs == 0:
            return
        reduce_adjacent_pixels(job, copy.x, copy.dy, runs, columns, &tuning, terms)


cdef inline void reduce_pixels(const Job* job, const Block* block, Columns* columns,
                               int terms) noexcept nogil:
    # A block of few channels. Pixels that are apart in memory are gathered, so many
    # at a time as make a whole number of row groups.
    cdef const Operand* other = other_input(job, terms)
    cdef bint gathered = not (gapless_runs(job, &job.buffers.x) and gapless_runs(job, other))
    cdef elem x_scratch[ROWS * PIXELS * PIXELS]
    cdef elem dy_scratch[ROWS * PIXELS * PIXELS]
    cdef elem* x
    cdef elem* dy
    cdef ReduceTuning tuning = reduce_tuning(job, PIXELS * job.problem.view.channels, terms)
    cdef Py_ssize_t i, run, runs, at_once = ROWS * PIXELS if gathered else block.runs
    if gathered:
        tuning.ahead = 0
        tuning.rowwise = False
    if block.mask != NULL:
        reduce_counted_pixels(job, block, columns, &tuning, terms)
        return
    for i in range(ceil_div(block.runs, at_once)):
        run = block.run + i * at_once
        runs = minimum(at_once, block.run + block.runs - run)
        x, dy = element(job, &job.buffers.x, 0, run, 0), element(job, other, 0, run, 0)
        if gathered:
            x = dy = gather_pixels(job, &job.buffers.x, run, runs, x_scratch)
            if terms != MOMENTS:
                dy = gather_pixels(job, other, run, runs, dy_scratch)
        reduce_adjacent_pixels(job, x, dy, runs, columns, &tuning, terms)


cdef inline void fetch_run(const elem* x, ptrdiff_t channel, Py_ssize_t n) noexcept nogil:
    # Some channels further: what follows a run in memory is not what is read next.
    cdef ptrdiff_t ahead = channel * ceil_div(FETCHED, n)
    cdef Py_ssize_t i
    for i in range(ceil_div(n, LINE)):
        prefetch(x + i * LINE, ahead)


cdef inline void reduce_runs(const Job* job, const Block* block, Py_ssize_t channel,
                             Py_ssize_t channels, Columns* columns, int terms) noexcept nogil:
    cdef const Operand* other = other_input(job, terms)
    cdef Features features = input_features(job, block, terms)
    cdef ReduceTuning tuning = reduce_tuning(job, RUN_COLUMNS, terms)
    cdef Py_ssize_t run, c, length = block.length, period = job.buffers.mask.period
    cdef const signed char* mask = NULL
    cdef ptrdiff_t ahead = tuning.ahead
    cdef bint apart = adjacent_inputs(job, channels, terms) != channels, gaps
    cdef Run one
    for run in range(block.run, block.run + block.runs):
        if block.mask != NULL:
            length, mask = extent_of_run(job, block, run), NULL
            if length < 0:
                length, mask = block.length, job.buffers.mask.bytes + run * period
            if length == 0 and run != block.run:
                continue
        gaps = apart or (block.mask != NULL and mask == NULL)
        tuning.ahead = 0 if gaps else ahead
        for c in range(channels):
            one = Run(element(job, &job.buffers.x, channel + c, run, block.offset),
                      element(job, other, channel + c, run, block.offset),
                      features, length, c * RUN_COLUMNS, mask, period, block.offset)
            if gaps and ahead and length > 0:
                fetch_run(one.x, job.buffers.x.channel, length)
                if terms != MOMENTS:
                    fetch_run(one.dy, other.channel, length)
            if mask != NULL:
                reduce_masked_run(one, columns, &tuning, terms, run == block.run)
            else:
                reduce_run(one, columns, &tuning, terms, run == block.run)


cdef void reduce_counted_rows(const Job* job, const Block* block, Py_ssize_t channel,
                              Py_ssize_t channels, Py_ssize_t first, Columns* columns,
                              const ReduceTuning* given, int terms) noexcept nogil:
    # Some rows at a time: those that count, or all, with what does not count replaced.
    cdef RowsCopy copy
    cdef ReduceTuning tuning = given[0]
    cdef Copying next = copying_of(block, channel, channels, terms)
    cdef Py_ssize_t runs
    cdef Inputs m
    if next.most > ROWS:
        next.most -= next.most % ROWS
    tuning.ahead, tuning.rowwise = 0, False
    m.first = first
    m.x = m.dy = copied_matrix(copy.x, next.length, next.step)
    m.dy.data = copy.dy
    while True:
        runs = copy_runs(job, &next, columns.pivot + first, &copy)
        if runs == 0:
            return
        m.x.rows = m.dy.rows = runs
        reduce_matrix(&m, columns, &tuning, terms)


cdef inline void reduce_matrices(const Job* job, const Block* block, Py_ssize_t channel,
                                 Py_ssize_t channels, Columns* columns, int terms) noexcept nogil:
    cdef ReduceTuning tuning = reduce_tuning(job, job.buffers.x.middle, terms)
    cdef Py_ssize_t i, c, together = adjacent_inputs(job, channels, terms)
    cdef Inputs m
    if block.mask != NULL:
        together = maximum(1, minimum(together, COLUMNS_COPIED // job.problem.view.inner))
    for i in range(ceil_div(channels, together)):
        c = i * together
        if block.mask != NULL:
            reduce_counted_rows(job, block, channel + c, minimum(together, channels - c),
                                c * job.problem.view.inner, columns, &tuning, terms)
            continue
        m = short_inputs(job, block, channel + c, together, c * job.problem.view.inner, terms)
        reduce_matrix(&m, columns, &tuning, terms)


cdef inline void reduce_block(const Job* job, const Block* block, Py_ssize_t channel,
                              Py_ssize_t channels, Columns* columns, int terms) noexcept nogil:
    if job.plan.long_runs:      # the first of them clears the sums
        reduce_runs(job, block, channel, channels, columns, terms)
        return
    clear_columns(columns, channels * job.problem.view.inner * job.plan.pixels)
    if job.plan.pixels > 1:
        reduce_pixels(job, block, columns, terms)
    else:
        reduce_matrices(job, block, channel, channels, columns, terms)
