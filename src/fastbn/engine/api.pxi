# SPDX-License-Identifier: BSD-3-Clause
# The functions of fastbn.h: a call as phases and tasks in the caller's memory.
#
# The memory begins with the request, then come its vectors, then its workspace. A task
# finds all it needs there, so tasks of a phase may run on any threads at the same time.
#
# May check, set pointers, run tasks. May not allocate, know about Python. A part of core.pyx.

cdef enum:
    BEGUN = 0x66617374      # in `State.begun`, so that other memory is noticed
    MOST_WORKERS = 1024

cdef struct State:
    uint64_t begun
    int phases              # of a round
    Request request


cdef inline State* state_in(const void* workspace) noexcept nogil:
    return <State*>on_a_line(<char*>workspace)


cdef inline State* begun_in(const void* workspace) noexcept nogil:
    # NULL: no call has begun there.
    if workspace == NULL or state_in(workspace).begun != BEGUN:
        return NULL
    return state_in(workspace)


cdef int understand_from_c(const fastbn_call* call, int workers, Request* r) noexcept nogil:
    cdef int code = understand(call, NULL, r)
    if code == FASTBN_OK and r.empty:
        code = fail(r, FASTBN_BAD_SHAPE, ARG_SHAPE)
    if code == FASTBN_OK and not 1 <= workers <= MOST_WORKERS:
        code = fail(r, FASTBN_BAD_WORKERS, ARG_WORKERS)
    return code


cdef size_t size_of_state(Request* r, int workers) noexcept nogil:
    return sizeof(State) + size_of_memory(r, workers) + 2 * LINE


cdef int api_workspace_size(const fastbn_call* call, int workers, size_t* size) noexcept nogil:
    cdef Request r
    cdef int code = understand_from_c(call, workers, &r)
    if code != FASTBN_OK:
        return code
    if size == NULL:
        return FASTBN_NULL_POINTER
    size[0] = size_of_state(&r, workers)
    return FASTBN_OK


cdef int api_begin(const fastbn_call* call, int workers, void* workspace,
                   size_t size) noexcept nogil:
    cdef Request r
    cdef Job own
    cdef Phases phases
    cdef State* state
    cdef int code = understand_from_c(call, workers, &r)
    if code != FASTBN_OK:
        return code
    if workspace == NULL:
        return FASTBN_NULL_POINTER
    if size < size_of_state(&r, workers):
        return FASTBN_BAD_WORKSPACE
    code = check_deviations(&r)
    if code != FASTBN_OK:
        return code
    state = state_in(workspace)
    code = take_memory(&r, on_a_line(<char*>state + sizeof(State)))
    if code != FASTBN_OK:
        return code
    if has_no_statistics(&r):
        take_nothing(&r)
    state.request = r
    list_phases(&state.request, 0, &own, &phases)
    state.phases = phases.count
    state.begun = BEGUN
    return FASTBN_OK


cdef int api_phases(const void* workspace) noexcept nogil:
    cdef State* state = begun_in(workspace)
    return state.phases * <int>count_rounds(&state.request) if state != NULL else 0


cdef Phase* find_phase(const State* state, int phase, Job* own,
                       Phases* phases) noexcept nogil:
    list_phases(&state.request, phase // state.phases, own, phases)
    return &phases.list[phase % state.phases]


cdef Py_ssize_t api_tasks(const void* workspace, int phase) noexcept nogil:
    cdef Job own
    cdef Phases phases
    if not 0 <= phase < api_phases(workspace):
        return 0
    return find_phase(state_in(workspace), phase, &own, &phases).tasks


cdef int api_run_tasks(const void* workspace, int phase, Py_ssize_t begin, Py_ssize_t end,
                       int worker) noexcept nogil:
    cdef State* state = begun_in(workspace)
    cdef Job own
    cdef Phases phases
    cdef Phase* found
    cdef Py_ssize_t i
    if state == NULL:
        return FASTBN_BAD_WORKSPACE
    if not 0 <= phase < api_phases(workspace) or not 0 <= worker < state.request.workers:
        return FASTBN_BAD_TASK
    found = find_phase(state, phase, &own, &phases)
    if not 0 <= begin <= end <= found.tasks:
        return FASTBN_BAD_TASK
    for i in range(begin, end):
        found.run(found, i, worker)
    return FASTBN_OK


cdef int api_finish(void* workspace) noexcept nogil:
    cdef State* state = begun_in(workspace)
    if state == NULL:
        return FASTBN_BAD_WORKSPACE
    commit(&state.request)
    state.begun = 0
    return FASTBN_OK


cdef int api_run(const fastbn_call* call, int threads, void* workspace,
                 size_t size) noexcept nogil:
    cdef int code = api_begin(call, threads, workspace, size)
    if code != FASTBN_OK:
        return code
    run_phases(&state_in(workspace).request)
    return api_finish(workspace)


cdef const char* api_error_message(int code) noexcept nogil:
    if code == FASTBN_OK:
        return "no error"
    if code == FASTBN_UNKNOWN_FIELD:
        return ("struct_size: expected sizeof(fastbn_call), and 0 in fields that this version "
                "of fastbn does not know")
    if code == FASTBN_NULL_POINTER:
        return "a pointer that the operation needs is NULL"
    if code == FASTBN_BAD_OPERATION:
        return ("norm, operation, activation: expected an operation that the norm has, and "
                "FASTBN_IDENTITY or another activation")
    if code == FASTBN_BAD_DTYPE:
        return ("dtype, vector_dtype, out_dtype: expected one of FASTBN_FLOAT32 and so on, which "
                "the operation has; with running statistics, vectors of FASTBN_FLOAT32 or "
                "FASTBN_FLOAT64")
    if code == FASTBN_BAD_SHAPE:
        return "ndim, shape: expected 1 to 64 sizes of at least 1, whose product is a size"
    if code == FASTBN_BAD_AXIS:
        return ("channel_axis, sample_axis, normalized_ndim: expected axes of the shape, "
                "different ones")
    if code == FASTBN_BAD_GROUPS:
        return "groups: expected a divisor of the number of channels"
    if code == FASTBN_BAD_NUMBER:
        return ("eps, momentum, negative_slope, max_value, norm_mean, norm_std: expected eps >= 0 "
                "(> 0 with statistics of a batch), max_value and norm_std > 0, all finite")
    if code == FASTBN_ONE_VALUE:
        return "shape: expected more than one value for each mean and variance"
    if code == FASTBN_BAD_STRIDES:
        return ("strides: expected a tensor without gaps from the channel axis inwards, and "
                "outer axes that step as at most two; an output whose elements are apart")
    if code == FASTBN_MISALIGNED:
        return "data: expected an address that is a multiple of the size of an element"
    if code == FASTBN_BAD_WORKERS:
        return "workers: expected a number from 1 to 1024"
    if code == FASTBN_BAD_WORKSPACE:
        return "workspace: expected as much memory as workspace_size says, in which a call began"
    if code == FASTBN_BAD_TASK:
        return "phase, begin, end, worker: expected what phases, tasks and workers allow"
    if code == FASTBN_OVERLAP:
        return ("out, dresidual: expected the memory of an input with the same strides, or memory "
                "apart; of dresidual, not that of x or out")
    if code == FASTBN_BAD_MASK:
        return ("mask, lengths: expected at most one of them, and neither with layer and RMS norm; "
                "strides of 0 on the channel axis; lengths from 0 to the size of their axis")
    return "unknown error"


cdef fastbn_api api


cdef const fastbn_api* filled_api() noexcept nogil:
    api.struct_size = sizeof(fastbn_api)
    api.abi = FASTBN_ABI
    api.version = FASTBN_VERSION
    api.error_message = api_error_message
    api.workspace_size = api_workspace_size
    api.run = api_run
    api.begin = api_begin
    api.phases = api_phases
    api.tasks = api_tasks
    api.run_tasks = api_run_tasks
    api.finish = api_finish
    return &api
