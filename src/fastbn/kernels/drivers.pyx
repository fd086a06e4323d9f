# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""One thin parallel loop, over the phases of an operation.

A driver cuts the view into tasks (`plan`, by shape alone), takes the workspace, and
shares out the pieces of each phase to threads.

    workspace.pxi   the memory of a job, and the jobs that it consists of
    phases.pxi      what is done, in which order
    team.pxi        by whom
    overlap.pxi     whether tensors of C share memory
    call.pxi        the same for C: a call of fastbn.h -> a job ...
    api.pxi         ... whose pieces the caller's threads do

Nothing of it but the last lines needs Python: library.pyx is the same without it.

May: schedule, allocate workspace. May not: compute with elements, know about
Python objects, raise. A driver returns 0; or NO_MEMORY, and nothing has been
written; or STOPPED by the caller, and a part of `out` has been written, but no
running statistics.
"""
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.stdint cimport PTRDIFF_MAX, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset

from fastbn cimport *
from fastbn.kernels.job cimport (
    COEFFICIENT_KINDS, COLUMNS, IDENTITY, NO_MEMORY, PIXELS, RUN_COLUMNS, SILU, STOPPED, WRAP, Job,
    KernelTable, Operand, Plan, ChannelKernel, TileKernel, View)

cdef extern from *:
    const char* FASTBN_VERSION

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
    WORTH_TWO_SHARES = 1 << 16  # gradients of features are summed in shares of the rows
    MOST_SHARES = 64
    # Bytes. These decide speed only.
    CACHE_OF_A_TILE = 4 << 20       # a tile is read again from the cache up to here ...
    CACHE_OF_ROWS = 1 << 20         # ... or here, where it is rows, or a piece of each
    CACHE_OF_GROUPS = 256 << 10     # groups of planes, whose output follows statistics
    CACHE = 32 << 20                # outputs of jobs with larger tensors go past it
    CACHE_OF_ONE = 20 << 20         # the same for one thread, which gains less from it
    SPAN = 8                        # blocks that are written in one go
    STRETCH = 128 << 20             # the caller can stop a job after as much as that
    LINE = 64


include "arithmetic.pxi"


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
include "phases.pxi"
include "team.pxi"


cdef int carry_out(const KernelTable* kernels, Job* job, const Operation* operation) noexcept nogil:
    cdef void* memory = malloc(prepare(kernels, job, operation.tensors))
    cdef int status
    if memory == NULL:
        return NO_MEMORY
    use_memory(kernels, job, <char*>memory)
    status = run_phases(kernels, job, operation)
    if status == 0 and operation.close != NULL:
        operation.close(job, 0, job.view.channels)
    free(memory)
    return status


cdef int statistics(const KernelTable* kernels, Job* job) noexcept nogil:
    cdef Operation operation = statistics_of(kernels)
    return carry_out(kernels, job, &operation)


cdef int preparation(const KernelTable* kernels, Job* job) noexcept nogil:
    # Into `prepared`, for jobs of any shape with these channels.
    job.view.outer = job.view.middle = job.view.inner = 1
    plan(&job.view, kernels.elem_size, &job.plan)
    job.coefficients = job.prepared
    kernels.coefficients(job, 0, job.view.channels)
    return 0


cdef int inference(const KernelTable* kernels, Job* job) noexcept nogil:
    cdef Operation operation = inference_of(kernels)
    return carry_out(kernels, job, &operation)


cdef int training(const KernelTable* kernels, Job* job) noexcept nogil:
    cdef Operation operation = training_of(kernels)
    return carry_out(kernels, job, &operation)


cdef int gradients(const KernelTable* kernels, Job* job) noexcept nogil:
    cdef Operation operation = gradients_of(kernels)
    return carry_out(kernels, job, &operation)


# ---- for C -------------------------------------------------------------------------

cdef enum:
    DTYPES = 4

cdef const KernelTable* kernels_of[DTYPES]    # in the order of fastbn_dtype

include "axes.pxi"
include "overlap.pxi"
include "call.pxi"
include "api.pxi"


cdef int run_call(const fastbn_call* call, int threads, int (*stopped)() noexcept nogil,
                  double* loss) noexcept nogil:
    # In memory of its own. `loss` is `Job.team_loss`.
    cdef Request r
    cdef State* state
    cdef void* memory
    cdef int code = understand(call, threads, &r)
    if code != FASTBN_OK:
        return code
    memory = malloc(memory_for(&r))
    if memory == NULL:
        return NO_MEMORY
    r.job.stopped = stopped
    state = begin_in(&r, memory)
    code = run_phases(r.kernels, &state.request.job, &state.request.operation)
    loss[0] = state.request.job.team_loss
    if code == 0:
        api_finish(memory)
    free(memory)
    return code


def use(*capsules):
    """Make the kernels of one CPU level, one capsule for each type, those of C's calls."""
    for kind, capsule in enumerate(capsules):
        kernels_of[kind] = <const KernelTable*>PyCapsule_GetPointer(capsule, "fastbn.kernels")


C_API = PyCapsule_New(<void*>filled_api(), "fastbn._C_API", NULL)
