# SPDX-License-Identifier: BSD-3-Clause
# The two sums of every statistic, column by column:
#
#   moments      s = sum d          q = sum d * d         d = x - pivot
#   gradients    s = sum dy         q = sum dy * d        d = x * pow2_scale - pivot
#
# where dy is first multiplied by the weight of its feature, if there are features; and
# before that, taken from y to z, where there is an activation.
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
    WHOLE = -RUN_COLUMNS    # no part of a row is missing
    # Speed only.
    NEAR = 128              # rows are near, at most so many elements apart
    LARGE = 1 << 20         # near rows of larger tensors (bytes) are prefetched ...
    VERY_LARGE = 4 << 20    # ... and all rows of tensors larger than this
    ALIGNED_COLUMNS = 256   # fewer are not worth a register more
    IN_L1 = 1024            # elements; a whole number of row groups

cdef enum:
    # What is summed: `gradient` below, a constant.
    MOMENTS, GRADIENTS, ACTIVATED

cdef struct Columns:
    # What the columns of a tile are read with, and their sums.
    lanes aligned               # unused: the arrays begin where a register may
    real pow2_scale[COLUMNS + PADDING]
    real pivot[COLUMNS + PADDING]
    real scale[COLUMNS + PADDING]
    real shift[COLUMNS + PADDING]
    double s[COLUMNS + PADDING]
    double q[COLUMNS + PADDING]
    Activation activation

cdef struct RowGroup:
    # Up to ROWS rows of one register of columns.
    const elem* x
    const elem* dy
    ptrdiff_t x_step
    ptrdiff_t dy_step
    bint weighted
    Features features           # RUN_COLUMNS to a row
    lanes pow2_scale
    lanes pivot
    lanes scale
    lanes shift
    const Activation* activation

cdef struct RealSums:
    lanes s
    lanes q

cdef struct WideSums:
    # The float64 sums of one register of columns.
    wides s[HALVES]
    wides q[HALVES]


cdef inline lanes preactivation(const RowGroup* g, Py_ssize_t row, lanes d) noexcept nogil:
    # What the activation saw.
    cdef lanes z = d * g.scale + g.shift
    if g.weighted:
        z = (z * load_real(g.features.weight + row * RUN_COLUMNS)
             + load_real(g.features.bias + row * RUN_COLUMNS))
    return z


cdef inline RealSums term(const RowGroup* g, Py_ssize_t row, Py_ssize_t left,
                          int terms) noexcept nogil:
    # WHOLE, or the last row of a run: `left` elements from row 0 on are the run's,
    # and columns past them get terms of 0. In trees, too, it is the last row.
    cdef RealSums t
    cdef lanes d, z, number
    cdef const elem* x = g.x + row * g.x_step
    cdef const elem* dy = g.dy + row * g.dy_step
    cdef Py_ssize_t n = maximum(0, minimum(WIDTH, left - row * RUN_COLUMNS))
    number = load(x) if left == WHOLE else load_n_or(x, n, set1(0) if terms else g.pivot)
    if terms:
        t.s = force_register(load(dy)) if left == WHOLE else load_n_or(dy, n, set1(0))
        z = number
        if terms == ACTIVATED and g.activation.inverted:
            number = leaky_inverse(g.activation, number)
        d = number * g.pow2_scale - g.pivot
        if terms == ACTIVATED:
            t.s = activation_grad_outlined(g.activation,
                                           z if g.activation.inverted else preactivation(g, row, d),
                                           t.s)
        if g.weighted:
            t.s = t.s * load_real(g.features.weight + row * RUN_COLUMNS)
    else:
        t.s = number - g.pivot
        d = t.s
    t.q = t.s * d
    return t


cdef inline RealSums add_sums(RealSums a, RealSums b) noexcept nogil:
    cdef RealSums t
    t.s = a.s + b.s
    t.q = add(a.q, b.q)
    return t


cdef inline RealSums sum_2_rows(const RowGroup* g, Py_ssize_t row, Py_ssize_t left,
                                int terms) noexcept nogil:
    return add_sums(term(g, row, WHOLE, terms), term(g, row + 1, left, terms))


cdef inline RealSums sum_4_rows(const RowGroup* g, Py_ssize_t row, Py_ssize_t left,
                                int terms) noexcept nogil:
    return add_sums(sum_2_rows(g, row, WHOLE, terms), sum_2_rows(g, row + 2, left, terms))


cdef inline RealSums sum_8_rows(const RowGroup* g, Py_ssize_t left, int terms) noexcept nogil:
    return add_sums(sum_4_rows(g, 0, WHOLE, terms), sum_4_rows(g, 4, left, terms))


cdef inline void flush_to_f64(WideSums* sums, RealSums t) noexcept nogil:
    cdef int half
    for half in range(HALVES):
        sums.s[half] = sums.s[half] + widen(t.s, half)
        sums.q[half] = sums.q[half] + widen(t.q, half)


cdef inline RealSums sum_last_rows(const RowGroup* g, Py_ssize_t rows, Py_ssize_t left,
                                   int terms) noexcept nogil:
    # Up to ROWS rows: a tree for each bit of their number, no deeper than a whole one.
    # If there is a part of a row, it is in the last of them.
    cdef RealSums t
    if rows == ROWS:
        return sum_8_rows(g, left, terms)
    if rows & 3 == 3:
        t = add_sums(sum_2_rows(g, rows & 4, WHOLE, terms), term(g, rows & 6, left, terms))
    elif rows & 2:
        t = sum_2_rows(g, rows & 4, left, terms)
    elif rows & 1:
        t = term(g, rows & 4, left, terms)
    else:
        return sum_4_rows(g, 0, left, terms)
    return add_sums(sum_4_rows(g, 0, WHOLE, terms), t) if rows & 4 else t


cdef inline void load_sums(const Columns* columns, Py_ssize_t at, WideSums* sums) noexcept nogil:
    cdef Py_ssize_t half
    for half in range(HALVES):
        sums.s[half] = load_wide(columns.s + at + half * WIDE)
        sums.q[half] = load_wide(columns.q + at + half * WIDE)


cdef inline void clear_sums(WideSums* sums) noexcept nogil:
    cdef int half
    for half in range(HALVES):
        sums.s[half] = sums.q[half] = widen(set1(0), half)


cdef inline void store_sums(const WideSums* sums, Py_ssize_t at, Columns* columns) noexcept nogil:
    cdef Py_ssize_t half
    for half in range(HALVES):
        store_wide(columns.s + at + half * WIDE, sums.s[half])
        store_wide(columns.q + at + half * WIDE, sums.q[half])


cdef inline void gather(const Matrix* m, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t column,
                        lanes fill, elem* scratch) noexcept nogil:
    # Rows of one register, WIDTH apart: for rows without a common step, and for
    # the last columns, past which nothing may be read but `fill`.
    cdef Py_ssize_t r, n = minimum(WIDTH, m.columns - column)
    for r in range(rows):
        store(scratch + r * WIDTH, load_n_or(row_at(m, row + r) + column, n, fill))


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


cdef inline void load_columns(const Columns* columns, Py_ssize_t at, int terms,
                              RowGroup* g) noexcept nogil:
    # What a register of columns is read with.
    g.pivot = load_real(columns.pivot + at)
    if terms:
        g.pow2_scale = load_real(columns.pow2_scale + at)
    if terms == ACTIVATED:
        g.scale = load_real(columns.scale + at)
        g.shift = load_real(columns.shift + at)
        g.activation = &columns.activation


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


cdef inline void reduce_chunk(const elem* x, const elem* dy, Features features, Py_ssize_t n,
                              Columns* columns, Py_ssize_t first, ptrdiff_t ahead, bint small,
                              int terms, bint weighted, bint fresh) noexcept nogil:
    # n neighbouring elements as rows of RUN_COLUMNS, the last one perhaps a part; what
    # they are added to is 0, if they are the first ones.
    cdef size_t size = RUN_COLUMNS * (SMALL_GROUP if small else ROWS)
    cdef Py_ssize_t k, j, groups = <size_t>n // size, left = <size_t>n % size
    cdef RowGroup g
    cdef WideSums sums
    g.x_step = RUN_COLUMNS
    g.dy_step = RUN_COLUMNS
    for k in range(RUN_COLUMNS // WIDTH):
        j = k * WIDTH
        g.x = x + j
        g.dy = dy + j
        g.weighted = weighted
        if weighted:
            g.features = later_features(features, j)
        load_columns(columns, first, terms, &g)
        if fresh:
            clear_sums(&sums)
        else:
            load_sums(columns, first + j, &sums)
        reduce_row_groups(&g, groups, ahead if j % LINE == 0 else 0, small, terms, &sums)
        if left:
            flush_to_f64(&sums, sum_last_rows(&g, ceil_div(left, RUN_COLUMNS), left - j, terms))
        store_sums(&sums, first + j, columns)


cdef inline void reduce_run(const elem* x, const elem* dy, Features features, Py_ssize_t length,
                            Columns* columns, Py_ssize_t first, const ReduceTuning* tuning,
                            int terms, bint fresh) noexcept nogil:
    cdef Py_ssize_t n
    while True:
        n = minimum(IN_L1, length)
        if terms != MOMENTS and features.weight != NULL:
            reduce_chunk(x, dy, features, n, columns, first, tuning.ahead, False, terms, True,
                         fresh)
        elif tuning.group_rows == ROWS:
            reduce_chunk(x, dy, features, n, columns, first, tuning.ahead, False, terms, False,
                         fresh)
        else:
            reduce_chunk(x, dy, features, n, columns, first, 0, True, terms, False, fresh)
        length -= n
        if length == 0:
            return
        x, dy, fresh = x + n, dy + n, False
        features = later_features(features, n)


# The same sums in float64, for blocks where `real` will not do.

cdef struct WideColumns:
    double pow2_scale[COLUMNS]
    double pivot[COLUMNS]
    const Columns* own      # of the same columns, if an activation is to be passed


cdef lanes activation_grad_of_one(elem x, elem dy, Features features, const Columns* own,
                                  Py_ssize_t column, lanes* number) noexcept nogil:
    # What `term` does about an activation, for one element. Returns dy.
    cdef lanes z = load_n_or(&x, 1, set1(0))
    number[0] = z
    if own.activation.inverted:
        number[0] = leaky_inverse(&own.activation, z)
    else:
        z = ((z * set1(own.pow2_scale[column]) - set1(own.pivot[column]))
             * set1(own.scale[column]) + set1(own.shift[column]))
        if features.weight != NULL:
            z = z * set1(features.weight[0]) + set1(features.bias[0])
    return activation_grad_outlined(&own.activation, z, load_n_or(&dy, 1, set1(0)))


cdef inline void wide_term(elem x, elem dy, Features features, const WideColumns* wide,
                           Py_ssize_t column, int terms, double* s, double* q) noexcept nogil:
    cdef double number = as_double(x)
    cdef lanes inverted_x
    if terms == MOMENTS:
        s[0] = number - wide.pivot[column]
        q[0] = s[0] * s[0]
        return
    s[0] = as_double(dy)
    if terms == ACTIVATED:
        s[0] = first_lane(activation_grad_of_one(x, dy, features, wide.own, column, &inverted_x))
        number = first_lane(inverted_x)
    if features.weight != NULL:
        s[0] *= features.weight[0]
    q[0] = s[0] * (number * wide.pow2_scale[column] - wide.pivot[column])


cdef inline void reduce_matrix_f64(const Matrix* x, const Matrix* dy, Features features,
                                   const WideColumns* wide, Columns* columns, Py_ssize_t first,
                                   int terms) noexcept nogil:
    # Four rows at a time: a column by itself would be one long chain of sums.
    cdef Py_ssize_t row, j, k
    cdef const elem* xs[4]
    cdef const elem* dys[4]
    cdef double s[4]
    cdef double q[4]
    for row in range(0, x.rows - 3, 4):
        for k in range(4):
            xs[k], dys[k] = row_at(x, row + k), row_at(dy, row + k)
        for j in range(x.columns):
            for k in range(4):
                wide_term(xs[k][j], dys[k][j],
                          later_features(features, (row + k) * RUN_COLUMNS + j), wide, first + j,
                          terms, &s[k], &q[k])
            columns.s[first + j] += (s[0] + s[1]) + (s[2] + s[3])
            columns.q[first + j] += (q[0] + q[1]) + (q[2] + q[3])
    for row in range(x.rows & ~3, x.rows):
        xs[0], dys[0] = row_at(x, row), row_at(dy, row)
        for j in range(x.columns):
            wide_term(xs[0][j], dys[0][j], later_features(features, row * RUN_COLUMNS + j), wide,
                      first + j, terms, &s[0], &q[0])
            columns.s[first + j] += s[0]
            columns.q[first + j] += q[0]


cdef inline void reduce_matrix_as(const Matrix* x, const Matrix* dy, Features features,
                                  const WideColumns* wide, Columns* columns, Py_ssize_t first,
                                  const ReduceTuning* tuning, int terms) noexcept nogil:
    if wide != NULL:
        reduce_matrix_f64(x, dy, features, wide, columns, first, terms)
    else:
        reduce_matrix(x, dy, columns, first, tuning, terms)


cdef inline void reduce_with_remainder(Matrix x, Matrix dy, Py_ssize_t length, Features features,
                                       const WideColumns* wide, Columns* columns, Py_ssize_t first,
                                       const ReduceTuning* tuning, int terms) noexcept nogil:
    # `length` neighbouring elements as a matrix, and what remains as one more row. A loop,
    # since the code of a sum is long.
    cdef int part
    for part in range(2):
        reduce_matrix_as(&x, &dy, features, wide, columns, first, tuning, terms)
        features = later_features(features, x.rows * RUN_COLUMNS)
        x = remainder_matrix(x, length)
        dy = remainder_matrix(dy, length)


cdef inline elem* gather_pixels(const Job* job, const Operand* operand, Py_ssize_t run,
                                Py_ssize_t runs, elem* to) noexcept nogil:
    cdef const elem* pixel
    cdef Py_ssize_t i, c, channels = job.view.channels
    for i in range(runs):
        pixel = element(job, operand, 0, run + i, 0)
        for c in range(channels):
            to[i * channels + c] = pixel[c * operand.channel]
    return to


cdef inline void reduce_pixels(const Job* job, const Block* block, Columns* columns,
                               int terms) noexcept nogil:
    # A block of few channels. Pixels that are apart in memory are gathered, so many
    # at a time as make a whole number of row groups.
    cdef const Operand* other = &job.dy if terms else &job.x
    cdef bint gathered = not (gapless_runs(job, &job.x) and gapless_runs(job, other))
    cdef elem x_scratch[ROWS * PIXELS * PIXELS]
    cdef elem dy_scratch[ROWS * PIXELS * PIXELS]
    cdef elem* x
    cdef elem* dy
    cdef ReduceTuning tuning = reduce_tuning(job, PIXELS * job.view.channels, terms)
    cdef Py_ssize_t i, run, runs, at_once = ROWS * PIXELS if gathered else block.runs
    if gathered:
        tuning.ahead = 0
        tuning.rowwise = False
    for i in range(ceil_div(block.runs, at_once)):
        run = block.run + i * at_once
        runs = minimum(at_once, block.run + block.runs - run)
        x, dy = element(job, &job.x, 0, run, 0), element(job, other, 0, run, 0)
        if gathered:
            x = dy = gather_pixels(job, &job.x, run, runs, x_scratch)
            if terms:
                dy = gather_pixels(job, other, run, runs, dy_scratch)
        reduce_with_remainder(
            pixel_matrix(job, x, runs), pixel_matrix(job, dy, runs),
            runs * job.view.channels, no_features(), NULL, columns, 0, &tuning, terms)


cdef inline void reduce_block(const Job* job, const Block* block, Py_ssize_t channel,
                              Py_ssize_t channels, const WideColumns* wide, Columns* columns,
                              int terms) noexcept nogil:
    # The sums of a block; with `wide` in float64, and each pixel a row.
    cdef Matrix x, dy
    cdef const Operand* other = &job.dy if terms else &job.x
    cdef Py_ssize_t i, c, run, together
    cdef Py_ssize_t width = columns_per_channel(job), length = block.length
    cdef ReduceTuning tuning
    cdef Features features = no_features()
    if terms and job.view.features:
        features = features_from(job, block.offset)
    if wide != NULL or not job.plan.long_runs:
        memset(columns.s, 0, channels * width * job.plan.pixels * sizeof(double))
        memset(columns.q, 0, channels * width * job.plan.pixels * sizeof(double))
    if job.plan.long_runs:
        tuning = reduce_tuning(job, RUN_COLUMNS, terms)
        for run in range(block.run, block.run + block.runs):
            for c in range(channels):
                if wide == NULL:
                    reduce_run(element(job, &job.x, channel + c, run, block.offset),
                               element(job, other, channel + c, run, block.offset), features,
                               length, columns, c * width, &tuning, terms, run == block.run)
                    continue
                x = long_matrix(job, &job.x, block, channel + c, run)
                dy = long_matrix(job, other, block, channel + c, run)
                reduce_with_remainder(x, dy, block.length, features, wide, columns, c * width,
                                      &tuning, terms)
        return
    if job.plan.pixels > 1 and wide == NULL:
        reduce_pixels(job, block, columns, terms)
        return
    together = minimum(neighbours(job, &job.x, channels), neighbours(job, other, channels))
    tuning = reduce_tuning(job, job.x.middle, terms)
    for i in range(channels // together):
        c = i * together
        x = short_matrix(job, &job.x, block, channel + c, together)
        dy = short_matrix(job, other, block, channel + c, together)
        reduce_matrix_as(&x, &dy, no_features(), wide, columns, c * width, &tuning, terms)


cdef inline double reduce_row(const double* sums) noexcept nogil:
    # What `reduce_strided` does with RUN_COLUMNS neighbours.
    cdef wides lane[8]
    cdef int k
    for k in range(8 // WIDE):
        lane[k] = load_wide(sums + k * WIDE) + load_wide(sums + 8 + k * WIDE)
    return sum_of_eight(lane)


cdef inline double reduce_strided(const double* sums, Py_ssize_t n, Py_ssize_t step) noexcept nogil:
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


cdef inline void broadcast_columns(real* columns, const real* values, Py_ssize_t channels,
                                   Py_ssize_t width, Py_ssize_t period) noexcept nogil:
    # Repeats each channel's value over its columns, and the columns once more
    # from the start for registers that reach past `period`. A store may reach
    # past its channel, never past the padding; the next channel overwrites it.
    cdef Py_ssize_t c, j, n, filled = channels * width
    if width == 1:
        memcpy(columns, values, channels * sizeof(real))
    else:
        for c in range(channels):
            for j in range(ceil_div(width, WIDTH)):
                store_real(columns + c * width + j * WIDTH, set1(values[c]))
    while filled < period + PADDING:
        n = minimum(filled, period + PADDING - filled)
        memcpy(columns + filled, columns, n * sizeof(real))
        filled += n


cdef inline void broadcast_channels(const Job* job, real* columns, const real* values,
                                    Py_ssize_t channels) noexcept nogil:
    # Over the columns that sums are made in.
    cdef Py_ssize_t width = columns_per_channel(job)
    broadcast_columns(columns, values, channels, width, channels * width * job.plan.pixels)


cdef inline void reduce_columns(const Columns* columns, Py_ssize_t channels, Py_ssize_t width,
                                double* s, double* q) noexcept nogil:
    cdef Py_ssize_t c
    if width == 1:
        memcpy(s, columns.s, channels * sizeof(double))
        memcpy(q, columns.q, channels * sizeof(double))
        return
    if width == RUN_COLUMNS:
        for c in range(channels):
            s[c] = reduce_row(columns.s + c * RUN_COLUMNS)
            q[c] = reduce_row(columns.q + c * RUN_COLUMNS)
        return
    for c in range(channels):
        s[c] = reduce_strided(columns.s + c * width, width, 1)
        q[c] = reduce_strided(columns.q + c * width, width, 1)


cdef inline void reduce_channels(const Job* job, const Columns* columns, Py_ssize_t channels,
                                 double* s, double* q) noexcept nogil:
    # The reverse of broadcast_channels.
    cdef Py_ssize_t c
    if job.plan.pixels == 1:
        reduce_columns(columns, channels, columns_per_channel(job), s, q)
        return
    for c in range(channels):
        s[c] = reduce_strided(columns.s + c, PIXELS, channels)
        q[c] = reduce_strided(columns.q + c, PIXELS, channels)
