# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes: the only place where a tensor is written.
#
#   forward    out = (x * scale - pivot) * gain + shift
#   gradient   out = (dy * gain - ((x * scale - pivot) * slope + shift)) * scale
#
# where `scale` is 1 for all usual data, and then left out: to multiply by 1 is exact.
# With features it is forward * weight + bias, and dy * weight in place of dy; their
# gradients are summed here too, since dy and x are at hand.
#
# An element is read before it is written, and written once, so `out` may be `x` or `dy`
# itself.

cdef enum:
    CYCLE = 4           # the coefficients of so many columns stay in registers
    LONG_ENOUGH = 32    # shorter runs are not written one by one

cdef struct Palette:
    # The coefficients of columns, once around and WIDTH further.
    const real* first
    Py_ssize_t step             # from a kind of coefficient to the next
    Py_ssize_t period

cdef struct Colours:
    # What a palette of a tile is filled with.
    lanes aligned               # unused: the rows begin where a register may
    real row[COEFFICIENTS][COLUMNS + PADDING + PADDING]

cdef struct Pen:
    # The coefficients of one register of columns.
    lanes scale, pivot, gain, shift, slope


cdef inline Py_ssize_t period_of(Py_ssize_t columns) noexcept nogil:
    # A whole number of registers, if CYCLE or one less will do.
    if CYCLE * WIDTH % columns == 0:
        return CYCLE * WIDTH
    if (CYCLE - 1) * WIDTH % columns == 0:
        return (CYCLE - 1) * WIDTH
    return columns * steps(WIDTH, columns)


cdef inline void fill_palette(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                              Py_ssize_t width, bint gradient, Colours* colours,
                              Palette* palette) noexcept nogil:
    cdef Py_ssize_t n = channels * width
    cdef int which
    palette.first, palette.step = &colours.row[0][0], COLUMNS + PADDING + PADDING
    palette.period = period_of(n)
    for which in range(COEFFICIENTS):
        if which == OFFSET or (which == SLOPE and not gradient):
            continue
        spread(colours.row[which], coefficient(job, which) + channel, channels, width,
               palette.period)


cdef inline Pen pen_at(const Palette* palette, Py_ssize_t column, bint gradient) noexcept nogil:
    cdef Pen pen
    cdef const real* first = palette.first + column
    pen.scale = load_real(first + SCALE * palette.step)
    pen.pivot = load_real(first + PIVOT * palette.step)
    pen.gain = load_real(first + GAIN * palette.step)
    pen.shift = load_real(first + SHIFT * palette.step)
    if gradient:
        pen.slope = load_real(first + SLOPE * palette.step)
    return pen


cdef inline Pen pen_of(const Job* job, Py_ssize_t channel, bint gradient) noexcept nogil:
    cdef Pen pen
    pen.scale = splat(coefficient(job, SCALE)[channel])
    pen.pivot = splat(coefficient(job, PIVOT)[channel])
    pen.gain = splat(coefficient(job, GAIN)[channel])
    pen.shift = splat(coefficient(job, SHIFT)[channel])
    if gradient:
        pen.slope = splat(coefficient(job, SLOPE)[channel])
    return pen


cdef inline lanes centred(const Pen* pen, lanes x, bint scaled) noexcept nogil:
    return (x * pen.scale if scaled else x) - pen.pivot


cdef inline lanes forward(const Pen* pen, lanes x, bint scaled) noexcept nogil:
    return centred(pen, x, scaled) * pen.gain + pen.shift


cdef inline lanes backward(const Pen* pen, lanes x, lanes dy, bint scaled) noexcept nogil:
    cdef lanes dx = dy * pen.gain - (centred(pen, x, scaled) * pen.slope + pen.shift)
    return dx * pen.scale if scaled else dx


cdef inline lanes value(const Pen* pen, const elem* x, const elem* dy, bint gradient,
                        bint scaled) noexcept nogil:
    if gradient:
        return backward(pen, load(x), load(dy), scaled)
    return forward(pen, load(x), scaled)


cdef inline void write_part(const elem* x, const elem* dy, elem* out, Py_ssize_t n,
                            const Pen* pen, bint gradient, bint scaled) noexcept nogil:
    cdef lanes some_x = load_part(x, n, splat(0))
    if gradient:
        store_part(out, backward(pen, some_x, load_part(dy, n, splat(0)), scaled), n)
    else:
        store_part(out, forward(pen, some_x, scaled), n)


cdef inline Py_ssize_t write_cycles(const elem* x, const elem* dy, elem* out, Py_ssize_t n,
                                    const Palette* palette, Py_ssize_t column, int registers,
                                    bint gradient, bint scaled, bint streaming) noexcept nogil:
    # What write_run does, for a palette of so many registers: none of it is loaded
    # again. (Loads may have to wait for stores at the same place of another page.)
    # Returns how many elements are done.
    cdef Pen pens[CYCLE]
    cdef Py_ssize_t i, j
    cdef int k
    for k in range(registers):
        pens[k] = pen_at(palette, (column + k * WIDTH) % palette.period, gradient)
    for i in range(n // (registers * WIDTH)):
        for k in range(registers):
            j = (i * registers + k) * WIDTH
            if streaming:
                stream(out + j, value(&pens[k], x + j, dy + j, gradient, scaled))
            else:
                store(out + j, value(&pens[k], x + j, dy + j, gradient, scaled))
    return n // (registers * WIDTH) * registers * WIDTH


cdef inline void write_run(const elem* x, const elem* dy, elem* out, Py_ssize_t n, Pen pen,
                           const Palette* palette, bint gradient,
                           bint scaled, bint streaming) noexcept nogil:
    # n neighbouring elements: all with `pen`; or, given a palette, from column 0
    # on, the columns repeating with its period.
    cdef Py_ssize_t i = 0, column = 0
    if streaming:
        i = minimum(n, to_alignment(out))
        if i:
            write_part(x, dy, out, i, &pen, gradient, scaled)
            if palette != NULL:
                column = i % palette.period
    if palette != NULL and palette.period == CYCLE * WIDTH:
        i += write_cycles(x + i, dy + i, out + i, n - i, palette, column, CYCLE,
                          gradient, scaled, streaming)
    elif palette != NULL and palette.period == (CYCLE - 1) * WIDTH:
        i += write_cycles(x + i, dy + i, out + i, n - i, palette, column, CYCLE - 1,
                          gradient, scaled, streaming)
    while i + WIDTH <= n:
        if palette != NULL:
            pen = pen_at(palette, column, gradient)
            column += WIDTH
            if column >= palette.period:
                column -= palette.period
        if streaming:
            stream(out + i, value(&pen, x + i, dy + i, gradient, scaled))
        else:
            store(out + i, value(&pen, x + i, dy + i, gradient, scaled))
        i += WIDTH
    if i < n:
        if palette != NULL:
            pen = pen_at(palette, column, gradient)
        write_part(x + i, dy + i, out + i, n - i, &pen, gradient, scaled)


cdef inline void write_rows(const Matrix* x, const Matrix* dy, const Matrix* out,
                            const Palette* palette, bint gradient, bint scaled) noexcept nogil:
    # Four rows at a time, so that a register's coefficients are loaded once. Rows
    # of WIDTH columns at least; if need be they end with a whole register that
    # overlaps the last but one: it is read first, since `out` may be `x`.
    cdef Py_ssize_t row, k, i, j, n = x.columns
    cdef const elem* xs[4]
    cdef const elem* dys[4]
    cdef elem* outs[4]
    cdef lanes tail[4]
    cdef Pen pen
    for row in range(0, x.rows - 3, 4):
        for k in range(4):
            xs[k], dys[k], outs[k] = row_at(x, row + k), row_at(dy, row + k), row_at(out, row + k)
        for k in range(4):
            tail[k] = splat(0)
        if n % WIDTH:
            pen = pen_at(palette, n - WIDTH, gradient)
            for k in range(4):
                tail[k] = value(&pen, xs[k] + n - WIDTH, dys[k] + n - WIDTH, gradient, scaled)
        for i in range(n // WIDTH):
            j = i * WIDTH
            pen = pen_at(palette, j, gradient)
            for k in range(4):
                store(outs[k] + j, value(&pen, xs[k] + j, dys[k] + j, gradient, scaled))
        if n % WIDTH:
            for k in range(4):
                store(outs[k] + n - WIDTH, tail[k])
    for row in range(x.rows & ~3, x.rows):
        write_run(row_at(x, row), row_at(dy, row), row_at(out, row), n,
                  pen_at(palette, 0, gradient), palette, gradient, scaled, False)


cdef inline bint crowded(const Operand* operand) noexcept nogil:
    # Rows a multiple of a page apart share a set of the cache: one at a time.
    return operand.middle % PAGE == 0


cdef inline bint gapless(const Matrix* m) noexcept nogil:
    return m.jump == 0 and m.step == m.columns


cdef inline void write_short(const Job* job, const Block* block, Py_ssize_t channel,
                             Py_ssize_t channels, const Palette* palette, bint gradient,
                             bint scaled, bint streaming) noexcept nogil:
    cdef Matrix x = short_matrix(job, &job.x, block, channel, channels)
    cdef Matrix out = short_matrix(job, &job.out, block, channel, channels)
    cdef Matrix dy = x
    cdef Py_ssize_t row
    cdef bint one_run
    if gradient:
        dy = short_matrix(job, &job.dy, block, channel, channels)
    one_run = gapless(&x) and gapless(&dy) and gapless(&out)
    if (not streaming and x.columns >= WIDTH and not crowded(&job.out)
            and not (one_run and palette.period <= CYCLE * WIDTH)):
        write_rows(&x, &dy, &out, palette, gradient, scaled)
    elif one_run:
        write_run(x.data, dy.data, out.data, x.rows * x.columns, pen_at(palette, 0, gradient),
                  palette, gradient, scaled, streaming)
    else:
        for row in range(x.rows):
            write_run(row_at(&x, row), row_at(&dy, row), row_at(&out, row), x.columns,
                      pen_at(palette, 0, gradient), palette, gradient, scaled, streaming)


cdef inline void write_tile(const Job* job, Py_ssize_t tile, Py_ssize_t b0, Py_ssize_t b1,
                            bint gradient, bint scaled, bint streaming) noexcept nogil:
    # Row by row, as statistics read it.
    cdef Py_ssize_t channel = first_channel(job, tile)
    cdef Py_ssize_t channels = count_channels(job, tile)
    cdef Py_ssize_t i, c, b, together
    cdef Colours colours
    cdef Palette palette
    cdef Block block
    together = minimum(neighbours(job, &job.x, channels), neighbours(job, &job.out, channels))
    if gradient:
        together = minimum(together, neighbours(job, &job.dy, channels))
    for i in range(channels // together):
        c = i * together
        fill_palette(job, channel + c, together, job.view.inner, gradient, &colours, &palette)
        for b in range(b0, b1):
            block = block_at(job, b)
            write_short(job, &block, channel + c, together, &palette, gradient, scaled, streaming)


cdef inline void stream_seam(const elem* x, const elem* dy, elem* out, Py_ssize_t n,
                             const Pen* pen, const Pen* next,
                             bint gradient) noexcept nogil:
    # One register: n elements with `pen`, the others with the next channel's.
    stream(out, join(value(pen, x, dy, gradient, False), value(next, x, dy, gradient, False), n))


cdef inline void stream_slab(const Job* job, const Block* block, Py_ssize_t run,
                             Py_ssize_t channel, Py_ssize_t channels,
                             bint gradient) noexcept nogil:
    # The runs of neighbouring channels, which lie side by side: as one run, since a
    # line that is not written as a whole has to be read. While memory is written, it
    # can read what is needed next.
    cdef elem* x = element(job, &job.x, channel, run, block.offset)
    cdef elem* dy = element(job, &job.dy, channel, run, block.offset) if gradient else x
    cdef elem* out = element(job, &job.out, channel, run, block.offset)
    cdef ptrdiff_t ahead = channels * job.view.inner if job.fetch_next else 0
    cdef Py_ssize_t c, end, i = minimum(block.length, to_alignment(out))
    cdef Pen pen, next = pen_of(job, channel, gradient)
    write_part(x, dy, out, i, &next, gradient, False)
    for c in range(1, channels + 1):
        end = c * block.length
        pen = next
        while i + WIDTH <= end:
            if ahead:
                prefetch(x + i, ahead)
                if gradient:
                    prefetch(dy + i, ahead)
            stream(out + i, value(&pen, x + i, dy + i, gradient, False))
            i += WIDTH
        if c == channels:
            write_part(x + i, dy + i, out + i, end - i, &pen, gradient, False)
            return
        next = pen_of(job, channel + c, gradient)
        if i < end:
            stream_seam(x + i, dy + i, out + i, end - i, &pen, &next, gradient)
            i += WIDTH


cdef inline bint can_stream_slabs(const Job* job, Py_ssize_t channels,
                                  bint gradient) noexcept nogil:
    # Do runs of these channels lie side by side?
    return ((channels == 1 or job.plan.parts == 1)
            and job.x.channel == job.view.inner and job.out.channel == job.view.inner
            and (not gradient or job.dy.channel == job.view.inner))


cdef inline bint any_scaled(const Job* job, Py_ssize_t channel,
                            Py_ssize_t channels) noexcept nogil:
    cdef const real* scale = coefficient(job, SCALE)
    cdef Py_ssize_t c
    cdef long scaled = 0
    for c in range(channel, channel + channels):
        scaled += scale[c] != 1.0
    return scaled != 0


cdef inline void write_runs(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                            Py_ssize_t b0, Py_ssize_t b1, bint gradient, bint scaled,
                            bint streaming) noexcept nogil:
    # Image by image, since that is how they lie in memory.
    cdef bint slabs = streaming and can_stream_slabs(job, channels, gradient)
    cdef Py_ssize_t b, run, c
    cdef Block block
    cdef elem* x
    cdef elem* dy
    for b in range(b0, b1):
        block = block_at(job, b)
        for run in range(block.run, block.run + block.runs):
            if slabs:
                stream_slab(job, &block, run, channel, channels, gradient)
                continue
            for c in range(channel, channel + channels):
                x = element(job, &job.x, c, run, block.offset)
                dy = element(job, &job.dy, c, run, block.offset) if gradient else x
                write_run(x, dy, element(job, &job.out, c, run, block.offset), block.length,
                          pen_of(job, c, gradient), NULL, gradient, scaled, streaming)


cdef inline bint one_run_of_rows(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                                 bint gradient) noexcept nogil:
    # Are these whole rows of many channels, without gaps?
    return (job.view.inner == 1 and t1 - t0 > 1 and t1 - t0 == job.plan.tiles
            and gapless_runs(job, &job.x) and gapless_runs(job, &job.out)
            and (not gradient or gapless_runs(job, &job.dy)))


cdef inline void stream_rows(const Job* job, Py_ssize_t b0, Py_ssize_t b1,
                             bint gradient) noexcept nogil:
    # As one run, for which the coefficients of the job are the palette.
    cdef Block first = block_at(job, b0), last = block_at(job, b1 - 1)
    cdef elem* x = element(job, &job.x, 0, first.run, 0)
    cdef elem* dy = element(job, &job.dy, 0, first.run, 0) if gradient else x
    cdef Palette palette = Palette(
        coefficient(job, 0), coefficient(job, 1) - coefficient(job, 0), job.view.channels)
    write_run(x, dy, element(job, &job.out, 0, first.run, 0),
              (last.run + last.runs - first.run) * job.view.channels,
              pen_at(&palette, 0, gradient), &palette, gradient, False, True)


cdef inline ptrdiff_t to_next_tile(const Job* job, const Operand* operand) noexcept nogil:
    # While memory is written, it can read what is needed next. 0: nothing is.
    return job.plan.tile_channels * operand.channel if job.fetch_next else 0


cdef inline void write_features(const elem* x, elem* out, Py_ssize_t n, const Pen* pen,
                                const real* weight, const real* bias, ptrdiff_t ahead, bint scaled,
                                bint streaming) noexcept nogil:
    # n neighbouring elements of one channel, each with a weight and a bias of its own.
    cdef Py_ssize_t i = 0, some = minimum(n, to_alignment(out)) if streaming else 0
    cdef lanes y
    while True:
        if some:
            y = forward(pen, load_part(x + i, some, splat(0)), scaled)
            y = y * load_real_part(weight + i, some) + load_real_part(bias + i, some)
            store_part(out + i, y, some)
            i += some
        while i + WIDTH <= n:
            if ahead:
                prefetch(x + i, ahead)
            y = forward(pen, load(x + i), scaled) * load_real(weight + i) + load_real(bias + i)
            if streaming:
                stream(out + i, y)
            else:
                store(out + i, y)
            i += WIDTH
        some = n - i
        if some == 0:
            return


cdef inline void write_forward_features(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                                        Py_ssize_t b0, Py_ssize_t b1, bint scaled,
                                        bint streaming) noexcept nogil:
    cdef ptrdiff_t ahead = to_next_tile(job, &job.x)
    cdef Py_ssize_t c, b
    cdef Block block
    cdef Pen pen
    for c in range(channel, channel + channels):
        pen = pen_of(job, c, False)
        for b in range(b0, b1):
            block = block_at(job, b)
            write_features(element(job, &job.x, c, 0, block.offset),
                           element(job, &job.out, c, 0, block.offset), block.length, &pen,
                           feature_weights(job) + block.offset,
                           feature_biases(job) + block.offset, ahead, scaled, streaming)


# The gradients of features are sums over channels, taken while dx is written: two
# channels at a time, since the rows of more may crowd one set of the cache; up to ROWS
# of them are added in `real`, in `Strip`, and then in float64.

cdef enum:
    STRIP = 512         # features

cdef struct Strip:
    lanes aligned       # unused: the arrays begin where a register may
    real s[STRIP]
    real q[STRIP]

cdef struct Row:
    # A channel, and what it is written with.
    const elem* x
    const elem* dy
    elem* out
    Pen pen
    lanes offset
    ptrdiff_t x_ahead, dy_ahead


cdef inline Row row_of(const Job* job, Py_ssize_t channel, Py_ssize_t at) noexcept nogil:
    # From feature `at` on.
    cdef Row row
    row.x = element(job, &job.x, channel, 0, at)
    row.dy = element(job, &job.dy, channel, 0, at)
    row.out = element(job, &job.out, channel, 0, at)
    row.pen = pen_of(job, channel, True)
    row.offset = splat(coefficient(job, OFFSET)[channel])
    row.x_ahead = to_next_tile(job, &job.x)
    row.dy_ahead = to_next_tile(job, &job.dy)
    return row


cdef inline Pair feature_term(const Row* row, Py_ssize_t j, Py_ssize_t some, lanes weight,
                              lanes* dx, bint whole, bint scaled) noexcept nogil:
    # dx of a register of features, and its terms of the gradients: dy and dy * xhat.
    cdef lanes x = load(row.x + j) if whole else load_part(row.x + j, some, splat(0))
    cdef Pair t
    if whole and row.x_ahead:
        prefetch(row.x + j, row.x_ahead)
        prefetch(row.dy + j, row.dy_ahead)
    t.s = load(row.dy + j) if whole else load_part(row.dy + j, some, splat(0))
    dx[0] = backward(&row.pen, x, t.s * weight, scaled)
    t.q = t.s * (centred(&row.pen, x, scaled) * row.pen.gain + row.offset)
    return t


cdef inline void write_dx(elem* out, lanes dx, Py_ssize_t some, bint whole,
                          bint streaming) noexcept nogil:
    if not whole:
        store_part(out, dx, some)
    elif streaming:
        stream(out, dx)
    else:
        store(out, dx)


cdef inline void write_register(const Row* a, const Row* b, const real* weights, Py_ssize_t j,
                                Py_ssize_t some, Strip* strip, bint first, bint whole,
                                bint scaled, bint streaming) noexcept nogil:
    # Both rows are read before one is written: loads may have to wait for a store to
    # the same place of another page.
    cdef lanes weight = load_real(weights + j) if whole else load_real_part(weights + j, some)
    cdef lanes dx_a, dx_b
    cdef Pair t = feature_term(a, j, some, weight, &dx_a, whole, scaled)
    if b != NULL:
        t = both(t, feature_term(b, j, some, weight, &dx_b, whole, scaled))
        write_dx(b.out + j, dx_b, some, whole, streaming)
    write_dx(a.out + j, dx_a, some, whole, streaming)
    if not first:
        t.s = t.s + load_real(strip.s + j)
        t.q = t.q + load_real(strip.q + j)
    store_real(strip.s + j, t.s)
    store_real(strip.q + j, t.q)


cdef inline void write_pair(const Row* a, const Row* b, const real* weights, Py_ssize_t n,
                            Strip* strip, bint first, bint scaled, bint streaming) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n // WIDTH):
        write_register(a, b, weights, i * WIDTH, WIDTH, strip, first, True, scaled, streaming)
    if n % WIDTH:
        write_register(a, b, weights, n - n % WIDTH, n % WIDTH, strip, first, False, scaled, False)


cdef inline void write_strip(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                             Py_ssize_t at, Py_ssize_t n, bint scaled,
                             bint streaming) noexcept nogil:
    # n features of up to ROWS channels.
    cdef const real* weights = feature_weights(job) + at
    cdef double* q = job.feature_sums + at
    cdef double* s = q + job.view.inner + WRAP
    cdef Py_ssize_t c, i, j, half
    cdef Strip strip
    cdef Row a, b
    for c in range(0, channels - 1, 2):
        a, b = row_of(job, channel + c, at), row_of(job, channel + c + 1, at)
        if c == 0:
            write_pair(&a, &b, weights, n, &strip, True, scaled, streaming)
        else:
            write_pair(&a, &b, weights, n, &strip, False, scaled, streaming)
    if channels & 1:
        a = row_of(job, channel + channels - 1, at)
        write_pair(&a, NULL, weights, n, &strip, channels == 1, scaled, streaming)
    for i in range(steps(n, WIDTH)):
        for half in range(HALVES):
            j = i * WIDTH + half * WIDE
            store_wide(s + j, load_wide(s + j) + widen(load_real(strip.s + i * WIDTH), half))
            store_wide(q + j, load_wide(q + j) + widen(load_real(strip.q + i * WIDTH), half))


cdef inline bint lie_alike(const Operand* operand) noexcept nogil:
    # Do all channels begin at the same place of a register?
    return operand.channel % WIDTH == 0 and operand.outer % WIDTH == 0


cdef inline void write_strips(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                              Py_ssize_t at, Py_ssize_t end, bint scaled,
                              bint streaming) noexcept nogil:
    # Up to ROWS channels. What is streamed begins with the part of a register.
    cdef Py_ssize_t n = to_alignment(element(job, &job.out, channel, 0, at)) if streaming else 0
    while at < end:
        n = minimum(n if n else STRIP, end - at)
        write_strip(job, channel, channels, at, n, scaled, streaming)
        at += n
        n = 0


cdef inline void write_gradient_features(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                                         Py_ssize_t b0, Py_ssize_t b1, bint scaled,
                                         bint streaming) noexcept nogil:
    cdef Block first = block_at(job, b0), last = block_at(job, b1 - 1)
    cdef Py_ssize_t i, c, end = last.offset + last.length
    for i in range(steps(channels, ROWS)):
        c = i * ROWS
        if streaming and lie_alike(&job.out):
            write_strips(job, channel + c, minimum(ROWS, channels - c), first.offset, end, scaled,
                         True)
        else:
            write_strips(job, channel + c, minimum(ROWS, channels - c), first.offset, end, scaled,
                         False)


cdef inline void write_tiles_as(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                                Py_ssize_t b1, bint gradient, bint scaled,
                                bint streaming) noexcept nogil:
    cdef Py_ssize_t tile, channel = first_channel(job, t0)
    cdef Py_ssize_t channels = channels_of_tiles(job, t0, t1)
    if job.view.features and gradient:
        write_gradient_features(job, channel, channels, b0, b1, scaled, streaming)
        return
    if job.view.features:
        write_forward_features(job, channel, channels, b0, b1, scaled, streaming)
        return
    if job.plan.long_runs or (t1 - t0 > 1 and job.view.inner >= LONG_ENOUGH
                              and (streaming or crowded(&job.out))):
        write_runs(job, channel, channels, b0, b1, gradient, scaled, streaming)
        return
    if streaming and one_run_of_rows(job, t0, t1, gradient):
        stream_rows(job, b0, b1, gradient)
        return
    for tile in range(t0, t1):
        write_tile(job, tile, b0, b1, gradient, scaled, streaming)


cdef inline void write_tiles(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                             Py_ssize_t b1, bint gradient) noexcept nogil:
    # The flags are constants below: each of these calls becomes loops of its own.
    cdef fp_state saved = fp_enter()
    if any_scaled(job, first_channel(job, t0), channels_of_tiles(job, t0, t1)):
        write_tiles_as(job, t0, t1, b0, b1, gradient, True, False)
    elif job.streaming:
        write_tiles_as(job, t0, t1, b0, b1, gradient, False, True)
        stream_end()
    else:
        write_tiles_as(job, t0, t1, b0, b1, gradient, False, False)
    fp_leave(saved)


cdef void write_forward(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                        Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    write_tiles(job, t0, t1, b0, b1, False)


cdef void write_gradient(const Job* job, Py_ssize_t t0, Py_ssize_t t1,
                         Py_ssize_t b0, Py_ssize_t b1) noexcept nogil:
    write_tiles(job, t0, t1, b0, b1, True)
