# SPDX-License-Identifier: BSD-3-Clause
# The engine's faults as exceptions: the argument, what was expected, what came. May not
# decide what is a fault. A part of binding.pyx.

cdef dict NAMES = {
    ARG_X: "x", ARG_DY: "dy", ARG_RESIDUAL: "residual", ARG_OUT: "out",
    ARG_DRESIDUAL: "dresidual", ARG_WEIGHT: "weight", ARG_BIAS: "bias",
    ARG_RUNNING_MEAN: "running_mean", ARG_RUNNING_VAR: "running_var", ARG_MEAN: "mean",
    ARG_INVSTD: "invstd", ARG_MASK: "mask", ARG_LENGTHS: "lengths"}
# What has statistics of its own, by norm.
cdef dict OWNERS = {
    FASTBN_BATCH_NORM: "channel in training", FASTBN_GROUP_NORM: "group",
    FASTBN_INSTANCE_NORM: "channel of a sample"}


cdef str name_of(const fastbn_call* call, int argument):
    if argument == ARG_INVSTD and call.norm == FASTBN_RMS_NORM:
        return "invrms"
    return NAMES[argument]


cdef bint can_be_copied(const Request* r) noexcept:
    # A tensor that no strides describe, or an output that a copy may stand for.
    return r.fault.other == ARG_NONE and r.fault.code in (FASTBN_BAD_STRIDES, FASTBN_MISALIGNED)


cdef object overlap_error(const fastbn_call* call, int argument, int other):
    name, other_name = name_of(call, argument), name_of(call, other)
    if argument == ARG_OUT and other in (ARG_X, ARG_DY, ARG_RESIDUAL):
        return ValueError(f"out: expected {other_name} itself or memory apart from it, got an "
                          f"array that overlaps {other_name} in part")
    return ValueError(f"{name}: expected memory of its own, got an array that overlaps "
                      f"{other_name}")


cdef object number_error(const fastbn_call* call, int argument):
    if argument == ARG_EPS:
        return eps_error(call.eps, core.needs_positive_eps(call))
    return finite_error("momentum", call.momentum)


cdef object eps_error(eps, bint positive):
    return ValueError(f"eps: expected a number {'> 0 in training' if positive else '>= 0'}, "
                      f"got {eps!r}")


cdef object finite_error(str name, value):
    return ValueError(f"{name}: expected a finite number, got {value!r}")


cdef object apart_error(str name, cnp.ndarray array):
    return ValueError(f"{name}: expected an array whose elements are apart in memory, as "
                      f"slicing and transposing make them, got shape {(<object>array).shape} "
                      f"with strides {(<object>array).strides}")


cdef object missing_error(const fastbn_call* call, int argument):
    return TypeError(f"{name_of(call, argument)}: expected an array of shape "
                     f"({call.shape[call.channel_axis]},), since training is False, got None")


cdef int raise_fault(Frame* f, Arrays a) except -1:
    cdef const fastbn_call* call = &f.call
    cdef int code = f.request.fault.code, argument = f.request.fault.argument
    if code == FASTBN_OVERLAP:
        raise overlap_error(call, argument, f.request.fault.other)
    if code == FASTBN_BAD_NUMBER:
        raise number_error(call, argument)
    if code == FASTBN_ONE_VALUE and argument == ARG_MASK:
        raise ValueError(f"x: expected more than one value per {OWNERS[call.norm]}, got one that "
                         f"counts, shape {(<object>a.x).shape}")
    if code == FASTBN_ONE_VALUE:
        raise ValueError(f"x: expected more than one value per {OWNERS[call.norm]}, "
                         f"got shape {(<object>a.x).shape}")
    if code == FASTBN_BAD_STRIDES:
        raise apart_error(name_of(call, argument), a.written(argument))
    if code == FASTBN_NULL_POINTER:
        raise missing_error(call, argument)
    raise RuntimeError(f"the engine refused a call with code {code} for argument {argument}")
