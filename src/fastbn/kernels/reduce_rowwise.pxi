# SPDX-License-Identifier: BSD-3-Clause
# Narrow rows without gaps to the sums of their columns, row by row: in the order of memory,
# which the CPU fetches ahead well enough where there are two tensors.
#
# May: read the matrix. May not: know what the matrix is a part of.

cdef enum:
    ROW_VECTORS = 4     # registers of a row that are summed side by side, at most


cdef inline bint fits_registers(const Inputs* m, int terms) noexcept nogil:
    return (MAX_ROW_VECTORS > 1 and WIDTH < m.x.columns <= MAX_ROW_VECTORS * WIDTH
            and m.x.columns % WIDTH == 0
            and gapless(&m.x) and (terms == MOMENTS or gapless(&m.dy)))


cdef inline void reduce_rows(const Inputs* m, Columns* columns,
                             Py_ssize_t row_groups, int registers, int terms) noexcept nogil:
    # Whole row groups of rows of so many registers.
    cdef Py_ssize_t i, at
    cdef int k
    cdef RowGroup g[ROW_VECTORS]
    cdef RealSums a[ROW_VECTORS]
    cdef RealSums b[ROW_VECTORS]
    cdef WideSums sums
    for k in range(registers):
        g[k].x, g[k].x_step = m.x.data + k * WIDTH, m.x.step
        g[k].dy, g[k].dy_step = m.dy.data + k * WIDTH, m.dy.step
        load_columns(columns, m.first + k * WIDTH, terms, &g[k])
    for i in range(row_groups):
        if terms == MOMENTS:
            for k in range(registers):
                prefetch_rows(&g[k], ROWS_AHEAD, terms)
        for k in range(registers):
            a[k] = sum_2_rows(&g[k], 0, WHOLE, terms)
        for k in range(registers):
            a[k] = add_sums(a[k], sum_2_rows(&g[k], 2, WHOLE, terms))
        for k in range(registers):
            b[k] = sum_2_rows(&g[k], 4, WHOLE, terms)
        for k in range(registers):
            b[k] = add_sums(b[k], sum_2_rows(&g[k], 6, WHOLE, terms))
        for k in range(registers):
            at = m.first + k * WIDTH
            load_sums(columns, at, &sums)
            flush_to_f64(&sums, add_sums(a[k], b[k]))
            store_sums(&sums, at, columns)
            g[k].x += ROWS * m.x.step
            g[k].dy += ROWS * m.dy.step


cdef inline void reduce_rows_of(const Inputs* m, Columns* columns,
                                Py_ssize_t row_groups, int terms) noexcept nogil:
    # 2, 3 or ROW_VECTORS registers: a constant, so that all sums stay in registers.
    if m.x.columns == 2 * WIDTH:
        reduce_rows(m, columns, row_groups, 2, terms)
    elif m.x.columns == 3 * WIDTH:
        reduce_rows(m, columns, row_groups, 3, terms)
    else:
        reduce_rows(m, columns, row_groups, ROW_VECTORS, terms)


# Functions of their own, so that the compiler has all registers for each.

cdef void reduce_rows_moments(const Inputs* m, Columns* columns,
                              Py_ssize_t row_groups) noexcept nogil:
    reduce_rows_of(m, columns, row_groups, MOMENTS)


cdef void reduce_rows_gradients(const Inputs* m, Columns* columns,
                                Py_ssize_t row_groups) noexcept nogil:
    reduce_rows_of(m, columns, row_groups, GRADIENTS)


cdef void reduce_rows_activated(const Inputs* m, Columns* columns,
                                Py_ssize_t row_groups) noexcept nogil:
    reduce_rows_of(m, columns, row_groups, GRADIENTS | ACTIVATED)


cdef inline void reduce_rowwise(const Inputs* m, Columns* columns,
                                int terms) noexcept nogil:
    # A matrix that fits registers.
    cdef Py_ssize_t row_groups = m.x.rows // ROWS, rest = m.x.rows % ROWS
    if terms == MOMENTS:
        reduce_rows_moments(m, columns, row_groups)
    elif terms & ACTIVATED:
        reduce_rows_activated(m, columns, row_groups)
    else:
        reduce_rows_gradients(m, columns, row_groups)
    if rest:
        reduce_odd_group(m, columns, m.x.rows - rest, rest, terms)
