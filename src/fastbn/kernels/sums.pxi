# SPDX-License-Identifier: BSD-3-Clause
# The two sums of every statistic, column by column:
#
#   moments      s = sum d          q = sum d * d         d = x - pivot
#   gradients    s = sum dy         q = sum dy * d        d = x * scale - pivot
#
# Up to ROWS terms of a column are added in `real`, as a binary tree; its result
# goes into a float64 sum. May add; may not decide what a sum means.
#
# A column never meets another one, so neither the width of the registers nor
# a neighbour's NaN can change its bits.

cdef enum:
    ROWS = 8               # terms of a tree
    SMALL_GROUP = 4         # the same in a channel of few values, where fewer trees
    FEW_VALUES = 512        # average their rounding errors out

cdef struct Columns:
    # What the columns of a tile are read with, and their sums.
    lanes aligned               # unused: the arrays begin where a register may
    real scale[COLUMNS + PADDING]
    real pivot[COLUMNS + PADDING]
    double s[COLUMNS + PADDING]
    double q[COLUMNS + PADDING]

cdef struct Group:
    # Up to ROWS rows of one register of columns.
    const elem* x
    const elem* dy
    ptrdiff_t x_step
    ptrdiff_t dy_step
    lanes scale
    lanes pivot


cdef inline void sum1(const Group* g, Py_ssize_t row, bint gradient,
                      lanes* s, lanes* q) noexcept nogil:
    cdef lanes u, v
    if gradient:
        u = load(g.dy + row * g.dy_step)
        v = load(g.x + row * g.x_step) * g.scale - g.pivot
    else:
        u = load(g.x + row * g.x_step) - g.pivot
        v = u
    s[0] = u
    q[0] = u * v


cdef inline void sum2(const Group* g, Py_ssize_t row, bint gradient,
                      lanes* s, lanes* q) noexcept nogil:
    cdef lanes s0, s1, q0, q1
    sum1(g, row, gradient, &s0, &q0)
    sum1(g, row + 1, gradient, &s1, &q1)
    s[0] = s0 + s1
    q[0] = q0 + q1


cdef inline void sum4(const Group* g, Py_ssize_t row, bint gradient,
                      lanes* s, lanes* q) noexcept nogil:
    cdef lanes s0, s1, q0, q1
    sum2(g, row, gradient, &s0, &q0)
    sum2(g, row + 2, gradient, &s1, &q1)
    s[0] = s0 + s1
    q[0] = q0 + q1


cdef inline void sum8(const Group* g, Py_ssize_t row, bint gradient,
                      lanes* s, lanes* q) noexcept nogil:
    cdef lanes s0, s1, q0, q1
    sum4(g, row, gradient, &s0, &q0)
    sum4(g, row + 4, gradient, &s1, &q1)
    s[0] = s0 + s1
    q[0] = q0 + q1


cdef inline void deposit(double* sums, lanes v) noexcept nogil:
    cdef int half
    for half in range(HALVES):
        store_wide(sums + half * WIDE, load_wide(sums + half * WIDE) + widen(v, half))


cdef inline void sum_group(const Group* g, Py_ssize_t rows, bint gradient,
                           double* s_sums, double* q_sums) noexcept nogil:
    # A group with fewer rows than a whole one is a tree for each bit of `rows`.
    cdef lanes s, q
    cdef Py_ssize_t row = 0
    if rows == ROWS:
        sum8(g, 0, gradient, &s, &q)
        deposit(s_sums, s)
        deposit(q_sums, q)
        return
    if rows & 4:
        sum4(g, row, gradient, &s, &q)
        deposit(s_sums, s)
        deposit(q_sums, q)
        row += 4
    if rows & 2:
        sum2(g, row, gradient, &s, &q)
        deposit(s_sums, s)
        deposit(q_sums, q)
        row += 2
    if rows & 1:
        sum1(g, row, gradient, &s, &q)
        deposit(s_sums, s)
        deposit(q_sums, q)


cdef inline void gather(const Matrix* m, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t column,
                        lanes fill, elem* scratch) noexcept nogil:
    # Rows of one register, WIDTH apart: for rows without a common step, and for
    # the last columns, past which nothing may be read but `fill`.
    cdef Py_ssize_t r, n = minimum(WIDTH, m.columns - column)
    cdef const elem* p
    for r in range(rows):
        p = row_at(m, row + r) + column
        if n == WIDTH:
            store(scratch + r * WIDTH, load(p))
        else:
            store(scratch + r * WIDTH, fill)
            store_part(scratch + r * WIDTH, load_part(p, n), n)


cdef inline ptrdiff_t groups_ahead(const Job* job) noexcept nogil:
    # How far to prefetch; 0: not at all. A group of a long run is 512 bytes, one
    # of rows is as long as eight of them. docs/performance.md has the figures.
    if not job.large:
        return 0
    return 16 if job.plan.long_runs else 4


cdef inline void prefetch_group(const Group* g, ptrdiff_t groups,
                                bint gradient) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(ROWS):
        prefetch(g.x + row * g.x_step, groups * ROWS * g.x_step)
        if gradient:
            prefetch(g.dy + row * g.dy_step, groups * ROWS * g.dy_step)


cdef inline void sum_matrix(const Matrix* x, const Matrix* dy, Columns* columns,
                            Py_ssize_t first, Py_ssize_t group, ptrdiff_t ahead,
                            bint gradient) noexcept nogil:
    # Adds a matrix to the sums of the columns from `first` on, in trees of
    # `group` rows. Columns that a register has too many get terms of 0.
    cdef elem x_scratch[ROWS * WIDTH]
    cdef elem dy_scratch[ROWS * WIDTH]
    cdef Group g
    cdef Py_ssize_t i, k, row, rows, j
    cdef bint apart
    for i in range(steps(x.rows, group)):
        row = i * group
        rows = minimum(group, x.rows - row)
        apart = jumps(x, row, rows) or (gradient and jumps(dy, row, rows))
        for k in range(steps(x.columns, WIDTH)):
            j = k * WIDTH
            g.pivot = load_real(columns.pivot + first + j)
            if gradient:
                g.scale = load_real(columns.scale + first + j)
            if apart or x.columns - j < WIDTH:
                gather(x, row, rows, j, splat(0) if gradient else g.pivot, x_scratch)
                g.x = x_scratch
                g.x_step = WIDTH
                if gradient:
                    gather(dy, row, rows, j, splat(0), dy_scratch)
                    g.dy = dy_scratch
                    g.dy_step = WIDTH
            else:
                g.x = row_at(x, row) + j
                g.x_step = x.step
                if gradient:
                    g.dy = row_at(dy, row) + j
                    g.dy_step = dy.step
                if ahead and rows == ROWS and j % LINE == 0:
                    prefetch_group(&g, ahead, gradient)
            sum_group(&g, rows, gradient, columns.s + first + j, columns.q + first + j)


# The same sums in float64, for blocks where `real` will not do.

cdef struct WideColumns:
    double scale[COLUMNS]
    double pivot[COLUMNS]


cdef inline void wide_term(elem x, elem dy, const WideColumns* wide, Py_ssize_t column,
                           bint gradient, double* s, double* q) noexcept nogil:
    if gradient:
        s[0] = as_double(dy)
        q[0] = s[0] * (as_double(x) * wide.scale[column] - wide.pivot[column])
    else:
        s[0] = as_double(x) - wide.pivot[column]
        q[0] = s[0] * s[0]


cdef inline void wide_matrix(const Matrix* x, const Matrix* dy, const WideColumns* wide,
                             Columns* columns, Py_ssize_t first, bint gradient) noexcept nogil:
    # Four rows at a time: a column by itself would be one long chain of sums.
    cdef Py_ssize_t row, j
    cdef (elem*) x0, x1, x2, x3, dy0, dy1, dy2, dy3
    cdef double s0, s1, s2, s3, q0, q1, q2, q3
    cdef double* s = columns.s + first
    cdef double* q = columns.q + first
    for row in range(0, x.rows - 3, 4):
        x0, x1 = row_at(x, row), row_at(x, row + 1)
        x2, x3 = row_at(x, row + 2), row_at(x, row + 3)
        dy0, dy1 = row_at(dy, row), row_at(dy, row + 1)
        dy2, dy3 = row_at(dy, row + 2), row_at(dy, row + 3)
        for j in range(x.columns):
            wide_term(x0[j], dy0[j], wide, first + j, gradient, &s0, &q0)
            wide_term(x1[j], dy1[j], wide, first + j, gradient, &s1, &q1)
            wide_term(x2[j], dy2[j], wide, first + j, gradient, &s2, &q2)
            wide_term(x3[j], dy3[j], wide, first + j, gradient, &s3, &q3)
            s[j] += (s0 + s1) + (s2 + s3)
            q[j] += (q0 + q1) + (q2 + q3)
    for row in range(x.rows & ~3, x.rows):
        x0, dy0 = row_at(x, row), row_at(dy, row)
        for j in range(x.columns):
            wide_term(x0[j], dy0[j], wide, first + j, gradient, &s0, &q0)
            s[j] += s0
            q[j] += q0


cdef inline void sum_matrices(const Matrix* x, const Matrix* dy, const WideColumns* wide,
                              Columns* columns, Py_ssize_t first, Py_ssize_t group,
                              ptrdiff_t ahead, bint gradient) noexcept nogil:
    if wide != NULL:
        wide_matrix(x, dy, wide, columns, first, gradient)
    else:
        sum_matrix(x, dy, columns, first, group, ahead, gradient)


cdef inline void sum_block(const Job* job, const Block* block, Py_ssize_t channel,
                           Py_ssize_t channels, const WideColumns* wide, Columns* columns,
                           bint gradient) noexcept nogil:
    # The sums of a block; with `wide` in float64.
    cdef Matrix x, dy
    cdef const Operand* other = &job.dy if gradient else &job.x
    cdef Py_ssize_t i, c, run, together
    cdef Py_ssize_t width = columns_per_channel(job)
    cdef ptrdiff_t ahead = groups_ahead(job)
    cdef Py_ssize_t group = SMALL_GROUP if count_per_channel(job) <= FEW_VALUES else ROWS
    memset(columns.s, 0, channels * width * sizeof(double))
    memset(columns.q, 0, channels * width * sizeof(double))
    if job.plan.long_runs:
        for run in range(block.run, block.run + block.runs):
            for c in range(channels):
                x = long_matrix(job, &job.x, block, channel + c, run)
                dy = long_matrix(job, other, block, channel + c, run)
                sum_matrices(&x, &dy, wide, columns, c * width, group, ahead, gradient)
                x = remainder_matrix(x, block.length)
                dy = remainder_matrix(dy, block.length)
                sum_matrices(&x, &dy, wide, columns, c * width, group, ahead, gradient)
        return
    together = minimum(neighbours(job, &job.x, channels), neighbours(job, other, channels))
    for i in range(channels // together):
        c = i * together
        x = short_matrix(job, &job.x, block, channel + c, together)
        dy = short_matrix(job, other, block, channel + c, together)
        sum_matrices(&x, &dy, wide, columns, c * width, group, ahead, gradient)


cdef inline double fold(const double* sums, Py_ssize_t n) noexcept nogil:
    # The sum of a channel's columns: eight running sums, then a tree.
    cdef double lane[8]
    cdef Py_ssize_t i, k
    for k in range(8):
        lane[k] = 0.0
    for i in range(0, n - 7, 8):
        for k in range(8):
            lane[k] += sums[i + k]
    for k in range(n & 7):
        lane[k] += sums[(n & ~7) + k]
    return (((lane[0] + lane[1]) + (lane[2] + lane[3]))
            + ((lane[4] + lane[5]) + (lane[6] + lane[7])))


cdef inline void spread(real* columns, const real* values, Py_ssize_t channels,
                        Py_ssize_t width, Py_ssize_t period) noexcept nogil:
    # Repeats each channel's value over its columns, and the columns once more
    # from the start for registers that reach past `period`. A store may reach
    # past its channel, never past the padding; the next channel overwrites it.
    cdef Py_ssize_t c, j, n = channels * width
    if width == 1:
        memcpy(columns, values, channels * sizeof(real))
    else:
        for c in range(channels):
            for j in range(steps(width, WIDTH)):
                store_real(columns + c * width + j * WIDTH, splat(values[c]))
    for j in range(n, period + PADDING):
        columns[j] = columns[j - n]


cdef inline void fold_columns(const Columns* columns, Py_ssize_t channels, Py_ssize_t width,
                              double* s, double* q) noexcept nogil:
    cdef Py_ssize_t c
    if width == 1:
        memcpy(s, columns.s, channels * sizeof(double))
        memcpy(q, columns.q, channels * sizeof(double))
        return
    for c in range(channels):
        s[c] = fold(columns.s + c * width, width)
        q[c] = fold(columns.q + c * width, width)
