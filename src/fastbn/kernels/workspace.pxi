# SPDX-License-Identifier: BSD-3-Clause
"""The memory that a job works with, and the jobs that a job consists of.

One piece of memory: a part for each worker, since threads may work on different
instances; what the features of layer norm need, once; and what a team keeps count in.

May: say how much is needed, and set pointers. May not: allocate, compute with elements.
A part of drivers.pyx, which has the sizes and the small functions used here.
"""

cdef inline size_t elements(const Job* job) noexcept nogil:
    return (<size_t>(job.view.outer * job.view.middle) * job.view.channels * job.view.inner
            * job.instances)


cdef inline void view_groups(const Job* job, Job* groups) noexcept nogil:
    # The job of the same statistics for which a group is a channel.
    groups[0] = job[0]
    groups.plan = job.group_plan
    groups.view.channels = job.view.channels // job.group
    groups.view.inner = job.view.inner * job.group
    groups.x.channel = job.x.channel * job.group
    groups.group = 1
    groups.partial[1] = groups.partial[0] + groups.view.channels * groups.plan.segments
    groups.mean = job.group_mean
    groups.m2 = groups.var = groups.invstd = job.group_invstd


cdef Py_ssize_t sums_of_a_worker(const Job* job) noexcept nogil:
    # How many float64 numbers `partial` has.
    cdef Py_ssize_t sums = 2 * job.view.channels * job.plan.segments
    cdef Job groups
    if job.group > 1:
        view_groups(job, &groups)
        sums = maximum(sums, 2 * groups.view.channels * groups.plan.segments)
    return sums


cdef inline char* alike(const KernelTable* kernels, char* place, const void* tensor) noexcept nogil:
    # Less than a line further: where a line begins among the numbers there, one does among
    # the elements of the tensor.
    cdef size_t wanted = <size_t>tensor // kernels.elem_size * kernels.real_size
    return place + ((wanted - <size_t>place) & (LINE - kernels.real_size))


cdef size_t lay_out(const KernelTable* kernels, Job* job, char* memory) noexcept nogil:
    # A worker's part of the memory. Returns its size; to know that, NULL will do.
    cdef char* place = memory
    cdef Py_ssize_t channels = job.view.channels
    job.partial[0] = <double*>place
    job.partial[1] = job.partial[0] + channels * job.plan.segments
    place += sums_of_a_worker(job) * sizeof(double)
    if job.group > 1:
        job.mean = <double*>place
        job.invstd = job.mean + channels
        place += 2 * channels * sizeof(double)
    job.coefficients = job.prepared
    if job.prepared == NULL:
        job.coefficients = alike(kernels, place, job.out.data)
    place += ceil_div(COEFFICIENT_KINDS * (channels + WRAP) * kernels.real_size, 8) * 8 + LINE
    return place - memory


cdef inline Py_ssize_t length_of_share(const Job* job) noexcept nogil:
    return 2 * (job.view.inner + WRAP)


cdef Py_ssize_t count_shares(const Job* job) noexcept nogil:
    # As many as fit into a sixteenth of the tensor; two, if it is worth a thread. By its
    # shape alone, since the order of additions follows from it.
    cdef Py_ssize_t n = elements(job)
    cdef Py_ssize_t least = 2 if n >= WORTH_TWO_SHARES else 1
    cdef Py_ssize_t most = minimum(MOST_SHARES, job.plan.tiles)
    return minimum(most, maximum(least, n // (4 * length_of_share(job)
                                              * <Py_ssize_t>sizeof(double))))


cdef inline char* on_a_line(char* place) noexcept nogil:
    # Registers that are loaded again and again should not cross lines.
    return <char*>(<size_t>ceil_div(<size_t>place, LINE) * LINE)


cdef size_t lay_out_features(const KernelTable* kernels, Job* job, char* memory) noexcept nogil:
    # What all workers share.
    cdef char* place = on_a_line(memory)
    if not job.view.features:
        return 0
    job.shares = count_shares(job)
    job.features = place
    place = on_a_line(place + length_of_share(job) * kernels.real_size)
    if job.dy.data != NULL:
        job.run_sums = <double*>place
        place = on_a_line(place + 2 * job.view.channels * sizeof(double))
        job.feature_sums = <double*>place
        place += job.shares * length_of_share(job) * sizeof(double)
    return place - memory + 2 * LINE


cdef void split_instances(const KernelTable* kernels, Job* job) noexcept nogil:
    # Planes of a instance into parts, each some groups that stay in the cache between
    # statistics and output.
    cdef Py_ssize_t groups = job.view.channels // job.group, some
    cdef Py_ssize_t size = job.view.inner * job.group * <Py_ssize_t>kernels.elem_size
    if job.group == 1 or job.view.outer * job.view.middle != 1:
        return
    some = maximum(1, minimum(groups, CACHE_OF_GROUPS // size))
    while groups % some:
        some -= 1
    job.parts = groups // some
    job.instances *= job.parts
    job.view.channels //= job.parts


cdef inline size_t size_of_team(const Job* job) noexcept nogil:
    return job.threads * sizeof(Share) + LINE if job.threads > 1 else 0


cdef inline size_t size_for_workers(const Job* job) noexcept nogil:
    return (job.threads if job.instances > 1 else 1) * job.worker_size


cdef size_t prepare(const KernelTable* kernels, Job* job, int tensors) noexcept nogil:
    # The plan. Returns how much memory it takes.
    cdef Job groups
    job.team_loss = 0.0
    job.fetch_next = False
    job.bytes = elements(job) * kernels.elem_size
    job.streaming = job.bytes * tensors >= <size_t>(CACHE if job.threads > 1 else CACHE_OF_ONE)
    split_instances(kernels, job)
    plan(&job.view, kernels.elem_size, &job.plan)
    if job.group > 1:
        view_groups(job, &groups)
        plan(&groups.view, kernels.elem_size, &job.group_plan)
    job.worker_size = lay_out(kernels, job, NULL)
    return size_for_workers(job) + lay_out_features(kernels, job, NULL) + size_of_team(job)


cdef void use_memory(const KernelTable* kernels, Job* job, char* memory) noexcept nogil:
    cdef char* place = memory + size_for_workers(job)
    job.workspace = memory
    lay_out(kernels, job, memory)
    place += lay_out_features(kernels, job, place)
    job.team = on_a_line(place)
    if job.view.features:
        kernels.broadcast_features(job, 0, job.view.inner)


cdef inline void move(const KernelTable* kernels, Operand* operand,
                      Py_ssize_t steps) noexcept nogil:
    operand.data = <char*>operand.data + steps * <Py_ssize_t>kernels.elem_size


cdef void move_to_instance(const KernelTable* kernels, const Job* job, Operand* operand,
                           Py_ssize_t instance) noexcept nogil:
    move(kernels, operand, instance // job.parts * operand.instance
         + instance % job.parts * job.view.channels * operand.channel)


cdef inline double* later(const double* vector, Py_ssize_t n) noexcept nogil:
    return NULL if vector == NULL else <double*>vector + n


cdef void take_instance(const KernelTable* kernels, const Job* whole, Py_ssize_t instance,
                        int worker, Job* job) noexcept nogil:
    # The job of one instance, in the memory of one worker.
    cdef Py_ssize_t channels = whole.view.channels
    cdef Py_ssize_t channel = instance % whole.parts * channels
    cdef Py_ssize_t at = instance * channels // whole.group
    job[0] = whole[0]
    job.instances = 1
    move_to_instance(kernels, whole, &job.x, instance)
    move_to_instance(kernels, whole, &job.dy, instance)
    move_to_instance(kernels, whole, &job.out, instance)
    move_to_instance(kernels, whole, &job.residual, instance)
    move_to_instance(kernels, whole, &job.dy_of_y, instance)
    job.weight, job.bias = later(whole.weight, channel), later(whole.bias, channel)
    job.mean, job.m2 = later(whole.mean, at), later(whole.m2, at)
    job.var, job.invstd = later(whole.var, at), later(whole.invstd, at)
    job.group_mean = later(whole.group_mean, at)
    job.group_invstd = later(whole.group_invstd, at)
    job.dweight = later(whole.dweight, instance * channels)
    job.dbias = later(whole.dbias, instance * channels)
    lay_out(kernels, job, <char*>whole.workspace + worker * whole.worker_size)
