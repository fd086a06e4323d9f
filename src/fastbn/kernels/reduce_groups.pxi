# SPDX-License-Identifier: BSD-3-Clause
# Row groups of a matrix to the sums of its columns: whole ones, one below the other, in
# registers; and those that are not whole, have a jump, or fewer columns than a register.
#
# May: read the matrix. May not: know what the matrix is a part of.

cdef enum:
    # Speed only. docs/performance.md has the figures.
    NEAR = 128              # rows are near, at most so many elements apart
    LARGE = 1 << 20         # near rows of larger tensors (bytes) are prefetched ...
    VERY_LARGE = 4 << 20    # ... and all rows of tensors larger than this ...
    RUNS_AHEAD = 16         # ... so many row groups ahead, if they are of runs ...
    ROWS_AHEAD = 4          # ... or of rows
    ALIGNED_COLUMNS = 256   # fewer are not worth a register more

cdef struct ReduceTuning:
    Py_ssize_t group_rows   # rows of a row group
    Py_ssize_t at_once      # row groups of a register of columns that are summed in one go
    ptrdiff_t ahead         # row groups from what is read to what is prefetched; 0: nothing is
    bint rowwise            # narrow rows are summed row by row


cdef inline ReduceTuning reduce_tuning(const Job* job, Py_ssize_t step, int terms) noexcept nogil:
    # For rows so far apart. Far ones share a few sets of the cache, those a multiple of a
    # page apart one: what is read there is soon evicted.
    cdef ReduceTuning tuning
    cdef bint near = step <= NEAR
    tuning.group_rows = SMALL_GROUP if count_per_channel(job) <= FEW_VALUES else ROWS
    tuning.at_once = 4 if near else 2
    if not near and (terms != MOMENTS or step % PAGE == 0):
        tuning.at_once = 1
    tuning.rowwise = tuning.group_rows == ROWS and (terms != MOMENTS or job.plan.streaming)
    tuning.ahead = 0
    if tuning.group_rows == ROWS and job.plan.bytes >= <size_t>(
            LARGE if near and not job.plan.long_runs else VERY_LARGE):
        tuning.ahead = RUNS_AHEAD if job.plan.long_runs else ROWS_AHEAD
    return tuning


cdef inline void prefetch_rows(const RowGroup* g, ptrdiff_t ahead, int terms) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(ROWS):
        prefetch(g.x + row * g.x_step, ahead * ROWS * g.x_step)
        if terms & GRADIENTS:
            prefetch(g.dy + row * g.dy_step, ahead * ROWS * g.dy_step)


cdef inline ptrdiff_t once_a_line(ptrdiff_t ahead, Py_ssize_t column) noexcept nogil:
    # Of the registers of a line, the first prefetches it.
    return ahead if column % LINE < WIDTH else 0


cdef inline void reduce_row_groups(RowGroup* g, Py_ssize_t row_groups, ptrdiff_t ahead, int size,
                                   int terms, WideSums* sums) noexcept nogil:
    # Whole row groups, one below the other; g is then past them.
    cdef Py_ssize_t i
    for i in range(row_groups):
        if ahead:
            prefetch_rows(g, ahead, terms)
        flush_to_f64(sums, sum_row_group(g, size, terms))
        g.x += size * g.x_step
        g.dy += size * g.dy_step
        if terms & WEIGHTED:
            g.features = later_features(g.features, size * RUN_COLUMNS)
        if terms & MASKED:
            g.mask += size * RUN_COLUMNS


cdef inline RowGroup rows_from(const Inputs* m, Py_ssize_t row) noexcept nogil:
    cdef RowGroup rows
    rows.x, rows.x_step = row_at(&m.x, row), m.x.step
    rows.dy, rows.dy_step = row_at(&m.dy, row), m.dy.step
    return rows


cdef inline RowGroup register_of(RowGroup rows, Py_ssize_t column, const Columns* columns,
                                 Py_ssize_t first, int terms) noexcept nogil:
    # The columns from this one on. `columns` has those of the rows from `first` on.
    rows.x, rows.dy = rows.x + column, rows.dy + column
    load_columns(columns, first + column, terms, &rows)
    return rows


cdef inline Py_ssize_t to_first_line(const Matrix* m, Py_ssize_t row) noexcept nogil:
    # Where all rows lie alike, registers after the first begin where a line of the
    # cache does: each line is read once, and need not stay in a cache whose sets the
    # rows may crowd. Not where a register more costs more than that.
    if m.step % LINE or m.columns < ALIGNED_COLUMNS:
        return 0
    return to_alignment(row_at(m, row))


cdef inline void reduce_whole_groups(const Inputs* m, Columns* columns, Py_ssize_t row,
                                     Py_ssize_t row_groups, ptrdiff_t ahead, int size,
                                     int terms) noexcept nogil:
    # Row groups without a jump, of at least one register of columns: the sums stay in
    # registers. The first and the last register may overlap their neighbours; they
    # start from the same sums, and so arrive at the same ones.
    cdef Py_ssize_t first = m.first, n = m.x.columns, last = n - WIDTH
    cdef Py_ssize_t j, start = to_first_line(&m.x, row)
    cdef WideSums sums, first_sums, last_sums
    cdef RowGroup g, rows = rows_from(m, row)
    load_sums(columns, first, &first_sums)
    load_sums(columns, first + last, &last_sums)
    if start:
        g = register_of(rows, 0, columns, first, terms)
        reduce_row_groups(&g, row_groups, ahead, size, terms, &first_sums)
    j = start
    while j <= last:
        load_sums(columns, first + j, &sums)
        g = register_of(rows, j, columns, first, terms)
        reduce_row_groups(&g, row_groups, once_a_line(ahead, j), size, terms, &sums)
        store_sums(&sums, first + j, columns)
        j += WIDTH
    if j < n:
        g = register_of(rows, last, columns, first, terms)
        reduce_row_groups(&g, row_groups, once_a_line(ahead, last), size, terms, &last_sums)
        store_sums(&last_sums, first + last, columns)
    if start:
        store_sums(&first_sums, first, columns)


cdef inline bint any_jumps(const Inputs* m, Py_ssize_t row, Py_ssize_t rows,
                           int terms) noexcept nogil:
    return jumps(&m.x, row, rows) or (terms != MOMENTS and jumps(&m.dy, row, rows))


cdef inline void gather(const Matrix* m, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t column,
                        lanes fill, elem* scratch) noexcept nogil:
    # Rows of one register, WIDTH apart: for rows without a common step, and for
    # the last columns, past which nothing may be read but `fill`.
    cdef Py_ssize_t r, n = minimum(WIDTH, m.columns - column)
    for r in range(rows):
        store(scratch + r * WIDTH, load_n_or(row_at(m, row + r) + column, n, fill))


cdef inline void reduce_odd_rows(const Inputs* m, Columns* columns,
                                 Py_ssize_t row, Py_ssize_t rows, int terms) noexcept nogil:
    # A row group that is not whole, or has a jump, or too few columns for a register:
    # columns that its last register has too many get terms of 0.
    cdef elem x_scratch[ROWS * WIDTH]
    cdef elem dy_scratch[ROWS * WIDTH]
    cdef RowGroup g
    cdef WideSums sums
    cdef Py_ssize_t k, j
    cdef bint gathered = any_jumps(m, row, rows, terms)
    for k in range(ceil_div(m.x.columns, WIDTH)):
        j = k * WIDTH
        load_columns(columns, m.first + j, terms, &g)
        if gathered or m.x.columns - j < WIDTH:
            gather(&m.x, row, rows, j, g.pivot if terms == MOMENTS else set1(0), x_scratch)
            g.x = x_scratch
            g.x_step = WIDTH
            if terms != MOMENTS:
                gather(&m.dy, row, rows, j, set1(0), dy_scratch)
                g.dy = dy_scratch
                g.dy_step = WIDTH
        else:
            g.x = row_at(&m.x, row) + j
            g.x_step = m.x.step
            if terms != MOMENTS:
                g.dy = row_at(&m.dy, row) + j
                g.dy_step = m.dy.step
        load_sums(columns, m.first + j, &sums)
        flush_to_f64(&sums, sum_last_rows(&g, rows, WHOLE, terms))
        store_sums(&sums, m.first + j, columns)


# Functions of their own: the code is long, and seldom needed.

cdef void reduce_odd_moments(const Inputs* m, Columns* columns, Py_ssize_t row,
                             Py_ssize_t rows) noexcept nogil:
    reduce_odd_rows(m, columns, row, rows, MOMENTS)


cdef void reduce_odd_gradients(const Inputs* m, Columns* columns, Py_ssize_t row,
                               Py_ssize_t rows) noexcept nogil:
    reduce_odd_rows(m, columns, row, rows, GRADIENTS)


cdef void reduce_odd_activated(const Inputs* m, Columns* columns, Py_ssize_t row,
                               Py_ssize_t rows) noexcept nogil:
    reduce_odd_rows(m, columns, row, rows, GRADIENTS | ACTIVATED)


cdef inline void reduce_odd_group(const Inputs* m, Columns* columns,
                                  Py_ssize_t row, Py_ssize_t rows, int terms) noexcept nogil:
    if terms == MOMENTS:
        reduce_odd_moments(m, columns, row, rows)
    elif terms & ACTIVATED:
        reduce_odd_activated(m, columns, row, rows)
    else:
        reduce_odd_gradients(m, columns, row, rows)
