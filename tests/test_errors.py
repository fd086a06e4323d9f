# SPDX-License-Identifier: BSD-3-Clause
"""Wrong arguments: the exception, the name in its message, and nothing written."""

import re

import numpy as np
import pytest
from arrays import batch
from numpy.lib.stride_tricks import as_strided

import fastbn

X = batch((4, 3, 5), "float32")


def vector(value=1.0, channels=3):
    return np.full(channels, value, np.float32)


def read_only(array):
    array.flags.writeable = False
    return array


class Lookalike:
    """Has an array interface, but is no array."""

    def __array__(self, dtype=None, copy=None):
        return np.zeros(3)


def overlapping_x():
    return np.ndarray((3,), np.float32, X.data)


# (function, changed arguments, exception, what the message must contain)
FORWARD = [
    ({"x": None}, TypeError, "x: expected a numpy.ndarray, got None"),
    ({"x": [[1.0, 2.0, 3.0]]}, TypeError, "x: expected a numpy.ndarray, got list"),
    ({"x": np.ma.masked_array(X)}, TypeError, "x: .*mask"),
    ({"x": X.astype(np.int64)}, TypeError, r"x: .*got int64.*x\.astype\(np\.float32\)"),
    ({"x": X.astype(np.uint8)}, TypeError, r"x: .*got uint8.*x\.astype\(np\.float32\)"),
    ({"x": X.astype(bool)}, TypeError, "x: .*got bool"),
    ({"x": X.astype(complex)}, TypeError, "x: .*got complex128"),
    ({"x": X.astype(np.uint16)}, TypeError, r"x: .*got uint16.*x\.astype\(np\.float32\)"),
    ({"x": X.astype(np.longdouble)}, TypeError, f"x: .*got {np.dtype(np.longdouble)}"),
    ({"x": X.astype(object)}, TypeError, "x: .*got object"),
    ({"x": np.float32(1)}, TypeError, "x: "),
    ({"x": X[0, 0]}, ValueError, r"x: expected at least 2 dimensions.*got 1, shape \(5,\)"),
    ({"x": np.array(1.0, np.float32)}, ValueError, "x: .*got 0"),
    ({"x": X[:1, :, :1]}, ValueError, r"x: expected more than one value.*\(1, 3, 1\)"),
    ({"layout": "NHWC"}, ValueError, r"layout: expected 3 letters.*\(4, 3, 5\).*'NHWC'"),
    ({"layout": "NLL"}, ValueError, "layout: .*'NLL'"),
    ({"layout": "NTD"}, ValueError, "layout: .*one 'C'"),
    ({"layout": "CCN"}, ValueError, "layout: "),
    ({"layout": "NC1"}, ValueError, "layout: "),
    ({"layout": "NC."}, ValueError, "layout: "),
    ({"layout": "NC..."}, ValueError, "layout: "),
    ({"layout": ""}, ValueError, "layout: "),
    ({"layout": 1}, TypeError, "layout: expected a string"),
    ({"layout": np.array(["NCL"])}, TypeError, "layout: expected a string"),
    ({"eps": 10**400}, ValueError, "eps: .*range of float64"),
    ({"momentum": -(10**400)}, ValueError, "momentum: .*range of float64"),
    ({"weight": vector(channels=4)}, ValueError, r"weight: expected shape \(3,\).*got \(4,\)"),
    ({"weight": vector()[None]}, ValueError, r"weight: .*\(1, 3\)"),
    ({"weight": np.ones(3, int)}, TypeError, "weight: .*int64"),
    ({"weight": 2.0}, TypeError, "weight: .*float"),
    ({"weight": Lookalike()}, TypeError, "weight: expected a numpy.ndarray"),
    ({"bias": vector(channels=2)}, ValueError, "bias: "),
    ({"running_mean": vector(channels=4)}, ValueError, "running_mean: "),
    ({"running_var": np.ones(3, np.float16)}, TypeError, "running_var: .*float16"),
    ({"running_mean": read_only(vector())}, ValueError, "running_mean: .*read-only"),
    ({"running_var": read_only(vector())}, ValueError, "running_var: .*read-only"),
    ({"running_mean": overlapping_x}, ValueError, "running_mean: .*overlaps x"),
    ({"running_var": as_strided(vector(), (3,), (0,))}, ValueError, "running_var: .*apart"),
    ({"eps": 0.0}, ValueError, "eps: .*> 0 in training.*got 0.0"),
    ({"eps": -1e-5}, ValueError, "eps: "),
    ({"eps": float("nan")}, ValueError, "eps: .*nan"),
    ({"eps": "1e-5"}, TypeError, "eps: expected a real number, got str"),
    ({"eps": None}, TypeError, "eps: .*None"),
    ({"eps": 1j}, TypeError, "eps: .*complex"),
    ({"momentum": float("inf")}, ValueError, "momentum: .*finite.*inf"),
    ({"momentum": float("nan")}, ValueError, "momentum: "),
    ({"momentum": None}, TypeError, "momentum: "),
    ({"momentum": [0.1]}, TypeError, "momentum: .*list"),
    ({"training": 1}, TypeError, "training: expected True or False, got 1"),
    ({"training": None}, TypeError, "training: "),
    ({"out": X[:3].copy()}, ValueError, r"out: expected the shape of x.*got \(3, 3, 5\)"),
    ({"out": X.astype(float)}, TypeError, "out: expected the dtype of x, float32, got float64"),
    ({"out": X.tolist()}, TypeError, "out: "),
    ({"out": read_only(X.copy())}, ValueError, "out: .*read-only"),
    ({"out": as_strided(X.copy(), X.shape, (0, 20, 4))}, ValueError, "out: .*apart"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "message"), FORWARD)
def test_forward(changed, error, message):
    arguments = {"x": X, "weight": vector(2), "bias": vector(3), "out": np.full_like(X, 7)}
    arguments |= {"running_mean": vector(5), "running_var": vector(6)}
    arguments |= {k: v() if v is overlapping_x else v for k, v in changed.items()}
    before = {k: v.copy() for k, v in arguments.items() if isinstance(v, np.ndarray)}
    with pytest.raises(error, match=message) as caught:
        fastbn.batch_norm_forward(**arguments)
    assert str(caught.value).startswith(next(iter(changed)))
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value)


def test_inference_needs_running_statistics():
    for missing in ("running_mean", "running_var"):
        running = {"running_mean": vector(), "running_var": vector(), missing: None}
        with pytest.raises(TypeError, match=rf"{missing}: .*\(3,\).*got None"):
            fastbn.batch_norm(X, **running)


def test_inference_reads_what_training_may_not_write():
    frozen, free = read_only(vector()), vector()
    y = fastbn.batch_norm(X, frozen, frozen, frozen, frozen, eps=0.0)
    assert y.tobytes() == fastbn.batch_norm(X, free, free, free, free, eps=0.0).tobytes()


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("running_mean", "running_var"),
        ("running_mean", "weight"),
        ("running_var", "bias"),
        ("out", "weight"),
        ("out", "running_var"),
    ],
)
def test_arrays_that_overlap_each_other(written, read):
    memory = np.ones(X.size, np.float32)
    arguments = {"x": X, "running_mean": vector(), "running_var": vector()}
    arguments[written] = memory.reshape(X.shape) if written == "out" else memory[:3]
    arguments[read] = memory[1:4]
    with pytest.raises(ValueError, match=f"({written}|{read}): .*overlaps ({written}|{read})"):
        fastbn.batch_norm_forward(**arguments)
    assert (memory == 1).all()


def test_out_may_be_an_input_but_not_overlap_it_in_part():
    memory = np.ones((6, 3, 5), np.float32)
    x = memory[:4]
    for out in (memory[1:5], memory[2:], memory[:4][::-1], memory[:4, ::-1]):
        with pytest.raises(ValueError, match="out: expected x itself or memory apart"):
            fastbn.batch_norm_forward(x, out=out)
    assert (memory == 1).all()
    fastbn.batch_norm_forward(memory[::2], out=memory[1::2])  # interleaved, yet apart
    dy = np.ones_like(X)
    with pytest.raises(ValueError, match="out: expected dy itself"):
        fastbn.batch_norm_backward(
            dy, X, np.zeros(3), np.ones(3), out=dy.reshape(-1)[::-1].reshape(dy.shape)
        )


BACKWARD = [
    ({"dy": None}, TypeError, "dy: "),
    ({"dy": X[:2]}, ValueError, r"dy: expected the shape of x, \(4, 3, 5\), got \(2, 3, 5\)"),
    ({"dy": X.astype(float)}, TypeError, "dy: expected the dtype of x, float32, got float64"),
    ({"x": X.astype(int)}, TypeError, "x: "),
    ({"mean": None}, TypeError, "mean: .*None"),
    ({"mean": vector(channels=2)}, ValueError, r"mean: expected shape \(3,\)"),
    ({"invstd": np.ones(3, int)}, TypeError, "invstd: "),
    ({"invstd": 1.0}, TypeError, "invstd: "),
    ({"weight": vector(channels=1)}, ValueError, "weight: "),
    ({"training": "yes"}, TypeError, "training: "),
    ({"layout": "NHC2"}, ValueError, "layout: "),
    ({"out": read_only(X.copy())}, ValueError, "out: "),
]


@pytest.mark.parametrize(("changed", "error", "message"), BACKWARD)
def test_backward(changed, error, message):
    arguments = {"dy": X, "x": X, "mean": vector(0), "invstd": vector()} | changed
    with pytest.raises(error, match=message):
        fastbn.batch_norm_backward(**arguments)


def test_backward_of_one_value_per_channel():
    one = X[:1, :, :1]
    with pytest.raises(ValueError, match="x: expected more than one value"):
        fastbn.batch_norm_backward(one, one, np.zeros(3), np.ones(3))
    dx, _, _ = fastbn.batch_norm_backward(one, one, np.zeros(3), np.full(3, 2.0), training=False)
    np.testing.assert_array_equal(dx, 2 * one)


def test_a_subclass_cannot_lie_about_its_shape():
    class Liar(np.ndarray):
        @property
        def shape(self):
            return X.shape

    memory = np.zeros(X.size, np.float32)
    small = memory[:15].reshape(1, 3, 5).view(Liar)
    with pytest.raises(ValueError, match="out: expected the shape of x"):
        fastbn.batch_norm_forward(X, out=small)
    with pytest.raises(ValueError, match="dy: expected the shape of x"):
        fastbn.batch_norm_backward(small, X, np.zeros(3), np.ones(3))
    assert not memory.any()


def test_keywords_only():
    with pytest.raises(TypeError):
        fastbn.batch_norm_forward(X, vector(), vector(), vector())
    with pytest.raises(TypeError):
        fastbn.batch_norm(X, vector(), vector(), None, None, False, 0.1, 1e-5, None)
    with pytest.raises(TypeError):
        fastbn.batch_stats(X, "NCL")


def test_a_failed_call_of_a_layer_changes_nothing():
    bn = fastbn.BatchNorm(3)
    bn(X)
    state = bn.state_dict()
    for bad in (X[:, :2], X.astype(int), X[:1, :, :1]):
        with pytest.raises((TypeError, ValueError), match=re.compile("^x: ")):
            bn(bad)
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, state[name])
