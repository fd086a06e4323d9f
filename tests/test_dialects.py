# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm under the names of other frameworks: arrays, conventions, what is refused."""

import numpy as np
import oracle
import pytest
from arrays import batch

import fastbn
from fastbn import dialects

NAMES = {
    "torch": ("weight", "bias", "running_mean", "running_var"),
    "keras": ("gamma", "beta", "moving_mean", "moving_variance"),
    "flax": ("scale", "bias", "mean", "var"),
    "onnx": ("scale", "B", "input_mean", "input_var"),
    "mxnet": ("gamma", "beta", "moving_mean", "moving_var"),
    "darknet": ("scales", "biases", "rolling_mean", "rolling_variance"),
}
CONFIGS = {
    "torch": {"eps": 1e-4, "momentum": 0.3, "affine": True, "track_running_stats": True},
    "keras": {"axis": -1, "momentum": 0.97, "epsilon": 1e-4, "center": True, "scale": True},
    "flax": {"axis": -1, "momentum": 0.97, "epsilon": 1e-4},
    "onnx": {"epsilon": 1e-4, "momentum": 0.97},
    "mxnet": {"eps": 1e-4, "momentum": 0.97, "fix_gamma": False, "axis": 1},
    "darknet": {},
}
EPS = {"torch": 1e-5, "keras": 1e-3, "flax": 1e-5, "onnx": 1e-5, "mxnet": 1e-3, "darknet": 0.0}
MOMENTUM = {"torch": 0.1, "keras": 0.01, "flax": 0.01, "onnx": 0.1, "mxnet": 0.1, "darknet": 0.1}
each = pytest.mark.parametrize("name", NAMES)


def weights_of(name, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    arrays = rng.normal(0, 1, (4, 5)).astype(dtype)
    # Down to what Darknet has for channels that are never used.
    arrays[3] = [0, 1e-20, 1e-9, 0.7, 3e4]
    weights = dict(zip(NAMES[name], arrays, strict=True))
    if name == "torch":
        weights["num_batches_tracked"] = np.array(7)
    return weights


@each
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_and_back(name, dtype):
    if name == "darknet" and dtype == "float64":
        pytest.skip("Darknet's arrays are float32")
    weights = weights_of(name, dtype)
    given = {k: v.copy() for k, v in weights.items()}
    bn = dialects.load(name, weights, CONFIGS[name])
    back, config = dialects.dump(name, bn)
    assert list(back) == list(given)
    for key, value in given.items():
        assert back[key].dtype == value.dtype
        assert back[key].tobytes() == value.tobytes(), key
        assert weights[key].tobytes() == value.tobytes()
        assert not np.shares_memory(back[key], bn.weight)
    assert config.keys() == CONFIGS[name].keys()
    for key, value in CONFIGS[name].items():
        if key == "momentum":
            assert abs(config[key] - value) <= 1e-15
        else:
            assert config[key] == value, key


@each
def test_conventions(name):
    bn = dialects.load(name, weights_of(name), CONFIGS[name])
    assert type(bn) is fastbn.BatchNorm
    assert bn.unbiased is (name == "torch")
    assert bn.training is (name != "darknet")
    assert bn.dtype == ("float64" if name == "darknet" else "float32")
    expected = {"torch": 0.3, "darknet": 0.1}.get(name, 0.03)
    assert abs(bn.momentum - expected) <= 1e-15
    assert bn.num_batches_tracked == (7 if name == "torch" else 0)
    assert bn.layout == ("N...C" if name in ("keras", "flax") else None)
    # What a file does not say is the default of the framework that wrote it.
    bn = dialects.load(name, weights_of(name), None if name != "mxnet" else {"fix_gamma": False})
    assert bn.eps == EPS[name]
    assert abs(bn.momentum - MOMENTUM[name]) <= 1e-15
    assert dialects.load(name, weights_of(name), layout="NHWC").layout == "NHWC"


@each
def test_outputs(name):
    weights = weights_of(name)
    scale, shift, mean, var = (weights[key].astype(float) for key in NAMES[name])
    if name == "darknet":
        # Where nothing is in a channel it is divided by 1e-6 alone.
        weights["rolling_variance"][:2] = 0.5, 2
        var[:2] = 0.5, 2
    bn = dialects.load(name, weights, CONFIGS[name], layout="N...C").eval()
    x = batch((7, 3, 5), "float32")
    expected = oracle.normalise(x, mean, var, scale, shift, 1e-4, "N...C")
    if name == "darknet":
        expected = (x - mean) / (np.sqrt(var) + 1e-6) * scale + shift
    size = np.abs(expected).max((0, 1))
    assert (np.abs(bn(x) - expected) <= 1e-6 * np.maximum(size, 1)).all()


def test_training_goes_on_with_the_variance_of_the_framework():
    x = batch((4, 5), "float32")
    for name in ("torch", "keras"):
        weights = weights_of(name)
        bn = dialects.load(name, weights, {"momentum": 0.5}, layout="NC")
        bn(x)
        new = fastbn.batch_stats(x).var(ddof=int(name == "torch"))
        expected = 0.5 * weights[NAMES[name][3]] + 0.5 * new
        np.testing.assert_allclose(bn.running_var, expected, rtol=1e-6)


@pytest.mark.parametrize("missing", ["gamma", "beta", "both"])
def test_without_gamma_or_beta(missing):
    weights = weights_of("keras")
    config = dict(CONFIGS["keras"])
    for key, said in (("gamma", "scale"), ("beta", "center")):
        if missing in (key, "both"):
            del weights[key]
            config[said] = False
    for given in (config, {"axis": -1, "momentum": 0.97, "epsilon": 1e-4}):
        bn = dialects.load("keras", weights, given)
        assert (bn.weight is None) == (missing in ("gamma", "both"))
        assert (bn.bias is None) == (missing in ("beta", "both"))
        x = batch((6, 5), "float32")
        bn(x)
        bn.backward(x)
        _, dweight, dbias = fastbn.batch_norm_backward(
            x, x, *fastbn.batch_norm_forward(x, eps=1e-4)[1:], bn.weight
        )
        for grad, expected, there in ((bn.weight_grad, dweight, bn.weight),
                                      (bn.bias_grad, dbias, bn.bias)):  # fmt: skip
            assert (grad is None) == (there is None)
            assert grad is None or grad.tobytes() == expected.tobytes()
        back, again = dialects.dump("keras", dialects.load("keras", weights, given))
        assert list(back) == list(weights)
        assert (again["scale"], again["center"]) == (config["scale"], config["center"])
        assert bn.affine is (missing != "both")
        assert list(bn.state_dict())[-3:] == ["running_mean", "running_var", "num_batches_tracked"]


def test_fix_gamma():
    weights = weights_of("mxnet")
    for config in ({}, {"fix_gamma": True}, None):
        bn = dialects.load("mxnet", weights, config)
        assert bn.weight is None
        back, config = dialects.dump("mxnet", bn)
        assert config == {"eps": 1e-3, "momentum": 0.9, "fix_gamma": True, "axis": 1}
        assert (back["gamma"] == 1).all()
        assert back["beta"].tobytes() == weights["beta"].tobytes()


@pytest.mark.parametrize(
    ("axis", "layout"),
    [(1, None), (-1, "N...C"), (2, "NTC"), (3, "NHWC"), ([3], "NHWC"), (4, "NDHWC")],
)
def test_axes(axis, layout):
    bn = dialects.load("keras", weights_of("keras"), {"axis": axis})
    assert bn.layout == layout
    assert dialects.dump("keras", bn)[1]["axis"] == (axis if isinstance(axis, int) else axis[0])


def test_pytorch_without_parameters_or_statistics():
    weights = weights_of("torch")
    only = {k: weights[k] for k in ("weight", "bias")}
    bn = dialects.load("torch", only)
    assert bn.running_mean is bn.running_var is bn.num_batches_tracked is None
    assert dialects.dump("torch", bn)[1]["track_running_stats"] is False
    only = {k: v for k, v in weights.items() if "running" in k}
    bn = dialects.load("torch", only, {"momentum": None})
    assert bn.weight is bn.bias is bn.momentum is None
    back, config = dialects.dump("torch", bn)
    assert config == {
        "eps": 1e-5, "momentum": None, "affine": False, "track_running_stats": True
    }  # fmt: skip
    assert list(back) == ["running_mean", "running_var", "num_batches_tracked"]
    # A weight without a bias is none of PyTorch's.
    half = weights_of("keras")
    del half["beta"]
    back, config = dialects.dump("torch", dialects.load("keras", half))
    assert config["affine"] is True
    assert (back["bias"] == 0).all()


def test_collections_of_flax():
    flat = weights_of("flax")
    nested = {"params": {k: flat[k] for k in ("scale", "bias")},
              "batch_stats": {k: flat[k] for k in ("mean", "var")}}  # fmt: skip
    a, b = (dialects.load("flax", w).state_dict() for w in (flat, nested))
    assert all(a[key].tobytes() == b[key].tobytes() for key in a)
    del nested["params"]
    assert dialects.load("flax", nested).weight is None


def test_what_cannot_be_loaded():
    good = weights_of("keras")
    with pytest.raises(ValueError, match="name: expected one of"):
        dialects.load("caffe", good)
    with pytest.raises(TypeError, match="name: expected one of"):
        dialects.load(None, good)
    for name in ("onnx", "mxnet", "darknet"):
        with pytest.raises(TypeError, match=f"weights: expected a mapping of the names of {name}"):
            dialects.load(name, 3)
    for key in ("moving_mean", "moving_variance"):
        with pytest.raises(KeyError, match=rf"\['{key}'\] are missing"):
            dialects.load("keras", {k: v for k, v in good.items() if k != key})
    with pytest.raises(KeyError, match=r"\['more'\] unexpected"):
        dialects.load("keras", good | {"more": good["beta"]})
    with pytest.raises(KeyError, match=r"\['gamma'\] unexpected"):
        dialects.load("keras", good, {"scale": False})
    with pytest.raises(KeyError, match=r"\['B'\] are missing"):
        dialects.load("onnx", {k: v for k, v in weights_of("onnx").items() if k != "B"})
    with pytest.raises(ValueError, match=r"^beta: expected the shape \(C,\)"):
        dialects.load("keras", good | {"beta": good["beta"][:3]})
    with pytest.raises(TypeError, match=r"^beta: expected dtype"):
        dialects.load("keras", good | {"beta": np.arange(5)})
    for axis in (0, 5, -2):
        with pytest.raises(ValueError, match=r"^axis: expected 1 or the last one"):
            dialects.load("keras", good, {"axis": axis})
        assert dialects.load("keras", good, {"axis": axis}, layout="CN").layout == "CN"
    with pytest.raises(ValueError, match=r"^layout: "):
        dialects.load("keras", good, layout="HW")
    with pytest.raises(ValueError, match=r"^eps: "):
        dialects.load("keras", good, {"epsilon": -1.0})
    with pytest.raises(ValueError, match="weights: expected arrays"):
        dialects.load("torch", {})


def test_what_cannot_be_dumped():
    average = fastbn.BatchNorm(5, momentum=None)
    for name in ("keras", "flax", "onnx", "mxnet"):
        with pytest.raises(ValueError, match="bn: expected a momentum that is a number, got None"):
            dialects.dump(name, average)
    dialects.dump("torch", average)
    for name in NAMES.keys() - {"torch"}:
        with pytest.raises(ValueError, match="bn: expected running statistics"):
            dialects.dump(name, fastbn.BatchNorm(5, track_running_stats=False))
    with pytest.raises(ValueError, match="bn: expected a layer without activation, got 'relu'"):
        dialects.dump("torch", fastbn.BatchNorm(5, activation="relu"))
    with pytest.raises(TypeError, match="bn: expected a BatchNorm, got LayerNorm"):
        dialects.dump("torch", fastbn.LayerNorm(5))
    bn = fastbn.BatchNorm(1, eps=0)
    bn.running_var[:] = 0
    with pytest.raises(ValueError, match="bn: expected deviations of at least 1e-06"):
        dialects.dump("darknet", bn)
