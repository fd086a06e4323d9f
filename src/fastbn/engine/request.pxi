# SPDX-License-Identifier: BSD-3-Clause
# What a call says, in small questions, and how a check says no. May not decide what is
# allowed. A part of core.pyx.

cdef enum:
    APART, SAME_OR_APART        # what two arguments have to be in memory

cdef const KernelTable* kernels_of[DTYPES]      # in the order of fastbn_dtype


cdef inline bint is_among(int number, int first, int last) noexcept nogil:
    # As integers: compared with an enum's, a number below 0 would be a large one.
    return first <= number <= last


cdef const KernelTable* kernels_for(int dtype) noexcept nogil:
    # NULL: there are none for such elements.
    if not is_among(dtype, FASTBN_FLOAT32, FASTBN_BFLOAT16):
        return NULL
    return kernels_of[dtype - FASTBN_FLOAT32]


cdef inline int fail(Request* r, int code, int argument) noexcept nogil:
    r.fault.code, r.fault.argument = code, argument
    return code


cdef inline bint of_rows(const fastbn_call* call) noexcept nogil:
    return call.norm == FASTBN_LAYER_NORM or call.norm == FASTBN_RMS_NORM


cdef inline bint of_instances(const fastbn_call* call) noexcept nogil:
    return call.norm == FASTBN_INSTANCE_NORM or call.norm == FASTBN_GROUP_NORM


cdef inline bint has_mean(const fastbn_call* call) noexcept nogil:
    return call.norm != FASTBN_RMS_NORM


cdef inline bint is_backward(const fastbn_call* call) noexcept nogil:
    return is_among(call.operation, FASTBN_BACKWARD, FASTBN_BACKWARD_INFERENCE)


cdef inline bint has_residual(const fastbn_call* call) noexcept nogil:
    return call.residual.data != NULL


cdef inline bint has_no_statistics(const Request* r) noexcept nogil:
    # Nothing counts, here or in the rest of the batch.
    return ((r.empty or r.nothing) and r.call.operation != FASTBN_INFERENCE
            and not r.job.problem.total > 0.0)


cdef inline bint has_running(const fastbn_call* call) noexcept nogil:
    return ((call.running_mean != NULL or call.running_var != NULL)
            and (call.norm == FASTBN_BATCH_NORM or call.norm == FASTBN_INSTANCE_NORM))


cdef bint is_finite(double number) noexcept nogil:
    return number - number == 0.0


cdef double default_rms_eps(int dtype) noexcept nogil:
    # The machine epsilon of what is computed with.
    return 2.0 ** -52 if dtype == FASTBN_FLOAT64 else 2.0 ** -23


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
