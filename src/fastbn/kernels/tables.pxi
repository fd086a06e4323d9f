# SPDX-License-Identifier: BSD-3-Clause
# The coefficients of channels -> those of a register of columns: from a table of the columns
# of a tile, or of the channel itself.
#
# May: load coefficients, copy them. May not: compute them.

cdef enum:
    TABLE_REGISTERS = 4         # the coefficients of so many columns stay in registers
    MANY_REGISTERS = 32     # a first one that is a part does not count


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
    if by_lines(variant) and (n >= MANY_REGISTERS * WIDTH or out.middle == n):
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
    joined.pow2_scale = blend_at(coef.pow2_scale, next.pow2_scale, n)
    joined.pivot = blend_at(coef.pivot, next.pivot, n)
    joined.scale = blend_at(coef.scale, next.scale, n)
    joined.shift = blend_at(coef.shift, next.shift, n)
    if needs(SLOPE, variant):
        joined.slope = blend_at(coef.slope, next.slope, n)
    if needs(OFFSET, variant):
        joined.offset = blend_at(coef.offset, next.offset, n)
    return joined
