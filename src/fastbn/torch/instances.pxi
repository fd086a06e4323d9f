# SPDX-License-Identifier: BSD-3-Clause
# PyTorch's operators of layer and group norm: their arguments -> a call, their results. The
# two differ in where arguments stand, and in what has statistics. May not touch the stack but
# to read it. A part of _dispatcher.pyx.

cdef struct Instances:
    int norm
    int32_t features            # of layer norm: so many last axes are normalised
    int64_t groups              # of group norm
    Description x, dy
    int64_t[MOST_AXES] strides  # of the results
    Shape parameters
    Shape owners                # of statistics
    int64_t[MOST_AXES] owner_sizes
    Vector weight, bias, dweight, dbias
    Tensor ordered_x, ordered_dy
    double* statistics
    bint[3] wanted


cdef bint take_layer(Tensor x, Value sizes, Instances* f) noexcept nogil:
    # PyTorch's own kernel, too, reads a copy of what is not contiguous.
    cdef Value size
    cdef size_t n = 0, i
    memset(f, 0, sizeof(Instances))
    f.norm = FASTBN_LAYER_NORM
    if not describe(x, &f.x) or not has_values(&f.x) or torch.list_size(<void*>sizes, &n):
        return False
    if not 1 <= n <= <size_t>f.x.ndim:
        return False
    f.features = <int32_t>n
    f.parameters = Shape(n, f.x.sizes + f.x.ndim - n)
    for i in range(n):
        if torch.list_item(<void*>sizes, i, &size) or <int64_t>size != f.parameters.sizes[i]:
            return False
    f.owners = Shape(f.x.ndim, &f.owner_sizes[0])
    for i in range(<size_t>f.x.ndim):
        f.owner_sizes[i] = f.x.sizes[i] if i + n < <size_t>f.x.ndim else 1
    strides_of(&f.x, False, f.strides)
    return ordered(&f.x, f.strides, &f.ordered_x)


cdef bint take_group(Tensor x, const Value* sizes, int64_t groups, Instances* f) noexcept nogil:
    # `sizes` are what PyTorch has found x to be: samples, channels, values of a channel.
    memset(f, 0, sizeof(Instances))
    f.norm, f.groups = FASTBN_GROUP_NORM, groups
    if not describe(x, &f.x) or not is_taken(&f.x, f.strides):
        return False
    if f.x.sizes[0] != <int64_t>sizes[0] or f.x.sizes[1] != <int64_t>sizes[1] or (
            count_in(Shape(f.x.ndim - 2, f.x.sizes + 2)) != <int64_t>sizes[2]):
        return False
    f.parameters = of_channels(&f.x)
    f.owners = Shape(2, &f.owner_sizes[0])
    f.owner_sizes[0], f.owner_sizes[1] = f.x.sizes[0], groups
    return True


cdef bint take_parameters(Tensor weight, Tensor bias, Instances* f) noexcept nogil:
    return (take_vector(weight, &f.x, f.parameters, &f.weight)
            and take_vector(bias, &f.x, f.parameters, &f.bias) and agree(&f.weight, &f.bias))


cdef void begin_instances(fastbn_call* c, const Instances* f) noexcept nogil:
    begin_call(c, f.norm, &f.x)
    c.normalized_ndim, c.groups = f.features, f.groups
    c.weight, c.bias = f.weight.data, f.bias.data


cdef bint compute_instances(Instances* f, double eps, Tensor* results) noexcept nogil:
    cdef fastbn_call c
    cdef int saved = parameter_dtype(&f.x, &f.weight, &f.bias)
    begin_instances(&c, f)
    c.operation, c.eps = FASTBN_FORWARD, eps
    results[0] = new_tensor(f.x.dtype, f.x.ndim, f.x.sizes, f.strides)
    results[1] = new_statistics(f.owners, saved, &c.mean)
    results[2] = new_statistics(f.owners, saved, &c.invstd)
    if results[0] == NULL or results[1] == NULL or results[2] == NULL or (
            torch.data(results[0], &c.out.data)):
        return False
    c.out.strides = <const Py_ssize_t*>f.strides
    return (run(&c) and round_statistics(results[1], f.owners, saved, c.mean)
            and round_statistics(results[2], f.owners, saved, c.invstd))


cdef bint differentiate_instances(Tensor dy, Tensor mean, Tensor invstd, Value output_mask,
                                  Instances* f, Tensor* results) noexcept nogil:
    cdef fastbn_call c
    cdef int64_t n = count_in(f.owners)
    cdef const Vector* bias = &f.bias if f.norm == FASTBN_LAYER_NORM else &f.weight
    if not (describe(dy, &f.dy) and take_output_mask(output_mask, f.wanted)
            and same_shape(&f.dy, &f.x) and ordered(&f.dy, f.strides, &f.ordered_dy)):
        return False
    f.statistics = <double*>malloc(2 * n * sizeof(double))
    if f.statistics == NULL or not (
            read_statistics(mean, f.owners, f.statistics)
            and read_statistics(invstd, f.owners, f.statistics + n)):
        return False
    if f.wanted[1] and not new_gradient(&f.x, &f.weight, f.parameters, &f.dweight, &results[1]):
        return False
    if f.wanted[2] and not new_gradient(&f.x, bias, f.parameters, &f.dbias, &results[2]):
        return False
    begin_instances(&c, f)
    c.operation, c.bias = FASTBN_BACKWARD, NULL
    c.dweight, c.dbias = f.dweight.data, f.dbias.data
    c.mean, c.invstd = f.statistics, f.statistics + n
    if not run_backward(&c, &f.x, &f.dy, f.strides, results):
        return False
    write_back(&f.dweight)
    write_back(&f.dbias)
    return True


cdef bint end_instances(Instances* f, bint done, bint wants_first, Tensor* results) noexcept nogil:
    drop_vector(&f.weight)
    drop_vector(&f.bias)
    drop_vector(&f.dweight)
    drop_vector(&f.dbias)
    drop(f.ordered_x)
    drop(f.ordered_dy)
    free(f.statistics)
    if done and not wants_first:
        drop(results[0])
        results[0] = NULL
    return done


# ---- the operators -----------------------------------------------------------------------

cdef bint forward_layer(const Places* p, Value* stack, Tensor* results) noexcept nogil:
    cdef Instances f
    cdef bint done = (
        take_layer(<Tensor>stack[0], stack[1], &f)
        and take_parameters(optional(stack[2]), optional(stack[3]), &f)
        and compute_instances(&f, real(stack[4]), results))
    return end_instances(&f, done, True, results)


cdef bint backward_layer(const Places* p, Value* stack, Tensor* results) noexcept nogil:
    cdef Instances f
    cdef bint done = (
        take_layer(<Tensor>stack[1], stack[2], &f)
        and take_parameters(optional(stack[5]), optional(stack[6]), &f)
        and differentiate_instances(<Tensor>stack[0], <Tensor>stack[3], <Tensor>stack[4], stack[7],
                                    &f, results))
    return end_instances(&f, done, f.wanted[0], results)


cdef bint forward_group(const Places* p, Value* stack, Tensor* results) noexcept nogil:
    cdef Instances f
    cdef bint done = (
        take_group(<Tensor>stack[0], stack + 3, <int64_t>stack[6], &f)
        and take_parameters(optional(stack[1]), optional(stack[2]), &f)
        and compute_instances(&f, real(stack[7]), results))
    return end_instances(&f, done, True, results)


cdef bint backward_group(const Places* p, Value* stack, Tensor* results) noexcept nogil:
    cdef Instances f
    cdef bint done = (
        take_group(<Tensor>stack[1], stack + 5, <int64_t>stack[8], &f)
        and take_parameters(optional(stack[4]), NULL, &f)
        and differentiate_instances(<Tensor>stack[0], <Tensor>stack[2], <Tensor>stack[3], stack[9],
                                    &f, results))
    return end_instances(&f, done, f.wanted[0], results)
