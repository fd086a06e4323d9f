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
    WHOLE = -RUN_COLUMNS    # no part of a row is missing


cdef enum:
    # What is summed: `gradient` below, a constant.
    MOMENTS, GRADIENTS, ACTIVATED


cdef struct RowGroup:
    # Up to ROWS rows of one register of columns.
    const elem* x
    const elem* dy
    ptrdiff_t x_step
    ptrdiff_t dy_step
    bint weighted
    Features features           # RUN_COLUMNS to a row
    lanes pow2_scale
    lanes pivot
    lanes scale
    lanes shift
    const Activation* activation


cdef struct RealSums:
    lanes s
    lanes q


cdef inline lanes preactivation(const RowGroup* g, Py_ssize_t row, lanes d) noexcept nogil:
    # What the activation saw.
    cdef lanes z = d * g.scale + g.shift
    if g.weighted:
        z = (z * load_real(g.features.weight + row * RUN_COLUMNS)
             + load_real(g.features.bias + row * RUN_COLUMNS))
    return z


cdef inline RealSums term(const RowGroup* g, Py_ssize_t row, Py_ssize_t left,
                          int terms) noexcept nogil:
    # WHOLE, or the last row of a run: `left` elements from row 0 on are the run's,
    # and columns past them get terms of 0. In trees, too, it is the last row.
    cdef RealSums t
    cdef lanes d, z, number
    cdef const elem* x = g.x + row * g.x_step
    cdef const elem* dy = g.dy + row * g.dy_step
    cdef Py_ssize_t n = maximum(0, minimum(WIDTH, left - row * RUN_COLUMNS))
    number = load(x) if left == WHOLE else load_n_or(x, n, set1(0) if terms else g.pivot)
    if terms:
        t.s = force_register(load(dy)) if left == WHOLE else load_n_or(dy, n, set1(0))
        z = number
        if terms == ACTIVATED and g.activation.inverted:
            number = leaky_inverse(g.activation, number)
        d = number * g.pow2_scale - g.pivot
        if terms == ACTIVATED:
            t.s = activation_grad_outlined(g.activation,
                                           z if g.activation.inverted else preactivation(g, row, d),
                                           t.s)
        if g.weighted:
            t.s = t.s * load_real(g.features.weight + row * RUN_COLUMNS)
    else:
        t.s = number - g.pivot
        d = t.s
    t.q = t.s * d
    return t


cdef inline RealSums add_sums(RealSums a, RealSums b) noexcept nogil:
    cdef RealSums t
    t.s = a.s + b.s
    t.q = add(a.q, b.q)
    return t


cdef inline RealSums sum_2_rows(const RowGroup* g, Py_ssize_t row, Py_ssize_t left,
                                int terms) noexcept nogil:
    return add_sums(term(g, row, WHOLE, terms), term(g, row + 1, left, terms))


cdef inline RealSums sum_4_rows(const RowGroup* g, Py_ssize_t row, Py_ssize_t left,
                                int terms) noexcept nogil:
    return add_sums(sum_2_rows(g, row, WHOLE, terms), sum_2_rows(g, row + 2, left, terms))


cdef inline RealSums sum_8_rows(const RowGroup* g, Py_ssize_t left, int terms) noexcept nogil:
    return add_sums(sum_4_rows(g, 0, WHOLE, terms), sum_4_rows(g, 4, left, terms))


cdef inline RealSums sum_last_rows(const RowGroup* g, Py_ssize_t rows, Py_ssize_t left,
                                   int terms) noexcept nogil:
    # Up to ROWS rows: a tree for each bit of their number, no deeper than a whole one.
    # If there is a part of a row, it is in the last of them.
    cdef RealSums t
    if rows == ROWS:
        return sum_8_rows(g, left, terms)
    if rows & 3 == 3:
        t = add_sums(sum_2_rows(g, rows & 4, WHOLE, terms), term(g, rows & 6, left, terms))
    elif rows & 2:
        t = sum_2_rows(g, rows & 4, left, terms)
    elif rows & 1:
        t = term(g, rows & 4, left, terms)
    else:
        return sum_4_rows(g, 0, left, terms)
    return add_sums(sum_4_rows(g, 0, WHOLE, terms), t) if rows & 4 else t
