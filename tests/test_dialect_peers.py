# SPDX-License-Identifier: BSD-3-Clause
"""Training that began in PyTorch, Keras or Flax goes on here as it goes on there.

Each framework where it is installed; with FASTBN_REQUIRE_PEERS=1 none may be missing. Keras
computes with PyTorch or JAX, whichever there is.
"""

import importlib.util
import os

import numpy as np
import pytest
from arrays import batch

import fastbn
from fastbn import dialects

# Keras's own, on PyTorch, with NumPy 2.
keras_warns = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REQUIRED = os.environ.get("FASTBN_REQUIRE_PEERS") == "1"
STEPS, RATE = 100, 0.05
SHAPE = (8, 5, 5, 3)  # channels last


def needs(*names):
    for name in names:
        if not REQUIRED:
            pytest.importorskip(name)


def use_keras():
    if importlib.util.find_spec("keras") is None and not REQUIRED:
        pytest.skip("needs keras")
    backend = next((b for b in ("torch", "jax") if importlib.util.find_spec(b)), None)
    if backend is None:
        pytest.skip("needs a backend of keras")
    os.environ.setdefault("KERAS_BACKEND", backend)
    import keras

    return keras


def data():
    """Fixed batches, and one vector for each: the loss is sum(y t)."""
    return [
        (batch(SHAPE, "float32", seed, mean=1.5), batch(SHAPE, "float32", 100 + seed, 0) / 200)
        for seed in range(10)
    ]


def trained_here(bn, batches, layout="NHWC"):
    for step in range(STEPS):
        x, t = batches[step % len(batches)]
        bn(x)
        bn.backward(t)
        for name in ("weight", "bias"):
            if getattr(bn, name) is not None:
                getattr(bn, name)[...] -= np.float32(RATE) * getattr(bn, f"{name}_grad")


def assert_the_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if name != "num_batches_tracked":
            value = np.asarray(value, np.float64)
            assert np.abs(ours[name] - value).max() <= 1e-5 * np.abs(value).max(), name
    assert ours.get("num_batches_tracked") == theirs.get("num_batches_tracked")


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_pytorch(momentum, affine):
    needs("torch")
    import torch

    module = torch.nn.BatchNorm2d(3, 1e-3, momentum, affine)
    batches = data()

    def train(steps, module):
        for step in range(steps):
            x, t = (torch.from_numpy(a.transpose(0, 3, 1, 2)) for a in batches[step % 10])
            module.zero_grad()
            (module(x) * t).sum().backward() if affine else module(x)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= RATE * parameter.grad

    train(10, module)
    bn = dialects.load("torch", module, layout="NHWC")
    state = {k: v.numpy().copy() for k, v in module.state_dict().items()}
    weights, config = dialects.dump("torch", bn)
    assert weights.keys() == state.keys()
    assert all(weights[k].tobytes() == state[k].tobytes() for k in state)
    assert config == {
        "eps": 1e-3, "momentum": momentum, "affine": affine, "track_running_stats": True
    }  # fmt: skip
    train(STEPS, module)
    trained_here(bn, batches)
    ours = dialects.dump("torch", bn)[0]
    assert_the_same(ours, {k: v.numpy() for k, v in module.state_dict().items()})
    module.load_state_dict({k: torch.from_numpy(v) for k, v in ours.items()})
    assert dialects.load("torch", module.eval()).training is False


def test_modules_of_pytorch_without_arrays():
    needs("torch")
    import torch

    module = torch.nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    assert dialects.load("torch", module).num_features == 4
    module = torch.nn.BatchNorm1d(4, dtype=torch.bfloat16)
    assert dialects.load("torch", module).weight.dtype == "float32"
    assert dialects.load("torch", module.double()).weight.dtype == "float64"


@keras_warns
@pytest.mark.parametrize(("center", "scale"), [(True, True), (False, True), (True, False)])
def test_keras(center, scale):
    keras = use_keras()
    layer = keras.layers.BatchNormalization(
        momentum=0.9, epsilon=1e-3, center=center, scale=scale, axis=3
    )
    layer.build(SHAPE)
    batches = data()
    gradient = gradient_of_keras(keras, layer)

    def train(steps):
        for step in range(steps):
            for variable, grad in gradient(*batches[step % 10]):
                variable.assign(keras.ops.convert_to_numpy(variable) - np.float32(RATE) * grad)

    train(10)
    bn = dialects.load("keras", layer)
    weights, config = dialects.dump("keras", bn)
    for name, value in weights.items():
        there = np.asarray(keras.ops.convert_to_numpy(getattr(layer, name)))
        assert value.tobytes() == there.tobytes()
    assert (config["center"], config["scale"], config["axis"]) == (center, scale, -1)
    assert abs(config["momentum"] - 0.9) <= 1e-15
    train(STEPS)
    trained_here(bn, batches)
    ours, config = dialects.dump("keras", bn)
    theirs = {k: keras.ops.convert_to_numpy(getattr(layer, k)) for k in ours}
    assert_the_same(ours, theirs)
    again = keras.layers.BatchNormalization(**config)
    again.build(SHAPE)
    again.set_weights([*ours.values()])
    x = batches[0][0]
    np.testing.assert_allclose(
        bn.eval()(x), keras.ops.convert_to_numpy(again(x, training=False)), atol=1e-5
    )


def gradient_of_keras(keras, layer):
    """A function of x and t that updates moving statistics; (variable, gradient) pairs."""
    variables = layer.trainable_variables
    if keras.backend.backend() == "torch":
        import torch

        def gradient(x, t):
            layer.zero_grad()
            loss = (layer(x, training=True) * torch.from_numpy(t)).sum()
            loss.backward()
            return [(v, v.value.grad.numpy().copy()) for v in variables]

        return gradient
    import jax

    def loss(trainable, others, x, t):
        y, others = layer.stateless_call(trainable, others, x, training=True)
        return (y * t).sum(), others

    compiled = jax.jit(jax.grad(loss, has_aux=True))

    def gradient(x, t):
        others = layer.non_trainable_variables
        grads, new = compiled([v.value for v in variables], [v.value for v in others], x, t)
        for variable, value in zip(others, new, strict=True):
            variable.assign(value)
        return [(v, np.asarray(g)) for v, g in zip(variables, grads, strict=True)]

    return gradient


@pytest.mark.parametrize("use_bias", [True, False])
def test_flax(use_bias):
    needs("flax", "jax")
    import jax
    from flax import nnx

    module = nnx.BatchNorm(3, momentum=0.9, epsilon=1e-3, use_bias=use_bias, rngs=nnx.Rngs(0))
    batches = data()
    gradient = nnx.jit(
        nnx.grad(lambda module, x, t: (module(x, use_running_average=False) * t).sum())
    )

    def train(steps):
        for step in range(steps):
            grads = gradient(module, *batches[step % 10])
            nnx.update(module, jax.tree.map(
                lambda p, g: p - RATE * g, nnx.state(module, nnx.Param), grads
            ))  # fmt: skip

    train(10)
    bn = dialects.load("flax", module)
    weights, config = dialects.dump("flax", bn)
    for name, value in weights.items():
        assert value.tobytes() == np.asarray(getattr(module, name)[...]).tobytes()
    assert config["axis"] == -1
    assert abs(config["momentum"] - 0.9) <= 1e-15
    assert config["epsilon"] == 1e-3
    train(STEPS)
    trained_here(bn, batches)
    ours = dialects.dump("flax", bn)[0]
    assert_the_same(ours, {name: np.asarray(getattr(module, name)[...]) for name in ours})


def test_linen():
    needs("flax", "jax")
    import flax.linen as nn
    import jax

    module = nn.BatchNorm(momentum=0.9, epsilon=1e-3)
    batches = data()
    variables = module.init(jax.random.key(0), batches[0][0], use_running_average=False)
    for x, _ in batches:
        _, new = module.apply(variables, x, mutable=["batch_stats"], use_running_average=False)
        variables = {**variables, **new}
    bn = dialects.load("flax", variables, module)
    assert (bn.eps, bn.layout, bn.unbiased) == (1e-3, "N...C", False)
    assert abs(bn.momentum - 0.1) <= 1e-15
    y = module.apply(variables, x, use_running_average=True)
    np.testing.assert_allclose(bn.eval()(x), np.asarray(y), atol=2e-5)


def test_update_statistics_beside_pytorch():
    needs("torch")
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    network = Network()
    batches = [x.transpose(0, 3, 1, 2) for x, _ in data()]
    first, second = (dialects.load("torch", m) for m in (network.first, network.second))
    torch.optim.swa_utils.update_bn([torch.from_numpy(x) for x in batches], network)
    number = fastbn.update_statistics(
        [first, second], lambda x: second(np.maximum(first(x), 0)), batches,
        method="mean_of_batches",
    )  # fmt: skip
    assert number == len(batches)
    for ours, theirs in ((first, network.first), (second, network.second)):
        state = {k: v.numpy() for k, v in theirs.state_dict().items()}
        assert_the_same(dialects.dump("torch", ours)[0], state)


@keras_warns
def test_renorm_beside_keras():
    keras = use_keras()
    try:
        layer = keras.layers.BatchNormalization(
            momentum=0.9, epsilon=1e-3, renorm=True, renorm_momentum=0.9,
            renorm_clipping={"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5},
        )  # fmt: skip
    except (TypeError, ValueError):
        pytest.skip("needs renorm, which this keras does not have")
    layer.build(SHAPE)
    bn = fastbn.BatchRenorm(3, 1e-3, 0.1, r_max=1.5, d_max=0.5, layout="NHWC")
    x, _ = data()[0]
    y = keras.ops.convert_to_numpy(layer(x, training=True))
    np.testing.assert_allclose(bn(x), y, atol=2e-3)


# ---- masks: of sequences, channels last -----------------------------------------------------

LENGTHS = [9, 3, 1, 7, 9, 2]


def sequences():
    x, dy = batch((6, 9, 4), "float32", 0, mean=1.5), batch((6, 9, 4), "float32", 1, 0)
    mask = np.arange(9) < np.array(LENGTHS)[:, None]
    return x, dy * mask[..., None], mask


@keras_warns
def test_mask_beside_keras():
    keras = use_keras()
    layer = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3)
    layer.build((6, 9, 4))
    bn = dialects.load("keras", layer)
    x, _, mask = sequences()
    y = np.asarray(keras.ops.convert_to_numpy(
        layer(x, training=True, mask=keras.ops.convert_to_tensor(mask))))  # fmt: skip
    ours = bn(x, mask=mask)
    np.testing.assert_allclose(ours[mask], y[mask], atol=2e-5)
    assert not ours[~mask].any()
    for name in ("moving_mean", "moving_variance"):
        there = np.asarray(keras.ops.convert_to_numpy(getattr(layer, name)))
        np.testing.assert_allclose(dialects.dump("keras", bn)[0][name], there, rtol=1e-5)


def test_mask_beside_flax():
    needs("flax", "jax")
    import flax.linen as nn
    import jax

    module = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-3)
    x, dy, mask = sequences()
    variables = module.init(jax.random.key(0), x)
    bn = dialects.load("flax", variables, module)

    def loss(parameters, x):
        y, new = module.apply(
            {**variables, "params": parameters}, x, mask=mask[..., None], mutable=["batch_stats"]
        )
        return (y * dy).sum(), (y, new)

    (_, (y, new)), (gradients, dx) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        variables["params"], x
    )
    ours = bn(x, lengths=LENGTHS)
    np.testing.assert_allclose(ours[mask], np.asarray(y)[mask], atol=2e-5)
    np.testing.assert_allclose(bn.backward(dy)[mask], np.asarray(dx)[mask], atol=2e-5)
    np.testing.assert_allclose(bn.weight_grad, np.asarray(gradients["scale"]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bn.bias_grad, np.asarray(gradients["bias"]), rtol=1e-4, atol=1e-5)
    for name, there in new["batch_stats"].items():
        np.testing.assert_allclose(dialects.dump("flax", bn)[0][name], np.asarray(there), rtol=1e-5)
