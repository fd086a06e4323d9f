# SPDX-License-Identifier: BSD-3-Clause
# PyTorch's operators of batch norm: their arguments -> a call, their results. Instance norm
# comes here, too: PyTorch makes it of batch norm. May not touch the stack but to read it. A
# part of _dispatcher.pyx.

cdef struct Forward:
    Description x
    int64_t[MOST_AXES] strides
    Vector weight, bias, running_mean, running_var
    bint training
    int saved               # dtype of saved statistics


cdef bint take_forward(const Places* p, Value* stack, Forward* f) noexcept nogil:
    cdef Tensor mean = NULL, var = NULL
    cdef Shape shape
    memset(f, 0, sizeof(Forward))
    if not describe(<Tensor>stack[0], &f.x) or not is_taken(&f.x, f.strides):
        return False
    shape = of_channels(&f.x)
    f.training = p.training < 0 or (stack[p.training] & 0xff) != 0
    if p.running >= 0:
        mean, var = tensor_at(p, stack, p.running), tensor_at(p, stack, p.running + 1)
    if (mean == NULL) != (var == NULL) or (mean == NULL and not f.training):
        return False
    if not (take_vector(optional(stack[1]), &f.x, shape, &f.weight)
            and take_vector(optional(stack[2]), &f.x, shape, &f.bias)
            and take_vector(mean, &f.x, shape, &f.running_mean)
            and take_vector(var, &f.x, shape, &f.running_var)
            and agree(&f.weight, &f.bias) and agree(&f.weight, &f.running_mean)
            and agree(&f.bias, &f.running_mean)
            and agree(&f.running_mean, &f.running_var)):
        return False
    f.saved = saved_dtype(f)
    return True


cdef int saved_dtype(const Forward* f) noexcept nogil:
    # That of the vectors, if there are any: float32 beside half precision.
    if f.running_mean.given != NULL and f.weight.given == NULL and f.bias.given == NULL:
        return f.running_mean.dtype
    return parameter_dtype(&f.x, &f.weight, &f.bias)


cdef bint compute_forward(const Places* p, Value* stack, Forward* f,
                          Tensor* results) noexcept nogil:
    cdef fastbn_call c
    cdef Shape shape = of_channels(&f.x)
    begin_call(&c, FASTBN_BATCH_NORM, &f.x)
    c.operation = FASTBN_FORWARD if f.training else FASTBN_INFERENCE
    c.momentum, c.eps = real(stack[p.momentum]), real(stack[p.eps])
    c.weight, c.bias = f.weight.data, f.bias.data
    c.running_mean, c.running_var = f.running_mean.data, f.running_var.data
    results[0] = new_tensor(f.x.dtype, f.x.ndim, f.x.sizes, f.strides)
    if f.training:
        results[1] = new_statistics(shape, f.saved, &c.mean)
        results[2] = new_statistics(shape, f.saved, &c.invstd)
    else:
        results[1], results[2] = new_vector(f.saved, 0), new_vector(f.saved, 0)
    if results[0] == NULL or results[1] == NULL or results[2] == NULL or (
            torch.data(results[0], &c.out.data)):
        return False
    c.out.strides = <const Py_ssize_t*>f.strides
    if not run(&c):
        return False
    if f.training:
        round_statistics(results[1], shape, f.saved, c.mean)
        round_statistics(results[2], shape, f.saved, c.invstd)
        write_back(&f.running_mean)
        write_back(&f.running_var)
    return True


cdef bint forward_batch(const Places* p, Value* stack, Tensor* results) noexcept nogil:
    cdef Forward f
    cdef bint done = take_forward(p, stack, &f) and compute_forward(p, stack, &f, results)
    drop_vector(&f.weight)
    drop_vector(&f.bias)
    drop_vector(&f.running_mean)
    drop_vector(&f.running_var)
    if done and p.outputs == 4:     # the reserve of another backend
        results[3] = new_vector(5, 0)
    return done


# ---- backward --------------------------------------------------------------------------

cdef struct Backward:
    Description x, dy
    int64_t[MOST_AXES] strides
    Vector weight, dweight, dbias
    bint[3] wanted
    Tensor ordered              # a copy of dy in the order of dx
    double* statistics


cdef bint take_statistics(Value* stack, Backward* b, bint train, double eps) noexcept nogil:
    # The saved ones are behind the running ones.
    cdef Shape shape = of_channels(&b.x)
    cdef int64_t i, n = shape.sizes[0]
    cdef int first = 5 if train else 3
    b.statistics = <double*>malloc(2 * n * sizeof(double))
    if b.statistics == NULL:
        return False
    if not (read_statistics(optional(stack[first]), shape, b.statistics)
            and read_statistics(optional(stack[first + 1]), shape, b.statistics + n)):
        return False
    for i in range(n if not train else 0):
        b.statistics[n + i] = 1.0 / sqrt(b.statistics[n + i] + eps)
    return True


cdef bint compute_backward(const Places* p, Value* stack, Backward* b,
                           Tensor* results) noexcept nogil:
    cdef fastbn_call c
    cdef bint train = (stack[7] & 0xff) != 0
    cdef Shape shape
    memset(b, 0, sizeof(Backward))
    if not (describe(<Tensor>stack[0], &b.dy) and describe(<Tensor>stack[1], &b.x)
            and is_taken(&b.x, b.strides) and take_output_mask(stack[9], b.wanted)
            and same_shape(&b.dy, &b.x) and ordered(&b.dy, b.strides, &b.ordered)):
        return False
    shape = of_channels(&b.x)
    if not (take_vector(tensor_at(p, stack, 2), &b.x, shape, &b.weight)
            and take_statistics(stack, b, train, real(stack[8]))):
        return False
    if b.wanted[1] and not new_gradient(&b.x, &b.weight, shape, &b.dweight, &results[1]):
        return False
    if b.wanted[2] and not new_gradient(&b.x, &b.weight, shape, &b.dbias, &results[2]):
        return False
    begin_call(&c, FASTBN_BATCH_NORM, &b.x)
    c.operation = FASTBN_BACKWARD if train else FASTBN_BACKWARD_INFERENCE
    c.eps = real(stack[8])
    c.weight, c.dweight, c.dbias = b.weight.data, b.dweight.data, b.dbias.data
    c.mean, c.invstd = b.statistics, b.statistics + shape.sizes[0]
    if not run_backward(&c, &b.x, &b.dy, b.strides, results):
        return False
    write_back(&b.dweight)
    write_back(&b.dbias)
    return True


cdef bint backward_batch(const Places* p, Value* stack, Tensor* results) noexcept nogil:
    cdef Backward b
    cdef bint done = compute_backward(p, stack, &b, results)
    drop_vector(&b.weight)
    drop_vector(&b.dweight)
    drop_vector(&b.dbias)
    drop(b.ordered)
    free(b.statistics)
    if done and not b.wanted[0]:
        drop(results[0])
        results[0] = NULL
    return done
