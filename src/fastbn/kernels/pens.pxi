# SPDX-License-Identifier: BSD-3-Clause
# The arithmetic of every write, on one register of elements, and the register's store:
#
#   forward         y = activation((x * scale - pivot) * gain + shift + residual)
#   gradient        dx = (dz * gain - ((x * scale - pivot) * slope + shift)) * scale
#
# where dz is dy, taken back through the activation, and `scale` is 1 for all usual data,
# and then left out: to multiply by 1 is exact.
#
# May: arithmetic, load coefficients and elements, store a register. May not: walk through a
# tensor.

cdef enum:
    # How a pass is written: bits of `how` below, a constant, so that each combination
    # becomes loops of its own.
    GRADIENT = 1        # dx, else y
    DZ = 2              # dz, the gradient before the activation, from dy
    FUSED = 4           # with an activation or a residual
    SCALED = 8          # rare: one code for all kinds
    STREAMING = 16

cdef enum:
    CYCLE = 4           # the coefficients of so many columns stay in registers
    LONG_RUN = 32       # registers: a first one that is a part does not count

cdef struct Palette:
    # The coefficients of columns, once around and WIDTH further.
    const real* first
    Py_ssize_t step             # from a kind of coefficient to the next
    Py_ssize_t period

cdef struct Colours:
    # What a palette of a tile is filled with.
    lanes aligned               # unused: the rows begin where a register may
    real row[COEFFICIENTS][COLUMNS + PADDING + PADDING]     # after up to WIDTH - 1 others

cdef struct Pen:
    # The coefficients of one register of columns.
    lanes scale, pivot, gain, shift, slope, offset

cdef struct Place:
    # Where an element is, in each tensor that is read or written.
    const elem* x
    const elem* dy
    const elem* residual
    elem* out
    const elem* lines           # of `out`: where its whole lines begin and end,
    const elem* lines_end       # if it is streamed
    const Activation* activation

cdef struct Lot:
    # One register of elements.
    lanes x, dy, residual


cdef inline bint plain(int how) noexcept nogil:
    return not how & (FUSED | DZ)


cdef inline bint reads_dy(int how) noexcept nogil:
    return how & (GRADIENT | DZ)


cdef inline bint reads_residual(const Activation* a, int how) noexcept nogil:
    return how & (FUSED | DZ) and not how & GRADIENT and a.adds


cdef inline const Operand* operand_of_dy(const Job* job, int how) noexcept nogil:
    return &job.dy_of_y if how & DZ else &job.dy


cdef inline const Operand* operand_of_out(const Job* job, int how) noexcept nogil:
    return &job.dy if how & DZ else &job.out


cdef inline Place place_of(const Job* job, const Activation* a, Py_ssize_t channel,
                           Py_ssize_t run, Py_ssize_t offset, int how) noexcept nogil:
    cdef Place p
    p.activation = a
    p.x = p.dy = p.residual = element(job, &job.x, channel, run, offset)
    p.out = element(job, operand_of_out(job, how), channel, run, offset)
    p.lines = p.lines_end = p.out
    if reads_dy(how):
        p.dy = element(job, operand_of_dy(job, how), channel, run, offset)
    if reads_residual(a, how):
        p.residual = element(job, &job.residual, channel, run, offset)
    return p


cdef inline Place further(const Place* p, Py_ssize_t n) noexcept nogil:
    return Place(p.x + n, p.dy + n, p.residual + n, p.out + n, p.lines, p.lines_end, p.activation)


cdef inline Py_ssize_t find_lines(Place* p, Py_ssize_t n) noexcept nogil:
    # Of n elements. Only whole lines are streamed: what is written in two parts, or in
    # two ways, has to be read first. Returns how many elements go before the first that a
    # register may be streamed to.
    cdef Py_ssize_t before = minimum(n, to_line(p.out))
    p.lines = p.out + before
    p.lines_end = p.lines + (n - before) // LINE * LINE
    return minimum(n, to_alignment(p.out))


# ---- coefficients ----------------------------------------------------------------

cdef inline bint needs(int which, int how) noexcept nogil:
    if which == OFFSET:
        return how & GRADIENT and how & FUSED
    return which != SLOPE or how & GRADIENT


cdef inline Py_ssize_t period_of(Py_ssize_t columns) noexcept nogil:
    # A whole number of registers, if CYCLE or one less will do.
    if CYCLE * WIDTH % columns == 0:
        return CYCLE * WIDTH
    if (CYCLE - 1) * WIDTH % columns == 0:
        return (CYCLE - 1) * WIDTH
    return columns * steps(WIDTH, columns)


cdef inline bint by_lines(int how) noexcept nogil:
    # Do registers of long runs begin where a line does? In the cache not those of half types,
    # whose coefficients are twice as long.
    return how & STREAMING or sizeof(elem) == sizeof(real)


cdef inline void fill_palette(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                              Py_ssize_t width, int how, Colours* colours,
                              Palette* palette) noexcept nogil:
    # At the same place of a register as the output, where rows are long, or without gaps and
    # so written as one.
    cdef const Operand* out = operand_of_out(job, how)
    cdef Py_ssize_t n = channels * width, lead = 0
    cdef int which
    if by_lines(how) and (n >= LONG_RUN * WIDTH or out.middle == n):
        lead = -to_alignment(element(job, out, channel, 0, 0)) & (WIDTH - 1)
    palette.first, palette.step = &colours.row[0][lead], COLUMNS + PADDING + PADDING
    palette.period = period_of(n)
    for which in range(COEFFICIENTS):
        if needs(which, how):
            spread(&colours.row[which][lead], coefficient(job, which) + channel, channels, width,
                   palette.period)


cdef inline Pen pen_at(const Palette* palette, Py_ssize_t column, int how) noexcept nogil:
    cdef Pen pen
    cdef const real* first = palette.first + column
    pen.scale = load_real(first + SCALE * palette.step)
    pen.pivot = load_real(first + PIVOT * palette.step)
    pen.gain = load_real(first + GAIN * palette.step)
    pen.shift = load_real(first + SHIFT * palette.step)
    if needs(SLOPE, how):
        pen.slope = load_real(first + SLOPE * palette.step)
    if needs(OFFSET, how):
        pen.offset = load_real(first + OFFSET * palette.step)
    return pen


cdef inline Pen pen_of(const Job* job, Py_ssize_t channel, int how) noexcept nogil:
    cdef Pen pen
    pen.scale = splat(coefficient(job, SCALE)[channel])
    pen.pivot = splat(coefficient(job, PIVOT)[channel])
    pen.gain = splat(coefficient(job, GAIN)[channel])
    pen.shift = splat(coefficient(job, SHIFT)[channel])
    if needs(SLOPE, how):
        pen.slope = splat(coefficient(job, SLOPE)[channel])
    if needs(OFFSET, how):
        pen.offset = splat(coefficient(job, OFFSET)[channel])
    return pen


cdef inline Pen pen_of_both(const Pen* pen, const Pen* next, Py_ssize_t n, int how) noexcept nogil:
    # For one register: n elements with `pen`, the others with `next`.
    cdef Pen both
    both.scale = join(pen.scale, next.scale, n)
    both.pivot = join(pen.pivot, next.pivot, n)
    both.gain = join(pen.gain, next.gain, n)
    both.shift = join(pen.shift, next.shift, n)
    if needs(SLOPE, how):
        both.slope = join(pen.slope, next.slope, n)
    if needs(OFFSET, how):
        both.offset = join(pen.offset, next.offset, n)
    return both


# ---- elements --------------------------------------------------------------------

cdef inline Lot lot(const Place* p, Py_ssize_t i, int how) noexcept nogil:
    cdef Lot some
    some.x = some.dy = some.residual = load(p.x + i)
    if reads_dy(how):
        some.dy = load(p.dy + i)
    if reads_residual(p.activation, how):
        some.residual = load(p.residual + i)
    return some


cdef inline Lot part_of_lot(const Place* p, Py_ssize_t i, Py_ssize_t n, int how) noexcept nogil:
    cdef Lot some
    some.x = some.dy = some.residual = load_part(p.x + i, n, splat(0))
    if reads_dy(how):
        some.dy = load_part(p.dy + i, n, splat(0))
    if reads_residual(p.activation, how):
        some.residual = load_part(p.residual + i, n, splat(0))
    return some


cdef inline void put(const Place* p, Py_ssize_t i, lanes v, int how) noexcept nogil:
    cdef elem* out = p.out + i
    if how & STREAMING and (WIDTH == LINE or p.lines <= out < p.lines_end):
        stream(out, v)
    else:
        store(out, v)


cdef inline void prefetch_place(const Place* p, Py_ssize_t i, ptrdiff_t ahead,
                                int how) noexcept nogil:
    # While memory is written, it can read what is needed next. 0: nothing is.
    if ahead == 0:
        return
    prefetch(p.x + i, ahead)
    if reads_dy(how):
        prefetch(p.dy + i, ahead)
    if reads_residual(p.activation, how):
        prefetch(p.residual + i, ahead)


cdef inline lanes centred(const Pen* pen, lanes x, int how) noexcept nogil:
    return (x * pen.scale if how & SCALED else x) - pen.pivot


cdef inline lanes finished(const Activation* a, lanes z, const Lot* some, int how) noexcept nogil:
    # What is written for a normalised z.
    if plain(how):
        return z
    if a.adds:
        z = z + some.residual
    return passed(a, z, some.dy) if how & DZ else activated(a, z)


cdef inline lanes backward(const Pen* pen, lanes d, lanes dz, int how) noexcept nogil:
    cdef lanes dx = dz * pen.gain - (d * pen.slope + pen.shift)
    return dx * pen.scale if how & SCALED else dx


cdef inline lanes fused_backward(const Pen* pen, const Activation* a, const Lot* some,
                                 int how) noexcept nogil:
    cdef lanes x = unbent(a, some.x) if a.inverted else some.x
    cdef lanes d = centred(pen, x, how)
    cdef lanes dz = passed_again(a, some.x if a.inverted else d * pen.gain + pen.offset, some.dy)
    if not a.frozen:
        return backward(pen, d, dz, how)
    return dz * pen.gain * pen.scale if how & SCALED else dz * pen.gain


cdef inline lanes value(const Pen* pen, const Activation* a, const Lot* some,
                        int how) noexcept nogil:
    if how & GRADIENT and how & FUSED:
        return fused_backward(pen, a, some, how)
    if how & GRADIENT:
        return backward(pen, centred(pen, some.x, how), some.dy, how)
    return finished(a, centred(pen, some.x, how) * pen.gain + pen.shift, some, how)


cdef inline lanes value_at(const Pen* pen, const Place* p, Py_ssize_t i, int how) noexcept nogil:
    cdef Lot some = lot(p, i, how)
    return value(pen, p.activation, &some, how)
