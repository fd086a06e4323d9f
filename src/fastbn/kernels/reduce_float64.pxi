# SPDX-License-Identifier: BSD-3-Clause
# The same sums in float64, for blocks where `real` will not do: any block, as matrices.
#
# May: read the block. May not: decide which blocks, or what their sums mean.

cdef enum:
    ROWS_IN_TURN = 4    # a column by itself would be one long chain of additions

cdef struct WideColumns:
    double pow2_scale[COLUMNS]
    double pivot[COLUMNS]
    const Columns* in_real      # ACTIVATED: the same columns


cdef lanes activation_grad_of_one(elem x, elem dy, Features features, const Columns* columns,
                                  Py_ssize_t column, lanes* number) noexcept nogil:
    # What `gradient_term` does about an activation, for one element. Returns dy.
    cdef const Activation* a = &columns.activation
    cdef lanes z = load_n_or(&x, 1, set1(0))
    number[0] = z
    if a.inverted:
        number[0] = leaky_inverse(a, z)
    else:
        z = ((z * set1(columns.pow2_scale[column]) - set1(columns.pivot[column]))
             * set1(columns.scale[column]) + set1(columns.shift[column]))
        if features.weight != NULL:
            z = z * set1(features.weight[0]) + set1(features.bias[0])
    return activation_grad_outlined(a, z, load_n_or(&dy, 1, set1(0)))


cdef inline void wide_term(elem x, elem dy, Features features, const WideColumns* wide,
                           Py_ssize_t column, int terms, double* s, double* q) noexcept nogil:
    cdef double number = as_double(x)
    cdef lanes inverted_x
    if terms == MOMENTS:
        s[0] = number - wide.pivot[column]
        q[0] = s[0] * s[0]
        return
    s[0] = as_double(dy)
    if terms & ACTIVATED:
        s[0] = first_lane(activation_grad_of_one(x, dy, features, wide.in_real, column,
                                                 &inverted_x))
        number = first_lane(inverted_x)
    if features.weight != NULL:
        s[0] *= features.weight[0]
    q[0] = s[0] * (number * wide.pow2_scale[column] - wide.pivot[column])


cdef inline void reduce_matrix_f64(const Inputs* m, Features features, const WideColumns* wide,
                                   Columns* columns, int terms) noexcept nogil:
    cdef Py_ssize_t i, row, j, k, rounds = <size_t>m.x.rows // ROWS_IN_TURN
    cdef const elem* x[ROWS_IN_TURN]
    cdef const elem* dy[ROWS_IN_TURN]
    cdef double s[ROWS_IN_TURN]
    cdef double q[ROWS_IN_TURN]
    for i in range(rounds):
        row = i * ROWS_IN_TURN
        for k in range(ROWS_IN_TURN):
            x[k], dy[k] = row_at(&m.x, row + k), row_at(&m.dy, row + k)
        for j in range(m.x.columns):
            for k in range(ROWS_IN_TURN):
                wide_term(x[k][j], dy[k][j],
                          later_features(features, (row + k) * RUN_COLUMNS + j), wide, m.first + j,
                          terms, &s[k], &q[k])
            columns.s[m.first + j] += (s[0] + s[1]) + (s[2] + s[3])
            columns.q[m.first + j] += (q[0] + q[1]) + (q[2] + q[3])
    for row in range(rounds * ROWS_IN_TURN, m.x.rows):
        x[0], dy[0] = row_at(&m.x, row), row_at(&m.dy, row)
        for j in range(m.x.columns):
            wide_term(x[0][j], dy[0][j], later_features(features, row * RUN_COLUMNS + j), wide,
                      m.first + j, terms, &s[0], &q[0])
            columns.s[m.first + j] += s[0]
            columns.q[m.first + j] += q[0]


cdef inline void reduce_run_f64(const Job* job, const Block* block, Inputs m,
                                const WideColumns* wide, Columns* columns,
                                int terms) noexcept nogil:
    # As a matrix, and what remains of it as one more row. A loop, since the code of a sum is
    # long.
    cdef Features features = input_features(job, block, terms)
    cdef int part
    for part in range(2):
        reduce_matrix_f64(&m, features, wide, columns, terms)
        features = later_features(features, m.x.rows * RUN_COLUMNS)
        m = remainder_of(&m, block.length)


cdef void reduce_copy_f64(ChunkCopy* copy, Py_ssize_t n, const WideColumns* wide,
                          Columns* columns, int terms) noexcept nogil:
    cdef Inputs m = Inputs(copied_matrix(copy.x, RUN_COLUMNS, RUN_COLUMNS),
                           copied_matrix(copy.dy, RUN_COLUMNS, RUN_COLUMNS), 0)
    cdef int part
    m.x.rows = m.dy.rows = n // RUN_COLUMNS
    for part in range(2):
        reduce_matrix_f64(&m, no_features(), wide, columns, terms)
        m = remainder_of(&m, n)


cdef void reduce_counted_f64(const Job* job, const Block* block, Py_ssize_t channel,
                             const WideColumns* wide, Columns* columns, int terms) noexcept nogil:
    # What a mask leaves of one channel, side by side, as rows of RUN_COLUMNS.
    cdef ChunkCopy copy
    cdef const Operand* other = other_input(job, terms)
    cdef const Mask* mask = &job.buffers.mask
    cdef Py_ssize_t run, i, n = 0
    clear_columns(columns, RUN_COLUMNS)
    for run in range(block.run, block.run + block.runs):
        for i in range(block.offset, block.offset + block.length):
            if not mask.bytes[run * mask.period + i % mask.period]:
                continue
            copy.x[n] = element(job, &job.buffers.x, channel, run, i)[0]
            copy.dy[n] = element(job, other, channel, run, i)[0]
            n += 1
            if n == RUN_COPIED:
                reduce_copy_f64(&copy, n, wide, columns, terms)
                n = 0
    reduce_copy_f64(&copy, n, wide, columns, terms)


cdef inline void reduce_block_f64(const Job* job, const Block* block, Py_ssize_t channel,
                                  Py_ssize_t channels, const WideColumns* wide, Columns* columns,
                                  int terms) noexcept nogil:
    cdef Py_ssize_t i, c, run, together, width = columns_per_channel(job)
    cdef Inputs m
    clear_columns(columns, channels * width)
    if job.plan.long_runs:
        for run in range(block.run, block.run + block.runs):
            for c in range(channels):
                m = long_inputs(job, block, channel + c, run, c * width, terms)
                reduce_run_f64(job, block, m, wide, columns, terms)
        return
    together = adjacent_inputs(job, channels, terms)
    for i in range(channels // together):
        c = i * together
        m = short_inputs(job, block, channel + c, together, c * width, terms)
        reduce_matrix_f64(&m, no_features(), wide, columns, terms)
