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
    # Speed only: groups that are summed before the next register of columns.
    MOST_TOGETHER = 4
    L1_ELEMENTS = 4096

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


cdef struct Pace:
    Py_ssize_t group        # rows of a tree
    Py_ssize_t together     # groups of a register of columns that are summed in one go
    ptrdiff_t ahead         # groups to prefetch ahead; 0: none


cdef inline Pace pace_of(const Job* job, Py_ssize_t columns) noexcept nogil:
    # For matrices of so many columns. As many groups together as stay in L1. A group
    # of a long run is 512 bytes, one of rows is as long as eight of them;
    # docs/performance.md has the figures.
    cdef Pace pace
    pace.group = SMALL_GROUP if count_per_channel(job) <= FEW_VALUES else ROWS
    pace.together = maximum(
        1, minimum(MOST_TOGETHER, L1_ELEMENTS // (pace.group * columns)))
    pace.ahead = 0
    if job.large and pace.group == ROWS:
        pace.ahead = maximum(pace.together, 16 if job.plan.long_runs else 4)
    return pace


cdef inline void prefetch_group(const Group* g, ptrdiff_t groups,
                                bint gradient) noexcept nogil:
    cdef Py_ssize_t row
    for row in range(ROWS):
        prefetch(g.x + row * g.x_step, groups * ROWS * g.x_step)
        if gradient:
            prefetch(g.dy + row * g.dy_step, groups * ROWS * g.dy_step)


cdef struct Sums:
    # The float64 sums of one register of columns.
    wides s[HALVES]
    wides q[HALVES]


cdef inline void load_sums(const Columns* columns, Py_ssize_t at, Sums* sums) noexcept nogil:
    cdef Py_ssize_t half
    for half in range(HALVES):
        sums.s[half] = load_wide(columns.s + at + half * WIDE)
        sums.q[half] = load_wide(columns.q + at + half * WIDE)


cdef inline void store_sums(const Sums* sums, Py_ssize_t at, Columns* columns) noexcept nogil:
    cdef Py_ssize_t half
    for half in range(HALVES):
        store_wide(columns.s + at + half * WIDE, sums.s[half])
        store_wide(columns.q + at + half * WIDE, sums.q[half])


cdef inline void sum_register(const Matrix* x, const Matrix* dy, const Columns* columns,
                              Py_ssize_t first, Py_ssize_t row, Py_ssize_t groups, Py_ssize_t j,
                              ptrdiff_t ahead, bint small, bint gradient,
                              Sums* sums) noexcept nogil:
    # Whole groups of one register of columns, from column j on.
    cdef Py_ssize_t i, half, rows = SMALL_GROUP if small else ROWS
    cdef lanes s, q
    cdef Group g
    g.x, g.x_step = row_at(x, row) + j, x.step
    g.dy, g.dy_step = row_at(dy, row) + j, dy.step
    g.pivot = load_real(columns.pivot + first + j)
    if gradient:
        g.scale = load_real(columns.scale + first + j)
    for i in range(groups):
        if ahead and j % LINE == 0:
            prefetch_group(&g, ahead, gradient)
        if small:
            sum4(&g, 0, gradient, &s, &q)
        else:
            sum8(&g, 0, gradient, &s, &q)
        for half in range(HALVES):
            sums.s[half] = sums.s[half] + widen(s, half)
            sums.q[half] = sums.q[half] + widen(q, half)
        g.x += rows * g.x_step
        g.dy += rows * g.dy_step


cdef inline void sum_whole_groups(const Matrix* x, const Matrix* dy, Columns* columns,
                                  Py_ssize_t first, Py_ssize_t row, Py_ssize_t groups,
                                  ptrdiff_t ahead, bint small, bint gradient) noexcept nogil:
    # Groups without a jump, of at least one register of columns: the sums stay in
    # registers. A last register may overlap the one before; it starts from the same
    # sums, and so arrives at the same ones.
    cdef Py_ssize_t k, j, last = x.columns - WIDTH
    cdef Sums sums, last_sums
    load_sums(columns, first + last, &last_sums)
    for k in range(x.columns // WIDTH):
        j = k * WIDTH
        load_sums(columns, first + j, &sums)
        sum_register(x, dy, columns, first, row, groups, j, ahead, small, gradient, &sums)
        store_sums(&sums, first + j, columns)
    if x.columns % WIDTH:
        sum_register(x, dy, columns, first, row, groups, last, ahead, small, gradient, &last_sums)
        store_sums(&last_sums, first + last, columns)


cdef inline void sum_odd_group(const Matrix* x, const Matrix* dy, Columns* columns,
                               Py_ssize_t first, Py_ssize_t row, Py_ssize_t rows,
                               bint gradient) noexcept nogil:
    # A group that is not whole, or has a jump, or too few columns for a register:
    # columns that its last register has too many get terms of 0.
    cdef elem x_scratch[ROWS * WIDTH]
    cdef elem dy_scratch[ROWS * WIDTH]
    cdef Group g
    cdef Py_ssize_t k, j
    cdef bint apart = jumps(x, row, rows) or (gradient and jumps(dy, row, rows))
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
        sum_group(&g, rows, gradient, columns.s + first + j, columns.q + first + j)


cdef inline void sum_matrix(const Matrix* x, const Matrix* dy, Columns* columns,
                            Py_ssize_t first, const Pace* pace, bint gradient) noexcept nogil:
    # Adds a matrix to the sums of the columns from `first` on.
    cdef Py_ssize_t group = pace.group, chunk = pace.together * pace.group
    cdef Py_ssize_t k, row, rows, groups, i
    for k in range(steps(x.rows, chunk)):
        row = k * chunk
        rows = minimum(chunk, x.rows - row)
        groups = rows // group
        if (x.columns < WIDTH or jumps(x, row, groups * group)
                or (gradient and jumps(dy, row, groups * group))):
            groups = 0
        elif group == ROWS:
            sum_whole_groups(x, dy, columns, first, row, groups, pace.ahead, False, gradient)
        else:
            sum_whole_groups(x, dy, columns, first, row, groups, pace.ahead, True, gradient)
        for i in range(groups, steps(rows, group)):
            sum_odd_group(x, dy, columns, first, row + i * group,
                          minimum(group, rows - i * group), gradient)


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
                              Columns* columns, Py_ssize_t first, const Pace* pace,
                              bint gradient) noexcept nogil:
    if wide != NULL:
        wide_matrix(x, dy, wide, columns, first, gradient)
    else:
        sum_matrix(x, dy, columns, first, pace, gradient)


cdef inline void sum_with_remainder(Matrix x, Matrix dy, Py_ssize_t length,
                                    const WideColumns* wide, Columns* columns, Py_ssize_t first,
                                    const Pace* pace, bint gradient) noexcept nogil:
    # `length` neighbouring elements as a matrix, and what remains as one more row.
    sum_matrices(&x, &dy, wide, columns, first, pace, gradient)
    x = remainder_matrix(x, length)
    dy = remainder_matrix(dy, length)
    if x.rows:
        sum_matrices(&x, &dy, wide, columns, first, pace, gradient)


cdef inline void gather_pixels(const Job* job, const Operand* operand, Py_ssize_t run,
                               Py_ssize_t runs, elem* to) noexcept nogil:
    cdef const elem* pixel
    cdef Py_ssize_t i, c, channels = job.view.channels
    for i in range(runs):
        pixel = element(job, operand, 0, run + i, 0)
        for c in range(channels):
            to[i * channels + c] = pixel[c * operand.channel]


cdef inline void sum_pixels(const Job* job, const Block* block, Columns* columns,
                            bint gradient) noexcept nogil:
    # A block of few channels. Pixels that are apart in memory are gathered, so many
    # at a time as make a whole number of groups.
    cdef const Operand* other = &job.dy if gradient else &job.x
    cdef elem x_scratch[ROWS * PIXELS * PIXELS]
    cdef elem dy_scratch[ROWS * PIXELS * PIXELS]
    cdef elem* dy = x_scratch
    cdef Pace pace = pace_of(job, PIXELS * job.view.channels)
    cdef Py_ssize_t i, run, runs
    if gapless_runs(job, &job.x) and gapless_runs(job, other):
        sum_with_remainder(
            pixel_matrix(job, element(job, &job.x, 0, block.run, 0), block.runs),
            pixel_matrix(job, element(job, other, 0, block.run, 0), block.runs),
            block.runs * job.view.channels, NULL, columns, 0, &pace, gradient)
        return
    pace.ahead = 0
    for i in range(steps(block.runs, ROWS * PIXELS)):
        run = block.run + i * ROWS * PIXELS
        runs = minimum(ROWS * PIXELS, block.run + block.runs - run)
        gather_pixels(job, &job.x, run, runs, x_scratch)
        if gradient:
            gather_pixels(job, &job.dy, run, runs, dy_scratch)
            dy = dy_scratch
        sum_with_remainder(
            pixel_matrix(job, x_scratch, runs), pixel_matrix(job, dy, runs),
            runs * job.view.channels, NULL, columns, 0, &pace, gradient)


cdef inline void sum_block(const Job* job, const Block* block, Py_ssize_t channel,
                           Py_ssize_t channels, const WideColumns* wide, Columns* columns,
                           bint gradient) noexcept nogil:
    # The sums of a block; with `wide` in float64, and each pixel a row.
    cdef Matrix x, dy
    cdef const Operand* other = &job.dy if gradient else &job.x
    cdef Py_ssize_t i, c, run, together
    cdef Py_ssize_t width = columns_per_channel(job)
    cdef Pace pace
    memset(columns.s, 0, channels * width * job.plan.pixels * sizeof(double))
    memset(columns.q, 0, channels * width * job.plan.pixels * sizeof(double))
    if job.plan.long_runs:
        pace = pace_of(job, RUN_COLUMNS)
        for run in range(block.run, block.run + block.runs):
            for c in range(channels):
                x = long_matrix(job, &job.x, block, channel + c, run)
                dy = long_matrix(job, other, block, channel + c, run)
                sum_with_remainder(x, dy, block.length, wide, columns, c * width, &pace, gradient)
        return
    if job.plan.pixels > 1 and wide == NULL:
        sum_pixels(job, block, columns, gradient)
        return
    together = minimum(neighbours(job, &job.x, channels), neighbours(job, other, channels))
    pace = pace_of(job, together * width)
    for i in range(channels // together):
        c = i * together
        x = short_matrix(job, &job.x, block, channel + c, together)
        dy = short_matrix(job, other, block, channel + c, together)
        sum_matrices(&x, &dy, wide, columns, c * width, &pace, gradient)


cdef inline double fold(const double* sums, Py_ssize_t n, Py_ssize_t step) noexcept nogil:
    # The sum of a channel's columns: eight running sums, then a tree.
    cdef double lane[8]
    cdef Py_ssize_t i, k
    for k in range(8):
        lane[k] = 0.0
    for i in range(0, n - 7, 8):
        for k in range(8):
            lane[k] += sums[(i + k) * step]
    for k in range(n & 7):
        lane[k] += sums[((n & ~7) + k) * step]
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


cdef inline void spread_channels(const Job* job, real* columns, const real* values,
                                 Py_ssize_t channels) noexcept nogil:
    # Over the columns that sums are made in.
    cdef Py_ssize_t width = columns_per_channel(job)
    spread(columns, values, channels, width, channels * width * job.plan.pixels)


cdef inline void fold_columns(const Columns* columns, Py_ssize_t channels, Py_ssize_t width,
                              double* s, double* q) noexcept nogil:
    cdef Py_ssize_t c
    if width == 1:
        memcpy(s, columns.s, channels * sizeof(double))
        memcpy(q, columns.q, channels * sizeof(double))
        return
    for c in range(channels):
        s[c] = fold(columns.s + c * width, width, 1)
        q[c] = fold(columns.q + c * width, width, 1)


cdef inline void fold_channels(const Job* job, const Columns* columns, Py_ssize_t channels,
                               double* s, double* q) noexcept nogil:
    # The reverse of spread_channels.
    cdef Py_ssize_t c
    if job.plan.pixels == 1:
        fold_columns(columns, channels, columns_per_channel(job), s, q)
        return
    for c in range(channels):
        s[c] = fold(columns.s + c, PIXELS, channels)
        q[c] = fold(columns.q + c, PIXELS, channels)
