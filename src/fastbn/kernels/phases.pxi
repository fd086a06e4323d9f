# SPDX-License-Identifier: BSD-3-Clause
"""What an operation does, as a list of phases.

    statistics   moments | merge
    inference    coefficients | write
    training     moments | merge, coefficients | write
    gradients    coefficients | sums | merge | write; before the sums of a segment, its
                 dz may be written

A phase is a number of pieces, which may be done in any order, on any threads; a phase
begins when all of the one before is done. Where planes of a tile fit the cache,
training and gradients do all of a tile before the next (`by_tile`), in one phase: the
second reading then comes from the cache. The bits are the same, since kernels see the
same tasks.

The siblings are the same operations. Layer and RMS norm: each run is a channel, and
has features. Instance norm: each instance is a job of its own. Group norm: the same,
and its statistics are those of a view in which a group is a channel.

May: decide what a piece is. May not: know who runs it; keep anything between pieces
but in the job and its workspace. A part of drivers.pyx, which has the sizes and the
small functions used here.
"""

cdef enum:
    MOST_PHASES = 8

cdef struct Phase
cdef struct Operation

# `worker` is the number of the thread, whose memory the piece may use.
ctypedef void (*Piece)(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil

cdef struct Phase:
    const KernelTable* kernels
    const Job* job
    const Operation* operation
    Piece piece             # does one of ...
    Py_ssize_t pieces
    TileKernel kernel               # ... by this, if by one kernel
    Py_ssize_t split        # pieces that a block is shared out to ...
    Py_ssize_t span         # ... or blocks that a piece has

cdef struct Phases:
    int count
    Phase list[MOST_PHASES]

cdef struct Operation:
    int tensors             # that are read or written
    # Adds the phases of one instance, and decides how it is written.
    void (*add_instance)(const KernelTable* kernels, Job* job, Phases* phases) noexcept nogil
    ChannelKernel close              # what is done last, on one thread; NULL: nothing


cdef inline Phase* add(Phases* phases, const KernelTable* kernels, const Job* job, Piece piece,
                       Py_ssize_t pieces) noexcept nogil:
    cdef Phase* phase = &phases.list[phases.count]
    phase[0] = Phase(kernels, job, NULL, piece, pieces, NULL, 1, 1)
    phases.count += 1
    return phase


cdef inline bint by_tile(const KernelTable* kernels, const Job* job, int tensors) noexcept nogil:
    cdef size_t tile = (<size_t>(job.view.outer * job.view.middle) * job.view.inner
                        * job.plan.tile_channels * kernels.elem_size * tensors)
    return (tile <= <size_t>(CACHE_OF_A_TILE if job.view.inner > 1 else CACHE_OF_ROWS)
            and (job.threads == 1 or job.plan.tiles >= 2 * job.threads))


# ---- pieces of one kernel ----------------------------------------------------------

cdef inline void do_segment(const Phase* phase, const Job* job, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t tile = i // job.plan.segments, segment = i % job.plan.segments
    phase.kernel(job, tile, tile + 1, segment, segment + 1)


cdef void segment_of_tile(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    do_segment(phase, phase.job, i)


cdef void segment_of_groups(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef Job groups
    view_groups(phase.job, &groups)
    do_segment(phase, &groups, i)


cdef inline void add_segments(Phases* phases, const KernelTable* kernels, const Job* job,
                              TileKernel kernel) noexcept nogil:
    add(phases, kernels, job, segment_of_tile, job.plan.tiles * job.plan.segments).kernel = kernel


cdef inline void do_blocks(const Phase* phase, const Job* job, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t tiles = job.plan.tiles, split = phase.split
    cdef Py_ssize_t block = i // split * phase.span, share = i % split
    phase.kernel(job, tiles * share // split, tiles * (share + 1) // split,
                 block, minimum(block + phase.span, job.plan.blocks))


cdef void share_of_blocks(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    do_blocks(phase, phase.job, i)


cdef void share_of_blocks_of_dy(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef Job job = phase.job[0]
    job.x = job.dy
    do_blocks(phase, &job, i)


cdef void add_blocks(Phases* phases, const KernelTable* kernels, const Job* job, Piece piece,
                     TileKernel kernel) noexcept nogil:
    # Elementwise: a piece is what lies together in memory, blocks before tiles. A
    # piece is several blocks of the only tile, whose coefficients are then spread out
    # once, or, where blocks are few, a share of the tiles.
    cdef Py_ssize_t blocks = job.plan.blocks, enough = 4 * job.threads
    cdef Phase* phase = add(phases, kernels, job, piece, 0)
    phase.kernel = kernel
    if job.plan.tiles == 1:
        phase.span = maximum(1, minimum(SPAN, blocks // enough))
    elif job.threads > 1 and blocks < enough:
        phase.split = minimum(job.plan.tiles, enough)
    phase.pieces = ceil_div(blocks, phase.span) * phase.split


cdef inline Py_ssize_t tile_start(const Job* job, Py_ssize_t tile) noexcept nogil:
    return minimum(job.view.channels, tile * job.plan.tile_channels)


# ---- statistics ------------------------------------------------------------------

cdef void merge_all(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    phase.kernels.merge_moments(phase.job, 0, phase.job.view.channels)


cdef void instance_of_statistics(const KernelTable* kernels, Job* job,
                                 Phases* phases) noexcept nogil:
    add_segments(phases, kernels, job, kernels.moments)
    add(phases, kernels, job, merge_all, 1)


cdef inline Operation statistics_of(const KernelTable* kernels) noexcept nogil:
    return Operation(1, instance_of_statistics, NULL)


# ---- inference -------------------------------------------------------------------

cdef void infer_tile(const Phase* phase, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const Job* job = phase.job
    if job.prepared == NULL:
        phase.kernels.coefficients(job, tile_start(job, tile), tile_start(job, tile + 1))
    phase.kernels.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef void find_coefficients(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    phase.kernels.coefficients(phase.job, 0, phase.job.view.channels)


cdef void instance_of_inference(const KernelTable* kernels, Job* job,
                                Phases* phases) noexcept nogil:
    if job.plan.blocks == 1 and job.view.inner == 1:
        add(phases, kernels, job, infer_tile, job.plan.tiles)
        return
    if job.prepared == NULL:
        add(phases, kernels, job, find_coefficients, 1)
    add_blocks(phases, kernels, job, share_of_blocks, kernels.write_forward)


cdef inline Operation inference_of(const KernelTable* kernels) noexcept nogil:
    return Operation(2, instance_of_inference, NULL)


# ---- training --------------------------------------------------------------------

cdef void train_tile(const Phase* phase, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const KernelTable* kernels = phase.kernels
    cdef const Job* job = phase.job
    cdef Py_ssize_t c0 = tile_start(job, tile), c1 = tile_start(job, tile + 1)
    kernels.moments(job, tile, tile + 1, 0, job.plan.segments)
    kernels.merge_moments(job, c0, c1)
    kernels.coefficients(job, c0, c1)
    kernels.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef void merge_for_write(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    phase.kernels.merge_moments(phase.job, 0, phase.job.view.channels)
    phase.kernels.coefficients(phase.job, 0, phase.job.view.channels)


cdef void merge_groups(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef Py_ssize_t channels = phase.job.view.channels
    cdef Job groups
    view_groups(phase.job, &groups)
    phase.kernels.merge_moments(&groups, 0, groups.view.channels)
    phase.kernels.broadcast_groups(phase.job, 0, channels)
    phase.kernels.coefficients(phase.job, 0, channels)


cdef inline void add_groups(Phases* phases, const KernelTable* kernels,
                            const Job* job) noexcept nogil:
    cdef Job groups
    view_groups(job, &groups)
    add(phases, kernels, job, segment_of_groups,
        groups.plan.tiles * groups.plan.segments).kernel = kernels.moments
    add(phases, kernels, job, merge_groups, 1)


cdef void instance_of_training(const KernelTable* kernels, Job* job, Phases* phases) noexcept nogil:
    if job.group > 1:
        add_groups(phases, kernels, job)
    elif by_tile(kernels, job, 1):
        job.fetch_next = job.streaming
        add(phases, kernels, job, train_tile, job.plan.tiles)
        return
    else:
        add_segments(phases, kernels, job, kernels.moments)
        add(phases, kernels, job, merge_for_write, 1)
    add_blocks(phases, kernels, job, share_of_blocks, kernels.write_forward)


cdef inline Operation training_of(const KernelTable* kernels) noexcept nogil:
    return Operation(2, instance_of_training, kernels.update_running)


# ---- gradients -------------------------------------------------------------------

cdef inline void sum_segment(const KernelTable* kernels, const Job* job, Py_ssize_t tile,
                             Py_ssize_t segment) noexcept nogil:
    cdef Py_ssize_t block = segment * job.plan.segment_blocks
    if job.dz_first:
        kernels.write_dz(
            job, tile, tile + 1, block, minimum(block + job.plan.segment_blocks, job.plan.blocks))
    kernels.gradient_sums(job, tile, tile + 1, segment, segment + 1)


cdef void sum_segment_of_tile(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    sum_segment(phase.kernels, phase.job, i // phase.job.plan.segments,
                i % phase.job.plan.segments)


cdef inline void do_gradient(const KernelTable* kernels, const Job* job,
                             Py_ssize_t tile) noexcept nogil:
    cdef Py_ssize_t segment, c0 = tile_start(job, tile), c1 = tile_start(job, tile + 1)
    kernels.coefficients(job, c0, c1)
    for segment in range(job.plan.segments):
        sum_segment(kernels, job, tile, segment)
    kernels.merge_gradients(job, c0, c1)
    kernels.write_gradient(job, tile, tile + 1, 0, job.plan.blocks)


cdef void differentiate_tile(const Phase* phase, Py_ssize_t tile, int worker) noexcept nogil:
    do_gradient(phase.kernels, phase.job, tile)


cdef void differentiate_share(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    # Neighbouring tiles, whose gradients of features are added up in one place.
    cdef Job job = phase.job[0]
    cdef Py_ssize_t tile, tiles = job.plan.tiles
    job.dweight, job.dbias = job.run_sums, job.run_sums + job.view.channels
    job.feature_sums += i * length_of_share(&job)
    memset(job.feature_sums, 0, length_of_share(&job) * sizeof(double))
    for tile in range(tiles * i // job.shares, tiles * (i + 1) // job.shares):
        do_gradient(phase.kernels, &job, tile)


cdef void spread_for_sums(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    if phase.job.group > 1:
        phase.kernels.broadcast_groups(phase.job, 0, phase.job.view.channels)
    phase.kernels.coefficients(phase.job, 0, phase.job.view.channels)


cdef void merge_sums(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    phase.kernels.merge_gradients(phase.job, 0, phase.job.view.channels)


cdef void instance_of_gradients(const KernelTable* kernels, Job* job,
                                Phases* phases) noexcept nogil:
    if job.view.features:
        job.fetch_next = job.streaming
        add(phases, kernels, job, differentiate_share, job.shares)
        return
    if job.group == 1 and job.training and by_tile(kernels, job, 4 if job.dz_first else 2):
        job.fetch_next = job.streaming
        add(phases, kernels, job, differentiate_tile, job.plan.tiles)
        return
    add(phases, kernels, job, spread_for_sums, 1)
    add(phases, kernels, job, sum_segment_of_tile, job.plan.tiles * job.plan.segments)
    add(phases, kernels, job, merge_sums, 1)
    if job.training or job.fused:
        add_blocks(phases, kernels, job, share_of_blocks, kernels.write_gradient)
    else:       # dx is an affine function of dy alone
        add_blocks(phases, kernels, job, share_of_blocks_of_dy, kernels.write_forward)


cdef inline Operation gradients_of(const KernelTable* kernels) noexcept nogil:
    return Operation(3, instance_of_gradients, kernels.add_instances)


# ---- instances ---------------------------------------------------------------------

cdef void whole_instance(const Phase* phase, Py_ssize_t i, int worker) noexcept nogil:
    cdef Job job
    cdef Phases phases
    cdef Py_ssize_t p
    cdef int k
    take_instance(phase.kernels, phase.job, i, worker, &job)
    job.threads = 1
    phases.count = 0
    phase.operation.add_instance(phase.kernels, &job, &phases)
    for k in range(phases.count):
        for p in range(phases.list[k].pieces):
            phases.list[k].piece(&phases.list[k], p, worker)


cdef inline bint in_turn(const Job* job) noexcept nogil:
    # All threads to each instance, where instances are few; else a instance to each thread.
    return job.instances > 1 and job.instances < 2 * job.threads


cdef inline Py_ssize_t turns(const Job* job) noexcept nogil:
    return job.instances if in_turn(job) else 1


cdef Job* take_turn(const KernelTable* kernels, Job* whole, const Operation* operation,
                    Py_ssize_t turn, Job* instance, Phases* phases) noexcept nogil:
    # The phases that are done together. Returns the job that they are of. Turns have as
    # many phases as each other.
    cdef Job* job = whole
    phases.count = 0
    if in_turn(whole):
        take_instance(kernels, whole, turn, 0, instance)
        job = instance
    if job.instances == 1:
        operation.add_instance(kernels, job, phases)
    else:
        add(phases, kernels, job, whole_instance, job.instances).operation = operation
    return job
