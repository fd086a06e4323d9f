# SPDX-License-Identifier: BSD-3-Clause
# The vectors of a call as the kernels want them, in float64: those of the call, where they
# are so, else in the memory of the request; and back. May not allocate, touch a tensor. A
# part of core.pyx.

cdef struct Supply:
    # Where float64 vectors come from; without memory, they are only counted.
    double* start
    Py_ssize_t used


cdef double* new_vector(Supply* supply, Py_ssize_t n) noexcept nogil:
    supply.used += n
    return supply.start + supply.used - n


cdef inline double* given_or_new(Supply* supply, double* given, Py_ssize_t n) noexcept nogil:
    return given if given != NULL else new_vector(supply, n)


cdef double* in_float64(Supply* supply, const fastbn_call* call, const void* vector,
                        Py_ssize_t n) noexcept nogil:
    # The vector itself, if it is so; else a copy.
    cdef double* to
    if vector == NULL or call.vector_dtype == FASTBN_FLOAT64:
        return <double*>vector
    to = new_vector(supply, n)
    if supply.start != NULL:
        kernels_for(call.vector_dtype).to_float64(vector, n, to)
    return to


cdef inline const void* as_kernels_have(const fastbn_call* call, const void* vector,
                                        Py_ssize_t n) noexcept nogil:
    # The vector itself, where kernels can read it; NULL: they cannot. Of bfloat16 they
    # want NaN as `as_real` gives it.
    cdef int real = FASTBN_FLOAT64 if call.dtype == FASTBN_FLOAT64 else FASTBN_FLOAT32
    if call.dtype == FASTBN_BFLOAT16 or n % WRAP or call.vector_dtype != real:
        return NULL
    return vector


cdef void take_features(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Buffers* b = &r.job.buffers
    cdef const void* bias = call.bias if has_mean(call) else NULL
    cdef Py_ssize_t n = r.parameters
    b.real_weight = as_kernels_have(call, call.weight, n)
    b.real_bias = as_kernels_have(call, bias, n)
    b.weight = in_float64(supply, call, call.weight, n) if b.real_weight == NULL else NULL
    b.bias = in_float64(supply, call, bias, n) if b.real_bias == NULL else NULL


cdef void take_parameters(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    if of_rows(call):
        take_features(r, supply)
        return
    r.job.buffers.weight = in_float64(supply, call, call.weight, r.parameters)
    r.job.buffers.bias = in_float64(supply, call, call.bias, r.parameters)


cdef void take_fixed(Request* r, Supply* supply) noexcept nogil:
    # Inference: the running statistics.
    cdef const fastbn_call* call = &r.call
    cdef Py_ssize_t n = r.owners
    r.job.buffers.mean = in_float64(supply, call, call.running_mean, n)
    r.job.buffers.var = in_float64(supply, call, call.running_var, n)
    r.job.buffers.invstd = given_or_new(supply, call.invstd, n)


cdef void take_forward(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Buffers* b = &r.job.buffers
    cdef double* mean = given_or_new(supply, call.mean if has_mean(call) else NULL, r.owners)
    cdef double* invstd = given_or_new(supply, call.invstd, r.owners)
    b.running_mean = b.running_var = NULL
    b.var = invstd
    if r.job.problem.group > 1:
        b.group_mean, b.group_invstd = mean, invstd
        return
    b.mean, b.m2, b.invstd = mean, invstd, invstd
    if has_running(call):
        b.running_mean = in_float64(supply, call, call.running_mean, r.groups)
        b.running_var = in_float64(supply, call, call.running_var, r.groups)
    if r.extras.part or (has_running(call) and call.running_var != NULL):
        b.m2 = new_vector(supply, r.owners)


cdef void take_backward(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Buffers* b = &r.job.buffers
    cdef Py_ssize_t n = r.parameters * (1 if of_rows(call) or not r.groups
                                        else r.owners // r.groups)
    b.var = NULL        # so that these are only read
    b.mean = b.group_mean = call.mean
    b.invstd = b.group_invstd = call.invstd
    if not has_mean(call):
        b.mean = new_vector(supply, r.owners)
        if supply.start != NULL:
            memset(b.mean, 0, r.owners * sizeof(double))
    b.dweight = new_vector(supply, n)
    b.dbias = new_vector(supply, n)


cdef void take_statistics(Request* r, Supply* supply) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Buffers* b = &r.job.buffers
    cdef Py_ssize_t n = r.owners
    b.mean, b.m2, b.var = call.mean, call.m2, NULL
    if call.minimum == NULL and call.maximum == NULL:
        return
    b.minimum, b.maximum = new_vector(supply, n), new_vector(supply, n)
    b.low = new_vector(supply, n * r.job.plan.segments)
    b.high = new_vector(supply, n * r.job.plan.segments)


cdef size_t take_vectors(Request* r, double* memory) noexcept nogil:
    # Returns how much memory they take; to know that, NULL will do.
    cdef Supply supply = Supply(memory, 0)
    if r.extras.coefficients != NULL:
        return 0
    take_parameters(r, &supply)
    if r.call.operation == FASTBN_STATISTICS:
        take_statistics(r, &supply)
    elif r.call.operation == FASTBN_INFERENCE:
        take_fixed(r, &supply)
    elif r.call.operation == FASTBN_FORWARD:
        take_forward(r, &supply)
    else:
        take_backward(r, &supply)
    return supply.used * sizeof(double)


cdef void write_vector(const double* vector, Py_ssize_t n, int dtype, void* to) noexcept nogil:
    if to != NULL and to != <const void*>vector:
        kernels_for(dtype).from_float64(vector, n, to)


cdef void fill(double* vector, Py_ssize_t n, double value) noexcept nogil:
    cdef Py_ssize_t i
    if vector != NULL:
        for i in range(n):
            vector[i] = value


cdef void take_nothing(Request* r) noexcept nogil:
    # The results of a tensor of which nothing counts: mean 0, invstd NaN, gradients 0.
    # Running statistics stay.
    cdef const fastbn_call* call = &r.call
    if is_backward(call):
        fill(r.job.buffers.dweight, r.parameters, 0.0)
        fill(r.job.buffers.dbias, r.parameters, 0.0)
        return
    fill(call.mean if has_mean(call) else NULL, r.owners, 0.0)
    if call.operation == FASTBN_STATISTICS:
        fill(call.m2, r.owners, 0.0)
        fill(r.job.buffers.minimum, r.owners, NAN)
        fill(r.job.buffers.maximum, r.owners, NAN)
    else:
        fill(call.invstd, r.owners, NAN)


cdef void write_vectors(const Request* r) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef const Buffers* b = &r.job.buffers
    if call.operation == FASTBN_INFERENCE and r.extras.coefficients == NULL:
        write_vector(b.mean, r.owners, FASTBN_FLOAT64, call.mean)
    elif call.operation == FASTBN_STATISTICS and b.minimum != NULL:
        write_vector(b.minimum, r.owners, call.dtype, call.minimum)
        write_vector(b.maximum, r.owners, call.dtype, call.maximum)
    elif call.operation == FASTBN_FORWARD and has_running(call) and not has_no_statistics(r):
        write_vector(b.running_mean, r.groups, call.vector_dtype, call.running_mean)
        write_vector(b.running_var, r.groups, call.vector_dtype, call.running_var)
    elif is_backward(call):
        write_vector(b.dweight, r.parameters, call.vector_dtype, call.dweight)
        write_vector(b.dbias, r.parameters, call.vector_dtype, call.dbias)


# ---- a part of a batch ---------------------------------------------------------------

cdef void give_own(const Request* r, double* vectors) noexcept nogil:
    # (mean, M2) or (sum dy, sum dy * xhat) of each channel.
    cdef const Buffers* b = &r.job.buffers
    cdef Py_ssize_t n = r.parameters
    memcpy(vectors, b.dbias if is_backward(&r.call) else b.mean, n * sizeof(double))
    memcpy(vectors + n, b.dweight if is_backward(&r.call) else b.m2, n * sizeof(double))


cdef void take_whole(Request* r, double count, const double* vectors) noexcept nogil:
    # The same of the whole batch, in their place.
    cdef Buffers* b = &r.job.buffers
    cdef Py_ssize_t i, n = r.parameters
    r.job.problem.total = count
    memcpy(b.dbias if is_backward(&r.call) else b.mean, vectors, n * sizeof(double))
    memcpy(b.dweight if is_backward(&r.call) else b.m2, vectors + n, n * sizeof(double))
    if not is_backward(&r.call):
        for i in range(n):
            b.var[i] = b.m2[i] / count
