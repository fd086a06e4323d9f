# SPDX-License-Identifier: BSD-3-Clause
# The same for narrow rows without gaps, row by row: several registers of columns at a time.

cdef inline void reduce_rowwise(const Matrix* x, const Matrix* dy, Columns* columns,
                                Py_ssize_t first, Py_ssize_t groups, int registers,
                                int terms) noexcept nogil:
    # Whole row groups of narrow rows without gaps, row by row: in the order of memory, which the
    # CPU fetches ahead well enough where there are two tensors.
    cdef Py_ssize_t i, at
    cdef int k
    cdef RowGroup g[4]         # registers, at most: MAX_ROW_VECTORS
    cdef RealSums a[4]
    cdef RealSums b[4]
    cdef WideSums sums
    for k in range(registers):
        g[k].weighted = False
        g[k].x, g[k].x_step = x.data + k * WIDTH, x.step
        g[k].dy, g[k].dy_step = dy.data + k * WIDTH, dy.step
        load_columns(columns, first + k * WIDTH, terms, &g[k])
    for i in range(groups):
        if terms == MOMENTS:
            for k in range(registers):
                prefetch_rows(&g[k], 4, terms)
        for k in range(registers):
            a[k] = sum_2_rows(&g[k], 0, WHOLE, terms)
        for k in range(registers):
            a[k] = add_sums(a[k], sum_2_rows(&g[k], 2, WHOLE, terms))
        for k in range(registers):
            b[k] = sum_2_rows(&g[k], 4, WHOLE, terms)
        for k in range(registers):
            b[k] = add_sums(b[k], sum_2_rows(&g[k], 6, WHOLE, terms))
        for k in range(registers):
            at = first + k * WIDTH
            load_sums(columns, at, &sums)
            flush_to_f64(&sums, add_sums(a[k], b[k]))
            store_sums(&sums, at, columns)
            g[k].x += ROWS * x.step
            g[k].dy += ROWS * dy.step


cdef inline void reduce_rowwise_as(const Matrix* x, const Matrix* dy, Columns* columns,
                                   Py_ssize_t first, Py_ssize_t groups, int terms) noexcept nogil:
    if x.columns == 2 * WIDTH:
        reduce_rowwise(x, dy, columns, first, groups, 2, terms)
    elif x.columns == 3 * WIDTH:
        reduce_rowwise(x, dy, columns, first, groups, 3, terms)
    else:
        reduce_rowwise(x, dy, columns, first, groups, 4, terms)


# Functions of their own, so that the compiler has all registers for each.

cdef void reduce_rowwise_moments(const Matrix* x, const Matrix* dy, Columns* columns,
                                 Py_ssize_t first, Py_ssize_t groups) noexcept nogil:
    reduce_rowwise_as(x, dy, columns, first, groups, MOMENTS)


cdef void reduce_rowwise_gradients(const Matrix* x, const Matrix* dy, Columns* columns,
                                   Py_ssize_t first, Py_ssize_t groups) noexcept nogil:
    reduce_rowwise_as(x, dy, columns, first, groups, GRADIENTS)


cdef void reduce_rowwise_activated(const Matrix* x, const Matrix* dy, Columns* columns,
                                   Py_ssize_t first, Py_ssize_t groups) noexcept nogil:
    reduce_rowwise_as(x, dy, columns, first, groups, ACTIVATED)


cdef inline void reduce_rowwise_matrix(const Matrix* x, const Matrix* dy, Columns* columns,
                                       Py_ssize_t first, int terms) noexcept nogil:
    cdef Py_ssize_t groups = x.rows // ROWS, rest = x.rows % ROWS
    if terms == MOMENTS:
        reduce_rowwise_moments(x, dy, columns, first, groups)
    elif terms == GRADIENTS:
        reduce_rowwise_gradients(x, dy, columns, first, groups)
    else:
        reduce_rowwise_activated(x, dy, columns, first, groups)
    if rest:
        reduce_odd_group(x, dy, columns, first, x.rows - rest, rest, terms)


cdef inline bint fits_registers(const Matrix* x, const Matrix* dy, int terms) noexcept nogil:
    return (WIDTH < x.columns <= MAX_ROW_VECTORS * WIDTH and x.columns % WIDTH == 0 and gapless(x)
            and (terms == MOMENTS or gapless(dy)))


cdef inline void reduce_matrix(const Matrix* x, const Matrix* dy, Columns* columns,
                               Py_ssize_t first, const ReduceTuning* tuning,
                               int terms) noexcept nogil:
    # Adds a matrix to the sums of the columns from `first` on.
    cdef Py_ssize_t group = tuning.group_rows, chunk = tuning.at_once * tuning.group_rows
    cdef Py_ssize_t k, row, rows, groups, i
    if tuning.rowwise and fits_registers(x, dy, terms):
        reduce_rowwise_matrix(x, dy, columns, first, terms)
        return
    for k in range(ceil_div(x.rows, chunk)):
        row = k * chunk
        rows = minimum(chunk, x.rows - row)
        groups = rows // group
        if (x.columns < WIDTH or jumps(x, row, groups * group)
                or (terms and jumps(dy, row, groups * group))):
            groups = 0
        elif group == ROWS:
            reduce_whole_groups(x, dy, columns, first, row, groups, tuning.ahead, False, terms)
        else:
            reduce_whole_groups(x, dy, columns, first, row, groups, tuning.ahead, True, terms)
        for i in range(groups, ceil_div(rows, group)):
            reduce_odd_group(x, dy, columns, first, row + i * group,
                             minimum(group, rows - i * group), terms)
