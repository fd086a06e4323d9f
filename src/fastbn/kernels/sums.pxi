# SPDX-License-Identifier: BSD-3-Clause
# The two sums of every statistic, column by column:
#
#   moments      s = sum d          q = sum d * d         d = x - pivot
#   gradients    s = sum dy         q = sum dy * xhat     xhat = (x * scale - pivot) * invstd
#
# Up to ROWS terms of a column are added in `real`, as a binary tree; its result
# goes into a float64 sum. May add; may not decide what a sum means.
#
# A column never meets another one, so neither the width of the registers nor
# a neighbour's NaN can change its bits.

cdef enum:
    ROWS = 16               # terms of a tree
    SMALL_GROUP = 4         # the same in a small block, where fewer trees average
    SMALL_BLOCK = 512       # their rounding errors out

cdef struct Columns:
    # What the columns of a tile are read with, and their sums.
    real scale[COLUMNS + PADDING]
    real pivot[COLUMNS + PADDING]
    real invstd[COLUMNS + PADDING]
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
    lanes invstd


cdef inline void sum1(const Group* g, Py_ssize_t row, bint gradient,
                      lanes* s, lanes* q) noexcept nogil:
    cdef lanes u, v
    if gradient:
        u = load(g.dy + row * g.dy_step)
        v = (load(g.x + row * g.x_step) * g.scale - g.pivot) * g.invstd
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


cdef inline void sum16(const Group* g, Py_ssize_t row, bint gradient,
                       lanes* s, lanes* q) noexcept nogil:
    cdef lanes s0, s1, q0, q1
    sum8(g, row, gradient, &s0, &q0)
    sum8(g, row + 8, gradient, &s1, &q1)
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
        sum16(g, 0, gradient, &s, &q)
        deposit(s_sums, s)
        deposit(q_sums, q)
        return
    if rows & 8:
        sum8(g, row, gradient, &s, &q)
        deposit(s_sums, s)
        deposit(q_sums, q)
        row += 8
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


cdef inline void sum_matrix(const Matrix* x, const Matrix* dy, Columns* columns,
                            Py_ssize_t first, Py_ssize_t group, bint gradient) noexcept nogil:
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
                g.invstd = load_real(columns.invstd + first + j)
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
            sum_group(&g, rows, gradient, columns.s + first + j, columns.q + first + j)


cdef inline void sum_block(const Job* job, const Block* block, Py_ssize_t channel,
                           Py_ssize_t channels, Columns* columns, bint gradient) noexcept nogil:
    cdef Matrix x, dy, x_rest, dy_rest
    cdef Py_ssize_t i, c, run, together
    cdef Py_ssize_t group = SMALL_GROUP if block.runs * block.length <= SMALL_BLOCK else ROWS
    if job.plan.long_runs:
        for run in range(block.run, block.run + block.runs):
            x = long_matrix(job, &job.x, block, channel, run)
            x_rest = remainder_matrix(x, block.length)
            if gradient:
                dy = long_matrix(job, &job.dy, block, channel, run)
                dy_rest = remainder_matrix(dy, block.length)
            sum_matrix(&x, &dy, columns, 0, group, gradient)
            sum_matrix(&x_rest, &dy_rest, columns, 0, group, gradient)
        return
    together = neighbours(job, &job.x, channels)
    if gradient:
        together = minimum(together, neighbours(job, &job.dy, channels))
    for i in range(channels // together):
        c = i * together
        x = short_matrix(job, &job.x, block, channel + c, together)
        if gradient:
            dy = short_matrix(job, &job.dy, block, channel + c, together)
        sum_matrix(&x, &dy, columns, c * job.view.inner, group, gradient)


cdef inline double fold(const double* sums, Py_ssize_t n) noexcept nogil:
    # The sum of a channel's columns: eight running sums, then a tree.
    cdef double lane[8]
    cdef Py_ssize_t i, k
    if n == 1:
        return sums[0]
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
    # from the start for registers that reach past `period`.
    cdef Py_ssize_t c, j, n = channels * width
    if width == 1:
        for c in range(channels):
            columns[c] = values[c]
    else:
        for c in range(channels):
            for j in range(width):
                columns[c * width + j] = values[c]
    for j in range(n, period + PADDING):
        columns[j] = columns[j - n]


# ---- the same sums of one channel in float64, for blocks where `real` fails ----

cdef inline void wide_term(const elem* x, const elem* dy, bint gradient, double scale,
                           double pivot, double invstd, double* s, double* q) noexcept nogil:
    if gradient:
        s[0] = as_double(dy[0])
        q[0] = s[0] * ((as_double(x[0]) * scale - pivot) * invstd)
    else:
        s[0] = as_double(x[0]) - pivot
        q[0] = s[0] * s[0]


cdef inline void wide_matrix(const Matrix* x, const Matrix* dy, bint gradient, double scale,
                             double pivot, double invstd, Columns* columns) noexcept nogil:
    cdef Py_ssize_t row, j, k, rows
    cdef elem* xs[4]
    cdef elem* dys[4]
    cdef double s[4]
    cdef double q[4]
    for row in range(0, x.rows, 4):
        rows = minimum(4, x.rows - row)
        for k in range(rows):
            xs[k] = row_at(x, row + k)
            dys[k] = row_at(dy, row + k) if gradient else NULL
        for j in range(x.columns):
            for k in range(4):
                s[k] = 0.0
                q[k] = 0.0
            for k in range(rows):
                wide_term(xs[k] + j, dys[k] + j if gradient else NULL, gradient,
                          scale, pivot, invstd, &s[k], &q[k])
            columns.s[j] += (s[0] + s[1]) + (s[2] + s[3])
            columns.q[j] += (q[0] + q[1]) + (q[2] + q[3])
