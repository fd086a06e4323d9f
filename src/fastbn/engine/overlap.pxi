# SPDX-License-Identifier: BSD-3-Clause
# Which arguments of a call may share memory, and whether they do. The only such rules.
#
#   out         is x, dy or the residual, or is apart from it; apart from all vectors
#   dresidual   is dy or the residual, or is apart from it; apart from x, out and all vectors
#   running_mean, running_var, in training
#               apart from each other, and from all that is read
#
# An element is read before it is written, but x again after the residual's gradient.
#
# Two elements share a byte if the distance of the tensors is a sum of strides of the one
# less a sum of strides of the other, the bytes of an element being one more axis. Counted
# from the last elements of the other, all that is subtracted is added: is a distance a sum
# of so many of these strides at most?
#
# May not touch the elements. A part of core.pyx.

cdef enum:
    MOST_STRIDES = 2 * (MAX_DIMENSIONS + 1)
    MOST_TRIES = 10_000         # then it is too hard to tell, and counts as an overlap

cdef struct Strides:
    # Of two tensors, none twice, the longest first; in bytes.
    int n
    Py_ssize_t stride[MOST_STRIDES]
    Py_ssize_t steps[MOST_STRIDES]          # at most
    Py_ssize_t reach[MOST_STRIDES + 1]      # of all from here on
    int tries


cdef void add_stride(Strides* s, Py_ssize_t stride, Py_ssize_t steps) noexcept nogil:
    cdef int i = s.n
    if stride == 0 or steps == 0:
        return
    while i > 0 and s.stride[i - 1] < stride:
        i -= 1
    if i > 0 and s.stride[i - 1] == stride:
        s.steps[i - 1] += steps
        return
    memmove(&s.stride[i + 1], &s.stride[i], (s.n - i) * sizeof(Py_ssize_t))
    memmove(&s.steps[i + 1], &s.steps[i], (s.n - i) * sizeof(Py_ssize_t))
    s.stride[i], s.steps[i] = stride, steps
    s.n += 1


cdef inline Py_ssize_t stride_in_bytes(const Memory* m, int axis) noexcept nogil:
    return m.axes.strides[axis] * (m.itemsize // m.axes.unit)


cdef void add_axes(Strides* s, const Memory* m) noexcept nogil:
    # Axes that step through memory as one axis would, the bytes of an element among them,
    # are one.
    cdef int order[MAX_DIMENSIONS]
    cdef int i, n = memory_order(&m.axes, 0, m.axes.ndim, NO_AXIS, order)
    cdef Py_ssize_t stride, step = 1, count = m.itemsize
    for i in range(n - 1, -1, -1):
        stride = magnitude(stride_in_bytes(m, order[i]))
        if stride == count * step:
            count *= m.axes.shape[order[i]]
            continue
        add_stride(s, step, count - 1)
        step, count = stride, m.axes.shape[order[i]]
    add_stride(s, step, count - 1)


cdef void extent(const Memory* m, Py_ssize_t* below, Py_ssize_t* above) noexcept nogil:
    # How far the bytes of the elements reach from the first element.
    cdef Py_ssize_t span
    cdef int axis
    below[0], above[0] = 0, m.itemsize
    for axis in range(m.axes.ndim):
        span = (m.axes.shape[axis] - 1) * stride_in_bytes(m, axis)
        if span < 0:
            below[0] -= span
        else:
            above[0] += span


cdef bint is_sum(Strides* s, int first, Py_ssize_t distance) noexcept nogil:
    cdef Py_ssize_t i, most, rest = s.reach[first]
    s.tries -= 1
    if distance < 0 or distance > rest:
        return False
    if distance == 0 or distance == rest or s.tries < 0:
        return True
    rest = s.reach[first + 1]
    most = minimum(s.steps[first], distance // s.stride[first])
    for i in range(ceil_div(maximum(0, distance - rest), s.stride[first]), most + 1):
        if is_sum(s, first + 1, distance - i * s.stride[first]):
            return True
    return False


cdef bint overlap(const Memory* a, const Memory* b) noexcept nogil:
    cdef Strides s
    cdef Py_ssize_t a_below, a_above, b_below, b_above, distance
    cdef int i
    if a.data == NULL or b.data == NULL:
        return False
    extent(a, &a_below, &a_above)
    extent(b, &b_below, &b_above)
    distance = b.data - a.data
    if distance - b_below >= a_above or distance + b_above <= -a_below:
        return False
    s.n, s.tries = 0, MOST_TRIES
    add_axes(&s, a)
    add_axes(&s, b)
    s.reach[s.n] = 0
    for i in range(s.n - 1, -1, -1):
        s.reach[i] = s.reach[i + 1] + s.steps[i] * s.stride[i]
    return is_sum(&s, 0, distance + a_below + b_above - 1)


cdef bint same_places(const Memory* a, const Memory* b) noexcept nogil:
    cdef int axis
    if a.data != b.data or a.itemsize != b.itemsize:
        return False
    for axis in range(a.axes.ndim):
        if a.axes.shape[axis] > 1 and stride_in_bytes(a, axis) != stride_in_bytes(b, axis):
            return False
    return True


# ---- the rules -----------------------------------------------------------------------

cdef struct Arena:
    # The arguments of a call in memory, and room for what is not given.
    Memory at[ARGUMENTS]
    Py_ssize_t gapless[ARGUMENTS][MAX_DIMENSIONS]
    Py_ssize_t length[ARGUMENTS]


cdef void place_tensor(Arena* arena, const Request* r, int argument,
                       const fastbn_tensor* tensor) noexcept nogil:
    arena.at[argument] = Memory(
        <const char*>tensor.data, axes_of_tensor(&r.call, tensor, arena.gapless[argument]),
        r.kernels.elem_size)


cdef void place_vector(Arena* arena, int argument, const void* vector, Py_ssize_t n,
                       Py_ssize_t itemsize) noexcept nogil:
    arena.length[argument], arena.gapless[argument][0] = n, itemsize
    arena.at[argument] = Memory(
        <const char*>vector,
        Axes(1, &arena.length[argument], &arena.gapless[argument][0], itemsize), itemsize)


cdef void place_all(Arena* arena, const Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef bint backward = is_backward(call), adds = has_residual(call)
    cdef fastbn_tensor none
    cdef Py_ssize_t wide = sizeof(double), itemsize = 0
    cdef int argument
    none.data, none.strides = NULL, NULL
    if kernels_for(call.vector_dtype) != NULL:
        itemsize = kernels_for(call.vector_dtype).elem_size
    place_tensor(arena, r, ARG_X, &call.x)
    place_tensor(arena, r, ARG_DY, &call.dy if backward else &none)
    place_tensor(arena, r, ARG_RESIDUAL, &call.residual)
    place_tensor(arena, r, ARG_OUT, &call.out)
    place_tensor(arena, r, ARG_DRESIDUAL, &call.dresidual if backward and adds else &none)
    place_vector(arena, ARG_WEIGHT, call.weight, r.parameters, itemsize)
    place_vector(arena, ARG_BIAS, call.bias, r.parameters, itemsize)
    place_vector(arena, ARG_LENGTHS, call.lengths, count_lengths(call), sizeof(int64_t))
    place_tensor(arena, r, ARG_MASK, &call.mask)
    arena.at[ARG_MASK].itemsize = 1
    place_vector(arena, ARG_RUNNING_MEAN, NULL if backward else call.running_mean, r.groups,
                 itemsize)
    place_vector(arena, ARG_RUNNING_VAR, NULL if backward else call.running_var, r.groups,
                 itemsize)
    place_vector(arena, ARG_MEAN, call.mean if has_mean(call) else NULL, r.owners, wide)
    place_vector(arena, ARG_INVSTD, call.invstd, r.owners, wide)
    if r.extras.memory == NULL:
        return
    for argument in range(ARG_X, ARGUMENTS):
        if r.extras.memory[argument].data != NULL:
            arena.at[argument] = r.extras.memory[argument]


cdef int check_pair(Request* r, const Arena* arena, int written, int other,
                    bint may_be_same) noexcept nogil:
    cdef const Memory* a = &arena.at[written]
    cdef const Memory* b = &arena.at[other]
    if not overlap(a, b) or (may_be_same and same_places(a, b)):
        return FASTBN_OK
    r.fault.other = other
    return fail(r, FASTBN_OVERLAP, written)


cdef int check_pairs(Request* r, const Arena* arena, int written, int first, int last,
                     bint may_be_same) noexcept nogil:
    # With each of the arguments [first, last].
    cdef int other, code = FASTBN_OK
    for other in range(first, last + 1):
        if code == FASTBN_OK and other != written:
            code = check_pair(r, arena, written, other, may_be_same)
    return code


cdef int check_written(Request* r, const Arena* arena, int argument) noexcept nogil:
    # An element is nowhere twice?
    if arena.at[argument].data == NULL or not steps_over_itself(&arena.at[argument].axes):
        return FASTBN_OK
    r.fault.other = argument
    return fail(r, FASTBN_BAD_STRIDES, argument)


cdef int check_out(Request* r, const Arena* arena) noexcept nogil:
    cdef int code = check_written(r, arena, ARG_OUT)
    if code == FASTBN_OK:
        code = check_pairs(r, arena, ARG_OUT, ARG_X, ARG_RESIDUAL, SAME_OR_APART)
    return code if code != FASTBN_OK else check_pairs(
        r, arena, ARG_OUT, ARG_WEIGHT, ARG_INVSTD, APART)


cdef int check_dresidual(Request* r, const Arena* arena) noexcept nogil:
    cdef int code = check_written(r, arena, ARG_DRESIDUAL)
    if code == FASTBN_OK:
        code = check_pair(r, arena, ARG_DRESIDUAL, ARG_X, APART)
    if code == FASTBN_OK:
        code = check_pairs(r, arena, ARG_DRESIDUAL, ARG_DY, ARG_RESIDUAL, SAME_OR_APART)
    return code if code != FASTBN_OK else check_pairs(
        r, arena, ARG_DRESIDUAL, ARG_OUT, ARG_INVSTD, APART)


cdef int check_running(Request* r, const Arena* arena, int running) noexcept nogil:
    cdef int code = check_written(r, arena, running)
    if code == FASTBN_OK:
        code = check_pairs(r, arena, running, ARG_X, ARG_RESIDUAL, APART)
    return code if code != FASTBN_OK else check_pairs(
        r, arena, running, ARG_WEIGHT, ARG_RUNNING_VAR, APART)


cdef int check_memory(Request* r) noexcept nogil:
    cdef bint updates = r.call.operation == FASTBN_FORWARD and has_running(&r.call)
    cdef Arena arena
    cdef int code = FASTBN_OK
    if (r.extras.new_outputs and not updates) or r.call.operation == FASTBN_STATISTICS:
        return FASTBN_OK
    place_all(&arena, r)
    if not r.extras.new_outputs:
        code = check_out(r, &arena)
    if code == FASTBN_OK and not r.extras.new_outputs:
        code = check_dresidual(r, &arena)
    if updates and code == FASTBN_OK:
        code = check_running(r, &arena, ARG_RUNNING_MEAN)
    return code if not updates or code != FASTBN_OK else check_running(
        r, &arena, ARG_RUNNING_VAR)
