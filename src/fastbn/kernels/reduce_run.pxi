# SPDX-License-Identifier: BSD-3-Clause
# A long run to the sums of the RUN_COLUMNS columns that its channel owns.
#
# May: read the run. May not: know which run it is.

cdef enum:
    IN_L1 = 1024            # elements; a whole number of row groups


cdef inline void reduce_chunk(const Run* chunk, Columns* columns, ptrdiff_t ahead, int size,
                              int terms, bint fresh) noexcept nogil:
    # As rows of RUN_COLUMNS, the last one perhaps a part. What they are added to is 0, if
    # the chunk is the first one.
    cdef size_t step = RUN_COLUMNS * size
    cdef Py_ssize_t row_groups = <size_t>chunk.length // step, left = <size_t>chunk.length % step
    cdef Py_ssize_t k, j, rows = ceil_div(left, RUN_COLUMNS)
    cdef RowGroup g
    cdef WideSums sums
    g.x_step = g.dy_step = RUN_COLUMNS
    for k in range(RUN_COLUMNS // WIDTH):
        j = k * WIDTH
        g.x, g.dy = chunk.x + j, chunk.dy + j
        if terms & WEIGHTED:
            g.features = later_features(chunk.features, j)
        if terms & MASKED:
            g.mask = chunk.mask + j
        load_columns(columns, chunk.first, terms, &g)   # which all columns of a channel share
        if fresh:
            clear_sums(&sums)
        else:
            load_sums(columns, chunk.first + j, &sums)
        reduce_row_groups(&g, row_groups, once_a_line(ahead, j), size, terms, &sums)
        if left:
            g.part = maximum(0, minimum(WIDTH, left - (rows - 1) * RUN_COLUMNS - j))
            flush_to_f64(&sums, sum_last_rows(&g, rows, PART, terms))
        store_sums(&sums, chunk.first + j, columns)


cdef inline void reduce_chunk_of_run(const Run* chunk, Columns* columns,
                                     const ReduceTuning* tuning, int terms,
                                     bint fresh) noexcept nogil:
    if terms & GRADIENTS and chunk.features.weight != NULL:
        reduce_chunk(chunk, columns, tuning.ahead, ROWS, terms | WEIGHTED, fresh)
    elif tuning.group_rows == SMALL_GROUP:
        reduce_chunk(chunk, columns, 0, SMALL_GROUP, terms, fresh)
    else:
        reduce_chunk(chunk, columns, tuning.ahead, ROWS, terms, fresh)


cdef inline Run rest_of_run(const Run* run, Py_ssize_t n) noexcept nogil:
    return Run(run.x + n, run.dy + n, later_features(run.features, n), run.length - n, run.first,
               run.mask, run.period, run.at + n)


cdef inline void reduce_run(Run run, Columns* columns, const ReduceTuning* tuning, int terms,
                            bint fresh) noexcept nogil:
    cdef Run chunk
    while True:
        chunk = run
        chunk.length = minimum(IN_L1, run.length)
        reduce_chunk_of_run(&chunk, columns, tuning, terms, fresh)
        if chunk.length == run.length:
            return
        run = rest_of_run(&run, IN_L1)
        fresh = False


cdef void reduce_masked_run(Run run, Columns* columns, const ReduceTuning* tuning, int terms,
                            bint fresh) noexcept nogil:
    # A function of its own: the code is long.
    cdef Run chunk
    cdef signed char repeated[IN_L1 + PADDING]
    while True:
        chunk = run
        chunk.length = minimum(IN_L1, run.length)
        chunk.mask = mask_of_chunk(&chunk, repeated)
        if terms == MOMENTS:
            reduce_chunk_of_run(&chunk, columns, tuning, MOMENTS | MASKED, fresh)
        elif terms & ACTIVATED:
            reduce_chunk_of_run(&chunk, columns, tuning, GRADIENTS | ACTIVATED | MASKED, fresh)
        else:
            reduce_chunk_of_run(&chunk, columns, tuning, GRADIENTS | MASKED, fresh)
        if chunk.length == run.length:
            return
        run = rest_of_run(&run, IN_L1)
        fresh = False
