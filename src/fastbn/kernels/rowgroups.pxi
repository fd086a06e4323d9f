# SPDX-License-Identifier: BSD-3-Clause
# The terms of the two sums that every statistic is made of, column by column:
#
#   moments      s = sum d          q = sum d * d         d = x - pivot
#   gradients    s = sum dy         q = sum dy * d        d = x * pow2_scale - pivot
#
# where dy is first multiplied by the weight of its feature, if there are features; and
# before that, taken from y to z, where there is an activation.
#
# Up to ROWS terms of a column, a row group, are added pairwise in `real`; columns.pxi adds
# the result to a float64 sum. A column never meets another one, so neither the width of the
# registers nor a neighbour's NaN can change its bits.
#
# May: load rows, add. May not: know where rows come from, decide what a sum means.

cdef enum:
    ROWS = 8                # rows of a row group
    SMALL_GROUP = 4         # the same in a channel of few values, where fewer of them
    FEW_VALUES = 512        # average their rounding errors out

cdef enum:
    # Of a row, all columns of a register are there, or, if it is the last one, the first.
    WHOLE, PART

cdef struct RowGroup:
    # Up to ROWS rows of one register of columns.
    const elem* x
    const elem* dy
    ptrdiff_t x_step
    ptrdiff_t dy_step
    Features features           # WEIGHTED: RUN_COLUMNS to a row
    const signed char* mask     # MASKED: the same
    Py_ssize_t part             # PART: so many columns of the last row are there
    lanes pow2_scale
    lanes pivot
    lanes scale
    lanes shift
    const Activation* activation

cdef struct RealSums:
    # The two sums of one register of columns, or one term of each.
    lanes s
    lanes q


cdef inline lanes preactivation(const RowGroup* g, Py_ssize_t row, lanes d,
                                int terms) noexcept nogil:
    # What the activation saw.
    cdef lanes z = d * g.scale + g.shift
    if terms & WEIGHTED:
        z = (z * load_real(g.features.weight + row * RUN_COLUMNS)
             + load_real(g.features.bias + row * RUN_COLUMNS))
    return z


cdef inline lanes counted(const RowGroup* g, Py_ssize_t row, lanes v, lanes instead,
                          int terms) noexcept nogil:
    if terms & MASKED:
        return select_bits(mask_bits(g.mask + row * RUN_COLUMNS), v, instead)
    return v


cdef inline RealSums moment_term(const RowGroup* g, Py_ssize_t row, int extent,
                                 int terms) noexcept nogil:
    cdef const elem* x = g.x + row * g.x_step
    cdef lanes number = load(x) if extent == WHOLE else load_n_or(x, g.part, g.pivot)
    cdef RealSums t
    t.s = counted(g, row, number, g.pivot, terms) - g.pivot
    t.q = t.s * t.s
    return t


cdef inline RealSums gradient_term(const RowGroup* g, Py_ssize_t row, int extent,
                                   int terms) noexcept nogil:
    cdef const elem* x = g.x + row * g.x_step
    cdef const elem* dy = g.dy + row * g.dy_step
    cdef lanes number = load(x) if extent == WHOLE else load_n_or(x, g.part, set1(0))
    cdef lanes d, z
    cdef RealSums t
    t.s = force_register(load(dy)) if extent == WHOLE else load_n_or(dy, g.part, set1(0))
    t.s = counted(g, row, t.s, set1(0), terms)
    z = number = counted(g, row, number, set1(0), terms)
    if terms & ACTIVATED and g.activation.inverted:
        number = leaky_inverse(g.activation, number)
    d = number * g.pow2_scale - g.pivot
    if terms & ACTIVATED:
        t.s = activation_grad_outlined(
            g.activation, z if g.activation.inverted else preactivation(g, row, d, terms), t.s)
    if terms & WEIGHTED:
        t.s = t.s * load_real(g.features.weight + row * RUN_COLUMNS)
    t.q = t.s * d
    return t


cdef inline RealSums term(const RowGroup* g, Py_ssize_t row, int extent, int terms) noexcept nogil:
    # Columns that are not there get terms of 0.
    if terms & GRADIENTS:
        return gradient_term(g, row, extent, terms)
    return moment_term(g, row, extent, terms)


cdef inline RealSums add_sums(RealSums a, RealSums b) noexcept nogil:
    cdef RealSums t
    t.s = a.s + b.s
    t.q = add(a.q, b.q)
    return t


# The extent of several rows is that of the last one.

cdef inline RealSums sum_2_rows(const RowGroup* g, Py_ssize_t row, int extent,
                                int terms) noexcept nogil:
    return add_sums(term(g, row, WHOLE, terms), term(g, row + 1, extent, terms))


cdef inline RealSums sum_4_rows(const RowGroup* g, Py_ssize_t row, int extent,
                                int terms) noexcept nogil:
    return add_sums(sum_2_rows(g, row, WHOLE, terms), sum_2_rows(g, row + 2, extent, terms))


cdef inline RealSums sum_8_rows(const RowGroup* g, int extent, int terms) noexcept nogil:
    return add_sums(sum_4_rows(g, 0, WHOLE, terms), sum_4_rows(g, 4, extent, terms))


cdef inline RealSums sum_row_group(const RowGroup* g, int size, int terms) noexcept nogil:
    # A whole one, of ROWS or SMALL_GROUP rows.
    return sum_8_rows(g, WHOLE, terms) if size == ROWS else sum_4_rows(g, 0, WHOLE, terms)


cdef inline RealSums sum_last_rows(const RowGroup* g, Py_ssize_t rows, int extent,
                                   int terms) noexcept nogil:
    # Up to ROWS rows: pairwise sums for each bit of their number, no deeper than a whole
    # row group.
    cdef RealSums t
    if rows == ROWS:
        return sum_8_rows(g, extent, terms)
    if rows & 3 == 3:
        t = add_sums(sum_2_rows(g, rows & 4, WHOLE, terms), term(g, rows & 6, extent, terms))
    elif rows & 2:
        t = sum_2_rows(g, rows & 4, extent, terms)
    elif rows & 1:
        t = term(g, rows & 4, extent, terms)
    else:
        return sum_4_rows(g, 0, extent, terms)
    return add_sums(sum_4_rows(g, 0, WHOLE, terms), t) if rows & 4 else t
