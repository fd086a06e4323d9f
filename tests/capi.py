# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.h in ctypes, so that its functions are tested without a compiler."""

import ctypes
import itertools
import random
import threading
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_double,
    c_int,
    c_int32,
    c_size_t,
    c_ssize_t,
    c_void_p,  # fmt: skip
    sizeof,
)

import cases
import numpy as np

import fastbn

NORMS = {"batch": 1, "instance": 2, "group": 3, "layer": 4, "rms": 5}
(STATISTICS, INFERENCE, FORWARD, BACKWARD, BACKWARD_INFERENCE, NORMALIZE,
 DENORMALIZE) = range(1, 8)  # fmt: skip
DTYPES = {"float32": 1, "float64": 2, "float16": 3, "bfloat16": 4,
          "uint8": 5, "int8": 6, "uint16": 7, "int16": 8}  # fmt: skip
ACTIVATIONS = {None: 0} | cases.ACTIVATIONS
(OK, UNKNOWN_FIELD, NULL_POINTER, BAD_OPERATION, BAD_DTYPE, BAD_SHAPE, BAD_AXIS, BAD_GROUPS,
 BAD_NUMBER, ONE_VALUE, BAD_STRIDES, MISALIGNED, BAD_WORKERS, BAD_WORKSPACE,
 BAD_TASK, OVERLAP, BAD_MASK) = range(17)  # fmt: skip


class Tensor(Structure):
    _fields_ = [("data", c_void_p), ("strides", POINTER(c_ssize_t))]


class Call(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        *[(name, c_int32) for name in (
            "norm", "operation", "dtype", "vector_dtype", "ndim", "channel_axis", "sample_axis",
            "normalized_ndim")],
        ("shape", POINTER(c_ssize_t)),
        ("groups", c_ssize_t),
        ("eps", c_double),
        ("momentum", c_double),
        *[(name, Tensor) for name in ("x", "dy", "out")],
        *[(name, c_void_p) for name in (
            "weight", "bias", "running_mean", "running_var", "dweight", "dbias", "mean",
            "invstd", "m2")],
        ("activation", c_int32),
        ("reserved", c_int32),
        ("negative_slope", c_double),
        ("residual", Tensor),
        ("dresidual", Tensor),
        ("out_dtype", c_int32),
        ("reserved2", c_int32),
        ("max_value", c_double),
        *[(name, c_void_p) for name in ("norm_mean", "norm_std", "minimum", "maximum")],
        ("mask", Tensor),
        ("lengths", c_void_p),
        ("length_axis", c_int32),
        ("padding", c_int32),
    ]  # fmt: skip


class Api(Structure):
    _fields_ = [
        ("struct_size", c_size_t),
        ("abi", c_int32),
        ("version", c_char_p),
        ("error_message", CFUNCTYPE(c_char_p, c_int)),
        ("workspace_size", CFUNCTYPE(c_int, POINTER(Call), c_int, POINTER(c_size_t))),
        ("run", CFUNCTYPE(c_int, POINTER(Call), c_int, c_void_p, c_size_t)),
        ("begin", CFUNCTYPE(c_int, POINTER(Call), c_int, c_void_p, c_size_t)),
        ("phases", CFUNCTYPE(c_int, c_void_p)),
        ("tasks", CFUNCTYPE(c_ssize_t, c_void_p, c_int)),
        ("run_tasks", CFUNCTYPE(c_int, c_void_p, c_int, c_ssize_t, c_ssize_t, c_int)),
        ("finish", CFUNCTYPE(c_int, c_void_p)),
    ]


def table_in(capsule):
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = c_void_p, [ctypes.py_object, c_char_p]
    return Api.from_address(pointer(capsule, b"fastbn._C_API"))


GARBAGE = 0xFF  # as numbers, NaN: what reads memory that nobody has written is noticed
API = table_in(fastbn._C_API)


def sizes(numbers):
    return (c_ssize_t * len(numbers))(*numbers)


def tensor(array):
    return Tensor(array.ctypes.data, sizes([stride // array.itemsize for stride in array.strides]))


TENSORS = ("dy", "out", "residual", "dresidual")


def new_call(norm, operation, x, **fields):
    """Arrays become pointers, activations numbers; `keep` keeps arrays alive."""
    call = Call(struct_size=sizeof(Call), norm=NORMS[norm], operation=operation,
                dtype=DTYPES[x.dtype.name], ndim=x.ndim, shape=sizes(x.shape), x=tensor(x),
                eps=1e-5, momentum=0.1)  # fmt: skip
    call.keep = [x, fields]
    for name, value in fields.items():
        if isinstance(value, np.ndarray) and name in TENSORS:
            value = tensor(value)
        elif isinstance(value, np.ndarray):
            assert value.flags.c_contiguous
            if name not in ("mean", "invstd", "m2"):
                call.vector_dtype = DTYPES[value.dtype.name]
            value = value.ctypes.data
        if name == "activation":
            value = ACTIVATIONS[value]
        if value is not None:
            setattr(call, name, value)
    return call


def workspace_for(call, workers=1):
    """Return exactly as much memory as is needed, between guards; its address; its size."""
    size = c_size_t()
    code = API.workspace_size(call, workers, size)
    assert code == OK, API.error_message(code)
    memory = np.full(size.value + 128, GARBAGE, np.uint8)
    return memory, memory.ctypes.data + 64, size.value


def intact(memory):
    return bool((memory[:64] == GARBAGE).all() and (memory[-64:] == GARBAGE).all())


def run(call, threads=1):
    memory, place, size = workspace_for(call, threads)
    code = API.run(call, threads, place, size)
    assert code == OK, API.error_message(code)
    assert intact(memory)


def run_in_tasks(call, workers, seed=0):
    """Ranges of tasks in any order, on threads of one's own."""
    memory, place, size = workspace_for(call, workers)
    assert API.begin(call, workers, place, size) == OK
    order = random.Random(seed)
    for phase in range(API.phases(place)):
        tasks = API.tasks(place, phase)
        cuts = sorted({0, tasks, *[order.randint(0, tasks) for _ in range(2 * workers)]})
        ranges = list(itertools.pairwise(cuts))
        order.shuffle(ranges)
        team = [threading.Thread(target=work, args=(place, phase, ranges, worker))
                for worker in range(workers)]  # fmt: skip
        for member in team:
            member.start()
        for member in team:
            member.join()
    assert API.finish(place) == OK
    assert intact(memory)


def work(place, phase, ranges, worker):
    while ranges:
        try:
            begin, end = ranges.pop()
        except IndexError:
            return
        assert API.run_tasks(place, phase, begin, end, worker) == OK
