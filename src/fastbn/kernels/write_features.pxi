# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes of layer and RMS norm, where each element of a run, a feature,
# has a weight and a bias of its own:
#
#   forward    z = (forward of elementwise.pxi) * weight + bias
#   gradient   the gradient of elementwise.pxi, for dz * weight in place of dz
#
# The gradients of features are sums over channels, taken while dx is written, since dz
# and x are at hand then: two channels at a time, since the rows of more may crowd one
# set of the cache; up to ROWS of them are added in `real`, in
# `FeatureChunkSums`, and then in float64.

cdef enum:
    FEATURE_CHUNK = 512         # features
    STAGED = 16384 / sizeof(elem)   # elements
    NARROW = 6 * LINE               # elements of a row of y, at most, that is staged

cdef struct Stage:
    # Rows on their way past the cache. What of a row is less than a line would be written by
    # itself, and that line read first: so they are put together in L1.
    lanes aligned               # unused: the array begins where a register may
    elem rows[STAGED + PADDING]

cdef struct FeatureChunkSums:
    lanes aligned       # unused: the arrays begin where a register may
    real s[FEATURE_CHUNK]
    real q[FEATURE_CHUNK]

cdef struct FeatureRow:
    # A channel, and what it is written with.
    Pointers place
    Coefficients coef
    ptrdiff_t x_to_next, dy_to_next

cdef struct RowPair:
    # Two channels that are written together, or one: then b is NULL.
    const FeatureRow* a
    const FeatureRow* b
    Features features
    FeatureChunkSums* sums

cdef enum:
    FIRST_ROWS, LATER_ROWS      # whether there is anything in the sums


cdef inline ptrdiff_t to_next_tile(const Job* job, const Operand* operand) noexcept nogil:
    return job.plan.tile_channels * operand.channel if job.plan.fetch_next else 0


# ---- rows past the cache ---------------------------------------------------------

cdef inline bint lie_alike(const Operand* operand) noexcept nogil:
    # Do all channels begin at the same place of a line?
    return operand.channel % LINE == 0 and operand.outer % LINE == 0


cdef inline bint whole_lines(const Job* job) noexcept nogil:
    # Of each row, is all that is written one line after the other?
    return (lie_alike(&job.buffers.out) and to_line(<elem*>job.buffers.out.data) == 0
            and job.problem.view.inner % LINE == 0)


cdef inline bint staged(const Job* job, Py_ssize_t rows, int variant) noexcept nogil:
    # Are so many rows staged, that lie side by side?
    cdef const Operand* out = &job.buffers.out
    return (variant & STREAMING and not whole_lines(job)
            and rows * job.problem.view.inner <= STAGED
            and out.channel == job.problem.view.inner
            and (job.problem.period >= job.problem.view.channels
                 or out.outer == job.problem.period * out.channel))


cdef void stream_rows(const Job* job, Py_ssize_t channel, Py_ssize_t rows,
                      const Stage* stage) noexcept nogil:
    cdef elem* to = element(job, &job.buffers.out, channel, 0, 0)
    cdef Py_ssize_t n = rows * job.problem.view.inner, i = minimum(n, to_line(to))
    cdef Py_ssize_t end = i + (n - i) // LINE * LINE
    memcpy(to, stage.rows, i * sizeof(elem))
    while i < end:
        stream(to + i, load(stage.rows + i))
        i += WIDTH
    memcpy(to + i, stage.rows + i, (n - i) * sizeof(elem))


# ---- forward ---------------------------------------------------------------------

cdef inline lanes with_feature(const Coefficients* coef, const Activation* a,
                               const Vectors* vectors, lanes weight, lanes bias,
                               int variant) noexcept nogil:
    cdef lanes z = (center(coef, vectors.x, variant) * coef.scale + coef.shift) * weight + bias
    return finish(a, z, vectors, variant)


cdef inline void write_channel(Pointers* p, Py_ssize_t n, const Coefficients* coef,
                               Features features, ptrdiff_t to_next, int variant) noexcept nogil:
    # n neighbouring elements of one channel.
    cdef Py_ssize_t i = 0, some = find_lines(p, n) if variant & STREAMING else 0
    cdef Vectors vectors
    cdef lanes y
    while True:
        if some:
            prefetch_next(p, i, to_next, variant)
            vectors = load_n_vectors(p, i, some, variant)
            y = with_feature(coef, p.activation, &vectors, load_real_n(features.weight + i, some),
                             load_real_n(features.bias + i, some), variant)
            store_n(p.out + i, y, some)
            i += some
        while i + WIDTH <= n:
            prefetch_next(p, i, to_next, variant)
            vectors = load_vectors(p, i, variant)
            y = with_feature(coef, p.activation, &vectors, load_real(features.weight + i),
                             load_real(features.bias + i), variant)
            store_vector(p, i, y, variant)
            i += WIDTH
        some = n - i
        if some == 0:
            return


cdef inline void write_staged_channels(const Job* job, const Activation* a, Py_ssize_t channel,
                                       Py_ssize_t channels, int variant) noexcept nogil:
    cdef ptrdiff_t to_next = to_next_tile(job, &job.buffers.x)
    cdef Py_ssize_t inner = job.problem.view.inner, at_once = STAGED // inner, i, c, rows
    cdef Features features = features_from(job, 0)
    cdef Stage stage
    cdef Pointers p
    cdef Coefficients coef
    for i in range(ceil_div(channels, at_once)):
        rows = minimum(at_once, channels - i * at_once)
        for c in range(rows):
            coef = coefficients_of(job, channel + i * at_once + c, variant)
            p = pointers_at(job, a, channel + i * at_once + c, 0, 0, variant)
            p.out = stage.rows + c * inner
            write_channel(&p, inner, &coef, features, to_next, variant & ~STREAMING)
        stream_rows(job, channel + i * at_once, rows, &stage)


cdef inline void write_channels(const Job* job, const Activation* a, Py_ssize_t channel,
                                Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                                int variant) noexcept nogil:
    cdef ptrdiff_t to_next = to_next_tile(job, &job.buffers.x)
    cdef Py_ssize_t c, b
    cdef Block block
    cdef Pointers p
    cdef Coefficients coef
    for b in range(b0, b1):
        block = block_at(job, b)
        for c in range(channel, channel + channels):
            coef = coefficients_of(job, c, variant)
            p = pointers_at(job, a, c, 0, block.offset, variant)
            write_channel(&p, block.length, &coef, features_from(job, block.offset), to_next,
                          variant)


# ---- backward --------------------------------------------------------------------

cdef inline FeatureRow row_of(const Job* job, const Activation* a, Py_ssize_t channel,
                              Py_ssize_t at, Py_ssize_t n, int variant) noexcept nogil:
    # n features from `at` on.
    cdef FeatureRow row
    row.place = pointers_at(job, a, channel, 0, at, variant)
    if variant & STREAMING:
        find_lines(&row.place, n)
    row.coef = coefficients_of(job, channel, variant)
    row.coef.offset = set1(coefficient(job, OFFSET)[channel])
    row.x_to_next = to_next_tile(job, &job.buffers.x)
    row.dy_to_next = to_next_tile(job, &job.buffers.dy)
    return row


cdef inline RealSums feature_term(const FeatureRow* row, Py_ssize_t j, Py_ssize_t n,
                                  lanes weight, lanes bias, lanes* dx, int extent,
                                  int variant) noexcept nogil:
    # dx of a register of features, and its terms of the gradients: dz and dz * xhat.
    cdef const Pointers* p = &row.place
    cdef Vectors vectors = (load_vectors(p, j, variant) if extent == WHOLE
                            else load_n_vectors(p, j, n, variant))
    cdef lanes d, xhat
    cdef RealSums t
    if row.x_to_next:
        prefetch(p.x + j, row.x_to_next)
        prefetch(p.dy + j, row.dy_to_next)
    d = center(&row.coef, vectors.x, variant)
    xhat = d * row.coef.scale + row.coef.offset
    t.s = activation_grad_outlined(p.activation, xhat * weight + bias,
                                   vectors.dy) if variant & FUSED else vectors.dy
    t.q = t.s * xhat
    dx[0] = backward(&row.coef, d, t.s * weight, variant)
    return t


cdef inline void write_dx(const Pointers* p, Py_ssize_t j, lanes dx, Py_ssize_t n, int extent,
                          int variant) noexcept nogil:
    if extent == WHOLE:
        store_vector(p, j, dx, variant)
    else:
        store_n(p.out + j, dx, n)


cdef inline lanes load_feature(const real* p, Py_ssize_t n, int extent) noexcept nogil:
    return load_real(p) if extent == WHOLE else load_real_n(p, n)


cdef inline void backward_vector(const RowPair* rows, Py_ssize_t j, Py_ssize_t n, int order,
                                 int extent, int variant) noexcept nogil:
    # Both rows are read before one is written: loads may have to wait for a store to
    # the same place of another page.
    cdef lanes weight = load_feature(rows.features.weight + j, n, extent)
    cdef lanes bias = weight
    cdef lanes dx_a, dx_b
    cdef RealSums t
    if variant & FUSED:
        bias = load_feature(rows.features.bias + j, n, extent)
    t = feature_term(rows.a, j, n, weight, bias, &dx_a, extent, variant)
    if rows.b != NULL:
        t = add_sums(t, feature_term(rows.b, j, n, weight, bias, &dx_b, extent, variant))
        write_dx(&rows.b.place, j, dx_b, n, extent, variant)
    write_dx(&rows.a.place, j, dx_a, n, extent, variant)
    if order != FIRST_ROWS:
        t.s = t.s + load_real(rows.sums.s + j)
        t.q = t.q + load_real(rows.sums.q + j)
    store_real(rows.sums.s + j, t.s)
    store_real(rows.sums.q + j, t.q)


cdef inline void backward_row_pair(const RowPair* rows, Py_ssize_t n, int order,
                                   int variant) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n // WIDTH):
        backward_vector(rows, i * WIDTH, WIDTH, order, WHOLE, variant)
    if n % WIDTH:
        backward_vector(rows, n - n % WIDTH, n % WIDTH, order, PART, variant)


cdef inline void backward_feature_chunk(const Job* job, const Activation* activation,
                                        Py_ssize_t channel, Py_ssize_t channels, Py_ssize_t at,
                                        Py_ssize_t n, elem* stage, int variant) noexcept nogil:
    # n features of up to ROWS channels, written to `stage`, if there is one.
    cdef double* q = job.buffers.feature_sums + at
    cdef double* s = q + job.problem.view.inner + WRAP
    cdef Py_ssize_t c, i, j, half
    cdef FeatureChunkSums sums
    cdef FeatureRow a, b
    cdef RowPair rows = RowPair(&a, &b, features_from(job, at), &sums)
    for c in range(0, channels - 1, 2):
        a = row_of(job, activation, channel + c, at, n, variant)
        b = row_of(job, activation, channel + c + 1, at, n, variant)
        if stage != NULL:
            a.place.out, b.place.out = stage + c * n, stage + (c + 1) * n
        if c == 0:
            backward_row_pair(&rows, n, FIRST_ROWS, variant)
        else:
            backward_row_pair(&rows, n, LATER_ROWS, variant)
    if channels & 1:
        rows.b = NULL
        a = row_of(job, activation, channel + channels - 1, at, n, variant)
        if stage != NULL:
            a.place.out = stage + (channels - 1) * n
        backward_row_pair(&rows, n, FIRST_ROWS if channels == 1 else LATER_ROWS, variant)
    for i in range(ceil_div(n, WIDTH)):
        for half in range(HALVES):
            j = i * WIDTH + half * WIDE
            store_wide(s + j, load_wide(s + j) + widen(load_real(sums.s + i * WIDTH), half))
            store_wide(q + j, load_wide(q + j) + widen(load_real(sums.q + i * WIDTH), half))


cdef inline void backward_feature_chunks(const Job* job, const Activation* a, Py_ssize_t channel,
                                         Py_ssize_t channels, Py_ssize_t at, Py_ssize_t end,
                                         elem* stage, int variant) noexcept nogil:
    # Up to ROWS channels. What is streamed begins with the part of a line. `stage`: of one chunk.
    cdef Py_ssize_t n = 0
    if variant & STREAMING:
        n = to_line(element(job, &job.buffers.out, channel, 0, at))
    while at < end:
        n = minimum(n if n else FEATURE_CHUNK, end - at)
        backward_feature_chunk(job, a, channel, channels, at, n, stage, variant)
        at += n
        n = 0


cdef inline void write_gradients(const Job* job, const Activation* a, Py_ssize_t channel,
                                 Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                                 int variant) noexcept nogil:
    cdef Block first = block_at(job, b0), last = block_at(job, b1 - 1)
    cdef Py_ssize_t i, c, rows, end = last.offset + last.length
    cdef bint stages = staged(job, ROWS, variant) and end <= FEATURE_CHUNK
    cdef Stage stage
    for i in range(ceil_div(channels, ROWS)):
        c = i * ROWS
        rows = minimum(ROWS, channels - c)
        if variant & STREAMING and not stages and lie_alike(&job.buffers.out):
            backward_feature_chunks(job, a, channel + c, rows, first.offset, end, NULL, variant)
        else:
            backward_feature_chunks(job, a, channel + c, rows, first.offset, end,
                                    stage.rows if stages else NULL, variant & ~STREAMING)
        if stages:
            stream_rows(job, channel + c, rows, &stage)


cdef inline void write_features(const Job* job, const Activation* a, Py_ssize_t channel,
                                Py_ssize_t channels, Py_ssize_t b0, Py_ssize_t b1,
                                int variant) noexcept nogil:
    if variant & GRADIENT:
        write_gradients(job, a, channel, channels, b0, b1, variant)
    elif job.problem.view.inner <= NARROW and staged(job, ROWS, variant):
        write_staged_channels(job, a, channel, channels, variant)
    else:
        write_channels(job, a, channel, channels, b0, b1, variant)
