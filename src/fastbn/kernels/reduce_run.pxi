# SPDX-License-Identifier: BSD-3-Clause
# A long run to the sums of the RUN_COLUMNS columns that its channel owns.

cdef enum:
    IN_L1 = 1024            # elements; a whole number of row groups


cdef inline void reduce_chunk(const elem* x, const elem* dy, Features features, Py_ssize_t n,
                              Columns* columns, Py_ssize_t first, ptrdiff_t ahead, bint small,
                              int terms, bint weighted, bint fresh) noexcept nogil:
    # n neighbouring elements as rows of RUN_COLUMNS, the last one perhaps a part; what
    # they are added to is 0, if they are the first ones.
    cdef size_t size = RUN_COLUMNS * (SMALL_GROUP if small else ROWS)
    cdef Py_ssize_t k, j, groups = <size_t>n // size, left = <size_t>n % size
    cdef RowGroup g
    cdef WideSums sums
    g.x_step = RUN_COLUMNS
    g.dy_step = RUN_COLUMNS
    for k in range(RUN_COLUMNS // WIDTH):
        j = k * WIDTH
        g.x = x + j
        g.dy = dy + j
        g.weighted = weighted
        if weighted:
            g.features = later_features(features, j)
        load_columns(columns, first, terms, &g)
        if fresh:
            clear_sums(&sums)
        else:
            load_sums(columns, first + j, &sums)
        reduce_row_groups(&g, groups, ahead if j % LINE == 0 else 0, small, terms, &sums)
        if left:
            flush_to_f64(&sums, sum_last_rows(&g, ceil_div(left, RUN_COLUMNS), left - j, terms))
        store_sums(&sums, first + j, columns)


cdef inline void reduce_run(const elem* x, const elem* dy, Features features, Py_ssize_t length,
                            Columns* columns, Py_ssize_t first, const ReduceTuning* tuning,
                            int terms, bint fresh) noexcept nogil:
    cdef Py_ssize_t n
    while True:
        n = minimum(IN_L1, length)
        if terms != MOMENTS and features.weight != NULL:
            reduce_chunk(x, dy, features, n, columns, first, tuning.ahead, False, terms, True,
                         fresh)
        elif tuning.group_rows == ROWS:
            reduce_chunk(x, dy, features, n, columns, first, tuning.ahead, False, terms, False,
                         fresh)
        else:
            reduce_chunk(x, dy, features, n, columns, first, 0, True, terms, False, fresh)
        length -= n
        if length == 0:
            return
        x, dy, fresh = x + n, dy + n, False
        features = later_features(features, n)
