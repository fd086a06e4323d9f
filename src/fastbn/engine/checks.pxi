# SPDX-License-Identifier: BSD-3-Clause
# What can be wrong with a call beside its memory. Each check returns FASTBN_OK, or a code,
# and notes the argument at fault. May not touch a tensor. A part of core.pyx.

cdef int take_call(const fastbn_call* given, Request* r) noexcept nogil:
    # A caller's struct may be shorter than ours, of an older header, or longer.
    cdef size_t i, known = sizeof(fastbn_call)
    cdef fastbn_call* call = &r.call
    if given == NULL:
        return fail(r, FASTBN_NULL_POINTER, ARG_CALL)
    if given.struct_size < sizeof(size_t):
        return fail(r, FASTBN_UNKNOWN_FIELD, ARG_CALL)
    for i in range(known, given.struct_size):
        if (<const char*>given)[i] != 0:
            return fail(r, FASTBN_UNKNOWN_FIELD, ARG_CALL)
    if given.struct_size < known:
        memset(call, 0, known)
    memcpy(call, given, known if known < given.struct_size else given.struct_size)
    if call.reserved != 0 or call.reserved2 != 0 or call.padding != 0:
        return fail(r, FASTBN_UNKNOWN_FIELD, ARG_CALL)
    if call.operation == FASTBN_STATISTICS or converts(call):   # they can follow nothing
        call.activation, call.residual.data = FASTBN_IDENTITY, NULL
    return FASTBN_OK


cdef int check_kind(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if not is_among(call.norm, FASTBN_BATCH_NORM, FASTBN_RMS_NORM):
        return fail(r, FASTBN_BAD_OPERATION, ARG_CALL)
    if not is_among(call.operation, FASTBN_STATISTICS, FASTBN_DENORMALIZE):
        return fail(r, FASTBN_BAD_OPERATION, ARG_CALL)
    if call.norm != FASTBN_BATCH_NORM and call.operation not in (
            FASTBN_FORWARD, FASTBN_BACKWARD):
        return fail(r, FASTBN_BAD_OPERATION, ARG_CALL)
    r.kernels = table_for(call.dtype)
    if r.kernels == NULL:
        return fail(r, FASTBN_BAD_DTYPE, ARG_DTYPE)
    if not 0 <= call.activation < r.kernels.activation_count:
        return fail(r, FASTBN_BAD_OPERATION, ARG_ACTIVATION)
    return check_image_kind(r)


cdef int check_vector_dtype(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef bint running = has_running(call) and (
        call.operation in (FASTBN_INFERENCE, FASTBN_FORWARD))
    cdef bint parameters = (call.weight != NULL or call.bias != NULL or call.dweight != NULL
                            or call.dbias != NULL)
    # Half types have too few bits for a mean over time.
    cdef int widest = FASTBN_FLOAT64 if running else FASTBN_BFLOAT16
    if is_among(call.vector_dtype, FASTBN_FLOAT32, widest) or not (running or parameters):
        return FASTBN_OK
    return fail(r, FASTBN_BAD_DTYPE, ARG_VECTOR_DTYPE)


cdef int check_vectors(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if call.operation == FASTBN_INFERENCE and r.extras.coefficients == NULL:
        if call.running_mean == NULL:
            return fail(r, FASTBN_NULL_POINTER, ARG_RUNNING_MEAN)
        if call.running_var == NULL:
            return fail(r, FASTBN_NULL_POINTER, ARG_RUNNING_VAR)
    if call.operation == FASTBN_STATISTICS and call.m2 == NULL:
        return fail(r, FASTBN_NULL_POINTER, ARG_M2)
    if is_backward(call) and call.invstd == NULL:
        return fail(r, FASTBN_NULL_POINTER, ARG_INVSTD)
    if call.mean == NULL and (call.operation == FASTBN_STATISTICS
                              or (is_backward(call) and has_mean(call))):
        return fail(r, FASTBN_NULL_POINTER, ARG_MEAN)
    return check_vector_dtype(r)


cdef int check_shape(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t most = PTRDIFF_MAX // <Py_ssize_t>r.kernels.elem_size
    cdef int axis
    r.empty = False
    if call.shape == NULL:
        return fail(r, FASTBN_NULL_POINTER, ARG_SHAPE)
    if not 1 <= call.ndim <= MAX_DIMENSIONS:
        return fail(r, FASTBN_BAD_SHAPE, ARG_SHAPE)
    for axis in range(call.ndim):
        if call.shape[axis] < 0 or call.shape[axis] > most:
            return fail(r, FASTBN_BAD_SHAPE, ARG_SHAPE)
        if call.shape[axis] == 0:
            r.empty = True
        else:
            most //= call.shape[axis]
    return FASTBN_OK


cdef inline bint is_axis(const fastbn_call* call, int axis) noexcept nogil:
    return 0 <= axis < call.ndim


cdef bint can_be_grouped(Py_ssize_t channels, Py_ssize_t groups) noexcept nogil:
    return groups >= 1 and channels % groups == 0


cdef int check_axes(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if of_rows(call):
        if 1 <= call.normalized_ndim <= call.ndim:
            return FASTBN_OK
        return fail(r, FASTBN_BAD_AXIS, ARG_AXIS)
    if not is_axis(call, call.channel_axis):
        return fail(r, FASTBN_BAD_AXIS, ARG_AXIS)
    if of_instances(call) and (not is_axis(call, call.sample_axis)
                               or call.sample_axis == call.channel_axis):
        return fail(r, FASTBN_BAD_AXIS, ARG_AXIS)
    if call.norm == FASTBN_GROUP_NORM and not can_be_grouped(
            call.shape[call.channel_axis], call.groups):
        return fail(r, FASTBN_BAD_GROUPS, ARG_GROUPS)
    return FASTBN_OK


cdef bint needs_positive_eps(const fastbn_call* call) noexcept nogil:
    # With eps = 0 a constant channel has no finite y. Of a row or a group that is an answer;
    # of statistics that a model keeps or trains with, it is a model that is lost.
    return call.operation == FASTBN_FORWARD and (
        call.norm == FASTBN_BATCH_NORM or has_running(call))


cdef bint is_eps(double eps, bint positive) noexcept nogil:
    return eps > 0.0 or (eps == 0.0 and not positive)


cdef inline bint are_axes_of_lengths(const fastbn_call* call) noexcept nogil:
    return (is_axis(call, call.sample_axis) and is_axis(call, call.length_axis)
            and call.sample_axis != call.channel_axis and call.length_axis != call.channel_axis
            and call.sample_axis != call.length_axis)


cdef inline Py_ssize_t count_lengths(const fastbn_call* call) noexcept nogil:
    return call.shape[call.sample_axis] if call.lengths != NULL else 0


cdef int check_mask(Request* r) noexcept nogil:
    # What can be wrong without a look at its elements.
    cdef const fastbn_call* call = &r.call
    if call.mask.data == NULL and call.lengths == NULL:
        return FASTBN_OK
    if of_rows(call) or converts(call) or (call.mask.data != NULL and call.lengths != NULL):
        return fail(r, FASTBN_BAD_MASK, ARG_MASK)
    if call.lengths != NULL and is_image(call):
        return fail(r, FASTBN_BAD_MASK, ARG_LENGTHS)
    if call.lengths != NULL and not are_axes_of_lengths(call):
        return fail(r, FASTBN_BAD_AXIS, ARG_LENGTHS)
    if call.lengths != NULL and <size_t>call.lengths % sizeof(int64_t):
        return fail(r, FASTBN_MISALIGNED, ARG_LENGTHS)
    if call.mask.data != NULL and (
            call.mask.strides == NULL or call.mask.strides[call.channel_axis] != 0):
        return fail(r, FASTBN_BAD_MASK, ARG_MASK)
    return FASTBN_OK


cdef int check_numbers(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if call.operation in (FASTBN_INFERENCE, FASTBN_FORWARD) and not is_eps(
            call.eps, needs_positive_eps(call)):
        return fail(r, FASTBN_BAD_NUMBER, ARG_EPS)
    if call.activation == FASTBN_LEAKY_RELU and not is_finite(call.negative_slope):
        return fail(r, FASTBN_BAD_NUMBER, ARG_NEGATIVE_SLOPE)
    return FASTBN_OK if is_finite(call.momentum) else fail(r, FASTBN_BAD_NUMBER, ARG_MOMENTUM)


cdef Py_ssize_t size_of_axes(const fastbn_call* call, int first, int end) noexcept nogil:
    cdef Py_ssize_t size = 1
    cdef int axis
    for axis in range(first, end):
        size *= call.shape[axis]
    return size


cdef void count_vectors(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef int kept = call.ndim - call.normalized_ndim
    if of_rows(call):
        r.parameters = size_of_axes(call, kept, call.ndim)
        r.groups = r.owners = size_of_axes(call, 0, kept)
        return
    r.parameters = call.shape[call.channel_axis]
    r.groups = call.groups if call.norm == FASTBN_GROUP_NORM else r.parameters
    r.owners = r.groups * (call.shape[call.sample_axis] if of_instances(call) else 1)


cdef inline bint counts_later(const Request* r) noexcept nogil:
    # How many values a channel has, a mask says, or those who have the rest of the batch.
    return r.extras.part or (has_mask(&r.call) and r.call.norm == FASTBN_BATCH_NORM)


cdef int check_count(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if (call.operation == FASTBN_FORWARD or call.operation == FASTBN_BACKWARD) and (
            not of_rows(call) and not r.empty and not counts_later(r)
            and size_of_axes(call, 0, call.ndim) == r.owners):
        return fail(r, FASTBN_ONE_VALUE, ARG_X)
    return FASTBN_OK


cdef int check_call(Request* r) noexcept nogil:
    cdef int code = check_kind(r)
    if code == FASTBN_OK:
        code = check_vectors(r)
    if code == FASTBN_OK:
        code = check_shape(r)
    if code == FASTBN_OK:
        code = check_axes(r)
    if code == FASTBN_OK:
        code = check_mask(r)
    if code == FASTBN_OK:
        code = check_numbers(r)
    if code == FASTBN_OK:
        count_vectors(r)
        code = check_count(r)
    return code


# ---- tensors -------------------------------------------------------------------------

cdef int check_tensor(Request* r, int argument, const fastbn_tensor* tensor,
                      uint64_t* breaks) noexcept nogil:
    # Can a view describe it, beside those before it?
    cdef Py_ssize_t gapless[MAX_DIMENSIONS]
    cdef Axes axes = axes_of_tensor(&r.call, tensor, gapless)
    cdef bint grouped = (argument == ARG_X and r.job.problem.group > 1
                         and r.call.operation == FASTBN_FORWARD)
    if tensor.data == NULL:
        return fail(r, FASTBN_NULL_POINTER, argument)
    if <size_t>tensor.data % r.kernels.elem_size:
        return fail(r, FASTBN_MISALIGNED, argument)
    if not gapless_inwards(&axes, &r.order):
        return fail(r, FASTBN_BAD_STRIDES, argument)
    if grouped and not channels_in_a_row(&axes, &r.order):
        return fail(r, FASTBN_BAD_STRIDES, argument)
    breaks[0] |= find_breaks(&axes, &r.order)
    return FASTBN_OK if at_most_one_bit(breaks[0]) else fail(r, FASTBN_BAD_STRIDES, argument)


cdef int check_tensors(Request* r, uint64_t* breaks) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef bint backward = is_backward(call), adds = has_residual(call)
    cdef int code = check_tensor(r, ARG_X, &call.x, breaks)
    if code == FASTBN_OK and backward:
        code = check_tensor(r, ARG_DY, &call.dy, breaks)
    if code == FASTBN_OK and adds:
        code = check_tensor(r, ARG_RESIDUAL, &call.residual, breaks)
    if code == FASTBN_OK and call.operation != FASTBN_STATISTICS:
        code = check_tensor(r, ARG_OUT, &call.out, breaks)
    if code == FASTBN_OK and adds and backward:
        code = check_tensor(r, ARG_DRESIDUAL, &call.dresidual, breaks)
    return code


cdef int order_axes(Request* r, const Axes* x) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef int outer
    if not of_rows(call):
        sort_by_channel(x, call.channel_axis,
                        call.sample_axis if of_instances(call) else NO_AXIS, &r.order)
        return FASTBN_OK
    sort_by_features(x, call.ndim - call.normalized_ndim, &r.order)
    outer = r.order.outer
    # Vectors have the order of the axes; so must the memory have.
    if ascending(r.order.axes, outer) and ascending(r.order.axes + outer, r.order.n - outer):
        return FASTBN_OK
    r.fault.other = ARG_AXIS
    return fail(r, FASTBN_BAD_STRIDES, ARG_X)
