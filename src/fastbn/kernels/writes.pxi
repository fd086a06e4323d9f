# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes over planes and rows: with features.pxi the only place where a
# tensor is written. pens.pxi has the arithmetic, and the store of a register.
#
# An element is read before it is written, and written once, so `out` may be any of the
# tensors that are read. (dz may lie in `out`, which is then written again: not where x is.)

cdef enum:
    LONG_ENOUGH = 128       # bytes: runs as long as that are written along, not by columns
    LONG_TO_STREAM = 64     # the same past the cache, where a line in two parts costs more
    SMALL = 2 << 20         # bytes: rows of larger tensors are written one by one
    MANY = 2048             # channels: the coefficients of more crowd the cache

cdef struct Sheet:
    # The same rows and columns of each tensor.
    Matrix x, dy, residual, out


cdef inline void write_part(const Place* p, Py_ssize_t i, Py_ssize_t n, const Pen* pen,
                            int how) noexcept nogil:
    cdef Lot some = part_of_lot(p, i, n, how)
    store_part(p.out + i, value(pen, p.activation, &some, how), n)


cdef inline void write_whole(const Place* p, Py_ssize_t i, const Pen* pen,
                             int how) noexcept nogil:
    put(p, i, value_at(pen, p, i, how), how)


cdef inline Py_ssize_t write_cycles(Place p, Py_ssize_t n, const Palette* palette,
                                    Py_ssize_t column, int registers, int how) noexcept nogil:
    # What write_run does, for a palette of so many registers: none of it is loaded
    # again. (Loads may have to wait for stores at the same place of another page.)
    # Returns how many elements are done.
    cdef Pen pens[CYCLE]
    cdef Py_ssize_t i
    cdef int k
    for k in range(registers):
        pens[k] = pen_at(palette, (column + k * WIDTH) % palette.period, how)
    for i in range(n // (registers * WIDTH)):
        for k in range(registers):
            write_whole(&p, (i * registers + k) * WIDTH, &pens[k], how)
    return n // (registers * WIDTH) * registers * WIDTH


cdef inline void write_run(Place p, Py_ssize_t n, const Palette* palette,
                           int how) noexcept nogil:
    # n neighbouring elements, from column 0 on, the columns repeating with the
    # palette's period. Registers of long runs begin where a line of the cache does.
    cdef Py_ssize_t i = 0, column = 0
    cdef Pen pen
    if how & STREAMING:
        i = find_lines(&p, n)
    elif by_lines(how) and n >= LONG_RUN * WIDTH:
        i = to_alignment(p.out)
    if i:
        pen = pen_at(palette, 0, how)
        write_part(&p, 0, i, &pen, how)
        column = i % palette.period
    if how & SCALED or (reads_dy(how) and not plain(how)):
        pass
    elif palette.period == CYCLE * WIDTH:
        i += write_cycles(further(&p, i), n - i, palette, column, CYCLE, how)
    elif palette.period == (CYCLE - 1) * WIDTH:
        i += write_cycles(further(&p, i), n - i, palette, column, CYCLE - 1, how)
    while i + WIDTH <= n:
        pen = pen_at(palette, column, how)
        write_whole(&p, i, &pen, how)
        i += WIDTH
        column += WIDTH
        if column >= palette.period:
            column -= palette.period
    if i < n:
        pen = pen_at(palette, column, how)
        write_part(&p, i, n - i, &pen, how)


cdef inline Sheet short_sheet(const Job* job, const Activation* a, const Block* block,
                              Py_ssize_t channel, Py_ssize_t channels, int how) noexcept nogil:
    cdef Sheet s
    s.x = short_matrix(job, &job.x, block, channel, channels)
    s.dy = s.residual = s.x
    s.out = short_matrix(job, operand_of_out(job, how), block, channel, channels)
    if reads_dy(how):
        s.dy = short_matrix(job, operand_of_dy(job, how), block, channel, channels)
    if reads_residual(a, how):
        s.residual = short_matrix(job, &job.residual, block, channel, channels)
    return s


cdef inline Place place_in(const Sheet* s, const Activation* a, Py_ssize_t row,
                           int how) noexcept nogil:
    cdef Place p
    p.activation = a
    p.x = p.dy = p.residual = row_at(&s.x, row)
    p.out = row_at(&s.out, row)
    p.lines = p.lines_end = p.out
    if reads_dy(how):
        p.dy = row_at(&s.dy, row)
    if reads_residual(a, how):
        p.residual = row_at(&s.residual, row)
    return p


cdef inline Py_ssize_t write_rows(const Sheet* s, const Activation* a, const Palette* palette,
                                  int how) noexcept nogil:
    # Four rows at a time, so that a register's coefficients are loaded once. Rows
    # of WIDTH columns at least; if need be they end with a whole register that
    # overlaps the last but one: it is read first, since `out` may be `x`.
    # Returns how many rows are done.
    cdef Py_ssize_t row, k, i, n = s.x.columns
    cdef Place p[4]
    cdef lanes tail[4]
    cdef Pen pen
    for row in range(0, s.x.rows - 3, 4):
        for k in range(4):
            p[k] = place_in(s, a, row + k, how)
        for k in range(4):
            tail[k] = splat(0)
        if n % WIDTH:
            pen = pen_at(palette, n - WIDTH, how)
            for k in range(4):
                tail[k] = value_at(&pen, &p[k], n - WIDTH, how)
        for i in range(n // WIDTH):
            pen = pen_at(palette, i * WIDTH, how)
            for k in range(4):
                write_whole(&p[k], i * WIDTH, &pen, how)
        if n % WIDTH:
            for k in range(4):
                store(p[k].out + n - WIDTH, tail[k])
    return s.x.rows & ~3


cdef inline bint crowded(const Job* job) noexcept nogil:
    # Rows a multiple of a page apart share a set of the cache: one at a time.
    return job.out.middle % PAGE == 0


cdef inline bint astride(const Matrix* m) noexcept nogil:
    # Would registers of rows cross lines, so many that it counts more than that coefficients
    # are loaded again for each row?
    return sizeof(elem) == sizeof(real) and 2 * WIDTH >= LINE and to_alignment(m.data) != 0


cdef inline void write_short(const Job* job, const Activation* a, const Block* block,
                             Py_ssize_t channel, Py_ssize_t channels, const Palette* palette,
                             int how) noexcept nogil:
    cdef Sheet s = short_sheet(job, a, block, channel, channels, how)
    cdef Py_ssize_t row, rows = s.x.rows, n = s.x.columns, done = 0
    cdef bint one_run = (gapless(&s.x) and gapless(&s.dy) and gapless(&s.residual)
                         and gapless(&s.out))
    if (plain(how) and not how & (STREAMING | SCALED) and n >= WIDTH and not crowded(job)
            and job.bytes < <size_t>SMALL
            and not (one_run and (astride(&s.out) or palette.period <= CYCLE * WIDTH))):
        done = write_rows(&s, a, palette, how)
    elif one_run:
        rows, n = 1, rows * n
    for row in range(done, rows):
        write_run(place_in(&s, a, row, how), n, palette, how)


cdef inline Py_ssize_t all_neighbours(const Job* job, const Activation* a, Py_ssize_t channels,
                                      int how) noexcept nogil:
    cdef Py_ssize_t together = minimum(neighbours(job, &job.x, channels),
                                       neighbours(job, operand_of_out(job, how), channels))
    if reads_dy(how):
        together = minimum(together, neighbours(job, operand_of_dy(job, how), channels))
    if reads_residual(a, how):
        together = minimum(together, neighbours(job, &job.residual, channels))
    return together


cdef inline void write_tile(const Job* job, const Activation* a, Py_ssize_t tile, Py_ssize_t b0,
                            Py_ssize_t b1, int how) noexcept nogil:
    # Row by row, as statistics read it.
    cdef Py_ssize_t channel = first_channel(job, tile)
    cdef Py_ssize_t channels = count_channels(job, tile)
    cdef Py_ssize_t together = all_neighbours(job, a, channels, how)
    cdef Py_ssize_t i, c, b
    cdef Colours colours
    cdef Palette palette
    cdef Block block
    for i in range(channels // together):
        c = i * together
        fill_palette(job, channel + c, together, job.view.inner, how, &colours, &palette)
        for b in range(b0, b1):
            block = block_at(job, b)
            write_short(job, a, &block, channel + c, together, &palette, how)


cdef inline void write_slab(const Job* job, const Activation* a, const Block* block,
                            Py_ssize_t run, Py_ssize_t channel, Py_ssize_t channels,
                            ptrdiff_t ahead, int how) noexcept nogil:
    # The runs of neighbouring channels, which lie side by side: as one run, in whole
    # registers. (Past the cache a line that is not written as a whole has to be read.)
    cdef Place p = place_of(job, a, channel, run, block.offset, how)
    cdef Py_ssize_t c, end, i = find_lines(&p, channels * block.length)
    cdef Pen pen, both, next = pen_of(job, channel, how)
    write_part(&p, 0, i, &next, how)
    for c in range(1, channels + 1):
        end = c * block.length
        pen = next
        while i + WIDTH <= end:
            prefetch_place(&p, i, ahead, how)
            write_whole(&p, i, &pen, how)
            i += WIDTH
        if c == channels:
            write_part(&p, i, end - i, &pen, how)
            return
        next = pen_of(job, channel + c, how)
        if i < end:
            both = pen_of_both(&pen, &next, end - i, how)
            write_whole(&p, i, &both, how)
            i += WIDTH


cdef inline bint any_scaled(const Job* job, Py_ssize_t channel,
                            Py_ssize_t channels) noexcept nogil:
    cdef const real* scale = coefficient(job, SCALE)
    cdef Py_ssize_t c
    cdef long scaled = 0
    for c in range(channel, channel + channels):
        scaled += scale[c] != 1.0
    return scaled != 0


cdef inline void write_runs(const Job* job, const Activation* a, Py_ssize_t channel,
                            Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                            int how) noexcept nogil:
    # Image by image, since that is how they lie in memory.
    cdef Py_ssize_t together = all_neighbours(job, a, channels, how) if job.plan.parts == 1 else 1
    cdef ptrdiff_t ahead = 0        # to the next tile, if it lies behind this one
    cdef Py_ssize_t b, run, c
    cdef Block block
    if job.fetch_next and how & STREAMING and together == channels:
        ahead = channels * job.view.inner
    for b in range(b0, b1):
        block = block_at(job, b)
        for run in range(block.run, block.run + block.runs):
            for c in range(channels // together):
                write_slab(job, a, &block, run, channel + c * together, together, ahead, how)


cdef inline bint along_runs(const Job* job, int how) noexcept nogil:
    # Always where runs are cut into columns: their tiles are too wide for a palette.
    return (job.plan.long_runs or job.view.inner * <Py_ssize_t>sizeof(elem)
            >= (LONG_TO_STREAM if how & STREAMING else LONG_ENOUGH))


cdef inline bint one_run_of_rows(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                                 int how) noexcept nogil:
    # Are these whole rows of many channels, without gaps?
    return (job.view.inner == 1 and t1 - t0 > 1 and t1 - t0 == job.plan.tiles
            and gapless_runs(job, &job.x) and gapless_runs(job, &job.out)
            and (not reads_dy(how) or gapless_runs(job, &job.dy))
            and (not reads_residual(a, how) or gapless_runs(job, &job.residual)))


cdef inline void write_whole_rows(const Job* job, const Activation* a, Py_ssize_t b0,
                                  Py_ssize_t b1, int how) noexcept nogil:
    # As one run, for which the coefficients of the job are the palette.
    cdef Block first = block_at(job, b0), last = block_at(job, b1 - 1)
    cdef Palette palette = Palette(
        coefficient(job, 0), coefficient(job, 1) - coefficient(job, 0), job.view.channels)
    write_run(place_of(job, a, 0, first.run, 0, how),
              (last.run + last.runs - first.run) * job.view.channels, &palette, how)


cdef inline void write_tiles_as(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                                Py_ssize_t b0, Py_ssize_t b1, int how) noexcept nogil:
    cdef Py_ssize_t tile, channel = first_channel(job, t0)
    cdef Py_ssize_t channels = channels_of_tiles(job, t0, t1)
    if job.view.features:
        write_features(job, a, channel, channels, b0, b1, how)
        return
    if along_runs(job, how):
        write_runs(job, a, channel, channels, b0, b1, how)
        return
    if ((how & STREAMING or job.view.channels <= MANY)
            and one_run_of_rows(job, a, t0, t1, how)):
        write_whole_rows(job, a, b0, b1, how)
        return
    for tile in range(t0, t1):
        write_tile(job, a, tile, b0, b1, how)


cdef void write_scaled(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                       Py_ssize_t b0, Py_ssize_t b1, int how) noexcept nogil:
    # The same code for all kinds, which asks each time what they need: with loops of their
    # own, a wheel would be a tenth larger.
    write_tiles_as(job, a, t0, t1, b0, b1, how | SCALED)


cdef inline void write_tiles(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                             Py_ssize_t b0, Py_ssize_t b1, int how) noexcept nogil:
    if any_scaled(job, first_channel(job, t0), channels_of_tiles(job, t0, t1)):
        write_scaled(job, a, t0, t1, b0, b1, how)
    elif job.streaming and not how & DZ:      # which is read again soon
        write_tiles_as(job, a, t0, t1, b0, b1, how | STREAMING)
        stream_end()
    else:
        write_tiles_as(job, a, t0, t1, b0, b1, how)


cdef void write_forward(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                        Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    if job.fused:
        write_tiles(job, &a, t0, t1, b0, b1, FUSED)
    else:
        write_tiles(job, NULL, t0, t1, b0, b1, 0)
    fp_leave(saved)


cdef void write_gradient(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                         Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    if job.fused:
        write_tiles(job, &a, t0, t1, b0, b1, GRADIENT | FUSED)
    else:
        write_tiles(job, NULL, t0, t1, b0, b1, GRADIENT)
    fp_leave(saved)


cdef void write_dz(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                   Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    write_tiles(job, &a, t0, t1, b0, b1, DZ)
    fp_leave(saved)
