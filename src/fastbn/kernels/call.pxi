# SPDX-License-Identifier: BSD-3-Clause
"""A call of fastbn.h -> a job: every check, and the vectors in float64.

What the view does for NumPy's arrays, this does for pointers. It refuses what a view
cannot describe, where the view would copy.

May: check, convert vectors, set pointers. May not: allocate, touch a tensor. A part of
drivers.pyx.
"""

cdef enum:
    MOST_WORKERS = 1024

cdef struct Request:
    # What a call comes to.
    fastbn_call call            # as far as this version knows it
    const KernelTable* kernels
    Operation operation
    Job job
    Order order
    Py_ssize_t parameters       # of weight and bias, how many numbers
    Py_ssize_t groups           # which have statistics of their own: in a instance ...
    Py_ssize_t owners           # ... and in all of them

cdef struct Supply:
    # Where float64 vectors come from; without memory, they are only counted.
    double* start
    Py_ssize_t used


# ---- checks --------------------------------------------------------------------------

cdef int take_call(const fastbn_call* given, fastbn_call* call) noexcept nogil:
    # A caller's struct may be shorter than ours, of an older header, or longer.
    cdef size_t i, known = sizeof(fastbn_call)
    if given == NULL:
        return FASTBN_NULL_POINTER
    if given.struct_size < sizeof(size_t):
        return FASTBN_UNKNOWN_FIELD
    for i in range(known, given.struct_size):
        if (<const char*>given)[i] != 0:
            return FASTBN_UNKNOWN_FIELD
    memset(call, 0, known)
    memcpy(call, given, known if known < given.struct_size else given.struct_size)
    if call.reserved != 0:
        return FASTBN_UNKNOWN_FIELD
    if call.operation == FASTBN_STATISTICS:     # nothing is written that they could follow
        call.activation, call.residual.data = FASTBN_IDENTITY, NULL
    return FASTBN_OK


cdef inline const KernelTable* kernels_for(int dtype) noexcept nogil:
    return kernels_of[dtype - FASTBN_FLOAT32]


cdef inline bint of_rows(const fastbn_call* call) noexcept nogil:
    return call.norm == FASTBN_LAYER_NORM or call.norm == FASTBN_RMS_NORM


cdef inline bint of_instances(const fastbn_call* call) noexcept nogil:
    return call.norm == FASTBN_INSTANCE_NORM or call.norm == FASTBN_GROUP_NORM


cdef inline bint is_backward(const fastbn_call* call) noexcept nogil:
    return call.operation >= FASTBN_BACKWARD


cdef inline bint has_residual(const fastbn_call* call) noexcept nogil:
    return call.residual.data != NULL


cdef inline bint is_among(int number, int first, int last) noexcept nogil:
    # As integers: compared with an enum's, a number below 0 would be a large one.
    return first <= number <= last


cdef int check_kind(const fastbn_call* call) noexcept nogil:
    if not is_among(call.norm, FASTBN_BATCH_NORM, FASTBN_RMS_NORM):
        return FASTBN_BAD_OPERATION
    if not is_among(call.operation, FASTBN_STATISTICS, FASTBN_BACKWARD_INFERENCE):
        return FASTBN_BAD_OPERATION
    if call.norm != FASTBN_BATCH_NORM and call.operation not in (
            FASTBN_FORWARD, FASTBN_BACKWARD):
        return FASTBN_BAD_OPERATION
    if not is_among(call.activation, FASTBN_IDENTITY, FASTBN_RELU6):
        return FASTBN_BAD_OPERATION
    if not is_among(call.dtype, FASTBN_FLOAT32, FASTBN_BFLOAT16):
        return FASTBN_BAD_DTYPE
    return FASTBN_OK


cdef int check_vector_dtype(const fastbn_call* call) noexcept nogil:
    cdef bint running = (call.running_mean != NULL or call.running_var != NULL) and (
        call.operation in (FASTBN_INFERENCE, FASTBN_FORWARD))
    cdef bint parameters = (call.weight != NULL or call.bias != NULL or call.dweight != NULL
                            or call.dbias != NULL)
    # Half types have too few bits for a mean over time.
    cdef int widest = FASTBN_FLOAT64 if running else FASTBN_BFLOAT16
    if is_among(call.vector_dtype, FASTBN_FLOAT32, widest) or not (running or parameters):
        return FASTBN_OK
    return FASTBN_BAD_DTYPE


cdef int check_vectors(const fastbn_call* call) noexcept nogil:
    cdef bint rms = call.norm == FASTBN_RMS_NORM
    if call.operation == FASTBN_INFERENCE and (
            call.running_mean == NULL or call.running_var == NULL):
        return FASTBN_NULL_POINTER
    if call.operation == FASTBN_STATISTICS and (call.mean == NULL or call.m2 == NULL):
        return FASTBN_NULL_POINTER
    if is_backward(call) and (call.invstd == NULL or (call.mean == NULL and not rms)):
        return FASTBN_NULL_POINTER
    return check_vector_dtype(call)


cdef int check_shape(const fastbn_call* call, Py_ssize_t elem_size) noexcept nogil:
    cdef Py_ssize_t most = PTRDIFF_MAX // elem_size
    cdef int axis
    if call.shape == NULL:
        return FASTBN_NULL_POINTER
    if not 1 <= call.ndim <= MAX_DIMENSIONS:
        return FASTBN_BAD_SHAPE
    for axis in range(call.ndim):
        if call.shape[axis] < 1 or call.shape[axis] > most:
            return FASTBN_BAD_SHAPE
        most //= call.shape[axis]
    return FASTBN_OK


cdef inline bint is_axis(const fastbn_call* call, int axis) noexcept nogil:
    return 0 <= axis < call.ndim


cdef int check_axes(const fastbn_call* call) noexcept nogil:
    if of_rows(call):
        return FASTBN_OK if 1 <= call.normalized_ndim <= call.ndim else FASTBN_BAD_AXIS
    if not is_axis(call, call.channel_axis):
        return FASTBN_BAD_AXIS
    if of_instances(call) and (not is_axis(call, call.sample_axis)
                               or call.sample_axis == call.channel_axis):
        return FASTBN_BAD_AXIS
    if call.norm == FASTBN_GROUP_NORM and (
            call.groups < 1 or call.shape[call.channel_axis] % call.groups):
        return FASTBN_BAD_GROUPS
    return FASTBN_OK


cdef inline bint is_finite(double number) noexcept nogil:
    return number - number == 0.0


cdef int check_numbers(const fastbn_call* call) noexcept nogil:
    if call.operation == FASTBN_FORWARD and not call.eps > 0.0:
        return FASTBN_BAD_NUMBER
    if call.operation == FASTBN_INFERENCE and not call.eps >= 0.0:
        return FASTBN_BAD_NUMBER
    if call.activation == FASTBN_LEAKY_RELU and not is_finite(call.negative_slope):
        return FASTBN_BAD_NUMBER
    return FASTBN_OK if is_finite(call.momentum) else FASTBN_BAD_NUMBER


cdef int check_call(const fastbn_call* call) noexcept nogil:
    cdef int code = check_kind(call)
    if code == FASTBN_OK:
        code = check_vectors(call)
    if code == FASTBN_OK and kernels_for(call.dtype) == NULL:
        code = FASTBN_BAD_DTYPE
    if code == FASTBN_OK:
        code = check_shape(call, kernels_for(call.dtype).elem_size)
    if code == FASTBN_OK:
        code = check_axes(call)
    return code if code != FASTBN_OK else check_numbers(call)


# ---- tensors -------------------------------------------------------------------------

cdef Axes axes_of_tensor(const fastbn_call* call, const fastbn_tensor* tensor,
                         Py_ssize_t* gapless) noexcept nogil:
    # `gapless` has room for strides.
    cdef Py_ssize_t step = 1
    cdef int axis
    if tensor.strides != NULL:
        return Axes(call.ndim, call.shape, tensor.strides, 1)
    for axis in range(call.ndim - 1, -1, -1):
        gapless[axis] = step
        step *= call.shape[axis]
    return Axes(call.ndim, call.shape, gapless, 1)


cdef int look_at(const Request* r, const fastbn_tensor* tensor, Py_ssize_t group,
                 bint written, uint64_t* breaks) noexcept nogil:
    cdef Py_ssize_t gapless[MAX_DIMENSIONS]
    cdef Axes axes = axes_of_tensor(&r.call, tensor, gapless)
    if tensor.data == NULL:
        return FASTBN_NULL_POINTER
    if <size_t>tensor.data % r.kernels.elem_size:
        return FASTBN_MISALIGNED
    if not gapless_inwards(&axes, &r.order) or (written and steps_over_itself(&axes)):
        return FASTBN_BAD_STRIDES
    if group > 1 and not channels_in_a_row(&axes, &r.order):
        return FASTBN_BAD_STRIDES
    breaks[0] |= find_breaks(&axes, &r.order)
    return FASTBN_OK if at_most_one_bit(breaks[0]) else FASTBN_BAD_STRIDES


cdef void settle_tensor(Request* r, const fastbn_tensor* tensor, int split,
                        Operand* operand) noexcept nogil:
    cdef Py_ssize_t gapless[MAX_DIMENSIONS]
    cdef Axes axes = axes_of_tensor(&r.call, tensor, gapless)
    settle_operand(&axes, &r.order, split, &r.job, tensor.data, operand)


cdef int order_axes(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t gapless[MAX_DIMENSIONS]
    cdef Axes axes = axes_of_tensor(call, &call.x, gapless)
    cdef int outer
    if not of_rows(call):
        sort_by_channel(&axes, call.channel_axis,
                        call.sample_axis if of_instances(call) else NO_AXIS, &r.order)
        return FASTBN_OK
    sort_by_features(&axes, call.ndim - call.normalized_ndim, &r.order)
    outer = r.order.outer
    # Vectors have the order of the axes; so must the memory have.
    if ascending(r.order.axes, outer) and ascending(r.order.axes + outer, r.order.n - outer):
        return FASTBN_OK
    return FASTBN_BAD_STRIDES


cdef int look_at_all(const Request* r, Py_ssize_t group, uint64_t* breaks) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef bint backward = is_backward(call), adds = has_residual(call)
    cdef int code = look_at(r, &call.x, 1 if backward else group, False, breaks)
    if code == FASTBN_OK and backward:
        code = look_at(r, &call.dy, 1, False, breaks)
    if code == FASTBN_OK and adds:
        code = look_at(r, &call.residual, 1, False, breaks)
    if code == FASTBN_OK and call.operation != FASTBN_STATISTICS:
        code = look_at(r, &call.out, 1, True, breaks)
    if code == FASTBN_OK and adds and backward:
        code = look_at(r, &call.dresidual, 1, True, breaks)
    return code


cdef bint same_or_apart(const Request* r, const Operand* a, const Operand* b) noexcept nogil:
    if a.data == NULL or b.data == NULL or same_places(&r.job, a, b):
        return True
    return not overlap(&r.job, r.kernels.elem_size, a, b)


cdef int check_apart(const Request* r) noexcept nogil:
    # An element is read before it is written, but x again after the residual's gradient.
    cdef const Job* job = &r.job
    cdef const Operand* dresidual = &job.dy
    if not (same_or_apart(r, &job.out, &job.x) and same_or_apart(r, &job.out, &job.dy_of_y)
            and same_or_apart(r, &job.out, &job.residual)):
        return FASTBN_OVERLAP
    if not has_residual(&r.call) or not is_backward(&r.call):
        return FASTBN_OK
    if (overlap(job, r.kernels.elem_size, dresidual, &job.out)
            or overlap(job, r.kernels.elem_size, dresidual, &job.x)):
        return FASTBN_OVERLAP
    if same_or_apart(r, dresidual, &job.dy_of_y) and same_or_apart(r, dresidual, &job.residual):
        return FASTBN_OK
    return FASTBN_OVERLAP


cdef int settle_tensors(Request* r, Py_ssize_t channels, Py_ssize_t group) noexcept nogil:
    cdef fastbn_call* call = &r.call
    cdef Py_ssize_t gapless[MAX_DIMENSIONS]
    cdef Axes axes = axes_of_tensor(call, &call.x, gapless)
    cdef bint backward = is_backward(call), adds = has_residual(call)
    cdef uint64_t breaks = 0
    cdef Operand dresidual
    cdef int split, code = look_at_all(r, group, &breaks)
    if code != FASTBN_OK:
        return code
    split = split_at(breaks)
    settle_view(&axes, &r.order, split, channels, group, &r.job)
    settle_tensor(r, &call.x, split, &r.job.x)
    if adds:
        settle_tensor(r, &call.residual, split, &r.job.residual)
    if backward:
        settle_tensor(r, &call.dy, split, &r.job.dy)
    if backward and adds:
        settle_tensor(r, &call.dresidual, split, &dresidual)
    if call.operation != FASTBN_STATISTICS:
        settle_tensor(r, &call.out, split, &r.job.out)
    settle_activation(r.kernels, &dresidual if backward and adds else NULL, &r.job)
    return check_apart(r)


cdef int settle_channels(Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t channels = call.shape[call.channel_axis]
    cdef Py_ssize_t instances = call.shape[call.sample_axis] if of_instances(call) else 1
    cdef Py_ssize_t size = 1
    cdef int axis, code
    r.parameters = channels
    r.groups = call.groups if call.norm == FASTBN_GROUP_NORM else channels
    r.owners = instances * r.groups
    for axis in range(call.ndim):
        size *= call.shape[axis]
    code = settle_tensors(r, channels, channels // r.groups)
    if code == FASTBN_OK and size == r.owners and call.operation in (
            FASTBN_FORWARD, FASTBN_BACKWARD):
        return FASTBN_ONE_VALUE
    return code


cdef int settle_rows(Request* r) noexcept nogil:
    cdef int code = settle_tensors(r, 1, 1)
    if code == FASTBN_OK:
        turn_to_features(&r.job)
        r.parameters = r.job.view.inner
        r.groups = r.owners = r.job.view.channels
    return code


cdef Operation operation_of(const fastbn_call* call, const KernelTable* kernels) noexcept nogil:
    if call.operation == FASTBN_STATISTICS:
        return statistics_of(kernels)
    if call.operation == FASTBN_INFERENCE:
        return inference_of(kernels)
    if call.operation == FASTBN_FORWARD:
        return training_of(kernels)
    return gradients_of(kernels)


cdef int understand(const fastbn_call* given, int workers, Request* r) noexcept nogil:
    # All but the vectors and the memory.
    cdef int code = take_call(given, &r.call)
    if code == FASTBN_OK:
        code = check_call(&r.call)
    if code == FASTBN_OK and not 1 <= workers <= MOST_WORKERS:
        code = FASTBN_BAD_WORKERS
    if code != FASTBN_OK:
        return code
    r.kernels = kernels_for(r.call.dtype)
    r.operation = operation_of(&r.call, r.kernels)
    memset(&r.job, 0, sizeof(Job))
    r.job.threads = workers
    r.job.eps, r.job.momentum = r.call.eps, r.call.momentum
    r.job.centred = r.call.norm != FASTBN_RMS_NORM
    r.job.training = r.call.operation != FASTBN_BACKWARD_INFERENCE
    r.job.activation, r.job.negative_slope = r.call.activation, r.call.negative_slope
    code = order_axes(r)
    if code == FASTBN_OK:
        code = settle_rows(r) if of_rows(&r.call) else settle_channels(r)
    return code


# ---- vectors -------------------------------------------------------------------------

cdef void narrow(const double* vector, Py_ssize_t n, int dtype, void* to) noexcept nogil:
    if to != NULL and to != <const void*>vector:
        kernels_for(dtype).from_float64(vector, n, to)


cdef double* new_vector(Supply* supply, Py_ssize_t n) noexcept nogil:
    supply.used += n
    return supply.start + supply.used - n


cdef inline double* given_or_new(Supply* supply, double* given, Py_ssize_t n) noexcept nogil:
    return given if given != NULL else new_vector(supply, n)


cdef double* wide(Supply* supply, const fastbn_call* call, const void* vector,
                  Py_ssize_t n) noexcept nogil:
    # The vector itself, if it is float64; else a copy.
    cdef double* to
    if vector == NULL or call.vector_dtype == FASTBN_FLOAT64:
        return <double*>vector
    to = new_vector(supply, n)
    if supply.start != NULL:
        kernels_for(call.vector_dtype).to_float64(vector, n, to)
    return to


cdef inline const void* real_vector(const fastbn_call* call, const void* vector,
                                    Py_ssize_t n) noexcept nogil:
    # The vector itself, where kernels can read it; NULL: they cannot. Of bfloat16 they
    # want NaN as `as_real` gives it.
    cdef int real = FASTBN_FLOAT64 if call.dtype == FASTBN_FLOAT64 else FASTBN_FLOAT32
    if call.dtype == FASTBN_BFLOAT16 or n % WRAP or call.vector_dtype != real:
        return NULL
    return vector


cdef void take_features(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef const void* bias = call.bias if call.norm == FASTBN_LAYER_NORM else NULL
    cdef Py_ssize_t n = r.parameters
    r.job.real_weight = real_vector(call, call.weight, n)
    r.job.real_bias = real_vector(call, bias, n)
    if r.job.real_weight == NULL:
        r.job.weight = wide(supply, call, call.weight, n)
    if r.job.real_bias == NULL:
        r.job.bias = wide(supply, call, bias, n)


cdef void take_parameters(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if of_rows(call):
        take_features(r, supply)
        return
    r.job.weight = wide(supply, call, call.weight, r.parameters)
    r.job.bias = wide(supply, call, call.bias, r.parameters)


cdef void take_fixed(Request* r, Supply* supply) noexcept nogil:
    # Inference: the running statistics.
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t n = r.owners
    r.job.mean = wide(supply, call, call.running_mean, n)
    r.job.var = wide(supply, call, call.running_var, n)
    r.job.invstd = given_or_new(supply, call.invstd, n)


cdef void take_forward(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef double* mean = given_or_new(supply, call.mean if r.job.centred else NULL, r.owners)
    cdef double* invstd = given_or_new(supply, call.invstd, r.owners)
    r.job.var = invstd
    if r.job.group > 1:
        r.job.group_mean, r.job.group_invstd = mean, invstd
        return
    r.job.mean, r.job.m2, r.job.invstd = mean, invstd, invstd
    if not of_rows(call):
        r.job.running_mean = wide(supply, call, call.running_mean, r.groups)
        r.job.running_var = wide(supply, call, call.running_var, r.groups)
        if call.running_var != NULL:
            r.job.m2 = new_vector(supply, r.owners)


cdef void take_backward(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t n = r.parameters * (1 if of_rows(call) else r.owners // r.groups)
    # Only read here, since `var` is NULL.
    r.job.mean = r.job.group_mean = call.mean
    r.job.invstd = r.job.group_invstd = call.invstd
    if not r.job.centred:
        r.job.mean = new_vector(supply, r.owners)
        if supply.start != NULL:
            memset(r.job.mean, 0, r.owners * sizeof(double))
    r.job.dweight = new_vector(supply, n)
    r.job.dbias = new_vector(supply, n)


cdef size_t take_vectors(Request* r, double* memory) noexcept nogil:
    # Returns how much memory they take; to know that, NULL will do.
    cdef Supply supply = Supply(memory, 0)
    take_parameters(r, &supply)
    if r.call.operation == FASTBN_STATISTICS:
        r.job.mean, r.job.m2 = r.call.mean, r.call.m2
    elif r.call.operation == FASTBN_INFERENCE:
        take_fixed(r, &supply)
    elif r.call.operation == FASTBN_FORWARD:
        take_forward(r, &supply)
    else:
        take_backward(r, &supply)
    return supply.used * sizeof(double)


cdef void give_vectors(const Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if call.operation == FASTBN_INFERENCE:
        narrow(r.job.mean, r.owners, FASTBN_FLOAT64, call.mean)
    elif call.operation == FASTBN_FORWARD and not of_rows(call) and r.job.group == 1:
        narrow(r.job.running_mean, r.groups, call.vector_dtype, call.running_mean)
        narrow(r.job.running_var, r.groups, call.vector_dtype, call.running_var)
    elif is_backward(call):
        narrow(r.job.dweight, r.parameters, call.vector_dtype, call.dweight)
        narrow(r.job.dbias, r.parameters, call.vector_dtype, call.dbias)
