# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes over planes and rows: with features.pxi the only place where a
# tensor is written. elementwise.pxi has the arithmetic, and the store of a register.
#
# An element is read before it is written, and written once, so `out` may be any of the
# tensors that are read. (dz may lie in `out`, which is then written again: not where x is.)

cdef enum:
    LONG_ENOUGH = 128       # bytes: runs as long as that are written along, not by columns
    LONG_TO_STREAM = 64     # the same past the cache, where a line in two parts costs more
    SMALL = 2 << 20         # bytes: rows of larger tensors are written one by one
    MANY = 2048             # channels: the coefficients of more crowd the cache

cdef struct Matrices:
    # The same rows and columns of each tensor.
    Matrix x, dy, residual, out


cdef inline void write_n(const Pointers* p, Py_ssize_t i, Py_ssize_t n, const Coefficients* coef,
                         int variant) noexcept nogil:
    cdef Vectors vectors = load_n_vectors(p, i, n, variant)
    store_n(p.out + i, value(coef, p.activation, &vectors, variant), n)


cdef inline void write_vector(const Pointers* p, Py_ssize_t i, const Coefficients* coef,
                              int variant) noexcept nogil:
    store_vector(p, i, value_at(coef, p, i, variant), variant)


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
    elif by_lines(variant) and n >= LONG_RUN * WIDTH:
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
    s.x = short_matrix(job, &job.x, block, channel, channels)
    s.dy = s.residual = s.x
    s.out = short_matrix(job, operand_of_out(job, variant), block, channel, channels)
    if reads_dy(variant):
        s.dy = short_matrix(job, operand_of_dy(job, variant), block, channel, channels)
    if reads_residual(a, variant):
        s.residual = short_matrix(job, &job.residual, block, channel, channels)
    return s


cdef inline Pointers pointers_in(const Matrices* s, const Activation* a, Py_ssize_t row,
                                 int variant) noexcept nogil:
    cdef Pointers p
    p.activation = a
    p.x = p.dy = p.residual = row_at(&s.x, row)
    p.out = row_at(&s.out, row)
    p.lines = p.lines_end = p.out
    if reads_dy(variant):
        p.dy = row_at(&s.dy, row)
    if reads_residual(a, variant):
        p.residual = row_at(&s.residual, row)
    return p


cdef inline Py_ssize_t write_rows(const Matrices* s, const Activation* a,
                                  const CoefficientTable* table, int variant) noexcept nogil:
    # Four rows at a time, so that a register's coefficients are loaded once. Rows
    # of WIDTH columns at least; if need be they end with a whole register that
    # overlaps the last but one: it is read first, since `out` may be `x`.
    # Returns how many rows are done.
    cdef Py_ssize_t row, k, i, n = s.x.columns
    cdef Pointers p[4]
    cdef lanes tail[4]
    cdef Coefficients coef
    for row in range(0, s.x.rows - 3, 4):
        for k in range(4):
            p[k] = pointers_in(s, a, row + k, variant)
        for k in range(4):
            tail[k] = set1(0)
        if n % WIDTH:
            coef = coefficients_at(table, n - WIDTH, variant)
            for k in range(4):
                tail[k] = value_at(&coef, &p[k], n - WIDTH, variant)
        for i in range(n // WIDTH):
            coef = coefficients_at(table, i * WIDTH, variant)
            for k in range(4):
                write_vector(&p[k], i * WIDTH, &coef, variant)
        if n % WIDTH:
            for k in range(4):
                store(p[k].out + n - WIDTH, tail[k])
    return s.x.rows & ~3


cdef inline bint rows_share_a_set(const Job* job) noexcept nogil:
    # Rows a multiple of a page apart share a set of the cache: one at a time.
    return job.out.middle % PAGE == 0


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
            and not rows_share_a_set(job) and job.bytes < <size_t>SMALL
            and not (one_run and (crosses_lines(&s.out)
                                  or table.length <= TABLE_REGISTERS * WIDTH))):
        done = write_rows(&s, a, table, variant)
    elif one_run:
        rows, n = 1, rows * n
    for row in range(done, rows):
        write_run(pointers_in(&s, a, row, variant), n, table, variant)


cdef inline Py_ssize_t all_neighbours(const Job* job, const Activation* a, Py_ssize_t channels,
                                      int variant) noexcept nogil:
    cdef Py_ssize_t together = minimum(neighbours(job, &job.x, channels),
                                       neighbours(job, operand_of_out(job, variant), channels))
    if reads_dy(variant):
        together = minimum(together, neighbours(job, operand_of_dy(job, variant), channels))
    if reads_residual(a, variant):
        together = minimum(together, neighbours(job, &job.residual, channels))
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
        fill_table(job, channel + c, together, job.view.inner, variant, &storage, &table)
        for b in range(b0, b1):
            block = block_at(job, b)
            write_short(job, a, &block, channel + c, together, &table, variant)


cdef inline void write_adjacent_runs(const Job* job, const Activation* a, const Block* block,
                                     Py_ssize_t run, Py_ssize_t channel, Py_ssize_t channels,
                                     ptrdiff_t to_next, int variant) noexcept nogil:
    # The runs of neighbouring channels, which lie side by side: as one run, in whole
    # registers. (Past the cache a line that is not written as a whole has to be read.)
    cdef Pointers p = pointers_at(job, a, channel, run, block.offset, variant)
    cdef Py_ssize_t c, end, i = find_lines(&p, channels * block.length)
    cdef Coefficients coef, joined, next = coefficients_of(job, channel, variant)
    write_n(&p, 0, i, &next, variant)
    for c in range(1, channels + 1):
        end = c * block.length
        coef = next
        while i + WIDTH <= end:
            prefetch_next(&p, i, to_next, variant)
            write_vector(&p, i, &coef, variant)
            i += WIDTH
        if c == channels:
            write_n(&p, i, end - i, &coef, variant)
            return
        next = coefficients_of(job, channel + c, variant)
        if i < end:
            joined = coefficients_of_two(&coef, &next, end - i, variant)
            write_vector(&p, i, &joined, variant)
            i += WIDTH


cdef inline bint any_pow2_scaled(const Job* job, Py_ssize_t channel,
                                 Py_ssize_t channels) noexcept nogil:
    cdef const real* pow2_scale = coefficient(job, POW2_SCALE)
    cdef Py_ssize_t c
    cdef long scaled = 0
    for c in range(channel, channel + channels):
        scaled += pow2_scale[c] != 1.0
    return scaled != 0


cdef inline void write_runs(const Job* job, const Activation* a, Py_ssize_t channel,
                            Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                            int variant) noexcept nogil:
    # Image by image, since that is how they lie in memory.
    cdef Py_ssize_t together = all_neighbours(job, a, channels,
                                              variant) if job.plan.parts == 1 else 1
    cdef ptrdiff_t to_next = 0      # to the next tile, if it lies behind this one
    cdef Py_ssize_t b, run, c
    cdef Block block
    if job.fetch_next and variant & STREAMING and together == channels:
        to_next = channels * job.view.inner
    for b in range(b0, b1):
        block = block_at(job, b)
        for run in range(block.run, block.run + block.runs):
            for c in range(channels // together):
                write_adjacent_runs(job, a, &block, run, channel + c * together, together, to_next,
                                    variant)


cdef inline bint along_runs(const Job* job, int variant) noexcept nogil:
    # Always where runs are cut into columns: their tiles are too wide for a table.
    return (job.plan.long_runs or job.view.inner * <Py_ssize_t>sizeof(elem)
            >= (LONG_TO_STREAM if variant & STREAMING else LONG_ENOUGH))


cdef inline bint one_run_of_rows(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                                 int variant) noexcept nogil:
    # Are these whole rows of many channels, without gaps?
    return (job.view.inner == 1 and t1 - t0 > 1 and t1 - t0 == job.plan.tiles
            and gapless_runs(job, &job.x) and gapless_runs(job, &job.out)
            and (not reads_dy(variant) or gapless_runs(job, &job.dy))
            and (not reads_residual(a, variant) or gapless_runs(job, &job.residual)))


cdef inline void write_whole_rows(const Job* job, const Activation* a, Py_ssize_t b0, Py_ssize_t b1,
                                  int variant) noexcept nogil:
    # As one run, for which the coefficients of the job are the table.
    cdef Block first = block_at(job, b0), last = block_at(job, b1 - 1)
    cdef CoefficientTable table = CoefficientTable(
        coefficient(job, 0), coefficient(job, 1) - coefficient(job, 0), job.view.channels)
    write_run(pointers_at(job, a, 0, first.run, 0, variant),
              (last.run + last.runs - first.run) * job.view.channels, &table, variant)


cdef inline void write_tiles_as(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                                Py_ssize_t b0, Py_ssize_t b1, int variant) noexcept nogil:
    cdef Py_ssize_t tile, channel = first_channel(job, t0)
    cdef Py_ssize_t channels = channels_of_tiles(job, t0, t1)
    if job.view.features:
        write_features(job, a, channel, channels, b0, b1, variant)
        return
    if along_runs(job, variant):
        write_runs(job, a, channel, channels, b0, b1, variant)
        return
    if ((variant & STREAMING or job.view.channels <= MANY)
            and one_run_of_rows(job, a, t0, t1, variant)):
        write_whole_rows(job, a, b0, b1, variant)
        return
    for tile in range(t0, t1):
        write_tile(job, a, tile, b0, b1, variant)


cdef void write_pow2_scaled(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                            Py_ssize_t b0, Py_ssize_t b1, int variant) noexcept nogil:
    # The same code for all kinds, which asks each time what they need: with loops of their
    # own, a wheel would be a tenth larger.
    write_tiles_as(job, a, t0, t1, b0, b1, variant | POW2_SCALED)


cdef inline void write_tiles(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                             Py_ssize_t b0, Py_ssize_t b1, int variant) noexcept nogil:
    if any_pow2_scaled(job, first_channel(job, t0), channels_of_tiles(job, t0, t1)):
        write_pow2_scaled(job, a, t0, t1, b0, b1, variant)
    elif job.streaming and not variant & DZ:      # which is read again soon
        write_tiles_as(job, a, t0, t1, b0, b1, variant | STREAMING)
        flush_stream()
    else:
        write_tiles_as(job, a, t0, t1, b0, b1, variant)


cdef void write_forward(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                        Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    if job.fused:
        write_tiles(job, &a, t0, t1, b0, b1, FUSED)
    else:
        write_tiles(job, NULL, t0, t1, b0, b1, 0)
    fp_leave(saved)


cdef void write_gradient(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                         Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    if job.fused:
        write_tiles(job, &a, t0, t1, b0, b1, GRADIENT | FUSED)
    else:
        write_tiles(job, NULL, t0, t1, b0, b1, GRADIENT)
    fp_leave(saved)


cdef void write_dz(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                   Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    write_tiles(job, &a, t0, t1, b0, b1, DZ)
    fp_leave(saved)
