# SPDX-License-Identifier: BSD-3-Clause
# The memory of a request: a part for each worker, since they may work on different
# instances; what features need, and a mask, once; and what threads keep count in. An
# instance, or the groups of its channels, have buffers of their own.
#
# May say how much is needed, and set pointers. May not allocate, compute with elements. A
# part of core.pyx.

cdef enum:
    LINE = 64       # bytes

cdef struct Share:
    # The tasks that are left of a thread's share: the first, and the one after the
    # last, 32 bits each, in one number, so that both change at once.
    uint64_t left
    char line[LINE - 8]     # no two shares on a line of the cache


cdef inline Job job_of_groups(const Request* r, const Job* job) noexcept nogil:
    # The same statistics, for which a group is a channel.
    cdef Job groups = r.group_job
    cdef Buffers* b = &groups.buffers
    b[0] = job.buffers
    b.x.channel *= r.job.problem.group
    b.partial[1] = b.partial[0] + groups.problem.view.channels * groups.plan.segments
    b.mean = b.group_mean
    b.m2 = b.var = b.invstd = b.group_invstd
    b.mask.blocks = b.mask.group_blocks
    b.mask.prefixes = NULL
    return groups


cdef Py_ssize_t sums_of_a_worker(const Request* r) noexcept nogil:
    # How many float64 numbers `partial` has.
    cdef Py_ssize_t sums = 2 * r.job.problem.view.channels * r.job.plan.segments
    if r.job.problem.group == 1:
        return sums
    return maximum(sums, 2 * r.group_job.problem.view.channels * r.group_job.plan.segments)


cdef inline char* alike(const KernelTable* kernels, char* place,
                        const void* tensor) noexcept nogil:
    # Less than a line further: where a line begins among the numbers there, one does among
    # the elements of the tensor.
    cdef size_t wanted = <size_t>tensor // kernels.elem_size * kernels.real_size
    return place + ((wanted - <size_t>place) & (LINE - kernels.real_size))


cdef size_t lay_out(const Request* r, Buffers* b, char* memory) noexcept nogil:
    # A worker's part of the memory. Returns its size; to know that, NULL will do.
    cdef char* place = memory
    cdef Py_ssize_t channels = r.job.problem.view.channels
    b.partial[0] = <double*>place
    b.partial[1] = b.partial[0] + channels * r.job.plan.segments
    place += sums_of_a_worker(r) * sizeof(double)
    if r.job.problem.group > 1:
        b.mean = <double*>place
        b.invstd = b.mean + channels
        place += 2 * channels * sizeof(double)
    b.coefficients = r.extras.coefficients
    if b.coefficients == NULL:
        b.coefficients = alike(r.kernels, place, b.out.data)
        place += (ceil_div(COEFFICIENT_KINDS * (channels + WRAP) * r.kernels.real_size,
                           sizeof(double)) * sizeof(double) + LINE)
    return place - memory


cdef inline char* on_a_line(char* place) noexcept nogil:
    # Vectors that are loaded again and again should not cross lines.
    return <char*>(<size_t>ceil_div(<size_t>place, LINE) * LINE)


cdef size_t lay_out_features(const Request* r, Buffers* b, char* memory) noexcept nogil:
    # What all workers share.
    cdef char* place = on_a_line(memory)
    if not r.job.problem.view.features:
        return 0
    b.features = place
    place = on_a_line(place + numbers_of_a_share(&r.job.problem) * r.kernels.real_size)
    if is_backward(&r.call):
        b.run_sums = <double*>place
        place = on_a_line(place + 2 * r.job.problem.view.channels * sizeof(double))
        b.feature_sums = <double*>place
        place += r.job.plan.shares * numbers_of_a_share(&r.job.problem) * sizeof(double)
    return place - memory + 2 * LINE


cdef inline size_t size_of_team(const Request* r) noexcept nogil:
    return r.workers * sizeof(Share) + LINE if r.workers > 1 else 0


cdef inline size_t size_for_workers(const Request* r) noexcept nogil:
    return (r.workers if r.job.problem.instances > 1 else 1) * r.worker_size


cdef size_t size_of_workspace(Request* r) noexcept nogil:
    r.worker_size = lay_out(r, &r.job.buffers, NULL)
    return (size_for_workers(r) + lay_out_features(r, &r.job.buffers, NULL)
            + lay_out_mask(r, &r.job.buffers.mask, NULL) + size_of_team(r) + LINE)


cdef void use_workspace(Request* r, char* memory) noexcept nogil:
    cdef char* place = memory + size_for_workers(r)
    r.workspace = memory
    lay_out(r, &r.job.buffers, memory)
    place += lay_out_features(r, &r.job.buffers, place)
    place = on_a_line(place)
    place += lay_out_mask(r, &r.job.buffers.mask, place)
    r.shares = on_a_line(place)
    if r.job.problem.view.features:
        r.kernels.broadcast_features(&r.job, 0, r.job.problem.view.inner)


cdef inline void move(const Request* r, Operand* operand, Py_ssize_t steps) noexcept nogil:
    operand.data = <char*>operand.data + steps * <Py_ssize_t>r.kernels.elem_size


cdef void move_to_instance(const Request* r, Operand* operand, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t parts = r.job.problem.channel_parts
    if operand.data != NULL:
        move(r, operand, i // parts * operand.instance
             + i % parts * r.job.problem.view.channels * operand.channel)


cdef inline double* later(const double* vector, Py_ssize_t n) noexcept nogil:
    return NULL if vector == NULL else <double*>vector + n


cdef Job job_of_instance(const Request* r, Py_ssize_t i, int worker) noexcept nogil:
    # In the memory of one worker.
    cdef Job job = r.job
    cdef Buffers* own = &job.buffers
    cdef Py_ssize_t channels = job.problem.view.channels
    cdef Py_ssize_t channel = i % job.problem.channel_parts * channels
    cdef Py_ssize_t at = i * channels // job.problem.group
    move_to_instance(r, &own.x, i)
    move_to_instance(r, &own.dy, i)
    move_to_instance(r, &own.out, i)
    move_to_instance(r, &own.residual, i)
    move_to_instance(r, &own.dy_of_y, i)
    own.weight, own.bias = later(own.weight, channel), later(own.bias, channel)
    own.mean, own.m2 = later(own.mean, at), later(own.m2, at)
    own.var, own.invstd = later(own.var, at), later(own.invstd, at)
    own.group_mean = later(own.group_mean, at)
    own.group_invstd = later(own.group_invstd, at)
    own.dweight = later(own.dweight, i * channels)
    own.dbias = later(own.dbias, i * channels)
    move_mask_to_instance(r, &own.mask, i)
    lay_out(r, own, r.workspace + worker * r.worker_size)
    return job
