# SPDX-License-Identifier: BSD-3-Clause
"""Layers with an activation and a residual; inference that keeps its coefficients.

What the functions compute is tested with them: here a layer gives the same bits.
"""

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from arrays import batch, in_order
from cases import ACTIVATIONS, Case

import fastbn
from fastbn import _dispatch

SHAPE = (5, 6, 4, 3)
SLOPE = 0.2
# (how to make the layer, what it computes)
LAYERS = [
    (lambda **o: fastbn.BatchNorm(6, **o), Case("batch", SHAPE)),
    (lambda **o: fastbn.BatchNorm(3, layout="NHWC", **o), Case("batch", SHAPE, layout="NHWC")),
    (lambda **o: fastbn.LayerNorm((4, 3), **o), Case("layer", SHAPE, (4, 3))),
    (lambda **o: fastbn.RMSNorm((3,), 1e-5, **o), Case("rms", SHAPE, 3)),
    (lambda **o: fastbn.GroupNorm(2, 6, **o), Case("group", SHAPE, 2)),
    (lambda **o: fastbn.InstanceNorm(6, affine=True, **o), Case("instance", SHAPE)),
]
each = pytest.mark.parametrize(("make", "case"), LAYERS, ids=[str(case) for _, case in LAYERS])
activations = pytest.mark.parametrize("activation", [None, *ACTIVATIONS])


def made(make, case, **options):
    """A layer with parameters that matter."""
    layer = make(**options)
    weight, bias = case.parameters("float32")
    layer.weight[...] = weight
    if case.has_mean:
        layer.bias[...] = bias
    return layer


def same(a, b):
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# ---- a layer is its functions ------------------------------------------------------


@each
@activations
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
def test_a_layer_has_the_bits_of_its_functions(any_dtype, make, case, activation, adds):
    layer = made(make, case, activation=activation, negative_slope=SLOPE)
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    fused = {"activation": activation, "negative_slope": SLOPE}
    fused["residual"] = case.batch(any_dtype, 6, 0.3, 1.0) if adds else None
    bias = {"bias": layer.bias} if case.has_mean else {}
    y, saved = case.forward(x, layer.weight, layer.bias, eps=1e-5, **fused)
    gradients = case.backward(dy, x, saved, layer.weight, **bias, **fused)

    assert same(layer(x, residual=fused["residual"]), y)
    dx = layer.backward(dy)
    assert isinstance(dx, tuple) == adds
    if adds:
        dx, dresidual = dx
        assert same(dresidual, gradients.pop())
    assert same(dx, gradients[0])
    assert same(layer.weight_grad, gradients[1])
    if case.has_mean:
        assert same(layer.bias_grad, gradients[2])
    out = np.empty_like(x)
    assert layer(x, out=out, residual=fused["residual"]) is out
    assert same(out, y)


@each
@activations
@pytest.mark.parametrize("adds", [False, True], ids=["", "residual"])
def test_evaluation_has_the_bits_of_the_function(make, case, activation, adds):
    layer = made(make, case, activation=activation, negative_slope=SLOPE).eval()
    x = case.batch("float32")
    fused = {"activation": activation, "negative_slope": SLOPE}
    fused["residual"] = case.batch("float32", 6, 0.3, 1.0) if adds else None
    if case.op == "batch":
        vectors = layer.running_mean, layer.running_var, layer.weight, layer.bias
        expected = fastbn.batch_norm(x, *vectors, layout=case.layout, **fused)
    else:
        expected = case.only_y(x, layer.weight, layer.bias, eps=1e-5, **fused)
    assert same(layer(x, residual=fused["residual"]), expected)
    z = x.copy()
    assert layer(z, out=z, residual=fused["residual"]) is z
    assert same(z, expected)


def test_evaluation_without_tracking_uses_the_batch():
    x, residual = batch(SHAPE, "float32"), batch(SHAPE, "float32", 1)
    for layer in (
        fastbn.BatchNorm(6, track_running_stats=False, activation="relu"),
        fastbn.InstanceNorm(6, activation="relu"),
    ):
        assert same(layer(x, residual=residual), layer.eval()(x, residual=residual))


# ---- what backward needs ----------------------------------------------------------


@each
def test_backward_is_refused_where_x_or_the_residual_is_gone(make, case):
    layer = make(activation="silu")
    x, dy = case.batch("float32"), case.gradient("float32")
    for overwritten in (0, 1):
        tensors = x.copy(), case.batch("float32", 6)
        layer(tensors[0], residual=tensors[1], out=tensors[overwritten])
        with pytest.raises(RuntimeError, match="overwritten"):
            layer.backward(dy)
        tensors = x.copy(), case.batch("float32", 6)
        layer(tensors[0], residual=tensors[1])
        first = layer.backward(dy)
        dx, _ = layer.backward(dy, out=tensors[overwritten])
        assert dx is tensors[overwritten]
        assert same(dx, first[0])
        with pytest.raises(RuntimeError, match="overwritten"):
            layer.backward(dy)


@each
def test_a_residual_is_of_one_call(make, case):
    layer = make()
    x, residual = case.batch("float32"), case.batch("float32", 6)
    layer(x, residual=residual)
    layer(x)
    assert isinstance(layer.backward(x), np.ndarray)
    layer.eval()(x, residual=residual)
    layer.train()
    with pytest.raises(RuntimeError, match="training mode"):
        layer.backward(x)


@each
def test_a_failed_call_changes_nothing(make, case):
    layer = make(activation="relu")
    x, residual = case.batch("float32"), case.batch("float32", 6)
    layer(x, residual=residual)
    expected, state = layer.backward(x), layer.state_dict()
    for bad, error in (
        (residual[:1], ValueError),
        (residual.astype(np.float64), TypeError),
        (residual.tolist(), TypeError),
    ):
        with pytest.raises(error, match=r"^residual: "):
            layer(x, residual=bad)
    for a, b in zip(layer.backward(x), expected, strict=True):
        assert same(a, b)
    for name, value in layer.state_dict().items():
        assert same(value, state[name])


# ---- arguments, state --------------------------------------------------------------


@each
@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"activation": 1}, TypeError, "activation"),
        ({"activation": ["relu"]}, TypeError, "activation"),
        ({"negative_slope": "steep"}, TypeError, "negative_slope"),
        ({"negative_slope": float("nan")}, ValueError, "negative_slope"),
    ],
)
def test_arguments(make, case, options, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        make(**options)


@each
def test_repr(make, case):
    plain = repr(make())
    assert "activation" not in plain
    assert "negative_slope" not in plain
    assert repr(make(activation="silu")) == plain[:-1] + ", activation='silu')"
    layer = make(activation="leaky_relu", negative_slope=0.2, dtype=np.float64)
    end = ", activation='leaky_relu', negative_slope=0.2, dtype=float64, training=False)"
    assert repr(layer.eval()) == plain[:-1] + end


@each
def test_state_and_copies(make, case):
    layer = made(make, case, activation="silu")
    x, residual = case.batch("float32"), case.batch("float32", 6)
    y = layer(x, residual=residual)
    # An activation has no state: PyTorch's names, and no others.
    assert set(layer.state_dict()) == set(make().state_dict())
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.activation == "silu"
        with pytest.raises(RuntimeError):
            clone.backward(x)
        assert same(clone(x, residual=residual), y)


# ---- prepared inference -------------------------------------------------------------


def inferring(channels, layout=None, dtype="float32", **options):
    rng = np.random.default_rng(channels)
    bn = fastbn.BatchNorm(channels, layout=layout, dtype=dtype, **options).eval()
    bn.weight[:], bn.bias[:] = rng.uniform(0.5, 1.5, channels), rng.uniform(-1, 1, channels)
    bn.running_mean[:] = rng.uniform(-1, 1, channels)
    bn.running_var[:] = rng.uniform(0.5, 2, channels)
    return bn


def inferred(bn, x, residual=None):
    """What the layer has to give, computed from its arrays."""
    return fastbn.batch_norm(
        x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps, layout=bn.layout,
        activation=bn.activation, negative_slope=bn.negative_slope, residual=residual,
    )  # fmt: skip


def assert_as_inferred(bn, x, residual=None):
    assert same(bn(x, residual=residual), inferred(bn, x, residual))


@pytest.mark.parametrize("channels", [1, 3, 8, 15, 16, 17, 63, 100, 511, 512, 513, 1030, 2100])
def test_prepared_inference_of_any_shape(level, channels):
    for (shape, layout), activation in itertools.product(
        [
            ((7, channels), None),
            ((300, channels), None),
            ((3, channels, 7, 7), None),
            ((2, channels, 15, 10), None),
            ((3, 7, 5, channels), "NHWC"),
        ],
        (None, "silu"),
    ):
        bn = inferring(channels, layout, activation=activation)
        x = batch(shape, "float32")
        assert_as_inferred(bn, x)
        prepared = bn._prepared
        assert_as_inferred(bn, x)
        assert_as_inferred(bn, x[:1], batch(x[:1].shape, "float32", 1))
        assert bn._prepared is prepared


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_prepared_inference_of_a_large_tensor(always_parallel, layout):
    # Past any cache: streamed.
    shape = (24, 64, 112, 112) if layout == "NCHW" else (24, 112, 112, 64)
    bn = inferring(64, layout, activation="relu")
    x = batch((1, *shape[1:]), "float32").repeat(24, axis=0)
    expected = inferred(bn, x)
    for threads in (1, 3):
        with fastbn.threads(threads):
            y = bn(x)
            assert (y.view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("order", ["C", "F", "channels last", "sliced", "cropped", "misaligned"])
def test_prepared_inference_of_any_memory_order(any_dtype, order):
    bn = inferring(6)
    x = in_order(batch(SHAPE, any_dtype), order)
    for _ in range(2):
        assert_as_inferred(bn, x)


def test_changes_in_place_are_noticed(level):
    bn = inferring(17)
    x = batch((4, 17, 3, 3), "float32")
    before = bn(x)
    for name in ("running_mean", "running_var", "weight", "bias"):
        for channel in (0, 16):
            getattr(bn, name)[channel] += 1
            assert not same(bn(x), before)
            assert_as_inferred(bn, x)
            before = bn(x)
    bn.eps = 0.5
    assert not same(bn(x), before)
    assert_as_inferred(bn, x)
    bn.load_state_dict(inferring(17).state_dict() | {"bias": np.full(17, 3.0)})
    assert_as_inferred(bn, x)
    bn.train()(x)  # moves the running statistics
    bn.eval()
    assert_as_inferred(bn, x)


def test_other_arrays_are_noticed(level):
    x = batch((4, 5, 3, 3), "float32")
    for name in ("running_mean", "running_var", "weight", "bias"):
        bn = inferring(5)
        array = getattr(bn, name)
        bn(x)
        for other in (
            array + np.float32(1),
            array.astype(np.float64),
            array.view(np.int32).astype(np.float32).astype(np.float64),
            np.repeat(array, 2)[::2],
            array[::-1],
            array.astype(array.dtype.newbyteorder()),
            # The same bytes, another number.
            array.view(array.dtype.newbyteorder()),
        ):
            setattr(bn, name, other)
            with np.errstate(all="ignore"):
                assert_as_inferred(bn, x)
                assert_as_inferred(bn, x)
            if other.flags.writeable:
                other[2] = 0.75
                assert_as_inferred(bn, x)
        if name in ("weight", "bias"):
            setattr(bn, name, None)
            assert_as_inferred(bn, x)
            setattr(bn, name, array)
            assert_as_inferred(bn, x)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_arrays_that_do_not_fit_are_named(name):
    x = batch((4, 5, 3, 3), "float32")
    for bad, error in (
        (np.ones(4, np.float32), ValueError),
        (np.ones((1, 5), np.float32), ValueError),
        (np.float32([[1]]), ValueError),
        (np.ones(5, np.int32), TypeError),
        ([1.0] * 5, TypeError),
    ):
        for called in (False, True):
            bn = inferring(5)
            if called:
                bn(x)
            setattr(bn, name, bad)
            with pytest.raises(error, match=f"^{name}: "):
                bn(x)


def test_another_dtype_of_x_is_noticed():
    pytest.importorskip("ml_dtypes")
    bn = inferring(17)
    x = batch((4, 17, 3, 3), "float64")
    for dtype in ("float64", "float32", "bfloat16", "float64", "float16", "float32"):
        assert_as_inferred(bn, x.astype(dtype))


@pytest.mark.skipif(len(_dispatch.runnable()) < 2, reason="one level")
def test_another_level_is_noticed():
    bn = inferring(17)
    x = batch((4, 17, 3, 3), "float32")
    expected = bn(x)
    for level in (*_dispatch.runnable(), *_dispatch.runnable()):
        with _dispatch.using(level):
            prepared = bn._prepared
            assert same(bn(x), expected)
            assert bn._prepared is not prepared or level == _dispatch.runnable()[0]


def test_what_follows_the_normalisation_is_not_prepared():
    bn = inferring(17)
    x = batch((4, 17, 3, 3), "float32")
    for activation, slope in ((None, 0.01), ("relu", 0.01), ("leaky_relu", 0.2)):
        bn.activation, bn.negative_slope = activation, slope
        assert_as_inferred(bn, x)
        assert_as_inferred(bn, x, batch(x.shape, "float32", 1))


def test_threads_may_share_a_layer():
    bn = inferring(33)
    x = batch((4, 33, 9, 9), "float32")
    with ThreadPoolExecutor(8) as pool:
        for change in range(20):
            bn.weight[change] = 7.0  # while nobody computes
            expected = inferred(bn, x)
            for y in pool.map(lambda _: bn(x), range(16)):
                assert same(y, expected)


def test_copies_leave_what_is_prepared_behind():
    bn = inferring(6)
    x = batch(SHAPE, "float32")
    y = bn(x)
    for clone in (copy.deepcopy(bn), copy.copy(bn), pickle.loads(pickle.dumps(bn))):
        assert clone._prepared is None
        assert same(clone(x), y)
    assert bn._prepared is not None
