# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3
"""Eager calls: arrays over the memory of tensors, and the functions of fastbn on them.

In Cython, since PyTorch needs 4 us for a small call, of which Python would take most.
`call` and `t` are what `_call.Call` and `_call.Tensors` name, or plain tuples like them.

May: allocate what is returned. May not: copy a tensor, check an argument.
"""
cimport numpy as cnp
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

import numpy as np
import torch
from torch import Tensor, from_numpy
from torch._C import _get_tracing_state, _len_torch_dispatch_stack
from torch._C._functorch import is_legacy_batchedtensor, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter

import fastbn
from fastbn.torch import _formulas
from fastbn.torch._call import empty_output

cnp.import_array()

include "tensors.pxi"


cpdef bint is_transformed() except -1:
    """Say whether `torch.func` or forward mode is at work."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


cpdef bint is_plain(x) except -1:
    """Say whether `x` is memory on the CPU, and nobody watches what is done with it."""
    cdef object kind = type(x)
    return ((kind is Tensor or kind is Parameter) and x.is_cpu
            and _len_torch_dispatch_stack() == 0 and _get_tracing_state() is None
            and not is_transformed())


def normalise(call, t):
    """Return `y`."""
    x, weight, bias, residual, _, _ = t
    if torch.is_grad_enabled() and (
            x.requires_grad or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)):
        return apply(call, *t)
    return forward(call, t)[0]


cpdef tuple forward(call, t):
    """Return `y`, and as arrays what backward needs: mean (not of rms) and invstd."""
    norm, sizes, training, momentum, eps, activation, slope = call
    x, weight, bias, residual, running_mean, running_var = t
    y = empty_output(norm, x)
    follow_threads()
    fused = fusion(activation, slope, residual)
    out = fused["out"] = array(y)
    x, weight, bias = array(x), array(weight), array(bias)
    if norm == "batch":
        saved = fastbn.batch_norm_forward(
            x, weight, bias, running_mean=array(running_mean), running_var=array(running_var),
            training=training, momentum=momentum, eps=eps, **fused)
    elif norm == "layer":
        saved = fastbn.layer_norm_forward(x, sizes, weight, bias, eps, **fused)
    elif norm == "rms":
        saved = fastbn.rms_norm_forward(x, sizes, weight, eps, **fused)
    elif norm == "group":
        saved = fastbn.group_norm_forward(x, sizes[0], weight, bias, eps, **fused)
    else:
        saved = fastbn.instance_norm_forward(
            x, weight, bias, running_mean=array(running_mean), running_var=array(running_var),
            momentum=momentum, eps=eps, **fused)
    return y, *saved[1:]


cpdef list backward(call, t, dy, saved):
    """Return dx, dweight, dbias and dresidual; None for what the call had not."""
    norm, sizes, training, _, _, activation, slope = call
    x, weight, bias, residual = t[:4]
    dx = empty_output(norm, x)
    follow_threads()
    fused = fusion(activation, slope, residual)
    if fused and norm != "rms":
        fused["bias"] = array(bias)
    fused["out"] = array(dx)
    given = array(dy), array(x), *saved
    scale = array(weight)
    if norm == "batch":
        found = fastbn.batch_norm_backward(*given, scale, training=training, **fused)
    elif norm == "layer":
        found = fastbn.layer_norm_backward(*given, sizes, scale, **fused)
    elif norm == "rms":
        found = fastbn.rms_norm_backward(*given, sizes, scale, **fused)
        found = *found[:2], None, *found[2:]
    elif norm == "group":
        found = fastbn.group_norm_backward(*given, sizes[0], scale, **fused)
    else:
        found = fastbn.instance_norm_backward(*given, scale, **fused)
    return [dx, like(found[1], weight), like(found[2], bias),
            like(found[3], residual) if len(found) == 4 else None]


cdef int follow_threads() except -1:
    # OpenMP has a number of threads for each Python thread: this makes it PyTorch's.
    torch.get_num_threads()
    return 0


cdef dict fusion(activation, slope, residual):
    # What the fused functions are told, where something is fused.
    if activation is None and residual is None:
        return {}
    return {"activation": activation, "negative_slope": slope, "residual": array(residual)}


cdef object like(gradient, tensor):
    # A gradient as a tensor of the dtype of what it belongs to.
    if tensor is None:
        return None
    if gradient.dtype is bfloat16:
        return from_numpy(gradient.view(np.uint16)).view(torch.bfloat16)
    found = from_numpy(gradient)
    return found if found.dtype is tensor.dtype else found.to(tensor.dtype)


class Normalise(torch.autograd.Function):
    """`normalise` with derivatives."""

    @staticmethod
    def forward(ctx, call, *t):
        y, *ctx.statistics = forward(call, t)
        ctx.call, ctx.has_residual = call, t[3] is not None
        # Only for an activation does backward compute its argument again.
        ctx.save_for_backward(*t[:3], None if call[5] is None else t[3])
        return y

    @staticmethod
    def backward(ctx, dy):
        t = ctx.saved_tensors
        if torch.is_grad_enabled() or not is_plain(dy) or is_legacy_batchedtensor(dy):
            gradients = _formulas.gradients(ctx.call, t, dy, [*map(from_numpy, ctx.statistics)])
        else:
            gradients = backward(ctx.call, t, dy, ctx.statistics)
        if ctx.has_residual and t[3] is None:
            gradients[3] = dy
        return None, *gradients, None, None


# Past `Function.apply`, which makes ready for transformations: there are none here.
cdef object apply = super(torch.autograd.Function, Normalise).apply
