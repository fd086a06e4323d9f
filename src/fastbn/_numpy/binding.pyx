# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, cdivision=True
"""NumPy's arrays -> a call of fastbn.h, and its faults -> exceptions.

    checks.pxi      what only arrays can be wrong in: types, shapes, flags, layouts
    errors.pxi      the engine's faults in Python's words
    tensors.pxi     arrays as tensors of the call; copies of what it cannot describe
    masks.pxi       masks and lengths
    vectors.pxi     parameters and statistics as vectors of the call
    prepared.pxi    what inference keeps from call to call
    images.pxi      integers, and other layouts
    here            the operations

Functions take arrays in one order: dy, x, mean, invstd, weight, bias, running_mean,
running_var, residual, out; then options in that of `functional`.

May check arrays, allocate, copy, choose a number of threads, ask for signals. May not compute
with elements, nor repeat a rule of the engine.
"""
cimport cython
cimport numpy as cnp
from libc.stdint cimport int32_t, int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

import numbers
import operator
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from fastbn cimport *
from fastbn._threads cimport team_was, threads_for
from fastbn.engine cimport core
from fastbn.engine.request cimport (
    ARG_AXIS, ARG_BIAS, ARG_DRESIDUAL, ARG_DY, ARG_EPS, ARG_INVSTD, ARG_LENGTHS, ARG_MASK,
    ARG_MEAN, ARG_NONE, ARG_OUT, ARG_RESIDUAL,
    ARG_RUNNING_MEAN, ARG_RUNNING_VAR, ARG_WEIGHT, ARG_X, ARGUMENTS, INTERRUPTED, MAX_DIMENSIONS,
    NO_AXIS, NO_MEMORY, Axes, Extras, Memory, Request)
from fastbn.kernels.problem cimport KernelTable

from fastbn._types import ACTIVATIONS

cnp.import_array()

cdef extern from "Python.h":
    int PyErr_CheckSignals() except -1
    int leave_signal_error "PyErr_CheckSignals"() noexcept

cdef extern from "numpy/ndarraytypes.h":
    enum:
        NPY_HALF
        NPY_USERDEF

cdef enum:
    OTHER = 0       # no dtype of fastbn.h

cdef int bfloat16_number = -1       # ml_dtypes gets it from NumPy, once it is imported


cdef int bfloat16_dtype(int number) except -1:
    global bfloat16_number
    ml_dtypes = sys.modules.get("ml_dtypes")
    if ml_dtypes is not None:
        bfloat16_number = np.dtype(ml_dtypes.bfloat16).num
    return FASTBN_BFLOAT16 if number == bfloat16_number else OTHER


cdef int dtype_of(cnp.ndarray a) except -1:
    # That of fastbn.h.
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return FASTBN_FLOAT32
    if number == cnp.NPY_DOUBLE:
        return FASTBN_FLOAT64
    if number == NPY_HALF:
        return FASTBN_FLOAT16
    if number == bfloat16_number:
        return FASTBN_BFLOAT16
    return bfloat16_dtype(number) if number >= NPY_USERDEF else OTHER


cdef int type_number(int dtype) noexcept:
    # NumPy's, of one of fastbn.h.
    if dtype == FASTBN_FLOAT32:
        return cnp.NPY_FLOAT
    if dtype == FASTBN_FLOAT64:
        return cnp.NPY_DOUBLE
    return NPY_HALF if dtype == FASTBN_FLOAT16 else bfloat16_number


include "checks.pxi"
include "errors.pxi"
include "tensors.pxi"
include "vectors.pxi"
include "masks.pxi"
include "prepared.pxi"


# ---- what all operations do ----------------------------------------------------------

cdef int signalled() noexcept with gil:
    # Runs Python's handlers of signals, on the main thread only. What one raises
    # waits in the thread's state for the end of the call.
    return leave_signal_error()


cdef void new_call(Frame* f, cnp.ndarray x, int norm, int operation) noexcept:
    memset(&f.call, 0, sizeof(fastbn_call))
    memset(&f.extras, 0, sizeof(Extras))
    f.extras.interrupted = signalled
    f.call.struct_size = sizeof(fastbn_call)
    f.call.norm, f.call.operation, f.call.dtype = norm, operation, dtype_of(x)
    f.call.ndim, f.call.shape = x.ndim, <const Py_ssize_t*>x.shape


cdef int take_activation(Frame* f, activation, negative_slope) except -1:
    f.call.activation = checked_activation(activation)
    f.call.negative_slope = checked_finite(negative_slope, "negative_slope")
    return 0


cdef int run_request(Frame* f) except -1:
    # Once the engine has understood the call.
    cdef Request* r = &f.request
    cdef Py_ssize_t work = core.work_of(r)
    cdef int threads = threads_for(work), status
    with nogil:
        status = core.run(r, threads)
    if threads > 1:
        team_was(r.loss, work)
    if status == NO_MEMORY:
        raise MemoryError("no memory for the workspace")
    return -1 if status == INTERRUPTED else 0


cdef int compute(Frame* f, Arrays a) except -1:
    cdef Request* r = &f.request
    if a.mode == CHECKED:
        return 0
    try:
        run_request(f)
        if r.fault.code != FASTBN_OK:     # what only a look at a mask can say
            raise_fault(f, a)
        a.copy_back()
        if f.call.operation == FASTBN_FORWARD:
            PyErr_CheckSignals()        # the last moment at which nothing is lost
            if a.mode == HELD:
                a.take_batch(r)
            else:
                core.commit(r)
                a.return_running()
        else:
            core.commit(r)
    finally:
        core.release(r)
    return 0


include "images.pxi"


cdef int compute_part(Frame* f, Arrays a, exchange) except -1:
    # As `compute`, of a part of a batch. `exchange` is given the values of a channel and
    # (mean, M2), in backward (sum dy, sum dy * xhat), of this part, an array of shape (2, C),
    # and returns the same of the whole batch.
    cdef Request* r = &f.request
    cdef Py_ssize_t work = core.work_of(r)
    cdef bint backward = f.call.operation == FASTBN_BACKWARD
    cdef int threads = threads_for(work), status
    cdef cnp.ndarray own = new_table(2, r.parameters), whole
    cdef double* vectors = numbers_of(own)
    cdef double count
    if a.mode == CHECKED:
        return 0
    try:
        with nogil:
            status = core.run_own(r, threads, &count, vectors)
        if status == NO_MEMORY:
            raise MemoryError("no memory for the workspace")
        if status == INTERRUPTED:
            return -1
        if status != FASTBN_OK:
            raise_fault(f, a)
        if backward:
            core.commit(r)
        a.count, whole = exchange(count, own)
        count, vectors = a.count, numbers_of(whole)
        with nogil:
            status = core.run_rest(r, count, vectors)
        if threads > 1:
            team_was(r.loss, work)
        if status == INTERRUPTED:
            return -1
        a.copy_back()
        if not backward:
            PyErr_CheckSignals()
            if a.mode == HELD:
                a.m2 = None if f.call.running_var == NULL else whole[1]
            else:
                core.commit(r)
                a.return_running()
    finally:
        core.release(r)
    return 0


# ---- batch norm ----------------------------------------------------------------------

cdef inline Py_ssize_t count_of(Frame* f, cnp.ndarray x, Py_ssize_t channels) noexcept:
    # Values of each channel that are counted.
    if is_masked(f) and x.size:
        return f.request.counted
    return cnp.PyArray_SIZE(x) // channels if channels else 0


def batch_statistics(x_, layout, counted=None, /):
    """Return (values per channel, mean, M2, min, max) of each channel; of the dtype of x the last.
    """
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = x.shape[axis]
    cdef cnp.ndarray mean = new_vector(channels, cnp.NPY_DOUBLE)
    cdef cnp.ndarray m2 = new_vector(channels, cnp.NPY_DOUBLE)
    cdef cnp.ndarray low = new_vector(channels, cnp.PyArray_TYPE(x))
    cdef cnp.ndarray high = new_vector(channels, cnp.PyArray_TYPE(x))
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef Frame f
    new_call(&f, x, FASTBN_BATCH_NORM, FASTBN_STATISTICS)
    f.call.channel_axis = axis
    f.call.minimum, f.call.maximum = cnp.PyArray_DATA(low), cnp.PyArray_DATA(high)
    f.call.mean, f.call.m2 = numbers_of(mean), numbers_of(m2)
    a.x = x
    take_mask(&f, a, counted, layout)
    a.understand(&f)
    compute(&f, a)
    return count_of(&f, x, channels), mean, m2, low, high


def batch_forward(x_, weight_, bias_, running_mean_, running_var_, residual_, out_, training_,
                  momentum, eps, layout, activation, negative_slope, bint only_y,
                  counted=None, num_features=None, Prepared prepared=None, int mode=MOVED,
                  exchange=None, size_t whole=0, /):
    """Batch norm: return (y, mean, invstd), or y; `functional` has the documentation.

    For a layer: x must have `num_features` channels. What is `prepared` was made of
    these statistics and parameters, and is used in their place. `exchange`: x is a part of
    a batch, and this is asked for the statistics of all of it (`compute_part`). `whole`: the
    bytes of the tensor that x is a slice of.

    In training, `mode` is one of those of `fastbn._numpy`. Where running statistics are held
    or unmoved, the result is (y, mean, invstd, values per channel, M2 or None).
    """
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = checked_channels(x, axis, num_features)
    cdef bint training = checked_flag(training_, "training")
    cdef bint moves = training and mode != UNMOVED
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef Frame f
    a.mode = mode
    new_call(&f, x, FASTBN_BATCH_NORM, FASTBN_FORWARD if training else FASTBN_INFERENCE)
    f.call.channel_axis = axis
    f.call.momentum = checked_number(momentum, "momentum")
    f.call.eps = checked_number(eps, "eps")
    take_activation(&f, activation, negative_slope)
    f.extras.part, f.extras.whole = exchange is not None, whole
    a.x, a.residual = x, checked_residual(residual_, x)
    take_mask(&f, a, counted, layout)
    a.weight = checked_vector(weight_, "weight", channels)
    a.bias = checked_vector(bias_, "bias", channels)
    a.running_mean = checked_running(running_mean_, "running_mean", channels, moves)
    a.running_var = checked_running(running_var_, "running_var", channels, moves)
    if training and not moves:
        a.running_mean = a.running_var = None
    if prepared is not None:
        f.extras.coefficients = prepared.coefficients
    if prepared is None or out_ is not None:
        a.take_vectors(&f, out_)
    a.take_out(&f, out_)
    if not only_y:
        a.mean = new_vector(channels, cnp.NPY_DOUBLE)
        a.invstd = new_vector(channels, cnp.NPY_DOUBLE)
        f.call.mean, f.call.invstd = numbers_of(a.mean), numbers_of(a.invstd)
    a.understand(&f)
    if f.extras.part:
        compute_part(&f, a, exchange)
    else:
        compute(&f, a)
    if training and (mode == HELD or mode == UNMOVED):
        count = count_of(&f, x, channels) if exchange is None else a.count
        return a.given_out, a.mean, a.invstd, count, a.m2
    return a.given_out if only_y else (a.given_out, a.mean, a.invstd)


def batch_backward(dy, x_, mean, invstd, weight, bias, residual, out, training, layout, activation,
                   negative_slope, bint inverted, counted=None, dresidual=None, int mode=MOVED,
                   exchange=None, size_t whole=0, /):
    """Batch norm: return (dx, dweight, dbias); `functional` has the documentation.

    With `inverted`, x is what forward returned, and the vectors are those that take it
    for the x of a batch norm: `functional` makes them. `dresidual` is where its gradient
    is written. In `mode` CHECKED nothing is. `exchange`, `whole`: as in `batch_forward`.
    """
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = x.shape[axis]
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef Frame f
    a.mode, a.dresidual = mode, dresidual
    new_call(&f, x, FASTBN_BATCH_NORM,
             FASTBN_BACKWARD if checked_flag(training, "training") else FASTBN_BACKWARD_INFERENCE)
    f.call.channel_axis = axis
    f.extras.inverted = inverted
    f.extras.part, f.extras.whole = exchange is not None, whole
    take_activation(&f, activation, negative_slope)
    a.take_inputs(x, checked_array(dy, "dy"), residual)
    take_mask(&f, a, counted, layout)
    a.mean = checked_vector(checked_array(mean, "mean", False), "mean", channels)
    a.invstd = checked_vector(checked_array(invstd, "invstd", False), "invstd", channels)
    a.weight = checked_vector(weight, "weight", channels)
    a.bias = checked_vector(bias, "bias", channels)
    a.prepare_gradients(&f, 1, <cnp.npy_intp*>&channels, out)
    a.understand(&f)
    return a.gradients(&f, True, exchange)


# ---- group and instance norm: each instance has statistics of its own ----------------

cdef object forward_of_instances(Frame* f, Arrays a, Py_ssize_t groups, eps, activation,
                                 negative_slope, residual, out, bint only_y):
    # Once the norm, its axes and its vectors are there.
    cdef Py_ssize_t instances = a.x.shape[f.call.sample_axis]
    f.call.eps = checked_number(eps, "eps")
    take_activation(f, activation, negative_slope)
    a.residual = checked_residual(residual, a.x)
    a.take_vectors(f, out)
    a.take_out(f, out)
    if not only_y:
        a.mean, a.invstd = new_table(instances, groups), new_table(instances, groups)
        f.call.mean, f.call.invstd = numbers_of(a.mean), numbers_of(a.invstd)
    a.understand(f)
    compute(f, a)
    return a.given_out if only_y else (a.given_out, a.mean, a.invstd)


cdef object backward_of_instances(Frame* f, Arrays a, Py_ssize_t groups, dy, mean, invstd, weight,
                                  bias, residual, out, activation, negative_slope):
    cdef Py_ssize_t channels = a.x.shape[f.call.channel_axis]
    cdef Py_ssize_t instances = a.x.shape[f.call.sample_axis]
    take_activation(f, activation, negative_slope)
    a.take_inputs(a.x, checked_array(dy, "dy"), residual)
    a.mean = checked_table(mean, "mean", instances, groups)
    a.invstd = checked_table(invstd, "invstd", instances, groups)
    a.weight = checked_vector(weight, "weight", channels)
    a.bias = checked_vector(bias, "bias", channels)
    a.prepare_gradients(f, 1, <cnp.npy_intp*>&channels, out)
    a.understand(f)
    return a.gradients(f, True)


cdef Arrays arrays_of_instances(Frame* f, x_, int norm, int operation, layout, num_groups,
                                counted):
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Arrays a = Arrays.__new__(Arrays)
    a.x = x
    new_call(f, x, norm, operation)
    f.call.channel_axis, f.call.sample_axis = axis, instance_axis(layout)
    if norm == FASTBN_GROUP_NORM:
        f.call.groups = checked_groups(num_groups, x.shape[axis])
    take_mask(f, a, counted, layout)
    return a


def group_forward(x, weight, bias, residual, out, num_groups, eps, layout, activation,
                  negative_slope, bint only_y, counted=None, /):
    """Group norm: return (y, mean, invstd), or y."""
    cdef Frame f
    cdef Arrays a = arrays_of_instances(&f, x, FASTBN_GROUP_NORM, FASTBN_FORWARD, layout,
                                        num_groups, counted)
    cdef Py_ssize_t channels = a.x.shape[f.call.channel_axis]
    a.weight = checked_vector(weight, "weight", channels)
    a.bias = checked_vector(bias, "bias", channels)
    return forward_of_instances(&f, a, f.call.groups, eps, activation, negative_slope, residual,
                                out, only_y)


def group_backward(dy, x, mean, invstd, weight, bias, residual, out, num_groups, layout,
                   activation, negative_slope, counted=None, /):
    """Group norm: return (dx, dweight, dbias)."""
    cdef Frame f
    cdef Arrays a = arrays_of_instances(&f, x, FASTBN_GROUP_NORM, FASTBN_BACKWARD, layout,
                                        num_groups, counted)
    return backward_of_instances(&f, a, f.call.groups, dy, mean, invstd, weight, bias, residual,
                                 out, activation, negative_slope)


def instance_forward(x, weight, bias, running_mean, running_var, residual, out, use_input_stats,
                     momentum, eps, layout, activation, negative_slope, bint only_y,
                     counted=None, /):
    """Instance norm: return (y, mean, invstd), or y."""
    cdef Frame f
    cdef Arrays a = arrays_of_instances(&f, x, FASTBN_INSTANCE_NORM, FASTBN_FORWARD, layout, None,
                                        counted)
    cdef Py_ssize_t channels = a.x.shape[f.call.channel_axis]
    if not checked_flag(use_input_stats, "use_input_stats"):
        return instance_inference(a.x, weight, bias, running_mean, running_var, residual, out, eps,
                                  layout, activation, negative_slope, only_y, counted)
    f.call.momentum = checked_number(momentum, "momentum")
    a.weight = checked_vector(weight, "weight", channels)
    a.bias = checked_vector(bias, "bias", channels)
    a.running_mean = checked_running(running_mean, "running_mean", channels, True)
    a.running_var = checked_running(running_var, "running_var", channels, True)
    return forward_of_instances(&f, a, channels, eps, activation, negative_slope, residual, out,
                                only_y)


cdef object instance_inference(cnp.ndarray x, weight, bias, running_mean, running_var, residual,
                               out, eps, layout, activation, negative_slope, bint only_y,
                               counted):
    # All instances have the same statistics: then this is batch norm.
    for name, running in ("running_mean", running_mean), ("running_var", running_var):
        if running is None:
            raise TypeError(f"{name}: expected an array of shape "
                            f"({x.shape[channel_axis(layout, x)]},), since use_input_stats is "
                            "False, got None")
    y, mean, invstd = batch_forward(x, weight, bias, running_mean, running_var, residual, out,
                                    False, 0.0, eps, layout, activation, negative_slope, False,
                                    counted)
    if only_y:
        return y
    instances = (x.shape[instance_axis(layout)], 1)
    return y, np.tile(mean, instances), np.tile(invstd, instances)


def instance_backward(dy, x, mean, invstd, weight, bias, residual, out, layout, activation,
                      negative_slope, counted=None, /):
    """Instance norm: return (dx, dweight, dbias)."""
    cdef Frame f
    cdef Arrays a = arrays_of_instances(&f, x, FASTBN_INSTANCE_NORM, FASTBN_BACKWARD, layout,
                                        None, counted)
    return backward_of_instances(&f, a, a.x.shape[f.call.channel_axis], dy, mean, invstd, weight,
                                 bias, residual, out, activation, negative_slope)


# ---- layer and RMS norm: elements of a row have a weight and a bias ------------------

def layer_forward(x_, weight, bias, residual, out, normalized_shape, eps, activation,
                  negative_slope, bint centred, bint only_y, /):
    """Layer norm: return (y, mean, invstd), or y. RMS norm: (y, invrms), or y."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int kept = kept_axes(normalized_shape, x)
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef Frame f
    new_call(&f, x, FASTBN_LAYER_NORM if centred else FASTBN_RMS_NORM, FASTBN_FORWARD)
    f.call.normalized_ndim = x.ndim - kept
    if eps is None and not centred:
        f.call.eps = core.default_rms_eps(f.call.dtype)
    else:
        f.call.eps = checked_number(eps, "eps")
    take_activation(&f, activation, negative_slope)
    a.x, a.residual = x, checked_residual(residual, x)
    a.weight = checked_shaped(weight, "weight", x, kept, x.ndim)
    a.bias = checked_shaped(bias, "bias", x, kept, x.ndim)
    a.take_vectors(&f, out)
    a.take_out(&f, out)
    if not only_y:
        a.mean = new_shaped(kept, x.shape, cnp.NPY_DOUBLE) if centred else None
        a.invstd = new_shaped(kept, x.shape, cnp.NPY_DOUBLE)
        f.call.mean = numbers_of(a.mean) if centred else NULL
        f.call.invstd = numbers_of(a.invstd)
    if a.understand(&f):
        axes = axes_in_memory(&f.request, x, kept)
        back = np.argsort(axes).tolist()
        y, *statistics = layer_forward(
            turned(x, axes, 0, x.ndim), turned(weight, axes, kept, x.ndim),
            turned(bias, axes, kept, x.ndim), turned(residual, axes, 0, x.ndim),
            turned(out, axes, 0, x.ndim), [x.shape[i] for i in axes[kept:]], eps, activation,
            negative_slope, centred, False)
        y = turned(y, back, 0, x.ndim) if out is None else out
        return y if only_y else (y, *[turned(s, back, 0, kept) for s in statistics])
    compute(&f, a)
    if only_y:
        return a.given_out
    return (a.given_out, a.mean, a.invstd) if centred else (a.given_out, a.invstd)


def layer_backward(dy, x_, mean, invstd, weight, bias, residual, out, normalized_shape,
                   activation, negative_slope, bint centred, /):
    """Layer norm: return (dx, dweight, dbias). RMS norm, whose mean is None: (dx, dweight)."""
    cdef str invstd_name = "invstd" if centred else "invrms"
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int kept = kept_axes(normalized_shape, x)
    cdef Arrays a = Arrays.__new__(Arrays)
    cdef Frame f
    new_call(&f, x, FASTBN_LAYER_NORM if centred else FASTBN_RMS_NORM, FASTBN_BACKWARD)
    f.call.normalized_ndim = x.ndim - kept
    take_activation(&f, activation, negative_slope)
    a.take_inputs(x, checked_array(dy, "dy"), residual)
    a.invstd = checked_shaped(checked_array(invstd, invstd_name, False), invstd_name, x, 0, kept)
    if centred:
        a.mean = checked_shaped(checked_array(mean, "mean", False), "mean", x, 0, kept)
    a.weight = checked_shaped(weight, "weight", x, kept, x.ndim)
    a.bias = checked_shaped(bias, "bias", x, kept, x.ndim)
    a.prepare_gradients(&f, x.ndim - kept, x.shape + kept, out)
    if a.understand(&f):
        axes = axes_in_memory(&f.request, x, kept)
        back = np.argsort(axes).tolist()
        dx, *gradients = layer_backward(
            turned(dy, axes, 0, x.ndim), turned(x, axes, 0, x.ndim), turned(mean, axes, 0, kept),
            turned(invstd, axes, 0, kept), turned(weight, axes, kept, x.ndim),
            turned(bias, axes, kept, x.ndim), turned(residual, axes, 0, x.ndim),
            turned(out, axes, 0, x.ndim), [x.shape[i] for i in axes[kept:]], activation,
            negative_slope, centred)
        parameters = 2 if centred else 1
        return (turned(dx, back, 0, x.ndim) if out is None else out,
                *[turned(g, back, kept, x.ndim) for g in gradients[:parameters]],
                *[turned(g, back, 0, x.ndim) for g in gradients[parameters:]])
    return a.gradients(&f, centred)
