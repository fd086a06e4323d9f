# SPDX-License-Identifier: BSD-3-Clause
# What an operation does, as a list of phases.
#
#     statistics   moments | merge
#     inference    coefficients | write
#     forward      moments | merge, coefficients | write
#     backward     coefficients | sums | merge | write; before the sums of a segment, its
#                  dz may be written
#
# Where x is a part of a batch, forward and backward are cut in two: after the merge, the
# binding asks the other parts.
#
# A phase is a number of tasks, which may be done in any order, on any threads; a phase
# begins when all of the one before is done. Where tiles fit the cache (`Plan.by_tile`),
# forward and backward are one phase, whose task is all of a tile. The bits are the same,
# since kernels see the same rectangles.
#
# Layer and RMS norm: each run is a channel, and has features. Instance norm: each instance
# has buffers of its own. Group norm: the same, and its statistics are those of a problem in
# which a group is a channel.
#
# May decide what a task is. May not know who runs it; keep anything between tasks but in
# buffers. A part of core.pyx.

cdef enum:
    MOST_PHASES = 8
    SPAN = 8            # blocks that are written in one go
    TASKS_A_WORKER = 4  # are enough for workers to finish at about the same time

cdef struct Phase

# `worker` is the number of the thread, whose memory the task may use.
ctypedef void (*RunTask)(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil

cdef struct Phase:
    const Request* request
    const Job* job              # of the instances that it works on
    RunTask run             # does one of ...
    Py_ssize_t tasks
    TileKernel kernel       # ... by this, if by one kernel, ...
    ImageKernel image_kernel    # ... or by this
    Py_ssize_t split        # tasks that a block is shared out to ...
    Py_ssize_t span         # ... or blocks that a task has

cdef struct Phases:
    int count
    Phase list[MOST_PHASES]

cdef inline Phase* add(Phases* phases, const Request* r, const Job* job, RunTask run,
                       Py_ssize_t tasks) noexcept nogil:
    cdef Phase* phase = &phases.list[phases.count]
    phase[0] = Phase(r, job, run, tasks, NULL, NULL, 1, 1)
    phases.count += 1
    return phase


# ---- tasks of one kernel -------------------------------------------------------------

cdef inline void do_segment(TileKernel kernel, const Job* job, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t tile = i // job.plan.segments, segment = i % job.plan.segments
    kernel(job, tile, tile + 1, segment, segment + 1)


cdef void segment_of_tile(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    do_segment(phase.kernel, phase.job, i)


cdef void segment_of_groups(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef Job groups = job_of_groups(phase.request, phase.job)
    do_segment(phase.kernel, &groups, i)


cdef void add_segments(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    add(phases, r, job, segment_of_tile,
        r.job.plan.tiles * r.job.plan.segments).kernel = r.kernels.moments


cdef inline void do_blocks(const Phase* phase, const Job* job, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t tiles = job.plan.tiles, split = phase.split
    cdef Py_ssize_t block = i // split * phase.span, share = i % split
    phase.kernel(job, tiles * share // split, tiles * (share + 1) // split,
                 block, minimum(block + phase.span, job.plan.blocks))


cdef void share_of_blocks(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    do_blocks(phase, phase.job, i)


cdef void share_of_blocks_of_dy(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef Job job = phase.job[0]
    job.buffers.x = job.buffers.dy
    do_blocks(phase, &job, i)


cdef void add_blocks(Phases* phases, const Request* r, const Job* job, RunTask run,
                     TileKernel kernel) noexcept nogil:
    # Elementwise: a task is what lies together in memory, blocks before tiles. A task is
    # several blocks of the only tile, whose coefficients are then broadcast once, or,
    # where blocks are few, a share of the tiles.
    cdef int workers = workers_of_an_instance(r)
    cdef Py_ssize_t blocks = r.job.plan.blocks, enough = TASKS_A_WORKER * workers
    cdef Phase* phase = add(phases, r, job, run, 0)
    phase.kernel = kernel
    if r.job.plan.tiles == 1:
        phase.span = maximum(1, minimum(SPAN, blocks // enough))
    elif workers > 1 and blocks < enough:
        phase.split = minimum(r.job.plan.tiles, enough)
    phase.tasks = ceil_div(blocks, phase.span) * phase.split


cdef inline Py_ssize_t tile_start(const Job* job, Py_ssize_t tile) noexcept nogil:
    return minimum(job.problem.view.channels, tile * job.plan.tile_channels)


# ---- statistics ----------------------------------------------------------------------

cdef void merge_all(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    phase.request.kernels.merge_moments(job, 0, job.problem.view.channels)
    if job.buffers.minimum != NULL:
        phase.request.kernels.merge_extremes(job, 0, job.problem.view.channels)


cdef void statistics_of_segment(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    # A segment is still in the cache when it is read the second time.
    do_segment(phase.request.kernels.moments, phase.job, i)
    do_segment(phase.request.kernels.extremes, phase.job, i)


cdef void add_statistics(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    if job.buffers.minimum != NULL:
        add(phases, r, job, statistics_of_segment, r.job.plan.tiles * r.job.plan.segments)
    else:
        add_segments(phases, r, job)
    add(phases, r, job, merge_all, 1)


# ---- inference -----------------------------------------------------------------------

cdef void infer_tile(const Phase* phase, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    if phase.request.extras.coefficients == NULL:
        phase.request.kernels.coefficients(job, tile_start(job, tile),
                                           tile_start(job, tile + 1))
    phase.request.kernels.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef void find_coefficients(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    phase.request.kernels.coefficients(job, 0, job.problem.view.channels)


cdef void add_inference(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    if r.job.plan.blocks == 1 and r.job.problem.view.inner == 1:
        add(phases, r, job, infer_tile, r.job.plan.tiles)
        return
    if r.extras.coefficients == NULL:
        add(phases, r, job, find_coefficients, 1)
    add_blocks(phases, r, job, share_of_blocks, r.kernels.write_forward)


# ---- forward -------------------------------------------------------------------------

cdef void forward_tile(const Phase* phase, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const KernelTable* kernels = phase.request.kernels
    cdef const Job* job = phase.job
    cdef Py_ssize_t c0 = tile_start(job, tile), c1 = tile_start(job, tile + 1)
    kernels.moments(job, tile, tile + 1, 0, job.plan.segments)
    kernels.merge_moments(job, c0, c1)
    kernels.coefficients(job, c0, c1)
    kernels.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef void merge_for_write(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    phase.request.kernels.merge_moments(job, 0, job.problem.view.channels)
    phase.request.kernels.coefficients(job, 0, job.problem.view.channels)


cdef void merge_groups(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const KernelTable* kernels = phase.request.kernels
    cdef Job groups = job_of_groups(phase.request, phase.job)
    cdef Py_ssize_t channels = phase.job.problem.view.channels
    kernels.merge_moments(&groups, 0, groups.problem.view.channels)
    kernels.broadcast_groups(phase.job, 0, channels)
    kernels.coefficients(phase.job, 0, channels)


cdef void add_forward(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    if r.job.plan.by_tile:
        add(phases, r, job, forward_tile, r.job.plan.tiles)
        return
    if r.job.problem.group > 1:
        add(phases, r, job, segment_of_groups,
            r.group_job.plan.tiles * r.group_job.plan.segments).kernel = r.kernels.moments
        add(phases, r, job, merge_groups, 1)
    else:
        add_segments(phases, r, job)
        add(phases, r, job, merge_for_write, 1)
    add_blocks(phases, r, job, share_of_blocks, r.kernels.write_forward)


# ---- backward ------------------------------------------------------------------------

cdef inline void sum_segment(const KernelTable* kernels, const Job* job, Py_ssize_t tile,
                             Py_ssize_t segment) noexcept nogil:
    cdef Py_ssize_t block = segment * job.plan.segment_blocks
    if job.plan.dz_first:
        kernels.write_dz(
            job, tile, tile + 1, block, minimum(block + job.plan.segment_blocks, job.plan.blocks))
    kernels.gradient_sums(job, tile, tile + 1, segment, segment + 1)


cdef void sum_segment_of_tile(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    sum_segment(phase.request.kernels, job, i // job.plan.segments, i % job.plan.segments)


cdef inline void do_backward(const KernelTable* kernels, const Job* job,
                             Py_ssize_t tile) noexcept nogil:
    cdef Py_ssize_t segment, c0 = tile_start(job, tile), c1 = tile_start(job, tile + 1)
    kernels.coefficients(job, c0, c1)
    for segment in range(job.plan.segments):
        sum_segment(kernels, job, tile, segment)
    kernels.merge_gradients(job, c0, c1)
    kernels.write_gradient(job, tile, tile + 1, 0, job.plan.blocks)


cdef void backward_tile(const Phase* phase, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    do_backward(phase.request.kernels, job, tile)


cdef void backward_share(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    # Neighbouring tiles, whose gradients of features are added up in one place.
    cdef Job job = phase.job[0]
    cdef Buffers* b = &job.buffers
    cdef Py_ssize_t tile, tiles = job.plan.tiles, n = numbers_of_a_share(&job.problem)
    b.dweight, b.dbias = b.run_sums, b.run_sums + job.problem.view.channels
    b.feature_sums += i * n
    memset(b.feature_sums, 0, n * sizeof(double))
    for tile in range(tiles * i // job.plan.shares, tiles * (i + 1) // job.plan.shares):
        do_backward(phase.request.kernels, &job, tile)


cdef void prepare_sums(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    if job.problem.group > 1:
        phase.request.kernels.broadcast_groups(job, 0, job.problem.view.channels)
    phase.request.kernels.coefficients(job, 0, job.problem.view.channels)


cdef void merge_sums(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    phase.request.kernels.merge_gradients(job, 0, job.problem.view.channels)


cdef void add_sums(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    add(phases, r, job, prepare_sums, 1)
    add(phases, r, job, sum_segment_of_tile, r.job.plan.tiles * r.job.plan.segments)
    add(phases, r, job, merge_sums, 1)


cdef void add_backward(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    if r.job.problem.view.features:
        add(phases, r, job, backward_share, r.job.plan.shares)
        return
    if r.job.plan.by_tile:
        add(phases, r, job, backward_tile, r.job.plan.tiles)
        return
    add_sums(phases, r, job)
    if r.job.problem.training or r.job.plan.fused:
        add_blocks(phases, r, job, share_of_blocks, r.kernels.write_gradient)
    else:       # dx is an affine function of dy alone
        add_blocks(phases, r, job, share_of_blocks_of_dy, r.kernels.write_forward)


# ---- operations ----------------------------------------------------------------------

cdef void write_all_dz(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    phase.request.kernels.write_dz(phase.job, 0, phase.job.plan.tiles, 0, phase.job.plan.blocks)


cdef void add_zeros(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    # Where a mask leaves nothing.
    if r.job.plan.dz_first:
        add(phases, r, job, write_all_dz, 1)
    if r.call.operation != FASTBN_STATISTICS:
        add_blocks(phases, r, job, share_of_blocks, r.kernels.write_forward)


cdef void add_phases(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    # Those of one instance.
    if has_no_statistics(r):
        add_zeros(phases, r, job)
    elif r.call.operation == FASTBN_STATISTICS:
        add_statistics(phases, r, job)
    elif r.call.operation == FASTBN_INFERENCE:
        add_inference(phases, r, job)
    elif r.call.operation == FASTBN_FORWARD:
        add_forward(phases, r, job)
    else:
        add_backward(phases, r, job)


cdef void finish_vectors(Request* r) noexcept nogil:
    # What is done last, on one thread: what all instances give together.
    if is_backward(&r.call):
        r.kernels.add_instances(&r.job, 0, r.job.problem.view.channels)
    elif r.call.operation == FASTBN_FORWARD:
        r.kernels.update_running(&r.job, 0, r.job.problem.view.channels)


# ---- a part of a batch, of which others have the rest --------------------------------

cdef void add_own(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    # What needs no other part: statistics, or sums of gradients.
    if is_backward(&r.call):
        add_sums(phases, r, job)
    else:
        add_statistics(phases, r, job)


cdef void find_batch_coefficients(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    phase.request.kernels.batch_coefficients(job, 0, job.problem.view.channels)


cdef void add_rest(Phases* phases, const Request* r, const Job* job) noexcept nogil:
    # What is left, once the same is known of the whole batch.
    if is_backward(&r.call):
        add(phases, r, job, find_batch_coefficients, 1)
        add_blocks(phases, r, job, share_of_blocks, r.kernels.write_gradient)
    else:
        add(phases, r, job, find_coefficients, 1)
        add_blocks(phases, r, job, share_of_blocks, r.kernels.write_forward)


# ---- instances -----------------------------------------------------------------------

cdef void whole_instance(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef Job own = job_of_instance(phase.request, i, worker)
    cdef Phases phases
    cdef Py_ssize_t task
    cdef int k
    phases.count = 0
    add_phases(&phases, phase.request, &own)
    for k in range(phases.count):
        for task in range(phases.list[k].tasks):
            phases.list[k].run(&phases.list[k], task, worker)


cdef inline Py_ssize_t count_rounds(const Request* r) noexcept nogil:
    # An instance after the other, or all of them in one phase.
    return r.job.problem.instances if not is_image(&r.call) and in_sequence(r) else 1


cdef void list_phases(const Request* r, Py_ssize_t round, Job* own,
                      Phases* phases) noexcept nogil:
    # Each round has as many phases as another. `own` is room for an instance.
    phases.count = 0
    if is_image(&r.call):
        list_image_phases(r, phases)
    elif in_sequence(r):
        own[0] = job_of_instance(r, round, 0)
        add_phases(phases, r, own)
    elif r.job.problem.instances == 1:
        add_phases(phases, r, &r.job)
    else:
        add(phases, r, &r.job, whole_instance, r.job.problem.instances)
