# SPDX-License-Identifier: BSD-3-Clause
"""The layers of layer, RMS, group and instance norm: one protocol, that of BatchNorm."""

import copy
import gc
import pickle
import weakref

import numpy as np
import oracle
import pytest
from arrays import assert_near, batch
from cases import Case, Expected

import fastbn

SHAPE = (5, 6, 4, 3)
# (how to make the layer, what it computes)
LAYERS = [
    (lambda **options: fastbn.LayerNorm((4, 3), **options), Case("layer", SHAPE, (4, 3))),
    (lambda **options: fastbn.LayerNorm(3, **options), Case("layer", SHAPE, 3)),
    (lambda **options: fastbn.RMSNorm((3,), 1e-5, **options), Case("rms", SHAPE, 3)),
    (lambda **options: fastbn.GroupNorm(2, 6, **options), Case("group", SHAPE, 2)),
    (
        lambda **options: fastbn.GroupNorm(3, 3, layout="NHWC", **options),
        Case("group", SHAPE, 3, "NHWC"),
    ),
    (lambda **options: fastbn.InstanceNorm(6, affine=True, **options), Case("instance", SHAPE)),
    (
        lambda **options: fastbn.InstanceNorm(6, affine=True, layout="LCHN", **options),
        Case("instance", SHAPE, layout="LCHN"),
    ),
]
each = pytest.mark.parametrize(("make", "case"), LAYERS, ids=[str(case) for _, case in LAYERS])


@each
def test_call_and_backward(level, any_dtype, make, case):
    for dtype in (np.float32, np.float64):
        layer = make(dtype=dtype)
        assert layer.training
        assert (layer.weight == 1).all()
        assert layer.weight.shape == case.parameter_shape
        layer.weight[...], bias = case.parameters("float64")
        if case.has_mean:
            assert (layer.bias == 0).all()
            layer.bias[...] = bias
        x, dy = case.batch(any_dtype), case.gradient(any_dtype)
        expected = Expected(case, x, dy, layer.weight, layer.bias)
        for _ in range(2):  # gradients are set, not added to
            y = layer(x)
            assert y.dtype == any_dtype
            assert_near(y, expected.y, expected.room_y)
            out = np.empty_like(x)
            assert layer.backward(dy, out=out) is out
            assert_near(out, expected.gradients[0], expected.rooms[0])
            assert layer.weight_grad.dtype == dtype
            assert_near(layer.weight_grad, expected.gradients[1], expected.rooms[1])
            if case.has_mean:
                assert layer.bias_grad.dtype == dtype
                assert_near(layer.bias_grad, expected.gradients[2], expected.rooms[2])
        assert layer(x, out=out) is out
        assert out.tobytes() == y.tobytes()


@each
def test_evaluation_gives_the_same_and_keeps_nothing(make, case):
    x = case.batch("float32")
    layer = make()
    y = layer(x)
    assert layer.eval() is layer
    assert not layer.training
    assert layer(x).tobytes() == y.tobytes()
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(x)
    assert layer.train() is layer
    assert layer.training
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(x)
    layer(x)
    layer.backward(x)


@each
def test_backward_is_refused_where_x_is_gone(make, case):
    layer = make()
    x, dy = case.batch("float32"), case.gradient("float32")
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(dy)
    z = x.copy()
    layer(z, out=z)
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(dy)
    layer(x)
    layer.backward(dy)
    layer.backward(dy, out=x)
    with pytest.raises(RuntimeError, match="overwritten"):
        layer.backward(dy)


@each
def test_only_training_keeps_x(make, case):
    class Array(np.ndarray):
        pass

    layer = make().eval()
    for training in (False, True):
        layer.train(training)
        x = case.batch("float32").view(Array)
        alive = weakref.ref(x)
        layer(x)
        del x
        gc.collect()
        assert (alive() is not None) == training
    layer.eval()
    gc.collect()
    assert alive() is None


@each
def test_state(make, case):
    layer = make(dtype=np.float64)
    names = ["weight", "bias"] if case.has_mean else ["weight"]
    layer.weight[...] = case.parameters("float64")[0]
    state = layer.state_dict()
    assert list(state) == names
    kept = state["weight"].copy()
    state["weight"][...] = 9
    np.testing.assert_array_equal(layer.weight, kept)  # a copy
    other = make()
    weight = other.weight
    other.load_state_dict(state)
    assert other.weight is weight  # in place: optimisers hold a reference
    assert (weight == 9).all()
    assert weight.dtype == np.float32
    x = case.batch("float32")
    layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(RuntimeError):
            clone.backward(x)  # the input is not copied
        assert clone(x).tobytes() == layer(x).tobytes()
        clone.weight[...] = 0
        assert layer.weight.all()


@each
def test_state_that_does_not_fit(make, case):
    layer = make()
    good = {name: value + 1 for name, value in layer.state_dict().items()}
    for name in good:
        without = {k: v for k, v in good.items() if k != name}
        with pytest.raises(KeyError, match=name):
            layer.load_state_dict(without)
    with pytest.raises(KeyError, match="extra"):
        layer.load_state_dict(good | {"extra": good["weight"]})
    with pytest.raises(ValueError, match=r"^weight: "):
        layer.load_state_dict(good | {"weight": np.zeros(7)})
    with pytest.raises(ValueError, match=r"^weight: "):
        layer.load_state_dict(good | {"weight": good["weight"][..., None]})
    with pytest.raises(TypeError, match=r"^weight: "):
        layer.load_state_dict(good | {"weight": good["weight"].tolist()})
    with pytest.raises(TypeError, match=r"^state_dict: "):
        layer.load_state_dict(None)
    assert (layer.weight == 1).all()
    assert layer.load_state_dict({"extra": 1}, strict=False) == (list(good), ["extra"])
    assert (layer.weight == 1).all()
    assert layer.load_state_dict(good) == ([], [])
    assert (layer.weight == 2).all()


@each
def test_states_of_any_dtype(any_dtype, make, case):
    layer = make(dtype=np.float64)
    names = layer.state_dict()
    state = {name: batch(case.parameter_shape, any_dtype, k) for k, name in enumerate(names)}
    assert layer.load_state_dict(state) == ([], [])
    for name, value in layer.state_dict().items():
        assert value.tobytes() == state[name].astype(np.float64).tobytes()


@pytest.mark.parametrize(
    ("layer", "case"),
    [
        (fastbn.LayerNorm((4, 3), elementwise_affine=False), Case("layer", SHAPE, (4, 3))),
        (fastbn.RMSNorm(3, elementwise_affine=False), Case("rms", SHAPE, 3)),
        (fastbn.GroupNorm(2, 6, affine=False), Case("group", SHAPE, 2)),
        (fastbn.InstanceNorm(6), Case("instance", SHAPE)),
    ],
    ids=["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"],
)
def test_without_parameters(layer, case):
    assert layer.weight is layer.bias is None
    assert layer.state_dict() == {}
    assert layer.load_state_dict({}) == ([], [])
    x = case.batch("float32")
    assert layer(x).tobytes() == case.only_y(x).tobytes()
    dx = case.backward(x, x, case.forward(x)[1])[0]
    assert layer.backward(x).tobytes() == dx.tobytes()
    assert layer.weight_grad is layer.bias_grad is None


def test_layer_norm_without_bias():
    layer = fastbn.LayerNorm(3, bias=False)
    assert layer.bias is None
    assert list(layer.state_dict()) == ["weight"]
    x = Case("layer", SHAPE, 3).batch("float32")
    layer(x)
    layer.backward(x)
    assert layer.weight_grad.shape == (3,)
    assert layer.bias_grad is None


def test_eps_is_passed_on():
    x = Case("layer", SHAPE, 3).batch("float32")
    for layer, y in (
        (fastbn.LayerNorm(3, 0.5), fastbn.layer_norm(x, 3, eps=0.5)),
        (fastbn.RMSNorm(3, 0.5), fastbn.rms_norm(x, 3, eps=0.5)),
        (fastbn.RMSNorm(3), fastbn.rms_norm(x, 3)),
        (fastbn.GroupNorm(2, 6, 0.5), fastbn.group_norm(x, 2, eps=0.5)),
        (fastbn.InstanceNorm(6, 0.5), fastbn.instance_norm(x, eps=0.5)),
        (fastbn.InstanceNorm(6, 0.5, 0.1, False, True), fastbn.instance_norm(x, eps=0.5)),
    ):
        assert layer(x).tobytes() == y.tobytes()
        if not isinstance(layer, fastbn.InstanceNorm):
            assert layer.eval()(x).tobytes() == y.tobytes()


def test_running_statistics_of_instance_norm(level, any_dtype):
    layer = fastbn.InstanceNorm(6, momentum=0.25, affine=True, track_running_stats=True)
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(layer.state_dict()) == names
    case = Case("instance", SHAPE)
    x = case.batch(any_dtype)
    mean, var = oracle.moments("instance", x)
    layer(x)
    assert_near(layer.running_mean, 0.25 * mean.mean(0), 5e-6)
    assert_near(layer.running_var, 0.75 + 0.25 * var.mean(0) * 12 / 11, 1e-5)
    assert layer.num_batches_tracked == 1
    before = layer.state_dict()
    y = layer.eval()(x)
    expected = oracle.normalise(x, layer.running_mean, layer.running_var)
    assert_near(y, expected, 1e-5)
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    other = fastbn.InstanceNorm(6, affine=True, track_running_stats=True)
    other.load_state_dict(before)
    assert other.eval()(x).tobytes() == y.tobytes()


def test_an_empty_input_leaves_instance_norm_alone():
    layer = fastbn.InstanceNorm(6, track_running_stats=True)
    empty = np.empty((0, 6, 4), np.float32)
    assert layer(empty).shape == empty.shape
    assert (layer.running_mean == 0).all()
    assert (layer.running_var == 1).all()
    assert layer.num_batches_tracked == 0
    assert layer.backward(empty).shape == empty.shape


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: fastbn.LayerNorm(3.0), TypeError, "normalized_shape"),
        (lambda: fastbn.LayerNorm(None), TypeError, "normalized_shape"),
        (lambda: fastbn.LayerNorm(-1), ValueError, "normalized_shape"),
        (lambda: fastbn.LayerNorm(3, -1.0), ValueError, "eps"),
        (lambda: fastbn.LayerNorm(3, None), TypeError, "eps"),
        (lambda: fastbn.LayerNorm(3, elementwise_affine=1), TypeError, "elementwise_affine"),
        (lambda: fastbn.LayerNorm(3, bias="no"), TypeError, "bias"),
        (lambda: fastbn.LayerNorm(3, dtype="int"), TypeError, "dtype"),
        (lambda: fastbn.RMSNorm("3"), TypeError, "normalized_shape"),
        (lambda: fastbn.RMSNorm(3, "x"), TypeError, "eps"),
        (lambda: fastbn.RMSNorm(3, elementwise_affine=None), TypeError, "elementwise_affine"),
        (lambda: fastbn.GroupNorm(4, 6), ValueError, "num_groups"),
        (lambda: fastbn.GroupNorm(0, 6), ValueError, "num_groups"),
        (lambda: fastbn.GroupNorm(2.0, 6), TypeError, "num_groups"),
        (lambda: fastbn.GroupNorm(1, 0), ValueError, "num_channels"),
        (lambda: fastbn.GroupNorm(1, None), TypeError, "num_channels"),
        (lambda: fastbn.GroupNorm(2, 6, affine="no"), TypeError, "affine"),
        (lambda: fastbn.GroupNorm(2, 6, layout="NHW"), ValueError, "layout"),
        (lambda: fastbn.InstanceNorm(0), ValueError, "num_features"),
        (lambda: fastbn.InstanceNorm(2.0), TypeError, "num_features"),
        (lambda: fastbn.InstanceNorm(2, momentum=float("nan")), ValueError, "momentum"),
        (lambda: fastbn.InstanceNorm(2, affine=2), TypeError, "affine"),
        (lambda: fastbn.InstanceNorm(2, track_running_stats=1), TypeError, "track_running_stats"),
        (lambda: fastbn.InstanceNorm(2, dtype=np.float16), TypeError, "dtype"),
    ],
)
def test_arguments(make, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        make()


@each
def test_a_failed_call_changes_nothing(make, case):
    layer = make()
    x = case.batch("float32")
    layer(x)
    dx = layer.backward(x)
    for bad in (x[..., :2].astype(int), x.tolist(), None):
        with pytest.raises(TypeError, match=r"^x: "):
            layer(bad)
    with pytest.raises(ValueError, match=r"^(x|normalized_shape): "):
        layer(np.zeros((5, 7, 7, 7), np.float32))
    assert layer.backward(x).tobytes() == dx.tobytes()


def test_another_number_of_channels():
    x = np.zeros(SHAPE, np.float32)
    for layer in (fastbn.GroupNorm(2, 4), fastbn.InstanceNorm(4)):
        with pytest.raises(ValueError, match=r"x: expected 4 channels on axis 1, got shape \(5, 6"):
            layer(x)


@each
def test_repr_names_the_class(make, case):
    layer = make()
    name = type(layer).__name__
    assert repr(layer).startswith(f"{name}(")
    assert repr(layer.eval()).endswith("training=False)")


@pytest.mark.parametrize("make", [
    lambda layout: fastbn.GroupNorm(2, 4, layout=layout),
    lambda layout: fastbn.InstanceNorm(4, layout=layout),
], ids=["group", "instance"])  # fmt: skip
def test_a_layout_without_instances_is_refused_at_once(make):
    with pytest.raises(ValueError, match="layout: expected an 'N'"):
        make("HWC")
