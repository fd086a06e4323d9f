# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of integers, extremes, normalize and denormalize from C: bits and errors."""

import ctypes

import capi
import ml_dtypes
import numpy as np
import pytest

import fastbn

INTEGERS = ("uint8", "int8", "uint16", "int16")
FLOATS = ("float32", "float64", "float16", "bfloat16")
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def images(dtype="uint8", shape=(3, 40, 41, 3)):
    rng = np.random.default_rng(0)
    if dtype in FLOATS:
        return rng.normal(0.5, 1, shape).astype(dtype_of(dtype))
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, endpoint=True).astype(dtype)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
def test_statistics(dtype, workers):
    x = images(dtype, (7, 90, 91, 3))
    mean, m2 = np.full(3, np.nan), np.full(3, np.nan)
    low, high = np.zeros(3, x.dtype), np.zeros(3, x.dtype)
    call = capi.new_call("batch", capi.STATISTICS, x, mean=mean, m2=m2)
    call.channel_axis = 3
    call.minimum, call.maximum = low.ctypes.data, high.ctypes.data
    capi.run_in_tasks(call, workers)
    stats = fastbn.batch_stats(x, layout="NHWC")
    assert mean.tobytes() == stats.mean.tobytes()
    assert m2.tobytes() == stats.m2.tobytes()
    assert low.tobytes() == stats.min.tobytes()
    assert high.tobytes() == stats.max.tobytes()
    bare = capi.new_call("batch", capi.STATISTICS, x, mean=mean, m2=m2)
    bare.channel_axis = 3
    mean[:] = 0
    capi.run(bare)
    assert mean.tobytes() == stats.mean.tobytes()


def conversion(kind, x, to, axis, **fields):
    """A call whose `out` has the axes of x in any order of memory."""
    call = capi.new_call("batch", kind, x, out=to)
    call.channel_axis, call.out_dtype = axis, capi.DTYPES[to.dtype.name]
    call.norm_mean, call.norm_std = MEAN.ctypes.data, STD.ctypes.data
    call.max_value = 255.0
    for name, value in fields.items():
        setattr(call, name, value)
    return call


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("dtype", "to"), [
    ("uint8", "float32"), ("int16", "bfloat16"), ("float16", "float64"),
    ("float32", "float16")])  # fmt: skip
def test_normalize(dtype, to, workers):
    x = images(dtype)
    planes = np.zeros((3, 3, 40, 41), dtype_of(to))
    call = conversion(capi.NORMALIZE, x, planes.transpose(0, 2, 3, 1), 3)
    capi.run_in_tasks(call, workers)
    expected = fastbn.normalize(x, MEAN, STD, layout="NHWC", out_layout="NCHW", max_value=255,
                                dtype=dtype_of(to))  # fmt: skip
    assert planes.tobytes() == expected.tobytes()
    back = np.zeros(x.shape, dtype_of(dtype))
    capi.run(conversion(capi.DENORMALIZE, planes, back.transpose(0, 3, 1, 2), 1), 2)
    expected = fastbn.denormalize(planes, MEAN, STD, layout="NCHW", out_layout="NHWC",
                                  max_value=255, dtype=dtype_of(dtype))  # fmt: skip
    assert back.tobytes() == expected.tobytes()


def code_of(call):
    return capi.API.workspace_size(call, 1, ctypes.c_size_t())


def begun(call):
    memory, place, size = capi.workspace_for(call)
    code = capi.API.begin(call, 1, place, size)
    assert capi.intact(memory)
    return code


def test_errors():
    x, out = images(), np.zeros((3, 40, 41, 3), np.float32)
    codes = {
        capi.NULL_POINTER: [{"norm_mean": None}, {"norm_std": None}],
        capi.BAD_NUMBER: [{"max_value": 0.0}, {"max_value": np.nan}, {"max_value": np.inf}],
        capi.BAD_DTYPE: [{"out_dtype": 0}, {"out_dtype": 5}, {"out_dtype": 9}, {"dtype": 9}],
        capi.BAD_AXIS: [{"channel_axis": 4}, {"channel_axis": -1}],
        capi.UNKNOWN_FIELD: [{"reserved2": 1}],
        capi.BAD_OPERATION: [{"operation": 8}, {"norm": 2}],
        capi.MISALIGNED: [{"out": capi.Tensor(out.ctypes.data + 1, None)}],
        capi.OVERLAP: [{"out": capi.Tensor(x.ctypes.data // 4 * 4, None)},
                       {"out": capi.Tensor(MEAN.ctypes.data, None)}],
        capi.BAD_STRIDES: [{"out": capi.Tensor(out.ctypes.data, capi.sizes([0, 0, 3, 1]))}],
    }  # fmt: skip
    assert code_of(conversion(capi.NORMALIZE, x, out, 3)) == capi.OK
    for code, changes in codes.items():
        for change in changes:
            assert code_of(conversion(capi.NORMALIZE, x, out, 3, **change)) == code, change
    call = conversion(capi.DENORMALIZE, x, out, 3)
    assert code_of(call) == capi.BAD_DTYPE  # denormalize reads floats
    for bad in (0.0, -1.0, np.nan, np.inf):
        std = np.array([1.0, 1.0, bad])
        call = conversion(capi.NORMALIZE, x, out, 3, norm_std=std.ctypes.data)
        assert begun(call) == capi.BAD_NUMBER
    mean = np.array([1.0, np.nan, 1.0])
    call = conversion(capi.NORMALIZE, x, out, 3, norm_mean=mean.ctypes.data)
    assert begun(call) == capi.BAD_NUMBER


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("operation", [
    capi.INFERENCE, capi.FORWARD, capi.BACKWARD, capi.BACKWARD_INFERENCE])  # fmt: skip
def test_integers_have_no_other_operation(operation, dtype):
    x = images(dtype)
    vectors = [np.ones(3) for _ in range(4)]
    call = capi.new_call("batch", operation, x, out=x.copy(), dy=x.copy(), mean=vectors[0],
                         invstd=vectors[1], running_mean=vectors[2],
                         running_var=vectors[3])  # fmt: skip
    call.channel_axis = 3
    assert code_of(call) == capi.BAD_DTYPE


def test_numbers():
    assert {name: capi.DTYPES[name] for name in INTEGERS} == {
        "uint8": 5, "int8": 6, "uint16": 7, "int16": 8}  # fmt: skip
    assert (capi.NORMALIZE, capi.DENORMALIZE) == (6, 7)
