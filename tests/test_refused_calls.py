# SPDX-License-Identifier: BSD-3-Clause
"""What is refused changes nothing of a layer: no statistic, no gradient, no mode, no input."""

import numpy as np
import pytest
from arrays import batch

import fastbn

SHAPE = (5, 6, 4, 3)
LAYERS = {
    "batch": lambda: fastbn.BatchNorm(6),
    "batch, average": lambda: fastbn.BatchNorm(6, momentum=None),
    "batch, untracked": lambda: fastbn.BatchNorm(6, track_running_stats=False),
    "in place": lambda: fastbn.InPlaceBatchNorm(6),
    "layer": lambda: fastbn.LayerNorm((4, 3)),
    "rms": lambda: fastbn.RMSNorm((4, 3)),
    "group": lambda: fastbn.GroupNorm(2, 6),
    "instance": lambda: fastbn.InstanceNorm(6, affine=True),
    "instance, tracked": lambda: fastbn.InstanceNorm(6, affine=True, track_running_stats=True),
}
each = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
modes = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])

X = batch(SHAPE, "float32")


def contents(value):
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, tuple | list):
        return type(value), [contents(part) for part in value]
    return id(value) if value.__class__.__module__.startswith("fastbn") else value


def snapshot(layer):
    """All attributes: which objects, and what is in the arrays."""
    return {name: contents(value) for name, value in vars(layer).items()}


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


def refused_calls(layer):
    """(positional arguments, keyword arguments, error)."""
    wrong = np.ones((5, 7, 7, 7), np.float32)
    yield (None,), {}, TypeError
    yield (X.tolist(),), {}, TypeError
    yield (X.astype(int),), {}, TypeError
    yield (wrong,), {}, ValueError
    yield (wrong.astype(np.float64),), {}, ValueError
    yield (X[0, 0, 0],), {}, ValueError
    if isinstance(layer, fastbn.InPlaceBatchNorm):
        yield (read_only(X),), {}, ValueError
        yield (np.broadcast_to(X[:1], X.shape),), {}, ValueError
    else:
        yield (X, X[:1].copy()), {}, ValueError
        yield (X, X.astype(np.float64)), {}, TypeError
        yield (X, read_only(X)), {}, ValueError
        yield (X,), {"residual": X[:1]}, ValueError
        yield (X,), {"residual": X.astype(np.float64)}, TypeError
        memory = np.zeros(X.size + 1, np.float32)
        yield (memory[1:].reshape(SHAPE), memory[:-1].reshape(SHAPE)), {}, ValueError


def spoilt(layer, training):
    """Attributes that a caller has made unfit: the name, what was there, what is, the error."""
    for name, bad, error in (
        ("eps", -1.0, ValueError),
        ("negative_slope", "steep", TypeError),
        ("activation", "tanh", ValueError),
        ("momentum", np.nan, ValueError),
        ("weight", np.ones(7, np.float32), ValueError),
        ("bias", [0.0] * 6, TypeError),
        ("running_var", np.ones((6, 1), np.float32), ValueError),
    ):
        good = getattr(layer, name, None)
        if good is None and name != "activation":
            continue
        if name != "momentum" or training:  # evaluation does not look at the momentum
            yield name, good, bad, error


def trained(make):
    """A layer after a call in training and its backward; what backward returned."""
    layer = make()
    if layer.weight is not None:
        layer.weight[...] = np.linspace(0.5, 1.5, layer.weight.size).reshape(layer.weight.shape)
    layer(X.copy())
    return layer, layer.backward(X).tobytes()


@each
@modes
def test_calls(make, training):
    layer, dx = trained(make)
    layer.training = training  # not `eval`, which forgets
    for arguments, options, error in refused_calls(layer):
        before = snapshot(layer)
        given = [contents(value) for value in (*arguments, *options.values())]
        with pytest.raises(error, match=r"^(x|out|residual|normalized_shape): "):
            layer(*arguments, **options)
        assert snapshot(layer) == before
        assert [contents(value) for value in (*arguments, *options.values())] == given
    layer.training = True
    assert layer.backward(X).tobytes() == dx


@each
@modes
def test_calls_of_a_layer_whose_attributes_do_not_fit(make, training):
    layer, dx = trained(make)
    layer.training = training
    for name, good, bad, error in spoilt(layer, training):
        setattr(layer, name, bad)
        before, x = snapshot(layer), X.copy()
        with pytest.raises(error, match=rf"^{name}: "):
            layer(x)
        assert snapshot(layer) == before
        assert x.tobytes() == X.tobytes()
        setattr(layer, name, good)
    layer.training = True
    assert layer.backward(X).tobytes() == dx


@each
def test_backward(make):
    layer, dx = trained(make)
    before = snapshot(layer)
    for arguments, error in (
        ((None,), TypeError),
        ((X[:1],), ValueError),
        ((X.astype(np.float64),), TypeError),
        ((X, X[:1].copy()), ValueError),
        ((X, read_only(X)), ValueError),
    ):
        with pytest.raises(error, match=r"^(dy|out): "):
            layer.backward(*arguments)
        assert snapshot(layer) == before
    assert layer.backward(X).tobytes() == dx


@each
def test_modes(make):
    layer, dx = trained(make)
    before = snapshot(layer)
    for mode in (0, "no", None):
        with pytest.raises(TypeError, match=r"^mode: "):
            layer.train(mode)
        assert snapshot(layer) == before
    assert layer.backward(X).tobytes() == dx


@each
def test_a_refused_evaluation_brings_nothing_back(make):
    layer, _ = trained(make)
    layer.eval()
    with pytest.raises(TypeError, match=r"^x: "):
        layer(None)
    with pytest.raises(RuntimeError, match="training mode"):
        layer.train().backward(X)


@each
def test_evaluation_that_succeeds_forgets(make):
    layer, _ = trained(make)
    layer.training = False
    layer(X.copy())
    layer.training = True
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(X)


def test_what_inference_keeps_survives_another_dtype():
    layer = fastbn.BatchNorm(6).eval()
    layer(X)
    prepared = layer._prepared
    with pytest.raises(ValueError, match=r"^residual: "):
        layer(X.astype(np.float64), residual=X.astype(np.float64)[:1])
    assert layer._prepared is prepared
