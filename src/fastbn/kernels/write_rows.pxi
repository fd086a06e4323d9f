# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes over neighbouring elements of several channels, whose coefficients
# are a table: rows, and planes of few values.
#
# An element is read before it is written, and written once, so `out` may be any of the
# tensors that are read. (dz may lie in `out`, which is then written again: not where x is.)

cdef enum:
    ROWS_AT_ONCE = 4
    SMALL = 2 << 20         # bytes: rows of larger tensors are written one by one


cdef struct Matrices:
    # The same rows and columns of each tensor.
    Matrix x, dy, residual, out
    WrittenMask mask


cdef inline Py_ssize_t write_whole_tables(Pointers p, Py_ssize_t n, const CoefficientTable* table,
                                          Py_ssize_t column, int registers,
                                          int variant) noexcept nogil:
    # What write_run does, for a table of so many registers: none of it is loaded
    # again. (Loads may have to wait for stores at the same place of another page.)
    # Returns how many elements are done.
    cdef Coefficients coefs[TABLE_REGISTERS]
    cdef Py_ssize_t i
    cdef int k
    for k in range(registers):
        coefs[k] = coefficients_at(table, (column + k * WIDTH) % table.length, variant)
    for i in range(n // (registers * WIDTH)):
        for k in range(registers):
            write_vector(&p, (i * registers + k) * WIDTH, &coefs[k], variant)
    return n // (registers * WIDTH) * registers * WIDTH


cdef inline void write_run(Pointers p, Py_ssize_t n, const CoefficientTable* table,
                           int variant) noexcept nogil:
    # n neighbouring elements, from column 0 on, the columns repeating with the
    # table's period. Registers of long runs begin where a line of the cache does.
    cdef Py_ssize_t i = 0, column = 0
    cdef Coefficients coef
    if variant & STREAMING:
        i = find_lines(&p, n)
    elif by_lines(variant) and n >= MANY_REGISTERS * WIDTH:
        i = to_alignment(p.out)
    if i:
        coef = coefficients_at(table, 0, variant)
        write_n(&p, 0, i, &coef, variant)
        column = i % table.length
    if variant & POW2_SCALED or (reads_dy(variant) and not is_plain(variant)):
        pass
    elif table.length == TABLE_REGISTERS * WIDTH:
        i += write_whole_tables(advanced(&p, i), n - i, table, column, TABLE_REGISTERS, variant)
    elif table.length == (TABLE_REGISTERS - 1) * WIDTH:
        i += write_whole_tables(advanced(&p, i), n - i, table, column, TABLE_REGISTERS - 1, variant)
    while i + WIDTH <= n:
        coef = coefficients_at(table, column, variant)
        write_vector(&p, i, &coef, variant)
        i += WIDTH
        column += WIDTH
        if column >= table.length:
            column -= table.length
    if i < n:
        coef = coefficients_at(table, column, variant)
        write_n(&p, i, n - i, &coef, variant)


cdef inline Matrices short_matrices(const Job* job, const Activation* a, const Block* block,
                                    Py_ssize_t channel, Py_ssize_t channels,
                                    int variant) noexcept nogil:
    cdef Matrices s
    s.x = short_matrix(job, &job.buffers.x, block, channel, channels)
    s.dy = s.residual = s.x
    s.out = short_matrix(job, operand_of_out(job, variant), block, channel, channels)
    s.mask = job.buffers.written_mask
    if reads_dy(variant):
        s.dy = short_matrix(job, operand_of_dy(job, variant), block, channel, channels)
    if reads_residual(a, variant):
        s.residual = short_matrix(job, &job.buffers.residual, block, channel, channels)
    return s


cdef inline Pointers pointers_in(const Matrices* s, const Activation* a, Py_ssize_t row,
                                 int variant) noexcept nogil:
    cdef Pointers p
    p.activation = a
    p.x = p.dy = p.residual = row_at(&s.x, row)
    p.out = row_at(&s.out, row)
    p.lines = p.lines_end = p.out
    p.mask = mask_at(&s.mask, p.out)
    if reads_dy(variant):
        p.dy = row_at(&s.dy, row)
    if reads_residual(a, variant):
        p.residual = row_at(&s.residual, row)
    return p


cdef inline Py_ssize_t write_rows(const Matrices* s, const Activation* a,
                                  const CoefficientTable* table, int variant) noexcept nogil:
    # ROWS_AT_ONCE rows at a time, so that a register's coefficients are loaded once. Rows
    # of WIDTH columns at least; if need be they end with a whole register that
    # overlaps the last but one: it is read first, since `out` may be `x`.
    # Returns how many rows are done.
    cdef Py_ssize_t k, i, row = 0, n = s.x.columns
    cdef Pointers p[ROWS_AT_ONCE]
    cdef lanes tail[ROWS_AT_ONCE]
    cdef Coefficients coef
    while row + ROWS_AT_ONCE <= s.x.rows:
        for k in range(ROWS_AT_ONCE):
            p[k] = pointers_in(s, a, row + k, variant)
        for k in range(ROWS_AT_ONCE):
            tail[k] = set1(0)
        if n % WIDTH:
            coef = coefficients_at(table, n - WIDTH, variant)
            for k in range(ROWS_AT_ONCE):
                tail[k] = kept(&p[k], n - WIDTH, value_at(&coef, &p[k], n - WIDTH, variant))
        for i in range(n // WIDTH):
            coef = coefficients_at(table, i * WIDTH, variant)
            for k in range(ROWS_AT_ONCE):
                write_vector(&p[k], i * WIDTH, &coef, variant)
        if n % WIDTH:
            for k in range(ROWS_AT_ONCE):
                store(p[k].out + n - WIDTH, tail[k])
        row += ROWS_AT_ONCE
    return row


cdef inline bint rows_share_a_set(const Job* job) noexcept nogil:
    # Rows a multiple of a page apart share a set of the cache: one at a time.
    return job.buffers.out.middle % PAGE == 0


cdef inline bint crosses_lines(const Matrix* m) noexcept nogil:
    # Would registers of rows cross lines, so many that it counts more than that coefficients
    # are loaded again for each row?
    return sizeof(elem) == sizeof(real) and 2 * WIDTH >= LINE and to_alignment(m.data) != 0


cdef inline void write_short(const Job* job, const Activation* a, const Block* block,
                             Py_ssize_t channel, Py_ssize_t channels, const CoefficientTable* table,
                             int variant) noexcept nogil:
    cdef Matrices s = short_matrices(job, a, block, channel, channels, variant)
    cdef Py_ssize_t row, rows = s.x.rows, n = s.x.columns, done = 0
    cdef bint one_run = (gapless(&s.x) and gapless(&s.dy) and gapless(&s.residual)
                         and gapless(&s.out))
    if (is_plain(variant) and not variant & (STREAMING | POW2_SCALED) and n >= WIDTH
            and not rows_share_a_set(job) and job.plan.bytes < <size_t>SMALL
            and not (one_run and (crosses_lines(&s.out)
                                  or table.length <= TABLE_REGISTERS * WIDTH))):
        done = write_rows(&s, a, table, variant)
    elif one_run:
        rows, n = 1, rows * n
    for row in range(done, rows):
        write_run(pointers_in(&s, a, row, variant), n, table, variant)


cdef inline Py_ssize_t all_neighbours(const Job* job, const Activation* a, Py_ssize_t channels,
                                      int variant) noexcept nogil:
    cdef Py_ssize_t together = minimum(neighbours(job, &job.buffers.x, channels),
                                       neighbours(job, operand_of_out(job, variant), channels))
    if reads_dy(variant):
        together = minimum(together, neighbours(job, operand_of_dy(job, variant), channels))
    if reads_residual(a, variant):
        together = minimum(together, neighbours(job, &job.buffers.residual, channels))
    return together


cdef inline void write_tile(const Job* job, const Activation* a, Py_ssize_t tile, Py_ssize_t b0,
                            Py_ssize_t b1, int variant) noexcept nogil:
    # Row by row, as statistics read it.
    cdef Py_ssize_t channel = first_channel(job, tile)
    cdef Py_ssize_t channels = count_channels(job, tile)
    cdef Py_ssize_t together = all_neighbours(job, a, channels, variant)
    cdef Py_ssize_t i, c, b
    cdef CoefficientStorage storage
    cdef CoefficientTable table
    cdef Block block
    for i in range(channels // together):
        c = i * together
        fill_table(job, channel + c, together, job.problem.view.inner, variant, &storage, &table)
        for b in range(b0, b1):
            block = block_at(job, b)
            write_short(job, a, &block, channel + c, together, &table, variant)
