# SPDX-License-Identifier: BSD-3-Clause
# A matrix to the sums of its columns: whole row groups, one below the other, in registers;
# and row groups that are not whole, have a jump, or fewer columns than a register.
#
# May not: know what the matrix is a part of.

cdef enum:
    # Speed only.
    NEAR = 128              # rows are near, at most so many elements apart
    LARGE = 1 << 20         # near rows of larger tensors (bytes) are prefetched ...
    VERY_LARGE = 4 << 20    # ... and all rows of tensors larger than this
    ALIGNED_COLUMNS = 256   # fewer are not worth a register more


cdef struct ReduceTuning:
    Py_ssize_t group_rows   # rows of a tree
    Py_ssize_t at_once      # row groups of a register of columns that are summed in one go
    ptrdiff_t ahead         # row groups to prefetch ahead; 0: none
    bint rowwise            # narrow rows are summed row by row


cdef inline ReduceTuning reduce_tuning(const Job* job, Py_ssize_t step, int terms) noexcept nogil:
    # For rows so far apart. Far ones share a few sets of the cache, those a multiple of a
    # page apart one: what is read there is soon evicted. docs/performance.md has the figures.
    cdef ReduceTuning tuning
    cdef bint near = step <= NEAR
    tuning.group_rows = SMALL_GROUP if count_per_channel(job) <= FEW_VALUES else ROWS
    tuning.at_once = 4 if near else 2
    if not near and (terms or step % PAGE == 0):
        tuning.at_once = 1
    tuning.rowwise = tuning.group_rows == ROWS and (terms or job.streaming)
    tuning.ahead = 0
    if tuning.group_rows == ROWS and job.bytes >= <size_t>(
            LARGE if near and not job.plan.long_runs else VERY_LARGE):
        tuning.ahead = 16 if job.plan.long_runs else 4
    return tuning


cdef inline void prefetch_rows(const RowGroup* g, ptrdiff_t groups, int terms) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(ROWS):
        prefetch(g.x + row * g.x_step, groups * ROWS * g.x_step)
        if terms:
            prefetch(g.dy + row * g.dy_step, groups * ROWS * g.dy_step)


cdef inline void gather(const Matrix* m, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t column,
                        lanes fill, elem* scratch) noexcept nogil:
    # Rows of one register, WIDTH apart: for rows without a common step, and for
    # the last columns, past which nothing may be read but `fill`.
    cdef Py_ssize_t r, n = minimum(WIDTH, m.columns - column)
    for r in range(rows):
        store(scratch + r * WIDTH, load_n_or(row_at(m, row + r) + column, n, fill))


cdef inline void reduce_row_groups(RowGroup* g, Py_ssize_t groups, ptrdiff_t ahead, bint small,
                                   int terms, WideSums* sums) noexcept nogil:
    # Whole row groups, one below the other; g is then past them.
    cdef Py_ssize_t i, rows = SMALL_GROUP if small else ROWS
    for i in range(groups):
        if ahead:
            prefetch_rows(g, ahead, terms)
        if small:
            flush_to_f64(sums, sum_4_rows(g, 0, WHOLE, terms))
        else:
            flush_to_f64(sums, sum_8_rows(g, WHOLE, terms))
        g.x += rows * g.x_step
        g.dy += rows * g.dy_step
        if g.weighted:
            g.features = later_features(g.features, rows * RUN_COLUMNS)


cdef inline void reduce_vector(const Matrix* x, const Matrix* dy, const Columns* columns,
                               Py_ssize_t first, Py_ssize_t row, Py_ssize_t groups, Py_ssize_t j,
                               ptrdiff_t ahead, bint small, int terms,
                               WideSums* sums) noexcept nogil:
    # Whole row groups of one register of columns, from column j on.
    cdef RowGroup g
    g.weighted = False
    g.x, g.x_step = row_at(x, row) + j, x.step
    g.dy, g.dy_step = row_at(dy, row) + j, dy.step
    load_columns(columns, first + j, terms, &g)
    reduce_row_groups(&g, groups, ahead if j % LINE < WIDTH else 0, small, terms, sums)


cdef inline Py_ssize_t to_first_line(const Matrix* m, Py_ssize_t row) noexcept nogil:
    # Where all rows lie alike, registers after the first begin where a line of the
    # cache does: each line is read once, and need not stay in a cache whose sets the
    # rows may crowd. Not where a register more costs more than that.
    if m.step % LINE or m.columns < ALIGNED_COLUMNS:
        return 0
    return to_alignment(row_at(m, row))


cdef inline void reduce_whole_groups(const Matrix* x, const Matrix* dy, Columns* columns,
                                     Py_ssize_t first, Py_ssize_t row, Py_ssize_t groups,
                                     ptrdiff_t ahead, bint small, int terms) noexcept nogil:
    # Groups without a jump, of at least one register of columns: the sums stay in
    # registers. The first and the last register may overlap their neighbours; they
    # start from the same sums, and so arrive at the same ones.
    cdef Py_ssize_t j, start = to_first_line(x, row), last = x.columns - WIDTH
    cdef WideSums sums, first_sums, last_sums
    load_sums(columns, first, &first_sums)
    load_sums(columns, first + last, &last_sums)
    if start:
        reduce_vector(x, dy, columns, first, row, groups, 0, ahead, small, terms, &first_sums)
    j = start
    while j <= last:
        load_sums(columns, first + j, &sums)
        reduce_vector(x, dy, columns, first, row, groups, j, ahead, small, terms, &sums)
        store_sums(&sums, first + j, columns)
        j += WIDTH
    if j < x.columns:
        reduce_vector(x, dy, columns, first, row, groups, last, ahead, small, terms, &last_sums)
        store_sums(&last_sums, first + last, columns)
    if start:
        store_sums(&first_sums, first, columns)


cdef void reduce_odd_group(const Matrix* x, const Matrix* dy, Columns* columns, Py_ssize_t first,
                           Py_ssize_t row, Py_ssize_t rows, int terms) noexcept nogil:
    # A row group that is not whole, or has a jump, or too few columns for a register:
    # columns that its last register has too many get terms of 0.
    cdef elem x_scratch[ROWS * WIDTH]
    cdef elem dy_scratch[ROWS * WIDTH]
    cdef RowGroup g
    cdef WideSums sums
    cdef Py_ssize_t k, j
    cdef bint gathered = jumps(x, row, rows) or (terms and jumps(dy, row, rows))
    g.weighted = False
    for k in range(ceil_div(x.columns, WIDTH)):
        j = k * WIDTH
        load_columns(columns, first + j, terms, &g)
        if gathered or x.columns - j < WIDTH:
            gather(x, row, rows, j, set1(0) if terms else g.pivot, x_scratch)
            g.x = x_scratch
            g.x_step = WIDTH
            if terms:
                gather(dy, row, rows, j, set1(0), dy_scratch)
                g.dy = dy_scratch
                g.dy_step = WIDTH
        else:
            g.x = row_at(x, row) + j
            g.x_step = x.step
            if terms:
                g.dy = row_at(dy, row) + j
                g.dy_step = dy.step
        load_sums(columns, first + j, &sums)
        flush_to_f64(&sums, sum_last_rows(&g, rows, WHOLE, terms))
        store_sums(&sums, first + j, columns)
