# SPDX-License-Identifier: BSD-3-Clause
# The operands of an elementwise pass: which it has, and one register of each.
#
# May: load and store a register of elements, prefetch. May not: compute, walk through a
# tensor.

cdef enum:
    # How a pass is written: bits of `variant` below, a constant, so that each combination
    # becomes loops of its own.
    GRADIENT = 1        # dx, else y
    DZ = 2              # dz, the gradient before the activation, from dy
    FUSED = 4           # with an activation or a residual
    POW2_SCALED = 8          # rare: one code for all kinds
    STREAMING = 16


cdef struct Pointers:
    # Where an element is, in each tensor that is read or written.
    const elem* x
    const elem* dy
    const elem* residual
    elem* out
    const elem* lines           # of `out`: where its whole lines begin and end,
    const elem* lines_end       # if it is streamed
    const Activation* activation
    const signed char* mask     # of `out`: zeros are written where it is 0; NULL: nowhere


cdef struct Vectors:
    # One register of elements.
    lanes x, dy, residual


cdef inline bint is_plain(int variant) noexcept nogil:
    return not variant & (FUSED | DZ)


cdef inline bint reads_dy(int variant) noexcept nogil:
    return variant & (GRADIENT | DZ)


cdef inline bint reads_residual(const Activation* a, int variant) noexcept nogil:
    return variant & (FUSED | DZ) and not variant & GRADIENT and a.adds


cdef inline const Operand* operand_of_dy(const Job* job, int variant) noexcept nogil:
    return &job.buffers.dy_of_y if variant & DZ else &job.buffers.dy


cdef inline const Operand* operand_of_out(const Job* job, int variant) noexcept nogil:
    return &job.buffers.dy if variant & DZ else &job.buffers.out


cdef inline const signed char* mask_at(const WrittenMask* mask, const elem* out) noexcept nogil:
    return NULL if mask.bytes == NULL else mask.bytes + (out - <const elem*>mask.start)


cdef inline lanes kept(const Pointers* p, Py_ssize_t i, lanes v) noexcept nogil:
    # Asked each time: with loops of their own, kernels would be half as large again.
    return v if p.mask == NULL else and_bits(v, mask_bits(p.mask + i))


cdef inline Pointers pointers_at(const Job* job, const Activation* a, Py_ssize_t channel,
                                 Py_ssize_t run, Py_ssize_t offset, int variant) noexcept nogil:
    cdef Pointers p
    p.activation = a
    p.x = p.dy = p.residual = element(job, &job.buffers.x, channel, run, offset)
    p.out = element(job, operand_of_out(job, variant), channel, run, offset)
    p.lines = p.lines_end = p.out
    p.mask = mask_at(&job.buffers.written_mask, p.out)
    if reads_dy(variant):
        p.dy = element(job, operand_of_dy(job, variant), channel, run, offset)
    if reads_residual(a, variant):
        p.residual = element(job, &job.buffers.residual, channel, run, offset)
    return p


cdef inline Pointers advanced(const Pointers* p, Py_ssize_t n) noexcept nogil:
    cdef Pointers later = p[0]
    later.x += n
    later.dy += n
    later.residual += n
    later.out += n
    if p.mask != NULL:
        later.mask += n
    return later


cdef inline Py_ssize_t find_lines(Pointers* p, Py_ssize_t n) noexcept nogil:
    # Of n elements. Only whole lines are streamed: what is written in two parts, or in
    # two ways, has to be read first. Returns how many elements go before the first that a
    # register may be streamed to.
    cdef Py_ssize_t before = minimum(n, to_line(p.out))
    p.lines = p.out + before
    p.lines_end = p.lines + (n - before) // LINE * LINE
    return minimum(n, to_alignment(p.out))


cdef inline Vectors load_vectors(const Pointers* p, Py_ssize_t i, int variant) noexcept nogil:
    cdef Vectors vectors
    vectors.x = vectors.dy = vectors.residual = load(p.x + i)
    if reads_dy(variant):
        vectors.dy = load(p.dy + i)
    if reads_residual(p.activation, variant):
        vectors.residual = load(p.residual + i)
    return vectors


cdef inline Vectors load_n_vectors(const Pointers* p, Py_ssize_t i, Py_ssize_t n,
                                   int variant) noexcept nogil:
    cdef Vectors vectors
    vectors.x = vectors.dy = vectors.residual = load_n_or(p.x + i, n, set1(0))
    if reads_dy(variant):
        vectors.dy = load_n_or(p.dy + i, n, set1(0))
    if reads_residual(p.activation, variant):
        vectors.residual = load_n_or(p.residual + i, n, set1(0))
    return vectors


cdef inline void store_vector(const Pointers* p, Py_ssize_t i, lanes v, int variant) noexcept nogil:
    cdef elem* out = p.out + i
    if variant & STREAMING and (WIDTH == LINE or p.lines <= out < p.lines_end):
        stream(out, kept(p, i, v))
    else:
        store(out, kept(p, i, v))


cdef inline void prefetch_next(const Pointers* p, Py_ssize_t i, ptrdiff_t to_next,
                               int variant) noexcept nogil:
    # While memory is written, it can read what is needed next. 0: nothing is.
    if to_next == 0:
        return
    prefetch(p.x + i, to_next)
    if reads_dy(variant):
        prefetch(p.dy + i, to_next)
    if reads_residual(p.activation, variant):
        prefetch(p.residual + i, to_next)
