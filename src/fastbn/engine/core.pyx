# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The engine: a call of fastbn.h -> checks, a plan, phases of tasks, threads.

    request.pxi     what a call says, in small questions
    checks.pxi      what can be wrong with it
    axes.pxi        axes -> a view
    overlap.pxi     which arguments may share memory
    call.pxi        a call -> a request
    plan.pxi        how it is cut, by shape alone
    mask.pxi        which positions count
    buffers.pxi     where memory is; that of an instance
    vectors.pxi     parameters and statistics, to float64 and back
    images.pxi      the same for calls that are a nest of loops: integers, other layouts
    phases.pxi      what is done, in which order
    threads.pxi     by whom
    api.pxi         the same for C, whose threads do the tasks

Nothing of it but the last lines needs Python: library.pyx is the same without it.

May check, schedule, allocate a workspace. May not compute with elements, know about Python
objects, raise.
"""
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_New
from libc.math cimport NAN
from libc.stdint cimport PTRDIFF_MAX, int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memmove, memset

from fastbn cimport *
from fastbn.engine.request cimport *
from fastbn.kernels.images cimport FULL_ROW, PANEL, TABLE, Image, ImageKernel, ImageKernels, Nest
from fastbn.kernels.problem cimport (
    COEFFICIENT_KINDS, COLUMNS, MASK_PADDING, PIXELS, PROBES, RUN_COLUMNS, WRAP, BlockMask, Buffers,
    Job, KernelTable, Mask, Operand, Plan, Problem, TileKernel, View)

cdef extern from *:
    const char* FASTBN_VERSION

cdef enum:
    DTYPES = 4


include "arithmetic.pxi"
include "request.pxi"
include "axes.pxi"
include "checks.pxi"
include "overlap.pxi"
include "call.pxi"
include "plan.pxi"
include "vectors.pxi"
include "mask.pxi"
include "buffers.pxi"
include "phases.pxi"
include "images.pxi"
include "threads.pxi"


cdef size_t size_of_memory(Request* r, int workers) noexcept nogil:
    r.workers = workers
    r.loss = 0.0
    if is_image(&r.call):
        return size_of_image(r)
    make_plan(r)
    return take_vectors(r, NULL) + size_of_workspace(r) + LINE


cdef int take_memory(Request* r, char* memory) noexcept nogil:
    # Then all that can be wrong is known.
    if is_image(&r.call):
        use_image_memory(r, memory)
        return FASTBN_OK
    use_workspace(r, memory + take_vectors(r, <double*>memory))
    return take_mask(r)


cdef int allocate(Request* r, int workers) noexcept nogil:
    r.memory = malloc(size_of_memory(r, workers))
    if r.memory == NULL:
        return NO_MEMORY
    return take_memory(r, on_a_line(<char*>r.memory))


cdef int run(Request* r, int workers) noexcept nogil:
    cdef int status = allocate(r, workers)
    if status != FASTBN_OK:
        return status
    if is_image(&r.call):
        return run_phases(r)
    if has_no_statistics(r):
        take_nothing(r)
    if r.empty and r.call.operation != FASTBN_INFERENCE:
        return FASTBN_OK
    return run_phases(r)


cdef int run_own(Request* r, int workers, double* count, double* vectors) noexcept nogil:
    cdef Phases phases
    cdef int status = allocate(r, workers)
    if status != FASTBN_OK:
        return status
    if r.empty or r.nothing:
        fill(r.job.buffers.mean if not is_backward(&r.call) else NULL, r.parameters, 0.0)
        fill(r.job.buffers.m2, r.parameters, 0.0)
        fill(r.job.buffers.dbias, r.parameters, 0.0)
        fill(r.job.buffers.dweight, r.parameters, 0.0)
    else:
        phases.count = 0
        add_own(&phases, r, &r.job)
        status = run_listed(&phases, r)
    count[0] = <double>values_that_count(r)
    give_own(r, vectors)
    return status


cdef int run_rest(Request* r, double count, const double* vectors) noexcept nogil:
    cdef Phases phases
    take_whole(r, count, vectors)
    if r.empty and is_backward(&r.call):
        return FASTBN_OK
    phases.count = 0
    add_rest(&phases, r, &r.job)
    return run_listed(&phases, r)


cdef void commit(Request* r) noexcept nogil:
    if is_image(&r.call):
        return
    if not has_no_statistics(r):
        finish_vectors(r)
    write_vectors(r)


cdef void release(Request* r) noexcept nogil:
    free(r.memory)
    r.memory = NULL


cdef size_t size_of_coefficients(Py_ssize_t channels) noexcept nogil:
    return COEFFICIENT_KINDS * (channels + WRAP) * sizeof(double)


cdef int prepare_coefficients(const fastbn_call* call, void* coefficients) noexcept nogil:
    # Of an inference of shape (1, channels), whose tensors are not looked at.
    cdef Request r
    cdef double* vectors
    cdef int code
    memset(&r, 0, sizeof(Request))
    code = take_call(call, &r)
    if code == FASTBN_OK:
        code = check_call(&r)
    if code != FASTBN_OK:
        return code
    state_problem(&r, 1)
    r.job.problem.view = View(1, 1, r.parameters, 1, features=False)
    cut(&r.job.problem.view, r.kernels.elem_size, &r.job.plan)
    vectors = <double*>malloc(take_vectors(&r, NULL) + sizeof(double))
    if vectors == NULL:
        return NO_MEMORY
    take_vectors(&r, vectors)
    r.job.buffers.coefficients = coefficients
    r.kernels.coefficients(&r.job, 0, r.parameters)
    free(vectors)
    return FASTBN_OK


include "api.pxi"


def use(*capsules, images):
    """Make the kernels of one CPU level, one capsule for each type, those of later calls."""
    set_image_kernels(PyCapsule_GetPointer(images, "fastbn.kernels"))
    for kind, capsule in enumerate(capsules):
        kernels_of[kind] = <const KernelTable*>PyCapsule_GetPointer(capsule, "fastbn.kernels")


C_API = PyCapsule_New(<void*>filled_api(), "fastbn._C_API", NULL)
