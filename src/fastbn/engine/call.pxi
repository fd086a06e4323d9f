# SPDX-License-Identifier: BSD-3-Clause
# A call of fastbn.h -> a request: checked, its problem and its operands found. The one door
# for NumPy, PyTorch and C. It refuses what a view cannot describe, where a binding may copy.
# May not allocate, touch a tensor. A part of core.pyx.

cdef void settle_tensor(Request* r, const fastbn_tensor* tensor, int split,
                        Operand* operand) noexcept nogil:
    cdef Py_ssize_t gapless[MAX_DIMENSIONS]
    cdef Axes axes = axes_of_tensor(&r.call, tensor, gapless)
    operand[0] = operand_of(&axes, &r.order, split, &r.job.problem.view, tensor.data)


cdef void settle_activation(Request* r, const Operand* dresidual) noexcept nogil:
    # `dresidual` is NULL, or where dz is wanted. Else that of an activation whose slope takes
    # longer than a write is written to `out`, which is written again later. Not where x is,
    # and not where elements have fewer bits than what is computed with.
    cdef Buffers* b = &r.job.buffers
    r.job.plan.fused = r.call.activation != FASTBN_IDENTITY or has_residual(&r.call)
    r.job.plan.dz_first = False
    if not is_backward(&r.call):
        return
    b.dy_of_y = b.dy
    r.job.plan.dz_first = dresidual != NULL or (
        r.kernels.activations[r.call.activation].dz_first and b.out.data != b.x.data
        and r.kernels.elem_size == r.kernels.real_size)
    if r.job.plan.dz_first:
        b.dy = dresidual[0] if dresidual != NULL else b.out
        r.job.plan.fused = False


cdef void settle_operands(Request* r, const Axes* x, int split) noexcept nogil:
    cdef fastbn_call* call = &r.call
    cdef Buffers* b = &r.job.buffers
    cdef bint backward = is_backward(call), adds = has_residual(call)
    cdef Py_ssize_t channels = 1 if of_rows(call) else r.parameters
    cdef Operand dresidual
    settle_view(x, &r.order, split, channels, &r.job.problem.view)
    settle_tensor(r, &call.x, split, &b.x)
    if adds:
        settle_tensor(r, &call.residual, split, &b.residual)
    if backward:
        settle_tensor(r, &call.dy, split, &b.dy)
    if backward and adds:
        settle_tensor(r, &call.dresidual, split, &dresidual)
    if call.operation != FASTBN_STATISTICS:
        settle_tensor(r, &call.out, split, &b.out)
    settle_activation(r, &dresidual if backward and adds else NULL)
    if of_rows(call):
        turn_to_features(&r.job.problem, b)
    if r.empty:
        r.job.problem.view.outer = 0


cdef void state_problem(Request* r, int instances) noexcept nogil:
    cdef const fastbn_call* call = &r.call
    cdef Problem* p = &r.job.problem
    p.instances, p.channel_parts, p.period = instances, 1, 1
    p.group = 1
    if of_instances(call) and r.groups:
        p.group = maximum(1, r.parameters // r.groups)
    p.centred = has_mean(call)
    p.training = call.operation != FASTBN_BACKWARD_INFERENCE
    p.inverted = r.extras.inverted
    p.activation, p.negative_slope = call.activation, call.negative_slope
    p.eps, p.momentum = call.eps, call.momentum


cdef int understand(const fastbn_call* given, const Extras* extras, Request* r) noexcept nogil:
    cdef Py_ssize_t gapless[MAX_DIMENSIONS]
    cdef Axes x
    cdef uint64_t breaks = 0
    cdef int code
    r.fault = Fault(FASTBN_OK, ARG_NONE, ARG_NONE)
    r.memory = NULL
    r.nothing, r.counted, r.job.problem.total = False, 0, 0.0
    memset(&r.job.buffers, 0, sizeof(Buffers))
    if extras != NULL:
        r.extras = extras[0]
    else:
        memset(&r.extras, 0, sizeof(Extras))
    code = take_call(given, r)
    if code == FASTBN_OK:
        code = check_call(r)
    if code == FASTBN_OK and is_image(&r.call):
        return understand_image(r)
    if code == FASTBN_OK and not r.empty:
        code = check_memory(r)
    if code != FASTBN_OK:
        return code
    x = axes_of_tensor(&r.call, &r.call.x, gapless)
    code = order_axes(r, &x)
    if code != FASTBN_OK:
        return code
    state_problem(r, r.call.shape[r.call.sample_axis] if r.order.instances else 1)
    if not r.empty:
        code = check_tensors(r, &breaks)
    if code == FASTBN_OK:
        settle_operands(r, &x, split_at(breaks))
    return code
