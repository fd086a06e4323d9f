# SPDX-License-Identifier: BSD-3-Clause
# The same sums in float64, for blocks where `real` will not do.

# The same sums in float64, for blocks where `real` will not do.

cdef struct WideColumns:
    double pow2_scale[COLUMNS]
    double pivot[COLUMNS]
    const Columns* own      # of the same columns, if an activation is to be passed


cdef lanes activation_grad_of_one(elem x, elem dy, Features features, const Columns* own,
                                  Py_ssize_t column, lanes* number) noexcept nogil:
    # What `term` does about an activation, for one element. Returns dy.
    cdef lanes z = load_n_or(&x, 1, set1(0))
    number[0] = z
    if own.activation.inverted:
        number[0] = leaky_inverse(&own.activation, z)
    else:
        z = ((z * set1(own.pow2_scale[column]) - set1(own.pivot[column]))
             * set1(own.scale[column]) + set1(own.shift[column]))
        if features.weight != NULL:
            z = z * set1(features.weight[0]) + set1(features.bias[0])
    return activation_grad_outlined(&own.activation, z, load_n_or(&dy, 1, set1(0)))


cdef inline void wide_term(elem x, elem dy, Features features, const WideColumns* wide,
                           Py_ssize_t column, int terms, double* s, double* q) noexcept nogil:
    cdef double number = as_double(x)
    cdef lanes inverted_x
    if terms == MOMENTS:
        s[0] = number - wide.pivot[column]
        q[0] = s[0] * s[0]
        return
    s[0] = as_double(dy)
    if terms == ACTIVATED:
        s[0] = first_lane(activation_grad_of_one(x, dy, features, wide.own, column, &inverted_x))
        number = first_lane(inverted_x)
    if features.weight != NULL:
        s[0] *= features.weight[0]
    q[0] = s[0] * (number * wide.pow2_scale[column] - wide.pivot[column])


cdef inline void reduce_matrix_f64(const Matrix* x, const Matrix* dy, Features features,
                                   const WideColumns* wide, Columns* columns, Py_ssize_t first,
                                   int terms) noexcept nogil:
    # Four rows at a time: a column by itself would be one long chain of sums.
    cdef Py_ssize_t row, j, k
    cdef const elem* xs[4]
    cdef const elem* dys[4]
    cdef double s[4]
    cdef double q[4]
    for row in range(0, x.rows - 3, 4):
        for k in range(4):
            xs[k], dys[k] = row_at(x, row + k), row_at(dy, row + k)
        for j in range(x.columns):
            for k in range(4):
                wide_term(xs[k][j], dys[k][j],
                          later_features(features, (row + k) * RUN_COLUMNS + j), wide, first + j,
                          terms, &s[k], &q[k])
            columns.s[first + j] += (s[0] + s[1]) + (s[2] + s[3])
            columns.q[first + j] += (q[0] + q[1]) + (q[2] + q[3])
    for row in range(x.rows & ~3, x.rows):
        xs[0], dys[0] = row_at(x, row), row_at(dy, row)
        for j in range(x.columns):
            wide_term(xs[0][j], dys[0][j], later_features(features, row * RUN_COLUMNS + j), wide,
                      first + j, terms, &s[0], &q[0])
            columns.s[first + j] += s[0]
            columns.q[first + j] += q[0]
