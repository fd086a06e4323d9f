# SPDX-License-Identifier: BSD-3-Clause
# cython: language_level=3, cdivision=True
"""Arrays -> a view and a job: the one place that validates, and that allocates.

    kernels/axes.pxi        axes -> view
    view/checks.pxi         what a caller can get wrong, found before anything is written
    view/memory.pxi         where elements are
    view/arrangement.pxi    arrays -> operands that the kernels can read
    view/vectors.pxi        parameters and statistics <-> float64
    view/prepared.pxi       what inference can keep from call to call
    here                    the operations

A view is (outer, middle, channels, inner), decided by the *memory order* of x: axes
slower than the channel axis are outer, faster ones are inner, whatever the layout
calls them. For group and instance norm it is the view of one instance. For layer and RMS
norm, the normalised axes are inner ("features"), the others count channels.

May: check, allocate, copy. May not: compute with elements.
"""
cimport cython
cimport numpy as cnp
from libc.math cimport NAN
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

import numbers
import operator
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from fastbn._threads cimport team_was, threads_for
from fastbn.kernels cimport drivers
from fastbn.kernels.job cimport (COEFFICIENT_KINDS, IDENTITY, LEAKY_RELU, NO_MEMORY, RELU, RELU6,
                                 SILU, STOPPED, WRAP, Job, KernelTable, Operand)

cnp.import_array()

cdef extern from "Python.h":
    void* PyCapsule_GetPointer(object capsule, const char* name) except NULL
    int PyErr_CheckSignals() except -1
    int leave_signal_error "PyErr_CheckSignals"() noexcept

cdef extern from "numpy/ndarraytypes.h":
    enum:
        NPY_HALF
        NPY_USERDEF

cdef extern from "kernels/environment.h":
    ctypedef int fp_state
    fp_state fp_enter()
    void fp_leave(fp_state saved)

cdef enum:
    PIECE = 128 << 20       # bytes that are copied before signals are looked at

cdef enum:
    FLOAT32, FLOAT64, FLOAT16, BFLOAT16, OTHER

cdef const KernelTable* kernels_of[OTHER]
cdef dict ACTIVATIONS = {
    "relu": RELU, "relu6": RELU6, "leaky_relu": LEAKY_RELU, "silu": SILU}
cdef int bfloat16_number = -1       # ml_dtypes gets it from NumPy, once it is imported


def use(*capsules):
    """Make the kernels of one CPU level, one capsule for each type, those of later calls."""
    for kind, capsule in enumerate(capsules):
        kernels_of[kind] = <const KernelTable*>PyCapsule_GetPointer(capsule, "fastbn.kernels")


cdef int bfloat16_kind(int number) except -1:
    global bfloat16_number
    ml_dtypes = sys.modules.get("ml_dtypes")
    if ml_dtypes is not None:
        bfloat16_number = np.dtype(ml_dtypes.bfloat16).num
    return BFLOAT16 if number == bfloat16_number else OTHER


cdef int kind_of(cnp.ndarray a) except -1:
    cdef int number = cnp.PyArray_TYPE(a)
    if number == cnp.NPY_FLOAT:
        return FLOAT32
    if number == cnp.NPY_DOUBLE:
        return FLOAT64
    if number == NPY_HALF:
        return FLOAT16
    if number == bfloat16_number:
        return BFLOAT16
    return bfloat16_kind(number) if number >= NPY_USERDEF else OTHER


cdef str to_install():
    return "" if find_spec("ml_dtypes") else "; pip install ml_dtypes, which has the type"


include "kernels/axes.pxi"
include "view/checks.pxi"
include "view/memory.pxi"
include "view/arrangement.pxi"
include "view/vectors.pxi"


# ---- what all operations do -------------------------------------------------------

cdef int signalled() noexcept with gil:
    # Runs Python's handlers of signals, on the main thread only. What one raises
    # waits in the thread's state for `ended`.
    return leave_signal_error()


cdef inline Py_ssize_t count_values(cnp.ndarray x, Py_ssize_t owners) noexcept:
    # Values for each of the owners of statistics.
    return cnp.PyArray_SIZE(x) // owners if owners else 0


cdef inline void new_job(Job* job) noexcept:
    memset(job, 0, sizeof(Job))
    job.centred = job.training = True


include "view/prepared.pxi"


cdef int choose_threads(Job* job, cnp.ndarray x, Py_ssize_t channels, int readings) except -1:
    # What is done for each channel of rows, on one thread, takes as long as 256 bytes of
    # data: work that more threads do not share.
    job.size = readings * (cnp.PyArray_NBYTES(x)
                           - (256 * channels if job.view.inner == 1 else 0))
    job.threads = threads_for(job.size)
    return 0


ctypedef int (*Driver)(const KernelTable* kernels, Job* job) noexcept nogil


cdef int carry_out(Driver driver, Job* job, cnp.ndarray x) except -1:
    cdef const KernelTable* kernels = kernels_of[kind_of(x)]
    cdef int status
    with nogil:
        status = driver(kernels, job)
    if job.threads > 1:
        team_was(job.team_loss, job.size)
    if status == NO_MEMORY:
        raise MemoryError("no memory for the workspace")
    return -1 if status == STOPPED else 0


cdef int take_activation(Job* job, activation, negative_slope) except -1:
    job.activation = checked_activation(activation)
    job.negative_slope = checked_slope(negative_slope)
    return 0


cdef cnp.ndarray forward_out(out_, cnp.ndarray x, cnp.ndarray weight, cnp.ndarray bias,
                             cnp.ndarray residual):
    cdef cnp.ndarray out = checked_out(out_, x)
    if out is not None:
        checked_same_or_apart(out, x, "x")
        checked_apart(out, "out", weight, "weight")
        checked_apart(out, "out", bias, "bias")
        if residual is not None:
            checked_same_or_apart(out, residual, "residual")
    return out


cdef cnp.ndarray backward_out(out_, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray mean,
                              cnp.ndarray invstd, str invstd_name, cnp.ndarray weight,
                              cnp.ndarray bias, cnp.ndarray residual):
    cdef cnp.ndarray out = checked_out(out_, x)
    if out is not None:
        checked_same_or_apart(out, dy, "dy")
        checked_same_or_apart(out, x, "x")
        checked_apart(out, "out", mean, "mean")
        checked_apart(out, "out", invstd, invstd_name)
        checked_apart(out, "out", weight, "weight")
        checked_apart(out, "out", bias, "bias")
        if residual is not None:
            checked_same_or_apart(out, residual, "residual")
    return out


cdef object gradients_of(Arrangement arrangement, tuple of_parameters):
    # (dx, those of the parameters), and that of the residual, if there is one.
    cdef tuple gradients = (arrangement.out,) + of_parameters
    return gradients if arrangement.dresidual is None else gradients + (arrangement.dresidual,)


# ---- batch norm ---------------------------------------------------------------------

def statistics(x_, layout, /):
    """Return (values per channel, mean, M2) of each channel, the last two float64."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = x.shape[axis]
    cdef cnp.ndarray mean = new_vector(channels)
    cdef cnp.ndarray m2 = new_vector(channels)
    cdef Py_ssize_t count = count_values(x, channels)
    cdef Job job
    cdef Order order
    cdef Arrangement arrangement
    if count == 0:
        return count, mean, m2
    new_job(&job)
    order_by_channel(x, axis, NO_AXIS, &order)
    arrangement = arranged(x, None, None, None, False, &order, 0)
    arrangement.settle(&job, channels, 1)
    job.mean, job.m2 = numbers_of(mean), numbers_of(m2)
    choose_threads(&job, x, channels, 1)
    carry_out(drivers.statistics, &job, x)
    return count, mean, m2


def forward(x_, weight_, bias_, running_mean_, running_var_, training_, momentum_, eps_, layout,
            activation, negative_slope, residual_, out_, bint only_y, num_features=None,
            Prepared prepared=None, /):
    """Batch norm: return (y, mean, invstd), or y; `functional` has the documentation.

    For a layer: x must have `num_features` channels. What is `prepared` was made of
    these statistics and parameters, and is used in their place.
    """
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = checked_channels(x, axis, num_features)
    cdef Py_ssize_t count = count_values(x, channels)
    cdef bint training = checked_flag(training_, "training")
    cdef cnp.ndarray weight = checked_vector(weight_, "weight", channels)
    cdef cnp.ndarray bias = checked_vector(bias_, "bias", channels)
    cdef cnp.ndarray running_mean = checked_vector(running_mean_, "running_mean", channels, False)
    cdef cnp.ndarray running_var = checked_vector(running_var_, "running_var", channels, False)
    cdef cnp.ndarray residual = checked_residual(residual_, x)
    cdef cnp.ndarray out
    cdef Arrangement arrangement
    cdef Order order
    cdef Job job
    new_job(&job)
    take_activation(&job, activation, negative_slope)
    job.momentum = checked_momentum(momentum_)
    job.eps = checked_eps(eps_, training)
    job.training = training
    if training:
        checked_count(x, count, "channel in training")
    elif running_mean is None or running_var is None:
        raise TypeError(
            f"{'running_mean' if running_mean is None else 'running_var'}: expected an array "
            f"of shape ({channels},), since training is False, got None")
    out = forward_out(out_, x, weight, bias, residual)
    if out is not None:
        checked_apart(out, "out", running_mean, "running_mean")
        checked_apart(out, "out", running_var, "running_var")
    if training:
        checked_running(running_mean, running_var, x, weight, bias, residual)

    order_by_channel(x, axis, NO_AXIS, &order)
    arrangement = arranged(x, None, residual, out, True, &order, 8 * channels)
    if prepared is not None:
        job.prepared = prepared.coefficients
    else:
        job.weight, job.bias = arrangement.readable(weight), arrangement.readable(bias)
        job.invstd = arrangement.vector(channels)
    if training:
        job.mean, job.var, job.m2 = (
            arrangement.vector(channels), arrangement.vector(channels),
            arrangement.vector(channels))
        job.running_mean = arrangement.widened(running_mean)
        job.running_var = arrangement.widened(running_var)
    elif prepared is None:
        job.mean, job.var = arrangement.widened(running_mean), arrangement.widened(running_var)
    if count == 0 and training:
        fill(job.mean, channels, 0.0)
        fill(job.invstd, channels, NAN)
    else:
        arrangement.settle(&job, channels, 1)
        choose_threads(&job, x, channels, 2 if training else 1)
        carry_out(drivers.training if training else drivers.inference, &job, x)
        arrangement.result()
        if training:
            keep_running(running_mean, running_var, &job)
    if only_y:
        return arrangement.out
    return (arrangement.out, rounded(job.mean, channels, cnp.NPY_DOUBLE),
            rounded(job.invstd, channels, cnp.NPY_DOUBLE))


cdef int keep_running(cnp.ndarray running_mean, cnp.ndarray running_var, const Job* job) except -1:
    PyErr_CheckSignals()        # the last moment at which nothing is lost
    copy_back(running_mean, job.running_mean)
    copy_back(running_var, job.running_var)
    return 0


def backward(dy_, x_, mean_, invstd_, weight_, bias_, training_, layout, activation,
             negative_slope, residual_, out_, bint inverted, /):
    """Batch norm: return (dx, dweight, dbias); `functional` has the documentation.

    With `inverted`, x is what forward returned, and the vectors are those that take it
    for the x of a batch norm: `functional` makes them.
    """
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef cnp.ndarray dy = checked_array(dy_, "dy")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = x.shape[axis]
    cdef Py_ssize_t count = count_values(x, channels)
    cdef bint training = checked_flag(training_, "training")
    cdef cnp.ndarray mean = checked_vector(checked_array(mean_, "mean", False), "mean", channels)
    cdef cnp.ndarray invstd = checked_vector(
        checked_array(invstd_, "invstd", False), "invstd", channels)
    cdef cnp.ndarray weight = checked_vector(weight_, "weight", channels)
    cdef cnp.ndarray bias = checked_vector(bias_, "bias", channels)
    cdef cnp.ndarray residual = checked_residual(residual_, x)
    cdef cnp.ndarray out
    cdef int number = gradient_type(x, weight)
    cdef Arrangement arrangement
    cdef Order order
    cdef Job job
    new_job(&job)
    take_activation(&job, activation, negative_slope)
    checked_like_x(dy, "dy", x)
    if training:
        checked_count(x, count, "channel in training")
    out = backward_out(out_, x, dy, mean, invstd, "invstd", weight, bias, residual)

    order_by_channel(x, axis, NO_AXIS, &order)
    arrangement = arranged(x, dy, residual, out, True, &order, 6 * channels)
    job.training, job.inverted = training, inverted
    # Only read here, since `var` is NULL.
    job.mean = <double*>arrangement.readable(mean)
    job.invstd = <double*>arrangement.readable(invstd)
    job.weight, job.bias = arrangement.readable(weight), arrangement.readable(bias)
    job.dweight, job.dbias = arrangement.vector(channels), arrangement.vector(channels)
    if count == 0:
        fill(job.dweight, channels, 0.0)
        fill(job.dbias, channels, 0.0)
    else:
        arrangement.settle(&job, channels, 1)
        choose_threads(&job, x, channels, 2)
        carry_out(drivers.gradients, &job, x)
        arrangement.result()
    return gradients_of(arrangement, (rounded(job.dweight, channels, number),
                                      rounded(job.dbias, channels, number)))


# ---- group and instance norm: each instance has statistics of its own -----------------

cdef object forward_of_instances(cnp.ndarray x, int axis, int sample_axis, Py_ssize_t groups,
                                 str owner, cnp.ndarray weight, cnp.ndarray bias,
                                 cnp.ndarray running_mean, cnp.ndarray running_var,
                                 double momentum, double eps, activation, negative_slope,
                                 residual_, out_, bint only_y):
    cdef Py_ssize_t channels = x.shape[axis], instances = x.shape[sample_axis]
    cdef Py_ssize_t group = channels // groups if groups else 1, owners = instances * groups
    cdef Py_ssize_t count = count_values(x, owners)
    cdef cnp.ndarray residual = checked_residual(residual_, x)
    cdef cnp.ndarray out = forward_out(out_, x, weight, bias, residual)
    cdef cnp.ndarray mean, invstd
    cdef Arrangement arrangement
    cdef Order order
    cdef Job job
    checked_count(x, count, owner)
    if out is not None:
        checked_apart(out, "out", running_mean, "running_mean")
        checked_apart(out, "out", running_var, "running_var")
    checked_running(running_mean, running_var, x, weight, bias, residual)
    new_job(&job)
    take_activation(&job, activation, negative_slope)
    job.momentum, job.eps = momentum, eps
    order_by_channel(x, axis, sample_axis, &order)
    arrangement = arranged(x, None, residual, out, True, &order, 4 * channels + owners)
    mean, invstd = new_table(instances, groups), new_table(instances, groups)
    if count == 0:
        fill(numbers_of(invstd), owners, NAN)
        return arrangement.out if only_y else (arrangement.out, mean, invstd)
    job.weight, job.bias = arrangement.readable(weight), arrangement.readable(bias)
    if group == 1:
        job.mean = numbers_of(mean)
        job.m2 = job.var = job.invstd = numbers_of(invstd)
        if running_var is not None:
            job.m2 = arrangement.vector(owners)
        job.running_mean = arrangement.widened(running_mean)
        job.running_var = arrangement.widened(running_var)
    else:
        job.group_mean, job.group_invstd = numbers_of(mean), numbers_of(invstd)
        job.var = job.group_invstd
    arrangement.settle(&job, channels, group)
    choose_threads(&job, x, 0, 2)
    carry_out(drivers.training, &job, x)
    arrangement.result()
    keep_running(running_mean, running_var, &job)
    return arrangement.out if only_y else (arrangement.out, mean, invstd)


cdef object backward_of_instances(dy_, cnp.ndarray x, int axis, int sample_axis, Py_ssize_t groups,
                                  str owner, mean_, invstd_, weight_, bias_, activation,
                                  negative_slope, residual_, out_):
    cdef Py_ssize_t channels = x.shape[axis], instances = x.shape[sample_axis]
    cdef Py_ssize_t group = channels // groups if groups else 1, owners = instances * groups
    cdef Py_ssize_t count = count_values(x, owners)
    cdef cnp.ndarray dy = checked_array(dy_, "dy")
    cdef cnp.ndarray mean, invstd, out
    cdef cnp.ndarray weight = checked_vector(weight_, "weight", channels)
    cdef cnp.ndarray bias = checked_vector(bias_, "bias", channels)
    cdef cnp.ndarray residual = checked_residual(residual_, x)
    cdef int number = gradient_type(x, weight)
    cdef Arrangement arrangement
    cdef Order order
    cdef Job job
    new_job(&job)
    take_activation(&job, activation, negative_slope)
    checked_like_x(dy, "dy", x)
    checked_count(x, count, owner)
    mean = checked_table(mean_, "mean", instances, groups)
    invstd = checked_table(invstd_, "invstd", instances, groups)
    out = backward_out(out_, x, dy, mean, invstd, "invstd", weight, bias, residual)
    order_by_channel(x, axis, sample_axis, &order)
    arrangement = arranged(x, dy, residual, out, True, &order,
                           2 * channels + 2 * owners + 2 * (instances + 1) * channels)
    job.dweight = arrangement.vector((instances + 1) * channels)
    job.dbias = arrangement.vector((instances + 1) * channels)
    if count == 0:
        fill(job.dweight, channels, 0.0)
        fill(job.dbias, channels, 0.0)
    else:
        # Only read here, since `var` is NULL.
        job.mean = job.group_mean = <double*>arrangement.readable(mean)
        job.invstd = job.group_invstd = <double*>arrangement.readable(invstd)
        job.weight, job.bias = arrangement.readable(weight), arrangement.readable(bias)
        arrangement.settle(&job, channels, group)
        choose_threads(&job, x, 0, 2)
        carry_out(drivers.gradients, &job, x)
        arrangement.result()
    return gradients_of(arrangement, (rounded(job.dweight, channels, number),
                                      rounded(job.dbias, channels, number)))


def group_forward(x_, num_groups, weight_, bias_, eps_, layout, activation, negative_slope,
                  residual, out_, bint only_y, /):
    """Group norm: return (y, mean, invstd), or y."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    cdef Py_ssize_t channels = x.shape[axis]
    return forward_of_instances(
        x, axis, sample_axis(layout), checked_groups(num_groups, channels), "group",
        checked_vector(weight_, "weight", channels), checked_vector(bias_, "bias", channels),
        None, None, 0.0, checked_eps(eps_, True), activation, negative_slope, residual, out_,
        only_y)


def group_backward(dy, x_, mean, invstd, num_groups, weight, bias, layout, activation,
                   negative_slope, residual, out, /):
    """Group norm: return (dx, dweight, dbias)."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    return backward_of_instances(
        dy, x, axis, sample_axis(layout), checked_groups(num_groups, x.shape[axis]), "group",
        mean, invstd, weight, bias, activation, negative_slope, residual, out)


def instance_forward(x_, weight_, bias_, running_mean_, running_var_, use_input_stats, momentum,
                     eps, layout, activation, negative_slope, residual, out, bint only_y, /):
    """Instance norm: return (y, mean, invstd), or y."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x), instance = sample_axis(layout)
    cdef Py_ssize_t channels = x.shape[axis]
    if checked_flag(use_input_stats, "use_input_stats"):
        return forward_of_instances(
            x, axis, instance, channels, "channel of a instance",
            checked_vector(weight_, "weight", channels), checked_vector(bias_, "bias", channels),
            checked_vector(running_mean_, "running_mean", channels, False),
            checked_vector(running_var_, "running_var", channels, False),
            checked_momentum(momentum), checked_eps(eps, True), activation, negative_slope,
            residual, out, only_y)
    # All instances have the same statistics: then this is batch norm.
    for name, running in ("running_mean", running_mean_), ("running_var", running_var_):
        if running is None:
            raise TypeError(f"{name}: expected an array of shape ({channels},), since "
                            "use_input_stats is False, got None")
    y, mean, invstd = forward(x_, weight_, bias_, running_mean_, running_var_, False, momentum, eps,
                              layout, activation, negative_slope, residual, out, False)
    if only_y:
        return y
    instances = (x.shape[instance], 1)
    return y, np.tile(mean, instances), np.tile(invstd, instances)


def instance_backward(dy, x_, mean, invstd, weight, bias, layout, activation, negative_slope,
                      residual, out, /):
    """Instance norm: return (dx, dweight, dbias)."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int axis = channel_axis(layout, x)
    return backward_of_instances(dy, x, axis, sample_axis(layout), x.shape[axis],
                                 "channel of a instance", mean, invstd, weight, bias, activation,
                                 negative_slope, residual, out)


# ---- layer and RMS norm: features have a weight and a bias ---------------------------

cdef int take_features(Arrangement arrangement, cnp.ndarray weight, cnp.ndarray bias, int kept,
                       Job* job) except -1:
    job.real_weight = arrangement.real_features(weight, kept)
    job.real_bias = arrangement.real_features(bias, kept)
    if job.real_weight == NULL:
        job.weight = arrangement.features(weight, kept)
    if job.real_bias == NULL:
        job.bias = arrangement.features(bias, kept)
    return 0


def layer_forward(x_, normalized_shape, weight_, bias_, eps, activation, negative_slope,
                  residual_, out_, bint centred, bint only_y, /):
    """Layer norm: return (y, mean, invstd), or y. RMS norm: (y, invrms), or y."""
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef int kept = kept_axes(normalized_shape, x)
    cdef cnp.ndarray weight = checked_shaped(weight_, "weight", x, kept, x.ndim)
    cdef cnp.ndarray bias = checked_shaped(bias_, "bias", x, kept, x.ndim)
    cdef cnp.ndarray residual = checked_residual(residual_, x)
    cdef cnp.ndarray out, mean, invstd
    cdef Py_ssize_t channels, features = size_of_axes(x, kept, x.ndim)
    cdef Arrangement arrangement
    cdef Order order
    cdef Job job
    new_job(&job)
    job.centred = centred
    job.eps = smallest_step(x) if eps is None and not centred else checked_eps(eps, True)
    take_activation(&job, activation, negative_slope)
    out = forward_out(out_, x, weight, bias, residual)
    order_by_features(x, kept, &order)
    arrangement = arranged(x, None, residual, out, True, &order, 2 * features)
    channels = size_of_axes(x, 0, kept)
    mean, invstd = new_vector(channels), new_vector(channels)
    if cnp.PyArray_SIZE(x) == 0:
        fill(numbers_of(invstd), channels, NAN)
    else:
        take_features(arrangement, weight, bias, kept, &job)
        job.mean = numbers_of(mean)
        job.m2 = job.var = job.invstd = numbers_of(invstd)
        arrangement.settle_features(&job)
        choose_threads(&job, x, 0, 2)
        carry_out(drivers.training, &job, x)
        arrangement.result()
    if only_y:
        return arrangement.out
    invstd = unflattened(invstd, x, 0, kept, order.axes, order.outer)
    if not centred:
        return arrangement.out, invstd
    return arrangement.out, unflattened(mean, x, 0, kept, order.axes, order.outer), invstd


def layer_backward(dy_, x_, mean_, invstd_, normalized_shape, weight_, bias_, activation,
                   negative_slope, residual_, out_, bint centred, /):
    """Layer norm: return (dx, dweight, dbias). RMS norm, whose mean is None: (dx, dweight)."""
    cdef str invstd_name = "invstd" if centred else "invrms"
    cdef cnp.ndarray x = checked_array(x_, "x")
    cdef cnp.ndarray dy = checked_array(dy_, "dy")
    cdef int kept = kept_axes(normalized_shape, x)
    cdef cnp.ndarray invstd = checked_shaped(
        checked_array(invstd_, invstd_name, False), invstd_name, x, 0, kept)
    cdef cnp.ndarray mean = None
    cdef cnp.ndarray weight = checked_shaped(weight_, "weight", x, kept, x.ndim)
    cdef cnp.ndarray bias = checked_shaped(bias_, "bias", x, kept, x.ndim)
    cdef cnp.ndarray residual = checked_residual(residual_, x)
    cdef cnp.ndarray out, dweight
    cdef Py_ssize_t channels = size_of_axes(x, 0, kept), features = size_of_axes(x, kept, x.ndim)
    cdef int number = gradient_type(x, weight)
    cdef Arrangement arrangement
    cdef Order order
    cdef Job job
    if centred:
        mean = checked_shaped(checked_array(mean_, "mean", False), "mean", x, 0, kept)
    checked_like_x(dy, "dy", x)
    out = backward_out(out_, x, dy, mean, invstd, invstd_name, weight, bias, residual)
    new_job(&job)
    take_activation(&job, activation, negative_slope)
    job.centred = centred
    order_by_features(x, kept, &order)
    arrangement = arranged(x, dy, residual, out, True, &order, 4 * features + 2 * channels)
    job.dweight, job.dbias = arrangement.vector(features), arrangement.vector(features)
    if cnp.PyArray_SIZE(x) == 0:
        fill(job.dweight, features, 0.0)
        fill(job.dbias, features, 0.0)
    else:
        take_features(arrangement, weight, bias, kept, &job)
        # Only read here, since `var` is NULL.
        job.invstd = <double*>arrangement.kept(invstd, kept)
        if centred:
            job.mean = <double*>arrangement.kept(mean, kept)
        else:
            job.mean = arrangement.vector(channels)
            fill(job.mean, channels, 0.0)
        arrangement.settle_features(&job)
        choose_threads(&job, x, 0, 2)
        carry_out(drivers.gradients, &job, x)
        arrangement.result()
    dweight = unflattened(rounded(job.dweight, features, number), x, kept, x.ndim,
                          order.axes + order.outer, order.n - order.outer)
    if not centred:
        return gradients_of(arrangement, (dweight,))
    return gradients_of(arrangement, (dweight, unflattened(
        rounded(job.dbias, features, number), x, kept, x.ndim,
        order.axes + order.outer, order.n - order.outer)))
