# SPDX-License-Identifier: BSD-3-Clause
"""Wrong activations and residuals: the exception, the name in its message, nothing written."""

import re

import numpy as np
import pytest
from arrays import batch
from cases import ACTIVATIONS, Case

import fastbn

X = batch((4, 6, 5), "float32")
CASES = [
    Case("batch", X.shape),
    Case("layer", X.shape, 5),
    Case("rms", X.shape, (6, 5)),
    Case("group", X.shape, 3),
    Case("instance", X.shape),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)

KNOWN = r"expected None, ('\w+',? )+or '\w+', got"
WRONG = [
    ({"activation": "gelu"}, ValueError, f"activation: {KNOWN} 'gelu'"),
    ({"activation": "ReLU"}, ValueError, f"activation: {KNOWN} 'ReLU'"),
    ({"activation": ""}, ValueError, f"activation: {KNOWN} ''"),
    ({"activation": "relu\0"}, ValueError, f"activation: {KNOWN} "),
    ({"activation": 1}, TypeError, f"activation: {KNOWN} int"),
    ({"activation": False}, TypeError, f"activation: {KNOWN} bool"),
    ({"activation": b"relu"}, TypeError, f"activation: {KNOWN} bytes"),
    ({"activation": ["relu"]}, TypeError, f"activation: {KNOWN} list"),
    ({"activation": np.maximum}, TypeError, f"activation: {KNOWN} numpy.ufunc"),
    ({"activation": X}, TypeError, f"activation: {KNOWN} an array"),
    ({"negative_slope": "0.1"}, TypeError, "negative_slope: expected a real number, got str"),
    ({"negative_slope": None}, TypeError, "negative_slope: .*None"),
    ({"negative_slope": 1j}, TypeError, "negative_slope: .*complex"),
    ({"negative_slope": True}, TypeError, "negative_slope: .*bool"),
    ({"negative_slope": np.ones(6)}, TypeError, "negative_slope: .*array"),
    ({"negative_slope": np.nan}, ValueError, "negative_slope: expected a finite number, got nan"),
    ({"negative_slope": np.inf}, ValueError, "negative_slope: expected a finite number, got inf"),
    ({"negative_slope": -np.inf}, ValueError, "negative_slope: .*-inf"),
    ({"negative_slope": 10**400}, ValueError, "negative_slope: .*range of float64"),
    ({"residual": 0.0}, TypeError, "residual: expected a numpy.ndarray, got float"),
    ({"residual": True}, TypeError, "residual: expected a numpy.ndarray, got bool"),
    ({"residual": X.tolist()}, TypeError, "residual: expected a numpy.ndarray, got list"),
    ({"residual": np.ma.masked_array(X)}, TypeError, "residual: .*mask"),
    ({"residual": X[:3]}, ValueError,
     r"residual: expected the shape of x, \(4, 6, 5\), got \(3, 6, 5\)"),
    ({"residual": X[0]}, ValueError, r"residual: .*got \(6, 5\)"),
    ({"residual": X[None]}, ValueError, r"residual: .*got \(1, 4, 6, 5\)"),
    ({"residual": X[:, :, :1]}, ValueError, r"residual: .*got \(4, 6, 1\)"),
    ({"residual": X.transpose(0, 2, 1)}, ValueError, r"residual: .*got \(4, 5, 6\)"),
    ({"residual": X.astype(float)}, TypeError,
     "residual: expected the dtype of x, float32, got float64"),
    ({"residual": X.astype(np.float16)}, TypeError, "residual: expected the dtype of x.*float16"),
    ({"residual": X.astype(np.int32)}, TypeError, "residual: .*got int32"),
    ({"residual": X.astype(np.uint16)}, TypeError, "residual: .*ml_dtypes"),
    ({"residual": X.astype(complex)}, TypeError, "residual: .*complex128"),
    ({"residual": X.astype(object)}, TypeError, "residual: .*object"),
]  # fmt: skip


def test_the_list_of_activations_is_whole():
    # What the message offers is what the tests try.
    with pytest.raises(ValueError, match=f"activation: {KNOWN} 'gelu'") as caught:
        fastbn.layer_norm(X, 5, activation="gelu")
    offered = re.findall(r"'(\w+)'", str(caught.value))
    assert sorted(offered) == sorted([*ACTIVATIONS, "gelu"])


def running_of(case):
    if case.op not in ("batch", "instance"):
        return {}
    return {"running_mean": np.full(6, 5.0), "running_var": np.full(6, 6.0)}


@pytest.mark.parametrize("function", ["forward", "only_y"])
@pytest.mark.parametrize(("changed", "error", "message"), WRONG)
@every_case
def test_wrong_arguments_forward(case, changed, error, message, function):
    running, out = running_of(case), np.full_like(X, 7)
    with pytest.raises(error, match=f"^{message}"):
        getattr(case, function)(X, **running, out=out, **changed)
    assert (out == 7).all()
    for name, value in running_of(case).items():
        np.testing.assert_array_equal(running[name], value)


@pytest.mark.parametrize(("changed", "error", "message"), WRONG)
@every_case
def test_wrong_arguments_backward(case, changed, error, message):
    _, saved = case.forward(X)
    out = np.full_like(X, 7)
    with pytest.raises(error, match=f"^{message}"):
        case.backward(X, X, saved, out=out, **changed)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("bias", "error"),
    [(1.0, TypeError), (np.ones(7), ValueError), (np.ones(5, int), TypeError),
     (np.ones((1, 1)), ValueError), (np.ma.masked_array(np.ones(5)), TypeError)],
)  # fmt: skip
@every_case
def test_a_wrong_bias_in_backward(case, bias, error):
    _, saved = case.forward(X)
    out = np.full_like(X, 7)
    if not case.has_mean:
        with pytest.raises(TypeError, match="bias"):
            case.backward(X, X, saved, bias=None, out=out)
        return
    for activation in (None, *ACTIVATIONS):
        with pytest.raises(error, match=r"^bias: "):
            case.backward(X, X, saved, bias=bias, activation=activation, out=out)
    assert (out == 7).all()


@every_case
def test_a_residual_that_overlaps_out_in_part(case):
    memory = np.ones((8, 6, 5), np.float32)
    residual = memory[2:6]
    _, saved = case.forward(X)
    for out in (memory[1:5], memory[3:7], residual[::-1], residual[:, ::-1]):
        for call in (
            lambda out=out: case.forward(X, residual=residual, out=out),
            lambda out=out: case.only_y(X, residual=residual, out=out),
            lambda out=out: case.backward(X, X, saved, residual=residual, out=out),
        ):
            with pytest.raises(ValueError, match=r"^out: expected residual itself or memory apart"):
                call()
    assert (memory == 1).all()
    # Side by side, and one between the other, are apart.
    expected = case.forward(X, residual=residual)[0]
    interleaved = np.ones((8, 6, 5), np.float32)
    case.forward(X, residual=interleaved[::2], out=interleaved[1::2])
    np.testing.assert_array_equal(interleaved[1::2], expected)
    np.testing.assert_array_equal(case.forward(X, residual=memory[:4], out=memory[4:])[0], expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.has_mean], ids=str)
def test_a_bias_that_overlaps_out_in_backward(case):
    _, saved = case.forward(X)
    memory = np.ones(X.size, np.float32)
    bias = memory[: int(np.prod(case.parameter_shape))].reshape(case.parameter_shape)
    with pytest.raises(ValueError, match=r"^out: .*overlaps bias"):
        case.backward(X, X, saved, bias=bias, activation="relu", out=memory.reshape(X.shape))
    assert (memory == 1).all()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_running_statistics_that_overlap_a_residual(case, name):
    residual = np.ones_like(X)
    running = running_of(case) | {name: residual.reshape(-1)[3:9]}
    for function in (case.forward, case.only_y):
        with pytest.raises(ValueError, match=rf"^{name}: .*overlaps residual"):
            function(X, residual=residual, **running)
    assert (residual == 1).all()


def test_a_slope_is_checked_whatever_the_activation_is():
    for activation in (None, *ACTIVATIONS):
        with pytest.raises(ValueError, match=r"^negative_slope: "):
            fastbn.layer_norm(X, 5, activation=activation, negative_slope=np.nan)


@every_case
def test_keywords_only(case):
    _, saved = case.forward(X)
    for name in ("activation", "negative_slope", "residual"):
        value = {"activation": "relu", "negative_slope": 0.1, "residual": X}[name]
        case.forward(X, **{name: value})
        case.backward(X, X, saved, **{name: value})
    positional = [*([case.what] if case.what is not None else []), None]
    with pytest.raises(TypeError, match="positional"):
        getattr(fastbn, f"{case.op}_norm_backward")(X, X, *saved, *positional, "relu")
