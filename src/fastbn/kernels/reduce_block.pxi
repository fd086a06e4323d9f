# SPDX-License-Identifier: BSD-3-Clause
# The sums of a block: as matrices, runs or pixels, whichever it is.
#
# May: decide how a block is walked through. May not: decide what its sums mean.

cdef inline void reduce_matrix_as(const Matrix* x, const Matrix* dy, Features features,
                                  const WideColumns* wide, Columns* columns, Py_ssize_t first,
                                  const ReduceTuning* tuning, int terms) noexcept nogil:
    if wide != NULL:
        reduce_matrix_f64(x, dy, features, wide, columns, first, terms)
    else:
        reduce_matrix(x, dy, columns, first, tuning, terms)


cdef inline void reduce_with_remainder(Matrix x, Matrix dy, Py_ssize_t length, Features features,
                                       const WideColumns* wide, Columns* columns, Py_ssize_t first,
                                       const ReduceTuning* tuning, int terms) noexcept nogil:
    # `length` neighbouring elements as a matrix, and what remains as one more row. A loop,
    # since the code of a sum is long.
    cdef int part
    for part in range(2):
        reduce_matrix_as(&x, &dy, features, wide, columns, first, tuning, terms)
        features = later_features(features, x.rows * RUN_COLUMNS)
        x = remainder_matrix(x, length)
        dy = remainder_matrix(dy, length)


cdef inline elem* gather_pixels(const Job* job, const Operand* operand, Py_ssize_t run,
                                Py_ssize_t runs, elem* to) noexcept nogil:
    cdef const elem* pixel
    cdef Py_ssize_t i, c, channels = job.view.channels
    for i in range(runs):
        pixel = element(job, operand, 0, run + i, 0)
        for c in range(channels):
            to[i * channels + c] = pixel[c * operand.channel]
    return to


cdef inline void reduce_pixels(const Job* job, const Block* block, Columns* columns,
                               int terms) noexcept nogil:
    # A block of few channels. Pixels that are apart in memory are gathered, so many
    # at a time as make a whole number of row groups.
    cdef const Operand* other = &job.dy if terms else &job.x
    cdef bint gathered = not (gapless_runs(job, &job.x) and gapless_runs(job, other))
    cdef elem x_scratch[ROWS * PIXELS * PIXELS]
    cdef elem dy_scratch[ROWS * PIXELS * PIXELS]
    cdef elem* x
    cdef elem* dy
    cdef ReduceTuning tuning = reduce_tuning(job, PIXELS * job.view.channels, terms)
    cdef Py_ssize_t i, run, runs, at_once = ROWS * PIXELS if gathered else block.runs
    if gathered:
        tuning.ahead = 0
        tuning.rowwise = False
    for i in range(ceil_div(block.runs, at_once)):
        run = block.run + i * at_once
        runs = minimum(at_once, block.run + block.runs - run)
        x, dy = element(job, &job.x, 0, run, 0), element(job, other, 0, run, 0)
        if gathered:
            x = dy = gather_pixels(job, &job.x, run, runs, x_scratch)
            if terms:
                dy = gather_pixels(job, other, run, runs, dy_scratch)
        reduce_with_remainder(
            pixel_matrix(job, x, runs), pixel_matrix(job, dy, runs),
            runs * job.view.channels, no_features(), NULL, columns, 0, &tuning, terms)


cdef inline void reduce_block(const Job* job, const Block* block, Py_ssize_t channel,
                              Py_ssize_t channels, const WideColumns* wide, Columns* columns,
                              int terms) noexcept nogil:
    # The sums of a block; with `wide` in float64, and each pixel a row.
    cdef Matrix x, dy
    cdef const Operand* other = &job.dy if terms else &job.x
    cdef Py_ssize_t i, c, run, together
    cdef Py_ssize_t width = columns_per_channel(job), length = block.length
    cdef ReduceTuning tuning
    cdef Features features = no_features()
    if terms and job.view.features:
        features = features_from(job, block.offset)
    if wide != NULL or not job.plan.long_runs:
        memset(columns.s, 0, channels * width * job.plan.pixels * sizeof(double))
        memset(columns.q, 0, channels * width * job.plan.pixels * sizeof(double))
    if job.plan.long_runs:
        tuning = reduce_tuning(job, RUN_COLUMNS, terms)
        for run in range(block.run, block.run + block.runs):
            for c in range(channels):
                if wide == NULL:
                    reduce_run(element(job, &job.x, channel + c, run, block.offset),
                               element(job, other, channel + c, run, block.offset), features,
                               length, columns, c * width, &tuning, terms, run == block.run)
                    continue
                x = long_matrix(job, &job.x, block, channel + c, run)
                dy = long_matrix(job, other, block, channel + c, run)
                reduce_with_remainder(x, dy, block.length, features, wide, columns, c * width,
                                      &tuning, terms)
        return
    if job.plan.pixels > 1 and wide == NULL:
        reduce_pixels(job, block, columns, terms)
        return
    together = minimum(neighbours(job, &job.x, channels), neighbours(job, other, channels))
    tuning = reduce_tuning(job, job.x.middle, terms)
    for i in range(channels // together):
        c = i * together
        x = short_matrix(job, &job.x, block, channel + c, together)
        dy = short_matrix(job, other, block, channel + c, together)
        reduce_matrix_as(&x, &dy, no_features(), wide, columns, c * width, &tuning, terms)
