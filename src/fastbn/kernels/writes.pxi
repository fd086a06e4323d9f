# SPDX-License-Identifier: BSD-3-Clause
# The elementwise passes: how each is walked, and the kernels.

cdef enum:
    LONG_ENOUGH = 128       # bytes: runs as long as that are written along, not by columns
    LONG_TO_STREAM = 64     # the same past the cache, where a line in two parts costs more
    MANY = 2048             # channels: the coefficients of more crowd the cache


cdef inline bint along_runs(const Job* job, int variant) noexcept nogil:
    # Always where runs are cut into columns: their tiles are too wide for a table.
    return (job.plan.long_runs or job.problem.view.inner * <Py_ssize_t>sizeof(elem)
            >= (LONG_TO_STREAM if variant & STREAMING else LONG_ENOUGH))


cdef inline bint one_run_of_rows(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                                 int variant) noexcept nogil:
    # Are these whole rows of many channels, without gaps?
    return (job.problem.view.inner == 1 and t1 - t0 > 1 and t1 - t0 == job.plan.tiles
            and gapless_runs(job, &job.buffers.x) and gapless_runs(job, &job.buffers.out)
            and (not reads_dy(variant) or gapless_runs(job, &job.buffers.dy))
            and (not reads_residual(a, variant) or gapless_runs(job, &job.buffers.residual)))


cdef inline void write_whole_rows(const Job* job, const Activation* a, Py_ssize_t b0, Py_ssize_t b1,
                                  int variant) noexcept nogil:
    # As one run, for which the coefficients of the job are the table.
    cdef Block first = block_at(job, b0), last = block_at(job, b1 - 1)
    cdef CoefficientTable table = CoefficientTable(
        coefficient(job, 0), coefficient(job, 1) - coefficient(job, 0), job.problem.view.channels)
    write_run(pointers_at(job, a, 0, first.run, 0, variant),
              (last.run + last.runs - first.run) * job.problem.view.channels, &table, variant)


cdef inline bint any_pow2_scaled(const Job* job, Py_ssize_t channel,
                                 Py_ssize_t channels) noexcept nogil:
    cdef const real* pow2_scale = coefficient(job, POW2_SCALE)
    cdef Py_ssize_t c
    cdef long scaled = 0
    for c in range(channel, channel + channels):
        scaled += pow2_scale[c] != 1.0
    return scaled != 0


cdef inline void write_tiles_as(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                                Py_ssize_t b0, Py_ssize_t b1, int variant) noexcept nogil:
    cdef Py_ssize_t tile, channel = first_channel(job, t0)
    cdef Py_ssize_t channels = channels_of_tiles(job, t0, t1)
    if job.problem.view.features:
        write_features(job, a, channel, channels, b0, b1, variant)
        return
    if along_runs(job, variant):
        write_runs(job, a, channel, channels, b0, b1, variant)
        return
    if ((variant & STREAMING or job.problem.view.channels <= MANY)
            and one_run_of_rows(job, a, t0, t1, variant)):
        write_whole_rows(job, a, b0, b1, variant)
        return
    for tile in range(t0, t1):
        write_tile(job, a, tile, b0, b1, variant)


cdef void write_pow2_scaled(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                            Py_ssize_t b0, Py_ssize_t b1, int variant) noexcept nogil:
    # The same code for all kinds, which asks each time what they need: with loops of their
    # own, a wheel would be a tenth larger.
    write_tiles_as(job, a, t0, t1, b0, b1, variant | POW2_SCALED)


cdef inline void write_tiles(const Job* job, const Activation* a, Py_ssize_t t0, Py_ssize_t t1,
                             Py_ssize_t b0, Py_ssize_t b1, int variant) noexcept nogil:
    if any_pow2_scaled(job, first_channel(job, t0), channels_of_tiles(job, t0, t1)):
        write_pow2_scaled(job, a, t0, t1, b0, b1, variant)
    elif job.plan.streaming and not variant & DZ:      # which is read again soon
        write_tiles_as(job, a, t0, t1, b0, b1, variant | STREAMING)
        if job.buffers.written_mask.bytes == NULL:      # of many parts, the last one is followed
            flush_stream()
    else:
        write_tiles_as(job, a, t0, t1, b0, b1, variant)


cdef void write_forward(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                        Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    cdef Pass way = Pass(write_forward, &job.buffers.out, job.plan.streaming)
    if is_masked(job):
        write_counted(job, &way, t0, t1, b0, b1)
    elif job.plan.fused:
        write_tiles(job, &a, t0, t1, b0, b1, FUSED)
    else:
        write_tiles(job, NULL, t0, t1, b0, b1, 0)
    fp_leave(saved)


cdef void write_gradient(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                         Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    cdef Pass way = Pass(write_gradient, &job.buffers.out, job.plan.streaming)
    if is_masked(job) and job.problem.training and (
            count_of_batch(job) * job.problem.group == 1.0):
        write_zeros(job, &way, t0, t1, b0, b1)      # of one value, with its mean
    elif is_masked(job):
        write_counted(job, &way, t0, t1, b0, b1)
    elif job.plan.fused:
        write_tiles(job, &a, t0, t1, b0, b1, GRADIENT | FUSED)
    else:
        write_tiles(job, NULL, t0, t1, b0, b1, GRADIENT)
    fp_leave(saved)


cdef void write_dz(const Job* job, Py_ssize_t t0, Py_ssize_t t1, Py_ssize_t b0,
                   Py_ssize_t b1) noexcept nogil:
    cdef fp_state saved = fp_enter()
    cdef Activation a = activation_of(job)
    cdef Pass way = Pass(write_dz, &job.buffers.dy, False)
    if is_masked(job):
        write_counted(job, &way, t0, t1, b0, b1)
    else:
        write_tiles(job, &a, t0, t1, b0, b1, DZ)
    fp_leave(saved)
