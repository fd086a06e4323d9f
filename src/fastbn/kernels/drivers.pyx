# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One thin parallel loop per operation, over tasks that leaves carry out.

A driver cuts the view into tasks (`plan`, by shape alone), takes the
workspace, and runs the phases of its operation:

    statistics   moments | merge
    inference    coefficients | write
    training     moments | merge | coefficients | write
    gradients    sums | merge | write

Where planes of a tile fit the cache, training and gradients run all phases of
a tile before the next (`by_tile`): its second reading then comes from the
cache. The bits are the same, since phases see the same tasks.

May: schedule, allocate workspace. May not: compute with elements, know about
Python objects, raise. A driver returns 0; or NO_MEMORY, and nothing has been
written; or STOPPED by the caller, and a part of `out` has been written, but no
running statistics.
"""
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from fastbn.kernels.job cimport (
    COEFFICIENTS, COLUMNS, NO_MEMORY, PIXELS, RUN_COLUMNS, STOPPED, WRAP, Job, Leaves, Plan,
    Task, View)

cdef enum:
    # Elements. With those of job.pxd they decide the order of additions: to
    # change one is to change results.
    BLOCK = 16384               # a block stays in L2 while it is worked on ...
    BLOCK_OF_ROWS = 32768       # ... and is worth what it costs by itself
    SEGMENT = 65536             # a task is worth waking a thread for
    LONGEST_SHORT_RUN = 128     # longer runs are cut into rows of 16 ...
    LONGEST_OF_FEW = 32         # ... and so are those longer than this, if they are few
    FEW_RUNS = 16
    NEIGHBOURS = 2048           # elements of long runs that are read in one go
    FEWEST_BLOCK_ROWS = 128
    # Bytes. These decide speed only.
    CACHE_OF_A_TILE = 4 << 20       # a tile is read again from the cache up to here
    CACHE = 32 << 20                # outputs of jobs with larger tensors go past it
    SPAN = 8                        # blocks that are written in one go
    STRETCH = 128 << 20             # the caller can stop a job after as much as that


cdef inline Py_ssize_t minimum(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a < b else b


cdef inline Py_ssize_t maximum(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return a if a > b else b


cdef inline Py_ssize_t ceil_div(Py_ssize_t a, Py_ssize_t b) noexcept nogil:
    return (a + b - 1) // b


cdef inline Py_ssize_t even_share(Py_ssize_t n, Py_ssize_t most, Py_ssize_t unit) noexcept nogil:
    # n cut into shares of at most about `most`, alike, each a multiple of `unit`.
    return ceil_div(ceil_div(n, ceil_div(n, most)), unit) * unit


cdef void plan(const View* view, Plan* p) noexcept nogil:
    cdef Py_ssize_t runs = view.outer * view.middle
    if runs == 0:
        memset(p, 0, sizeof(Plan))      # nothing to do
        return
    p.long_runs = (view.inner > LONGEST_SHORT_RUN
                   or (view.inner > LONGEST_OF_FEW and runs < FEW_RUNS))
    p.pixels = PIXELS if view.inner == 1 and view.channels < PIXELS else 1
    if p.long_runs:
        p.tile_channels = minimum(minimum(view.channels, ceil_div(NEIGHBOURS, view.inner)),
                                  COLUMNS // RUN_COLUMNS)
        p.block_runs = even_share(runs, maximum(1, BLOCK // (view.inner * p.tile_channels)), 1)
        p.block_length = even_share(view.inner, BLOCK, 16)
    else:
        p.tile_channels = minimum(view.channels, COLUMNS // view.inner)
        p.block_runs = even_share(
            runs, maximum(BLOCK_OF_ROWS // (p.tile_channels * view.inner), FEWEST_BLOCK_ROWS), 16)
        p.block_length = view.inner
    p.tiles = ceil_div(view.channels, p.tile_channels)
    p.parts = ceil_div(view.inner, p.block_length)
    p.blocks = ceil_div(runs, p.block_runs) * p.parts
    p.segment_blocks = maximum(
        1, SEGMENT // (p.block_runs * minimum(p.block_length, view.inner) * p.tile_channels))
    p.segments = ceil_div(p.blocks, p.segment_blocks)


cdef inline size_t elements(const Job* job) noexcept nogil:
    return <size_t>(job.view.outer * job.view.middle) * job.view.channels * job.view.inner


cdef int prepare(const Leaves* leaves, Job* job, int tensors) noexcept nogil:
    # The plan, and all the workspace of the job in one piece.
    cdef size_t channels = job.view.channels
    cdef size_t sums
    job.team_loss = 0.0
    job.fetch_next = False
    plan(&job.view, &job.plan)
    sums = channels * job.plan.segments * sizeof(double)
    job.partial[0] = <double*>malloc(2 * sums + COEFFICIENTS * (channels + WRAP) * leaves.real_size)
    if job.partial[0] == NULL:
        return NO_MEMORY
    job.partial[1] = job.partial[0] + channels * job.plan.segments
    job.coefficients = job.partial[1] + channels * job.plan.segments
    job.bytes = elements(job) * leaves.elem_size
    job.streaming = job.bytes * tensors >= <size_t>CACHE
    return 0


cdef inline void finish(Job* job) noexcept nogil:
    free(job.partial[0])


cdef inline bint by_tile(const Leaves* leaves, const Job* job, int tensors) noexcept nogil:
    cdef size_t tile = (<size_t>(job.view.outer * job.view.middle) * job.view.inner
                        * job.plan.tile_channels * leaves.elem_size * tensors)
    return (tile <= CACHE_OF_A_TILE
            and (job.threads == 1 or job.plan.tiles >= 2 * job.threads))


include "team.pxi"


# ---- phases ----------------------------------------------------------------------

cdef void segment_of_tile(const Sweep* sweep, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t tile = i // sweep.job.plan.segments, segment = i % sweep.job.plan.segments
    sweep.leaf(sweep.job, tile, tile + 1, segment, segment + 1)


cdef int sweep_segments(const Leaves* leaves, Job* job, Task leaf) noexcept nogil:
    cdef Sweep sweep = Sweep(leaves, job, leaf, 1, 1)
    return run(&sweep, segment_of_tile, job.plan.tiles * job.plan.segments)


cdef void share_of_blocks(const Sweep* sweep, Py_ssize_t i) noexcept nogil:
    cdef Py_ssize_t tiles = sweep.job.plan.tiles, split = sweep.split
    cdef Py_ssize_t block = i // split * sweep.span, share = i % split
    sweep.leaf(sweep.job, tiles * share // split, tiles * (share + 1) // split,
               block, minimum(block + sweep.span, sweep.job.plan.blocks))


cdef int sweep_blocks(const Leaves* leaves, Job* job, Task leaf) noexcept nogil:
    # Elementwise: a piece is what lies together in memory, blocks before tiles. A
    # piece is several blocks of the only tile, whose coefficients are then spread out
    # once, or, where blocks are few, a share of the tiles.
    cdef Py_ssize_t blocks = job.plan.blocks, enough = 4 * job.threads
    cdef Sweep sweep = Sweep(leaves, job, leaf, 1, 1)
    if job.plan.tiles == 1:
        sweep.span = maximum(1, minimum(SPAN, blocks // enough))
    elif job.threads > 1 and blocks < enough:
        sweep.split = minimum(job.plan.tiles, enough)
    return run(&sweep, share_of_blocks, ceil_div(blocks, sweep.span) * sweep.split)


cdef int sweep_tiles(const Leaves* leaves, Job* job, Piece tile) noexcept nogil:
    cdef Sweep sweep = Sweep(leaves, job, NULL, 1, 1)
    return run(&sweep, tile, job.plan.tiles)


# ---- the operations --------------------------------------------------------------

cdef int statistics(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = prepare(leaves, job, 1)
    if status == 0:
        status = sweep_segments(leaves, job, leaves.moments)
    if status == 0:
        leaves.merge_moments(job, 0, job.view.channels)
    finish(job)
    return status


cdef inline Py_ssize_t tile_start(const Job* job, Py_ssize_t tile) noexcept nogil:
    return minimum(job.view.channels, tile * job.plan.tile_channels)


cdef void infer_tile(const Sweep* sweep, Py_ssize_t tile) noexcept nogil:
    cdef const Job* job = sweep.job
    sweep.leaves.coefficients(job, tile_start(job, tile), tile_start(job, tile + 1))
    sweep.leaves.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef int inference(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = prepare(leaves, job, 2)
    if status == 0 and job.plan.blocks == 1 and job.view.inner == 1:
        status = sweep_tiles(leaves, job, infer_tile)
    elif status == 0:
        leaves.coefficients(job, 0, job.view.channels)
        status = sweep_blocks(leaves, job, leaves.write_forward)
    finish(job)
    return status


cdef void train_tile(const Sweep* sweep, Py_ssize_t tile) noexcept nogil:
    cdef const Leaves* leaves = sweep.leaves
    cdef const Job* job = sweep.job
    cdef Py_ssize_t c0 = tile_start(job, tile), c1 = tile_start(job, tile + 1)
    leaves.moments(job, tile, tile + 1, 0, job.plan.segments)
    leaves.merge_moments(job, c0, c1)
    leaves.coefficients(job, c0, c1)
    leaves.write_forward(job, tile, tile + 1, 0, job.plan.blocks)


cdef int train(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status
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
        status = train(leaves, job)
    if status == 0:
        leaves.update_running(job, 0, job.view.channels)
    finish(job)
    return status


cdef void differentiate_tile(const Sweep* sweep, Py_ssize_t tile) noexcept nogil:
    cdef const Leaves* leaves = sweep.leaves
    cdef const Job* job = sweep.job
    leaves.gradient_sums(job, tile, tile + 1, 0, job.plan.segments)
    leaves.merge_gradients(job, tile_start(job, tile), tile_start(job, tile + 1))
    leaves.write_gradient(job, tile, tile + 1, 0, job.plan.blocks)


cdef int differentiate(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status
    leaves.coefficients(job, 0, job.view.channels)
    if job.training and by_tile(leaves, job, 2):
        job.fetch_next = job.streaming
        return sweep_tiles(leaves, job, differentiate_tile)
    status = sweep_segments(leaves, job, leaves.gradient_sums)
    if status != 0:
        return status
    leaves.merge_gradients(job, 0, job.view.channels)
    if job.training:
        return sweep_blocks(leaves, job, leaves.write_gradient)
    job.x = job.dy      # dx is an affine function of dy alone
    return sweep_blocks(leaves, job, leaves.write_forward)


cdef int gradients(const Leaves* leaves, Job* job) noexcept nogil:
    cdef int status = prepare(leaves, job, 3)
    if status == 0:
        status = differentiate(leaves, job)
    finish(job)
    return status
