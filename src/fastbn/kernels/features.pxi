# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes of layer and RMS norm, where each element of a run, a feature,
# has a weight and a bias of its own:
#
#   forward    z = (forward of pens.pxi) * weight + bias
#   gradient   the gradient of pens.pxi, for dz * weight in place of dz
#
# The gradients of features are sums over channels, taken while dx is written, since dz
# and x are at hand then: two channels at a time, since the rows of more may crowd one
# set of the cache; up to ROWS of them are added in `real`, in `Strip`, and then in
# float64.

cdef enum:
    STRIP = 512         # features

cdef struct Strip:
    lanes aligned       # unused: the arrays begin where a register may
    real s[STRIP]
    real q[STRIP]

cdef struct Row:
    # A channel, and what it is written with.
    Place place
    Pen pen
    ptrdiff_t x_ahead, dy_ahead


cdef inline ptrdiff_t to_next_tile(const Job* job, const Operand* operand) noexcept nogil:
    return job.plan.tile_channels * operand.channel if job.fetch_next else 0


# ---- forward ---------------------------------------------------------------------

cdef inline lanes with_feature(const Pen* pen, const Activation* a, const Lot* some,
                               lanes weight, lanes bias, int how) noexcept nogil:
    cdef lanes z = (centred(pen, some.x, how) * pen.gain + pen.shift) * weight + bias
    return finished(a, z, some, how)


cdef inline void write_channel(Place* p, Py_ssize_t n, const Pen* pen, Features features,
                               ptrdiff_t ahead, int how) noexcept nogil:
    # n neighbouring elements of one channel.
    cdef Py_ssize_t i = 0, some = find_lines(p, n) if how & STREAMING else 0
    cdef Lot these
    cdef lanes y
    while True:
        if some:
            these = part_of_lot(p, i, some, how)
            y = with_feature(pen, p.activation, &these, load_real_part(features.weight + i, some),
                             load_real_part(features.bias + i, some), how)
            store_part(p.out + i, y, some)
            i += some
        while i + WIDTH <= n:
            prefetch_place(p, i, ahead, how)
            these = lot(p, i, how)
            y = with_feature(pen, p.activation, &these, load_real(features.weight + i),
                             load_real(features.bias + i), how)
            put(p, i, y, how)
            i += WIDTH
        some = n - i
        if some == 0:
            return


cdef inline void write_channels(const Job* job, const Activation* a, Py_ssize_t channel,
                                Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                                int how) noexcept nogil:
    cdef ptrdiff_t ahead = to_next_tile(job, &job.x)
    cdef Py_ssize_t c, b
    cdef Block block
    cdef Place p
    cdef Pen pen
    for b in range(b0, b1):
        block = block_at(job, b)
        for c in range(channel, channel + channels):
            pen = pen_of(job, c, how)
            p = place_of(job, a, c, 0, block.offset, how)
            write_channel(&p, block.length, &pen, features_from(job, block.offset), ahead, how)


# ---- backward --------------------------------------------------------------------

cdef inline Row row_of(const Job* job, const Activation* a, Py_ssize_t channel, Py_ssize_t at,
                       Py_ssize_t n, int how) noexcept nogil:
    # n features from `at` on.
    cdef Row row
    row.place = place_of(job, a, channel, 0, at, how)
    if how & STREAMING:
        find_lines(&row.place, n)
    row.pen = pen_of(job, channel, how)
    row.pen.offset = splat(coefficient(job, OFFSET)[channel])
    row.x_ahead = to_next_tile(job, &job.x)
    row.dy_ahead = to_next_tile(job, &job.dy)
    return row


cdef inline Pair feature_term(const Row* row, Py_ssize_t j, Py_ssize_t some, lanes weight,
                              lanes bias, lanes* dx, bint whole, int how) noexcept nogil:
    # dx of a register of features, and its terms of the gradients: dz and dz * xhat.
    cdef const Place* p = &row.place
    cdef Lot these = lot(p, j, how) if whole else part_of_lot(p, j, some, how)
    cdef lanes d, xhat
    cdef Pair t
    if whole and row.x_ahead:
        prefetch(p.x + j, row.x_ahead)
        prefetch(p.dy + j, row.dy_ahead)
    d = centred(&row.pen, these.x, how)
    xhat = d * row.pen.gain + row.pen.offset
    t.s = passed_again(p.activation, xhat * weight + bias, these.dy) if how & FUSED else these.dy
    t.q = t.s * xhat
    dx[0] = backward(&row.pen, d, t.s * weight, how)
    return t


cdef inline void write_dx(const Place* p, Py_ssize_t j, lanes dx, Py_ssize_t some, bint whole,
                          int how) noexcept nogil:
    if whole:
        put(p, j, dx, how)
    else:
        store_part(p.out + j, dx, some)


cdef inline void write_register(const Row* a, const Row* b, Features features, Py_ssize_t j,
                                Py_ssize_t some, Strip* strip, bint first, bint whole,
                                int how) noexcept nogil:
    # Both rows are read before one is written: loads may have to wait for a store to
    # the same place of another page.
    cdef const real* weights = features.weight + j
    cdef lanes weight = load_real(weights) if whole else load_real_part(weights, some)
    cdef lanes bias = weight
    cdef lanes dx_a, dx_b
    cdef Pair t
    if how & FUSED:
        bias = load_real(features.bias + j) if whole else load_real_part(features.bias + j, some)
    t = feature_term(a, j, some, weight, bias, &dx_a, whole, how)
    if b != NULL:
        t = both(t, feature_term(b, j, some, weight, bias, &dx_b, whole, how))
        write_dx(&b.place, j, dx_b, some, whole, how)
    write_dx(&a.place, j, dx_a, some, whole, how)
    if not first:
        t.s = t.s + load_real(strip.s + j)
        t.q = t.q + load_real(strip.q + j)
    store_real(strip.s + j, t.s)
    store_real(strip.q + j, t.q)


cdef inline void write_pair(const Row* a, const Row* b, Features features, Py_ssize_t n,
                            Strip* strip, bint first, int how) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n // WIDTH):
        write_register(a, b, features, i * WIDTH, WIDTH, strip, first, True, how)
    if n % WIDTH:
        write_register(a, b, features, n - n % WIDTH, n % WIDTH, strip, first, False, how)


cdef inline void write_strip(const Job* job, const Activation* activation, Py_ssize_t channel,
                             Py_ssize_t channels, Py_ssize_t at, Py_ssize_t n,
                             int how) noexcept nogil:
    # n features of up to ROWS channels.
    cdef Features features = features_from(job, at)
    cdef double* q = job.feature_sums + at
    cdef double* s = q + job.view.inner + WRAP
    cdef Py_ssize_t c, i, j, half
    cdef Strip strip
    cdef Row a, b
    for c in range(0, channels - 1, 2):
        a = row_of(job, activation, channel + c, at, n, how)
        b = row_of(job, activation, channel + c + 1, at, n, how)
        if c == 0:
            write_pair(&a, &b, features, n, &strip, True, how)
        else:
            write_pair(&a, &b, features, n, &strip, False, how)
    if channels & 1:
        a = row_of(job, activation, channel + channels - 1, at, n, how)
        write_pair(&a, NULL, features, n, &strip, channels == 1, how)
    for i in range(steps(n, WIDTH)):
        for half in range(HALVES):
            j = i * WIDTH + half * WIDE
            store_wide(s + j, load_wide(s + j) + widen(load_real(strip.s + i * WIDTH), half))
            store_wide(q + j, load_wide(q + j) + widen(load_real(strip.q + i * WIDTH), half))


cdef inline bint lie_alike(const Operand* operand) noexcept nogil:
    # Do all channels begin at the same place of a line?
    return operand.channel % LINE == 0 and operand.outer % LINE == 0


cdef inline void write_strips(const Job* job, const Activation* a, Py_ssize_t channel,
                              Py_ssize_t channels, Py_ssize_t at, Py_ssize_t end,
                              int how) noexcept nogil:
    # Up to ROWS channels. What is streamed begins with the part of a line.
    cdef Py_ssize_t n = 0
    if how & STREAMING:
        n = to_line(element(job, &job.out, channel, 0, at))
    while at < end:
        n = minimum(n if n else STRIP, end - at)
        write_strip(job, a, channel, channels, at, n, how)
        at += n
        n = 0


cdef inline void write_gradients(const Job* job, const Activation* a, Py_ssize_t channel,
                                 Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                                 int how) noexcept nogil:
    cdef Block first = block_at(job, b0), last = block_at(job, b1 - 1)
    cdef Py_ssize_t i, c, end = last.offset + last.length
    for i in range(steps(channels, ROWS)):
        c = i * ROWS
        if how & STREAMING and lie_alike(&job.out):
            write_strips(job, a, channel + c, minimum(ROWS, channels - c), first.offset, end, how)
        else:
            write_strips(job, a, channel + c, minimum(ROWS, channels - c), first.offset, end,
                         how & ~STREAMING)


cdef inline void write_features(const Job* job, const Activation* a, Py_ssize_t channel,
                                Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                                int how) noexcept nogil:
    if how & GRADIENT:
        write_gradients(job, a, channel, channels, b0, b1, how)
    else:
        write_channels(job, a, channel, channels, b0, b1, how)
