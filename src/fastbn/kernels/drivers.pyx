# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One thin parallel loop per operation, over tasks that leaves carry out.

A driver cuts the view into tasks (`plan`, by shape alone), takes the
workspace, and runs the phases of its operation:

    statistics   moments | merge
    inference    coefficients | write
    training     moments | merge | coefficients | write
    gradients    sums | merge | write; with a residual, before them, its gradient

Where planes of a tile fit the cache, training and gradients run all phases of
a tile before the next (`by_tile`): its second reading then comes from the
cache. The bits are the same, since phases see the same tasks.

The siblings are the same operations. Layer and RMS norm: each run is a channel, and
has features. Instance norm: each sample is a job of its own. Group norm: the same,
and its statistics are those of a view in which a group is a channel.

May: schedule, allocate workspace. May not: compute with elements, know about
Python objects, raise. A driver returns 0; or NO_MEMORY, and nothing has been
written; or STOPPED by the caller, and a part of `out` has been written, but no
running statistics.
"""
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastbn.kernels.job cimport (
    COEFFICIENTS, COLUMNS, NO_MEMORY, PIXELS, RUN_COLUMNS, STOPPED, WRAP, Job, Leaves, Operand,
    Plan, Task, View)

cdef enum:
    # Elements. With those of job.pxd they decide the order of additions: to
    # change one is to change results.
    BLOCK = 16384               # a block stays in L2 while it is worked on ...
    BLOCK_OF_ROWS = 32768       # ... and is worth what it costs by itself
    SEGMENT = 65536             # a task is worth waking a thread for
    LONGEST_SHORT_RUN = 128     # longer runs are cut into rows of 16 ...
    LONGEST_OF_FEW = 32         # ... and so are those longer than this, if they are few
    FEW_RUNS = 16
    NEIGHBOURS = 2048           # elements of long runs that are read in one go, ...
    NEIGHBOURING_BYTES = 8192   # ... or so many bytes, if that is more
    LONG_FEATURES = 32768       # elements of a tile whose runs have features
    FEWEST_BLOCK_ROWS = 128
    WORTH_TWO_SHARES = 1 << 17  # gradients of features are summed in shares of the rows
    MOST_SHARES = 64
    # Bytes. These decide speed only.
    CACHE_OF_A_TILE = 4 << 20       # a tile is read again from the cache up to here
    CACHE_OF_GROUPS = 256 << 10     # groups of planes, whose output follows statistics
    CACHE = 32 << 20                # outputs of jobs with larger tensors go past it
    SPAN = 8                        # blocks that are written in one go
    STRETCH = 128 << 20             # the caller can stop a job after as much as that
    LINE = 64


cdef inline Py_ssize_t minimum(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t maximum(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a > b else b


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t even_share(Py_ssize_t n, Py_ssize_t most, Py_ssize_t unit) noexcept nogil:
    # n cut into shares of at most about `most`, alike, each a multiple of `unit`.
    return ceil_div(ceil_div(n, ceil_div(n, most)), unit) * unit


cdef Py_ssize_t channels_of_a_tile(const View* view, Py_ssize_t elem_size,
                                   bint long_runs) noexcept nogil:
    cdef Py_ssize_t neighbours = maximum(NEIGHBOURS, NEIGHBOURING_BYTES // elem_size)
    if view.features:
        return minimum(view.channels, maximum(1, minimum(COLUMNS // RUN_COLUMNS,
                                                         LONG_FEATURES // view.inner)))
    if long_runs:
        return minimum(minimum(view.channels, ceil_div(neighbours, view.inner)),
                       COLUMNS // RUN_COLUMNS)
    return minimum(view.channels, COLUMNS // view.inner)


cdef void plan(const View* view, Py_ssize_t elem_size, Plan* p) noexcept nogil:
    cdef Py_ssize_t runs = view.outer * view.middle
    if runs == 0:
        memset(p, 0, sizeof(Plan))      # nothing to do
        return
    p.long_runs = (view.features or view.inner > LONGEST_SHORT_RUN
                   or (view.inner > LONGEST_OF_FEW and runs < FEW_RUNS))
    p.pixels = PIXELS if view.inner == 1 and view.channels < PIXELS and not p.long_runs else 1
    p.tile_channels = channels_of_a_tile(view, elem_size, p.long_runs)
    if p.long_runs:
        p.block_runs = even_share(runs, maximum(1, BLOCK // (view.inner * p.tile_channels)), 1)
        p.block_length = even_share(view.inner, BLOCK, 16)
    else:
        p.block_runs = even_share(
            runs, maximum(BLOCK_OF_ROWS // (p.tile_channels * view.inner), FEWEST_BLOCK_ROWS), 16)
        p.block_length = view.inner
    p.tiles = ceil_div(view.channels, p.tile_channels)
    p.parts = ceil_div(view.inner, p.block_length)
    p.blocks = ceil_div(runs, p.block_runs) * p.parts
    p.segment_blocks = maximum(
        1, SEGMENT // (p.block_runs * minimum(p.block_length, view.inner) * p.tile_channels))
    p.segments = ceil_div(p.blocks, p.segment_blocks)


include "workspace.pxi"


cdef inline bint by_tile(const Leaves* leaves, const Job* job, int tensors) noexcept nogil:
    cdef size_t tile = (<size_t>(job.view.outer * job.view.middle) * job.view.inner
                        * job.plan.tile_channels * leaves.elem_size * tensors)
    return (tile <= CACHE_OF_A_TILE
            and (job.threads == 1 or job.plan.tiles >= 2 * job.threads))


include "team.pxi"


# ---- phases ----------------------------------------------------------------------

cdef inline Sweep sweep_of(const Leaves* leaves, Job* job) noexcept nogil:
    return Sweep(leaves, job, NULL, NULL, 1, 1)


cdef void segment_of_tile(const Sweep* sweep, Py_ssize_t i, int worker) noexcept nogil:
    cdef Py_ssize_t tile = i // sweep.job.plan.segments, segment = i % sweep.job.plan.segments
    sweep.leaf(sweep.job, tile, tile + 1, segment, segment + 1)


cdef int sweep_segments(const Leaves* leaves, Job* job, Task leaf) noexcept nogil:
    cdef Sweep sweep = sweep_of(leaves, job)
    sweep.leaf = leaf
    return run(&sweep, segment_of_tile, job.plan.tiles * job.plan.segments)


cdef void share_of_blocks(const Sweep* sweep, Py_ssize_t i, int worker) noexcept nogil:
    cdef Py_ssize_t tiles = sweep.job.plan.tiles, split = sweep.split
    cdef Py_ssize_t block = i // split * sweep.span, share = i % split
    sweep.leaf(sweep.job, tiles * share // split, tiles * (share + 1) // split,
               block, minimum(block + sweep.span, sweep.job.plan.blocks))


cdef int sweep_blocks(const Leaves* leaves, Job* job, Task leaf) noexcept nogil:
    # Elementwise: a piece is what lies together in memory, blocks before tiles. A
    # piece is several blocks of the only tile, whose coefficients are then spread out
    # once, or, where blocks are few, a share of the tiles.
    cdef Py_ssize_t blocks = job.plan.blocks, enough = 4 * job.threads
    cdef Sweep sweep = sweep_of(leaves, job)
    sweep.leaf = leaf
    if job.plan.tiles == 1:
        sweep.span = maximum(1, minimum(SPAN, blocks // enough))
    elif job.threads > 1 and blocks < enough:
        sweep.split = minimum(job.plan.tiles, enough)
    return run(&sweep, share_of_blocks, ceil_div(blocks, sweep.span) * sweep.split)


cdef int sweep_tiles(const Leaves* leaves, Job* job, Piece tile) noexcept nogil:
    cdef Sweep sweep = sweep_of(leaves, job)
    return run(&sweep, tile, job.plan.tiles)


cdef void whole_sample(const Sweep* sweep, Py_ssize_t i, int worker) noexcept nogil:
    cdef Job job
    take_sample(sweep.leaves, sweep.job, i, worker, &job)
    job.threads = 1
    job.stopped = NULL      # between samples is soon enough
    sweep.operation(sweep.leaves, &job)


cdef int sweep_samples(const Leaves* leaves, Job* job, Operation operation) noexcept nogil:
    # A sample to each thread; or, where samples are few, all threads to each sample.
    cdef Sweep sweep = sweep_of(leaves, job)
    cdef Job sample
    cdef Py_ssize_t i
    cdef int status
    if job.samples == 1:
        return operation(leaves, job)
    if job.samples >= 2 * job.threads:
        sweep.operation = operation
        return run(&sweep, whole_sample, job.samples)
    for i in range(job.samples):
        take_sample(leaves, job, i, 0, &sample)
        status = operation(leaves, &sample)
        job.team_loss += sample.team_loss
        if status != 0:
            return status
    return 0


# ---- the operations --------------------------------------------------------------

cdef int statistics(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = prepare(leaves, job, 1)
    if status == 0:
        status = sweep_segments(leaves, job, leaves.moments)
    if status == 0:
        leaves.merge_moments(job, 0, job.view.channels)
    finish(job)
    return status


cdef int preparation(const Leaves* leaves, Job* job) noexcept nogil:
    # Into `prepared`, for jobs of any shape with these channels.
    job.view.outer = job.view.middle = job.view.inner = 1
    plan(&job.view, leaves.elem_size, &job.plan)
    job.coefficients = job.prepared
    leaves.coefficients(job, 0, job.view.channels)
    return 0


cdef inline Py_ssize_t tile_start(const Job* job, Py_ssize_t tile) noexcept nogil:
    return minimum(job.view.channels, tile * job.plan.tile_channels)


cdef void infer_tile(const Sweep* sweep, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const Job* job = sweep.job
    if job.prepared == NULL:
        sweep.leaves.coefficients(job, tile_start(job, tile), tile_start(job, tile + 1))
    sweep.leaves.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef int inference(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = prepare(leaves, job, 2)
    if status == 0 and job.plan.blocks == 1 and job.view.inner == 1:
        status = sweep_tiles(leaves, job, infer_tile)
    elif status == 0:
        if job.prepared == NULL:
            leaves.coefficients(job, 0, job.view.channels)
        status = sweep_blocks(leaves, job, leaves.write_forward)
    finish(job)
    return status


cdef void train_tile(const Sweep* sweep, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const Leaves* leaves = sweep.leaves
    cdef const Job* job = sweep.job
    cdef Py_ssize_t c0 = tile_start(job, tile), c1 = tile_start(job, tile + 1)
    leaves.moments(job, tile, tile + 1, 0, job.plan.segments)
    leaves.merge_moments(job, c0, c1)
    leaves.coefficients(job, c0, c1)
    leaves.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef int train_groups(const Leaves* leaves, Job* job) noexcept nogil:
    cdef Job groups
    cdef int status
    view_groups(job, &groups)
    status = sweep_segments(leaves, &groups, leaves.moments)
    if status != 0:
        return status
    leaves.merge_moments(&groups, 0, groups.view.channels)
    leaves.spread_groups(job, 0, job.view.channels)
    leaves.coefficients(job, 0, job.view.channels)
    status = sweep_blocks(leaves, job, leaves.write_forward)
    job.team_loss += groups.team_loss
    return status


cdef int train(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status
    if job.group > 1:
        return train_groups(leaves, job)
    if by_tile(leaves, job, 1):
        job.fetch_next = job.streaming
        return sweep_tiles(leaves, job, train_tile)
    status = sweep_segments(leaves, job, leaves.moments)
    if status != 0:
        return status
    leaves.merge_moments(job, 0, job.view.channels)
    leaves.coefficients(job, 0, job.view.channels)
    return sweep_blocks(leaves, job, leaves.write_forward)


cdef int training(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = prepare(leaves, job, 2)
    if status == 0:
        status = sweep_samples(leaves, job, train)
    if status == 0:
        leaves.update_running(job, 0, job.view.channels)
    finish(job)
    return status


cdef void differentiate_tile(const Sweep* sweep, Py_ssize_t tile, int worker) noexcept nogil:
    cdef const Leaves* leaves = sweep.leaves
    cdef const Job* job = sweep.job
    cdef Py_ssize_t c0 = tile_start(job, tile), c1 = tile_start(job, tile + 1)
    leaves.coefficients(job, c0, c1)
    if job.residual.data != NULL:
        leaves.write_sum_gradient(job, tile, tile + 1, 0, job.plan.blocks)
    leaves.gradient_sums(job, tile, tile + 1, 0, job.plan.segments)
    leaves.merge_gradients(job, c0, c1)
    leaves.write_gradient(job, tile, tile + 1, 0, job.plan.blocks)


cdef int differentiate(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = 0
    if job.group > 1:
        leaves.spread_groups(job, 0, job.view.channels)
    elif job.training and by_tile(leaves, job, 2 if job.residual.data == NULL else 4):
        job.fetch_next = job.streaming
        return sweep_tiles(leaves, job, differentiate_tile)
    leaves.coefficients(job, 0, job.view.channels)
    if job.residual.data != NULL:
        status = sweep_blocks(leaves, job, leaves.write_sum_gradient)
    if status == 0:
        status = sweep_segments(leaves, job, leaves.gradient_sums)
    if status != 0:
        return status
    leaves.merge_gradients(job, 0, job.view.channels)
    if job.training or job.fused:
        return sweep_blocks(leaves, job, leaves.write_gradient)
    job.x = job.dy      # dx is an affine function of dy alone
    return sweep_blocks(leaves, job, leaves.write_forward)


cdef void differentiate_share(const Sweep* sweep, Py_ssize_t i, int worker) noexcept nogil:
    # Neighbouring tiles, whose gradients of features are added up in one place.
    cdef Job job = sweep.job[0]
    cdef Sweep sweep_of_share = sweep_of(sweep.leaves, &job)
    cdef Py_ssize_t tile, tiles = job.plan.tiles
    job.dweight, job.dbias = job.run_sums, job.run_sums + job.view.channels
    job.fetch_next = job.streaming
    job.feature_sums += i * length_of_share(&job)
    memset(job.feature_sums, 0, length_of_share(&job) * sizeof(double))
    for tile in range(tiles * i // job.shares, tiles * (i + 1) // job.shares):
        differentiate_tile(&sweep_of_share, tile, worker)


cdef int differentiate_features(const Leaves* leaves, Job* job) noexcept nogil:
    cdef Sweep sweep = sweep_of(leaves, job)
    return run(&sweep, differentiate_share, job.shares)


cdef int gradients(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = prepare(leaves, job, 3)
    if status == 0 and job.view.features:
        status = differentiate_features(leaves, job)
    elif status == 0:
        status = sweep_samples(leaves, job, differentiate)
    if status == 0:
        leaves.add_samples(job, 0, job.view.channels)
    finish(job)
    return status
