# SPDX-License-Identifier: BSD-3-Clause
"""The layer: modes, state, gradients, what it remembers and when it refuses."""

import copy
import gc
import pickle
import weakref

import numpy as np
import oracle
import pytest
from arrays import batch

import fastbn

X = batch((6, 3, 4, 4), "float32")


def test_training_then_evaluation(level):
    bn = fastbn.BatchNorm(3, momentum=0.25)
    bn.weight[:], bn.bias[:] = [1, 2, 3], [4, 5, 6]
    mean, var = oracle.stats(X)
    y = bn(X)
    np.testing.assert_allclose(y, oracle.normalise(X, mean, var, bn.weight, bn.bias), atol=1e-5)
    n = X.size // 3
    np.testing.assert_allclose(bn.running_mean, 0.25 * mean, atol=1e-6)
    np.testing.assert_allclose(bn.running_var, 0.75 + 0.25 * var * n / (n - 1), atol=1e-6)
    assert bn.num_batches_tracked == 1
    before = bn.running_mean.copy()
    y = bn.eval()(X)
    expected = oracle.normalise(X, bn.running_mean, bn.running_var, bn.weight, bn.bias)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(bn.running_mean, before)
    assert bn.num_batches_tracked == 1


def test_backward_sets_gradients(level):
    bn = fastbn.BatchNorm(3)
    bn.weight[:] = [1, 2, 3]
    mean, var = oracle.stats(X)
    dy = batch(X.shape, "float32", 1)
    expected = oracle.backward(dy, X, mean, 1 / np.sqrt(var + 1e-5), bn.weight)
    for _ in range(2):  # set, not added to
        bn(X)
        out = np.empty_like(X)
        assert bn.backward(dy, out=out) is out
        np.testing.assert_allclose(out, expected[0], atol=1e-5)
        np.testing.assert_allclose(bn.weight_grad, expected[1], rtol=1e-5)
        np.testing.assert_allclose(bn.bias_grad, expected[2], rtol=1e-5)
    assert bn.weight_grad.dtype == bn.weight.dtype


def test_a_refused_evaluation_forgets_nothing():
    bn = fastbn.BatchNorm(3)
    bn(X)
    bn.training = False
    with pytest.raises(ValueError, match="x: expected 3 channels on axis 1"):
        bn(X[:, :2])
    bn.training = True
    assert bn.backward(X).shape == X.shape


def test_momentum_none_is_the_plain_average():
    bn = fastbn.BatchNorm(3, momentum=None, dtype=np.float64)
    batches = [batch(X.shape, "float64", seed) for seed in range(4)]
    for x in batches:
        bn(x)
    stats = [fastbn.batch_stats(x) for x in batches]
    np.testing.assert_allclose(bn.running_mean, np.mean([s.mean for s in stats], 0))
    np.testing.assert_allclose(bn.running_var, np.mean([s.var(ddof=1) for s in stats], 0))


def test_an_empty_batch_leaves_the_layer_alone():
    bn = fastbn.BatchNorm(3, momentum=None)
    assert bn(X[:0]).shape == (0, 3, 4, 4)
    assert bn.num_batches_tracked == 0
    np.testing.assert_array_equal(bn.running_var, 1)
    assert bn.backward(X[:0]).shape == (0, 3, 4, 4)
    np.testing.assert_array_equal(bn.weight_grad, 0)


def test_without_tracking_evaluation_uses_the_batch():
    bn = fastbn.BatchNorm(3, track_running_stats=False)
    assert bn.running_mean is bn.running_var is bn.num_batches_tracked is None
    np.testing.assert_array_equal(bn(X), bn.eval()(X))
    assert sorted(bn.state_dict()) == ["bias", "weight"]
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)


def test_without_affine():
    bn = fastbn.BatchNorm(3, affine=False)
    assert bn.weight is bn.bias is None
    bn(X)
    bn.backward(X)
    assert bn.weight_grad is bn.bias_grad is None
    assert sorted(bn.state_dict()) == ["num_batches_tracked", "running_mean", "running_var"]


@pytest.mark.parametrize("parameters", [np.float32, np.float64])
def test_y_follows_x(dtype, parameters):
    bn = fastbn.BatchNorm(3, dtype=parameters)
    assert bn(X.astype(dtype)).dtype == dtype
    bn.backward(X.astype(dtype))
    for array in (bn.weight, bn.running_var, bn.weight_grad, bn.bias_grad):
        assert array.dtype == parameters


def test_layout():
    first, last = fastbn.BatchNorm(3), fastbn.BatchNorm(3, layout="NHWC")
    y = first(X)
    np.testing.assert_allclose(
        last(np.ascontiguousarray(X.transpose(0, 2, 3, 1))), y.transpose(0, 2, 3, 1), atol=1e-6
    )


def test_when_backward_is_refused():
    bn = fastbn.BatchNorm(3)
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)
    bn(X)
    bn.eval()
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)
    bn.train()
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)
    bn(X)
    bn.backward(X)
    x = X.copy()
    bn(x, out=x)
    with pytest.raises(RuntimeError, match="overwritten"):
        bn.backward(X)
    bn(X)
    bn.backward(X)
    bn.eval()(X)
    bn.train()
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)


def test_backward_is_refused_after_it_has_overwritten_x():
    bn = fastbn.BatchNorm(3)
    x = X.copy()
    bn(x)
    bn.backward(X, out=x)
    with pytest.raises(RuntimeError, match="overwritten"):
        bn.backward(X)


def test_only_training_keeps_x():
    class Array(np.ndarray):
        pass

    def make():
        return X.copy().view(Array)

    bn = fastbn.BatchNorm(3).eval()
    x = make()
    alive = weakref.ref(x)
    bn(x)
    del x
    gc.collect()
    assert alive() is None
    x = make()
    alive = weakref.ref(x)
    bn.train()(x)
    del x
    assert alive() is not None
    bn.eval()
    gc.collect()
    assert alive() is None


def test_state():
    bn = fastbn.BatchNorm(3, dtype=np.float64)
    bn(X)
    state = bn.state_dict()
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(state) == names
    assert state["num_batches_tracked"].dtype == np.int64
    assert state["num_batches_tracked"].shape == ()
    state["weight"][:] = 9
    assert (bn.weight == 1).all()  # a copy
    other = fastbn.BatchNorm(3)
    weight = other.weight
    other.load_state_dict(state)
    assert other.weight is weight  # in place: optimisers hold a reference
    assert (other.weight == 9).all()
    assert other.weight.dtype == np.float32
    assert other.num_batches_tracked == 1
    for clone in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        with pytest.raises(RuntimeError):
            clone.backward(X)  # the batch is not copied
        np.testing.assert_array_equal(clone.running_mean, bn.running_mean)


def test_state_that_does_not_fit():
    bn = fastbn.BatchNorm(3)
    good = {k: v + 1 for k, v in bn.state_dict().items()}
    for name in set(good) - {"num_batches_tracked"}:
        without = {k: v for k, v in good.items() if k != name}
        with pytest.raises(KeyError, match=rf"where \['{name}'\] are missing and \[\] unexpected"):
            bn.load_state_dict(without)
    with pytest.raises(KeyError, match="extra"):
        bn.load_state_dict(good | {"extra": np.zeros(3)})
    with pytest.raises(ValueError, match="running_var: "):
        bn.load_state_dict(good | {"running_var": np.zeros(4)})
    with pytest.raises(TypeError, match="bias: "):
        bn.load_state_dict(good | {"bias": [0.0, 0.0, 0.0]})
    for bad in (np.array(1.5), np.array([1, 2]), np.array([[1]]), np.array([True]), True, None):
        with pytest.raises(TypeError, match="num_batches_tracked: "):
            bn.load_state_dict(good | {"num_batches_tracked": bad})
    with pytest.raises(ValueError, match="num_batches_tracked: "):
        bn.load_state_dict(good | {"num_batches_tracked": -1})
    with pytest.raises(TypeError, match="state_dict: "):
        bn.load_state_dict(None)
    with pytest.raises(KeyError, match=r"state_dict: .* missing and \[1, 'a'\] unexpected"):
        bn.load_state_dict({1: 2, "a": 3})
    with pytest.raises(TypeError, match=r"^strict: "):
        bn.load_state_dict(good, strict=1)
    with pytest.raises(ValueError, match=r"^running_var: "):
        bn.load_state_dict(good | {"running_var": np.zeros(4), "extra": 1}, strict=False)
    bn.running_var.flags.writeable = False
    with pytest.raises(ValueError, match=r"running_var: .*writable"):
        bn.load_state_dict(good)
    bn.running_var = np.ones((1, 3), np.float32)
    with pytest.raises(ValueError, match=r"^the layer's running_var: expected shape \(3,\)"):
        bn.load_state_dict(good)
    bn.running_var = None
    with pytest.raises(TypeError, match=r"^the layer's running_var: "):
        bn.load_state_dict(good)
    assert (bn.weight == 1).all()
    assert bn.num_batches_tracked == 0


def test_parts_of_a_state():
    bn = fastbn.BatchNorm(3)
    bn(X)
    before = bn.state_dict()
    part = {"more": 1, "bias": before["bias"] + 2, "other": None}
    missing, unexpected = bn.load_state_dict(part, strict=False)
    assert missing == ["weight", "running_mean", "running_var"]
    assert unexpected == ["more", "other"]
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, part.get(name, before[name]))
    assert bn.load_state_dict({}, strict=np.False_) == (
        ["weight", "bias", "running_mean", "running_var"], [],
    )  # fmt: skip
    assert bn.load_state_dict(before) == ([], [])


def test_a_state_without_a_number_of_batches():
    # As PyTorch wrote them before version 0.4.1.
    bn = fastbn.BatchNorm(3, momentum=None)
    bn(X)
    bn(X)
    state = {k: v + 1 for k, v in bn.state_dict().items() if k != "num_batches_tracked"}
    for strict in (True, False):
        assert bn.load_state_dict(state, strict) == ([], [])
        assert bn.num_batches_tracked == 2
        np.testing.assert_array_equal(bn.running_mean, state["running_mean"])


def test_states_of_any_dtype(any_dtype):
    names = ("weight", "bias", "running_mean", "running_var")
    state = {name: batch((3,), any_dtype, seed) for seed, name in enumerate(names)}
    for batches in (7, np.array(7), np.array([7]), np.array([7], np.int32), np.uint64(7)):
        for dtype in (np.float32, np.float64):
            bn = fastbn.BatchNorm(3, dtype=dtype)
            bn.load_state_dict(state | {"num_batches_tracked": batches})
            assert type(bn.num_batches_tracked) is int
            assert bn.num_batches_tracked == 7
            for name in names:
                kept = getattr(bn, name)
                assert kept.dtype == dtype
                assert kept.tobytes() == state[name].astype(dtype).tobytes()


def test_a_state_may_hold_the_arrays_of_the_layer():
    bn = fastbn.BatchNorm(3)
    bn.load_state_dict({"weight": bn.bias, "bias": bn.weight}, strict=False)
    assert (bn.weight == 0).all()
    assert (bn.bias == 1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"num_features": 0}, ValueError, "num_features"),
        ({"num_features": 2.0}, TypeError, "num_features"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"eps": "x"}, TypeError, "eps"),
        ({"momentum": float("nan")}, ValueError, "momentum"),
        ({"layout": "HW"}, ValueError, "layout"),
        ({"dtype": np.float16}, TypeError, "dtype"),
        ({"dtype": "int"}, TypeError, "dtype"),
        ({"dtype": None}, TypeError, "dtype"),
        ({"dtype": "unknown"}, TypeError, "dtype"),
        ({"num_features": 2**70}, ValueError, "num_features"),
        ({"num_features": np.array([3, 3])}, TypeError, "num_features"),
        ({"affine": "no"}, TypeError, "affine"),
        ({"track_running_stats": None}, TypeError, "track_running_stats"),
    ],
)
def test_arguments(arguments, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        fastbn.BatchNorm(**{"num_features": 3} | arguments)


def test_another_number_of_channels():
    with pytest.raises(ValueError, match=r"x: expected 5 channels on axis 1, got shape \(6, 3"):
        fastbn.BatchNorm(5)(X)


def test_repr():
    assert repr(fastbn.BatchNorm(3)) == "BatchNorm(3, eps=1e-05, momentum=0.1)"
    bn = fastbn.BatchNorm(2, 1e-3, None, False, False, layout="NTC", dtype=np.float64)
    assert repr(bn.eval()) == (
        "BatchNorm(2, eps=0.001, momentum=None, affine=False, track_running_stats=False, "
        "layout='NTC', dtype=float64, training=False)"
    )
