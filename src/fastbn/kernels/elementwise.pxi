# SPDX-License-Identifier: BSD-3-Clause
# The arithmetic of every write, on one register of elements, and the register's store:
#
#   forward         y = activation((x * pow2_scale - pivot) * scale + shift + residual)
#   gradient        dx = (dz * scale - ((x * pow2_scale - pivot) * slope + shift)) * pow2_scale
#
# where dz is dy, taken back through the activation, and `pow2_scale` is 1 for all usual data,
# and then left out: to multiply by 1 is exact.
#
# May: arithmetic, load coefficients and elements, store a register. May not: walk through a
# tensor.

cdef enum:
    # How a pass is written: bits of `variant` below, a constant, so that each combination
    # becomes loops of its own.
    GRADIENT = 1        # dx, else y
    DZ = 2              # dz, the gradient before the activation, from dy
    FUSED = 4           # with an activation or a residual
    POW2_SCALED = 8          # rare: one code for all kinds
    STREAMING = 16

cdef enum:
    TABLE_REGISTERS = 4         # the coefficients of so many columns stay in registers
    LONG_RUN = 32       # registers: a first one that is a part does not count

cdef struct CoefficientTable:
    # The coefficients of columns, once around and WIDTH further.
    const real* start
    Py_ssize_t step             # from a kind of coefficient to the next
    Py_ssize_t length           # columns

cdef struct CoefficientStorage:
    # What the table of a tile is filled with.
    lanes aligned               # unused: the rows begin where a register may
    real row[COEFFICIENT_KINDS][COLUMNS + PADDING + PADDING]     # after up to WIDTH - 1 others

cdef struct Coefficients:
    # The coefficients of one register of columns.
    lanes pow2_scale, pivot, scale, shift, slope, offset

cdef struct Pointers:
    # Where an element is, in each tensor that is read or written.
    const elem* x
    const elem* dy
    const elem* residual
    elem* out
    const elem* lines           # of `out`: where its whole lines begin and end,
    const elem* lines_end       # if it is streamed
    const Activation* activation

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
    return &job.dy_of_y if variant & DZ else &job.dy


cdef inline const Operand* operand_of_out(const Job* job, int variant) noexcept nogil:
    return &job.dy if variant & DZ else &job.out


cdef inline Pointers pointers_at(const Job* job, const Activation* a, Py_ssize_t channel,
                                 Py_ssize_t run, Py_ssize_t offset, int variant) noexcept nogil:
    cdef Pointers p
    p.activation = a
    p.x = p.dy = p.residual = element(job, &job.x, channel, run, offset)
    p.out = element(job, operand_of_out(job, variant), channel, run, offset)
    p.lines = p.lines_end = p.out
    if reads_dy(variant):
        p.dy = element(job, operand_of_dy(job, variant), channel, run, offset)
    if reads_residual(a, variant):
        p.residual = element(job, &job.residual, channel, run, offset)
    return p


cdef inline Pointers advanced(const Pointers* p, Py_ssize_t n) noexcept nogil:
    return Pointers(p.x + n, p.dy + n, p.residual + n, p.out + n, p.lines, p.lines_end,
                    p.activation)


cdef inline Py_ssize_t find_lines(Pointers* p, Py_ssize_t n) noexcept nogil:
    # Of n elements. Only whole lines are streamed: what is written in two parts, or in
    # two ways, has to be read first. Returns how many elements go before the first that a
    # register may be streamed to.
    cdef Py_ssize_t before = minimum(n, to_line(p.out))
    p.lines = p.out + before
    p.lines_end = p.lines + (n - before) // LINE * LINE
    return minimum(n, to_alignment(p.out))


# ---- coefficients ----------------------------------------------------------------

cdef inline bint needs(int which, int variant) noexcept nogil:
    if which == OFFSET:
        return variant & GRADIENT and variant & FUSED
    return which != SLOPE or variant & GRADIENT


cdef inline Py_ssize_t table_length(Py_ssize_t columns) noexcept nogil:
    # A whole number of registers, if TABLE_REGISTERS or one less will do.
    if TABLE_REGISTERS * WIDTH % columns == 0:
        return TABLE_REGISTERS * WIDTH
    if (TABLE_REGISTERS - 1) * WIDTH % columns == 0:
        return (TABLE_REGISTERS - 1) * WIDTH
    return columns * ceil_div(WIDTH, columns)


cdef inline bint by_lines(int variant) noexcept nogil:
    # Do registers of long runs begin where a line does? In the cache not those of half types,
    # whose coefficients are twice as long.
    return variant & STREAMING or sizeof(elem) == sizeof(real)


cdef inline void fill_table(const Job* job, Py_ssize_t channel, Py_ssize_t channels,
                            Py_ssize_t width, int variant, CoefficientStorage* storage,
                            CoefficientTable* table) noexcept nogil:
    # At the same place of a register as the output, where rows are long, or without gaps and
    # so written as one.
    cdef const Operand* out = operand_of_out(job, variant)
    cdef Py_ssize_t n = channels * width, lead = 0
    cdef int which
    if by_lines(variant) and (n >= LONG_RUN * WIDTH or out.middle == n):
        lead = -to_alignment(element(job, out, channel, 0, 0)) & (WIDTH - 1)
    table.start, table.step = &storage.row[0][lead], COLUMNS + PADDING + PADDING
    table.length = table_length(n)
    for which in range(COEFFICIENT_KINDS):
        if needs(which, variant):
            broadcast_columns(&storage.row[which][lead], coefficient(job, which) + channel,
                              channels, width, table.length)


cdef inline Coefficients coefficients_at(const CoefficientTable* table, Py_ssize_t column,
                                         int variant) noexcept nogil:
    cdef Coefficients coef
    cdef const real* first = table.start + column
    coef.pow2_scale = load_real(first + POW2_SCALE * table.step)
    coef.pivot = load_real(first + PIVOT * table.step)
    coef.scale = load_real(first + SCALE * table.step)
    coef.shift = load_real(first + SHIFT * table.step)
    if needs(SLOPE, variant):
        coef.slope = load_real(first + SLOPE * table.step)
    if needs(OFFSET, variant):
        coef.offset = load_real(first + OFFSET * table.step)
    return coef


cdef inline Coefficients coefficients_of(const Job* job, Py_ssize_t channel,
                                         int variant) noexcept nogil:
    cdef Coefficients coef
    coef.pow2_scale = set1(coefficient(job, POW2_SCALE)[channel])
    coef.pivot = set1(coefficient(job, PIVOT)[channel])
    coef.scale = set1(coefficient(job, SCALE)[channel])
    coef.shift = set1(coefficient(job, SHIFT)[channel])
    if needs(SLOPE, variant):
        coef.slope = set1(coefficient(job, SLOPE)[channel])
    if needs(OFFSET, variant):
        coef.offset = set1(coefficient(job, OFFSET)[channel])
    return coef


cdef inline Coefficients coefficients_of_two(const Coefficients* coef, const Coefficients* next,
                                             Py_ssize_t n, int variant) noexcept nogil:
    # For one register: n elements with `coef`, the others with `next`.
    cdef Coefficients joined
    joined.pow2_scale = concat_at(coef.pow2_scale, next.pow2_scale, n)
    joined.pivot = concat_at(coef.pivot, next.pivot, n)
    joined.scale = concat_at(coef.scale, next.scale, n)
    joined.shift = concat_at(coef.shift, next.shift, n)
    if needs(SLOPE, variant):
        joined.slope = concat_at(coef.slope, next.slope, n)
    if needs(OFFSET, variant):
        joined.offset = concat_at(coef.offset, next.offset, n)
    return joined


# ---- elements --------------------------------------------------------------------

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
        stream(out, v)
    else:
        store(out, v)


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


cdef inline lanes center(const Coefficients* coef, lanes x, int variant) noexcept nogil:
    return (x * coef.pow2_scale if variant & POW2_SCALED else x) - coef.pivot


cdef inline lanes finish(const Activation* a, lanes z, const Vectors* vectors,
                         int variant) noexcept nogil:
    # What is written for a normalised z.
    if is_plain(variant):
        return z
    if a.adds:
        z = z + vectors.residual
    return activation_grad(a, z, vectors.dy) if variant & DZ else activate(a, z)


cdef inline lanes backward(const Coefficients* coef, lanes d, lanes dz, int variant) noexcept nogil:
    cdef lanes dx = dz * coef.scale - (d * coef.slope + coef.shift)
    return dx * coef.pow2_scale if variant & POW2_SCALED else dx


cdef inline lanes fused_backward(const Coefficients* coef, const Activation* a,
                                 const Vectors* vectors, int variant) noexcept nogil:
    cdef lanes x = leaky_inverse(a, vectors.x) if a.inverted else vectors.x
    cdef lanes d = center(coef, x, variant)
    cdef lanes z = vectors.x if a.inverted else d * coef.scale + coef.offset
    cdef lanes dz = activation_grad_outlined(a, z, vectors.dy)
    if not a.frozen:
        return backward(coef, d, dz, variant)
    return dz * coef.scale * coef.pow2_scale if variant & POW2_SCALED else dz * coef.scale


cdef inline lanes value(const Coefficients* coef, const Activation* a, const Vectors* vectors,
                        int variant) noexcept nogil:
    if variant & GRADIENT and variant & FUSED:
        return fused_backward(coef, a, vectors, variant)
    if variant & GRADIENT:
        return backward(coef, center(coef, vectors.x, variant), vectors.dy, variant)
    return finish(a, center(coef, vectors.x, variant) * coef.scale + coef.shift, vectors,
                  variant)


cdef inline lanes value_at(const Coefficients* coef, const Pointers* p, Py_ssize_t i,
                           int variant) noexcept nogil:
    cdef Vectors vectors = load_vectors(p, i, variant)
    return value(coef, p.activation, &vectors, variant)
