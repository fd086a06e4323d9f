# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, boundscheck=False, wraparound=False
"""Eager calls: the functions of fastbn.h on the memory of tensors.

In Cython, and past NumPy, since what a call touches beside its data counts twice in a
network: the convolution before it has emptied the caches. `call` and `t` are what
`_call.Call` and `_call.Tensors` name, or plain tuples like them.

May: allocate what is returned; copy what is in another memory order than the result.
May not: raise an error of its own. What is refused (`RefusedError`), PyTorch's functions get.
"""
from cpython.pycapsule cimport PyCapsule_GetPointer
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset

import torch
from torch import Tensor, empty, empty_like, float32, float64, get_num_threads, is_grad_enabled
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastbn cimport *
from fastbn._threads cimport team_for
from fastbn.engine cimport core
from fastbn.engine.request cimport INTERRUPTED, NO_MEMORY, Extras, Request

from fastbn._types import ACTIVATIONS

from fastbn.torch import _formulas
from fastbn.torch._call import Tensors, empty_output, statistics_shape

cdef dict NORMS = {
    "batch": FASTBN_BATCH_NORM, "layer": FASTBN_LAYER_NORM, "rms": FASTBN_RMS_NORM,
    "group": FASTBN_GROUP_NORM, "instance": FASTBN_INSTANCE_NORM}


class RefusedError(Exception):
    """The kernels do not take these arguments; nothing has been written."""

    def __init__(self):
        super().__init__("fastbn's kernels do not take these arguments")


include "tensors.pxi"


cdef bint are_watched() except -1:
    # Modes, tracers and transformations want to see PyTorch's functions, or operators.
    return (_len_torch_function_stack() or _len_torch_dispatch_stack()
            or forward_ad._current_level >= 0 or peek_interpreter_stack() is not None
            or _get_tracing_state() is not None)


def are_plain(tuple things):
    """Say whether these are tensors without functions of their own, and nobody looks on."""
    for thing in things:
        if not (type(thing) is Tensor or type(thing) is Parameter):
            return False
    return not are_watched()


cdef int refuse_watched(tuple tensors) except -1:
    for tensor in tensors:
        if not (tensor is None or type(tensor) is Tensor or type(tensor) is Parameter):
            raise RefusedError
    if are_watched():
        raise RefusedError
    return 0


# ---- what is described -------------------------------------------------------------

cdef struct Shape:
    const int64_t* shape
    int ndim


cdef bint same_sizes(const int64_t* a, int n, const int64_t* b, int m) noexcept:
    cdef int axis
    if n != m:
        return False
    for axis in range(n):
        if a[axis] != b[axis]:
            return False
    return True


cdef int take_sizes(sizes, const Description* x, fastbn_call* c, Shape* of_parameters) except -1:
    # Of parameters there is one number for each channel, or for each feature.
    cdef int i, n = len(sizes)
    cdef bint features = c.norm == FASTBN_LAYER_NORM or c.norm == FASTBN_RMS_NORM
    if x.ndim < (n if features else 2):
        raise RefusedError
    if features:
        c.normalized_ndim = n
        of_parameters.shape, of_parameters.ndim = x.shape + x.ndim - n, n
        for i in range(n):
            if of_parameters.shape[i] != sizes[i]:
                raise RefusedError
        return 0
    of_parameters.shape, of_parameters.ndim = x.shape + 1, 1
    if c.norm == FASTBN_GROUP_NORM:
        if not 1 <= sizes[0] <= x.shape[1]:
            raise RefusedError
        c.groups = sizes[0]
    return 0


cdef int take_call(call, tensor, Description* x, Shape* of_parameters, fastbn_call* c) except -1:
    # All but tensors and vectors.
    norm, sizes, _, momentum, eps, activation, slope = call
    describe(tensor, x)
    memset(c, 0, sizeof(fastbn_call))
    c.struct_size = sizeof(fastbn_call)
    c.norm, c.dtype = NORMS[norm], dtype_of(x)
    c.ndim, c.shape = x.ndim, <const Py_ssize_t*>x.shape
    c.channel_axis = 1
    if activation not in ACTIVATIONS:
        raise RefusedError
    c.activation, c.negative_slope = ACTIVATIONS[activation], slope
    c.momentum = momentum
    if eps is None and c.norm == FASTBN_RMS_NORM:   # float32's for half precision, too
        eps = core.default_rms_eps(c.dtype)
    if eps is None:
        raise RefusedError
    c.eps = eps
    return take_sizes(sizes, x, c, of_parameters)


cdef int common_type(tuple vectors) except -1:
    # One that the kernels know, and that all vectors can be converted to.
    for vector in vectors:
        if isinstance(vector, Tensor) and vector.dtype is float64:
            return FASTBN_FLOAT64
    return FASTBN_FLOAT32


cdef object vector_of(vector, const Shape* shape, const fastbn_call* c, void** memory):
    # Gapless, of the call's dtype for vectors: the tensor itself, where it is so. What it
    # may be beside x is what PyTorch allows: its dtype, or float32 beside half precision.
    cdef Description d
    if vector is None:
        return None
    describe(vector, &d)
    if not (dtype_of(&d) == c.dtype
            or (dtype_of(&d) == FASTBN_FLOAT32 and c.dtype != FASTBN_FLOAT64)):
        raise RefusedError
    if not same_sizes(d.shape, d.ndim, shape.shape, shape.ndim):
        raise RefusedError
    if dtype_of(&d) != c.vector_dtype or not gapless(&d, False):
        dtype = float64 if c.vector_dtype == FASTBN_FLOAT64 else float32
        vector = vector.detach().to(dtype).contiguous()
        describe(vector, &d)
    memory[0] = d.data + d.offset
    return vector


cdef int take_statistics(statistics, fastbn_call* c) except -1:
    # rms has no mean: the first row is the last one.
    cdef Description d
    describe(statistics, &d)
    c.mean = c.invstd = <double*>(d.data + d.offset)
    if c.norm != FASTBN_RMS_NORM:
        c.invstd += d.strides[0]
    return 0


cdef extern from "Python.h":
    int leave_signal_error "PyErr_CheckSignals"() noexcept


cdef int signalled() noexcept with gil:
    # What a handler raises waits in the thread's state for the end of the call.
    return leave_signal_error()


cdef object view_of_mask(mask, x):
    # In the shape of x, whose channels share it.
    return None if mask is None else mask.unsqueeze(1).expand(x.shape)


cdef int take_mask(view, Description* d, fastbn_call* c) except -1:
    if view is not None:
        describe(view, d)
        c.mask.data, c.mask.strides = d.data + d.offset, <const Py_ssize_t*>d.strides
    return 0


# ---- running -----------------------------------------------------------------------

cdef int place(tensor, const Description* x, Description* d, fastbn_tensor* to) except -1:
    if tensor is None:
        return 0
    describe(tensor, d)
    if (d.code != x.code or d.bits != x.bits
            or not same_sizes(d.shape, d.ndim, x.shape, x.ndim)):
        raise RefusedError
    to.data, to.strides = d.data + d.offset, <const Py_ssize_t*>d.strides
    return 0


cdef int attempt(fastbn_call* c, const Description* like, x, dy, residual, out,
                 dresidual) except? -1:
    cdef Description[5] d
    cdef Extras extras
    cdef Request request
    cdef int code, threads
    place(x, like, &d[0], &c.x)
    place(dy, like, &d[1], &c.dy)
    place(residual, like, &d[2], &c.residual)
    place(out, like, &d[3], &c.out)
    place(dresidual, like, &d[4], &c.dresidual)
    memset(&extras, 0, sizeof(Extras))
    extras.new_outputs, extras.interrupted = True, signalled
    code = core.understand(c, &extras, &request)
    if code != FASTBN_OK or request.empty:
        return code if code != FASTBN_OK else FASTBN_BAD_SHAPE
    threads = team_for(core.work_of(&request))   # PyTorch's threads do not sleep
    with nogil:
        code = core.run(&request, threads)
        if code == FASTBN_OK:
            core.commit(&request)
        core.release(&request)
    return -1 if code == INTERRUPTED else code


cdef object output_for(norm, x, const Description* d):
    # `empty_output`, by the short way where that leads there.
    if gapless(d, False) or (norm in ("batch", "group") and gapless(d, True)):
        return empty_like(x)
    return empty_output(norm, x)


cdef object ordered_as(tensor, out):
    if tensor is None or (tensor.stride() == out.stride()
                          and tensor.data_ptr() % tensor.element_size() == 0):
        return tensor
    return empty_like(out).copy_(tensor)


cdef int attempt_in_order(fastbn_call* c, const Description* like, x, dy, residual, out,
                          dresidual) except? -1:
    # With copies in the order of the result; that of features is the order of axes.
    target, dtarget = out, dresidual
    if c.normalized_ndim:
        target = out.contiguous()
        dtarget = None if dresidual is None else dresidual.contiguous()
    code = attempt(c, like, ordered_as(x, target), ordered_as(dy, target),
                   ordered_as(residual, target), target, dtarget)
    for given, written in (out, target), (dresidual, dtarget):
        if given is not written:
            given.copy_(written)
    return code


cdef int compute(fastbn_call* c, const Description* like, x, dy, residual, out,
                 dresidual) except -1:
    get_num_threads()   # makes OpenMP's number, one for each Python thread, PyTorch's
    code = attempt(c, like, x, dy, residual, out, dresidual)
    if code == FASTBN_BAD_STRIDES or code == FASTBN_MISALIGNED:
        code = attempt_in_order(c, like, x, dy, residual, out, dresidual)
    if code == NO_MEMORY:
        raise MemoryError("no memory for the workspace")
    if code != FASTBN_OK:
        raise RefusedError
    return 0


cpdef tuple forward(call, t, bint keeps=True):
    """Return `y`; and mean and invstd as one tensor of float64, if backward will need it."""
    norm, sizes, training, _, _, _, _ = call
    x, weight, bias, residual, running_mean, running_var, mask = t
    cdef Description like, of_mask
    cdef Shape shape
    cdef fastbn_call c
    take_call(call, x, &like, &shape, &c)
    c.operation = FASTBN_FORWARD if training else FASTBN_INFERENCE
    c.vector_dtype = common_type((weight, bias, running_mean, running_var))
    weight = vector_of(weight, &shape, &c, <void**>&c.weight)
    bias = vector_of(bias, &shape, &c, <void**>&c.bias)
    mean = vector_of(running_mean, &shape, &c, &c.running_mean)
    var = vector_of(running_var, &shape, &c, &c.running_var)
    statistics = None
    if keeps:
        statistics = empty(statistics_shape(norm, x, sizes), dtype=float64, device="cpu")
        take_statistics(statistics, &c)
    view = view_of_mask(mask, x)    # whose strides the call has
    take_mask(view, &of_mask, &c)
    y = output_for(norm, x, &like)
    compute(&c, &like, x, None, residual, y, None)
    if training:
        for kept, new in (running_mean, mean), (running_var, var):
            if kept is not new:
                kept.detach().copy_(new)
    return y, statistics


cpdef list backward(call, t, dy, statistics):
    """Return dx, dweight, dbias and dresidual; None for what the call had not."""
    norm, _, training, _, _, _, _ = call
    x, weight, bias, residual, _, _, mask = t
    cdef Description like, of_mask
    cdef Shape shape
    cdef fastbn_call c
    take_call(call, x, &like, &shape, &c)
    c.operation = FASTBN_BACKWARD if training else FASTBN_BACKWARD_INFERENCE
    c.vector_dtype = common_type((weight, bias))
    own_weight = vector_of(weight, &shape, &c, <void**>&c.weight)
    own_bias = vector_of(bias, &shape, &c, <void**>&c.bias)
    dweight = None if weight is None else empty_like(own_weight)
    dbias = None if bias is None else empty_like(own_bias)
    vector_of(dweight, &shape, &c, &c.dweight)
    vector_of(dbias, &shape, &c, &c.dbias)
    take_statistics(statistics, &c)
    view = view_of_mask(mask, x)
    take_mask(view, &of_mask, &c)
    dx = output_for(norm, x, &like)
    dresidual = None if residual is None else empty_like(dx)
    compute(&c, &like, x, dy, residual, dx, dresidual)
    return [dx, typed_as(dweight, weight), typed_as(dbias, bias), dresidual]


cdef object typed_as(gradient, tensor):
    if gradient is None or gradient.dtype is tensor.dtype:
        return gradient
    return gradient.to(tensor.dtype)


# ---- autograd ------------------------------------------------------------------------

cdef inline bint requires_grad(tensor):
    return tensor is not None and tensor.requires_grad


def normalise(call, t):
    """Return `y`."""
    x, weight, bias, residual, mean, var, _ = t
    refuse_watched(t)
    if not is_grad_enabled():
        return forward(call, t, False)[0]
    if requires_grad(mean) or requires_grad(var):
        raise RefusedError  # they have no gradients, as PyTorch says
    if (x.requires_grad or requires_grad(weight) or requires_grad(bias)
            or requires_grad(residual)):
        return apply(call, *t)
    return forward(call, t, False)[0]


class Normalise(torch.autograd.Function):
    """`normalise` with derivatives."""

    @staticmethod
    def forward(ctx, call, *t):
        y, ctx.statistics = forward(call, t)
        ctx.call, ctx.has_residual = call, t[3] is not None
        # Only for an activation does backward compute its argument again; a mask is read
        # beside it.
        ctx.save_for_backward(*t[:3], None if call[5] is None and t[6] is None else t[3],
                              None, None, t[6])
        return y

    @staticmethod
    def backward(ctx, dy):
        t = ctx.saved_tensors
        try:
            if is_grad_enabled():
                raise RefusedError
            refuse_watched((dy,))
            gradients = backward(ctx.call, t, dy, ctx.statistics)
        except RefusedError:     # dy may be batched, too, and has no memory of its own then
            gradients = _formulas.gradients(ctx.call, Tensors(*t), dy, ctx.statistics)
        if ctx.has_residual and t[3] is None:
            gradients[3] = dy
        return None, *gradients, None, None, None


# Past `Function.apply`, which makes ready for transformations: there are none here.
cdef object apply = super(torch.autograd.Function, Normalise).apply
