# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's own results, on its own shapes, where PyTorch is installed.

With FASTBN_REQUIRE_PEERS=1 a missing peer is a failure, not a skip.
"""

import itertools
import os

import numpy as np
import pytest

import fastbn

if os.environ.get("FASTBN_REQUIRE_PEERS") == "1":
    import torch
else:
    torch = pytest.importorskip("torch")

# From the test suites of torch.nn.BatchNorm1d, 2d, 3d, and beyond.
SHAPES = [(4, 10), (4, 10, 3), (2, 3, 6, 6), (2, 3, 4, 4, 4), (5, 5, 5, 5, 5), (16, 128), (2, 1)]
TOLERANCE = {"float32": 3e-5, "float64": 1e-12}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, 0.75])
def test_functional(level, dtype, shape, affine, training, momentum):
    rng = np.random.default_rng(5)
    channels = shape[1]
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    weight, bias = (rng.standard_normal(channels).astype(dtype) for _ in range(2))
    if not affine:
        weight = bias = None
    running = [rng.standard_normal(channels).astype(dtype), rng.random(channels).astype(dtype)]
    theirs = [torch.tensor(a) for a in running]
    tensors = [
        None if a is None else torch.tensor(a, requires_grad=True) for a in (x, weight, bias)
    ]
    expected = torch.nn.functional.batch_norm(
        tensors[0], *theirs, tensors[1], tensors[2], training, momentum, 1e-5
    )
    expected.backward(torch.tensor(dy))

    before = [a.copy() for a in running]
    y = fastbn.batch_norm(x, *running, weight, bias, training, momentum, 1e-5)
    tolerance = TOLERANCE[dtype] * 10
    np.testing.assert_allclose(y, expected.detach().numpy(), atol=tolerance)
    for mine, other in zip(running, theirs, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), atol=tolerance)

    _, mean, invstd = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=before[0], running_var=before[1], training=training
    )
    gradients = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, training=training)
    for mine, other in zip(gradients, tensors, strict=True):
        if other is not None:
            scale = max(1.0, float(other.grad.abs().max()))
            np.testing.assert_allclose(mine, other.grad.numpy(), atol=tolerance * scale)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_over_several_batches(momentum, track, affine):
    theirs = torch.nn.BatchNorm2d(3, 1e-3, momentum, affine, track)
    mine = fastbn.BatchNorm(3, 1e-3, momentum, affine, track)
    if affine:
        torch.nn.init.normal_(theirs.weight)
    mine.load_state_dict({k: v.numpy() for k, v in theirs.state_dict().items()})
    rng = np.random.default_rng(6)
    for _ in range(5):
        x, dy = (rng.standard_normal((4, 3, 5, 5)).astype(np.float32) for _ in range(2))
        tensor = torch.tensor(x, requires_grad=True)
        theirs.zero_grad()
        expected = theirs(tensor)
        expected.backward(torch.tensor(dy))
        np.testing.assert_allclose(mine(x), expected.detach().numpy(), atol=1e-5)
        np.testing.assert_allclose(mine.backward(dy), tensor.grad.numpy(), atol=1e-5)
        if affine:
            np.testing.assert_allclose(mine.weight_grad, theirs.weight.grad.numpy(), atol=1e-4)
            np.testing.assert_allclose(mine.bias_grad, theirs.bias.grad.numpy(), atol=1e-4)
    state = theirs.state_dict()
    assert list(state) == list(mine.state_dict())
    for name, value in mine.state_dict().items():
        np.testing.assert_allclose(value, state[name].numpy(), atol=1e-5)
        assert value.dtype == state[name].numpy().dtype
        assert value.shape == tuple(state[name].shape)
    x = rng.standard_normal((4, 3, 5, 5)).astype(np.float32)
    expected = theirs.eval()(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(mine.eval()(x), expected, atol=1e-5)


def test_channels_last_memory():
    x = torch.randn(4, 6, 9, 8).to(memory_format=torch.channels_last)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)
    y = fastbn.batch_norm(x.numpy(), None, None, training=True)
    assert y.strides == tuple(4 * s for s in expected.stride())
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-5)


def test_a_tensor_is_refused_by_name():
    tensor = torch.zeros(2, 3)
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(TypeError, match=r"x: .*torch.*x\.detach\(\)\.numpy\(\)"):
        fastbn.batch_norm(tensor, None, None, training=True)
    for name in ("running_mean", "running_var"):
        with pytest.raises(TypeError, match=rf"{name}: .*\.numpy\(\)"):
            fastbn.batch_norm_forward(x, **{name: torch.zeros(3)})


def test_gradients_agree_with_double_precision_autograd(level):
    for shape, training in itertools.product([(20, 7), (3, 4, 9, 11)], [True, False]):
        rng = np.random.default_rng(7)
        x, dy = (rng.standard_normal(shape).astype(np.float32) + mean for mean in (100, 1))
        weight = rng.standard_normal(shape[1])
        fixed = rng.random(shape[1]) + 99, rng.random(shape[1]) + 0.5
        tensors = [torch.tensor(a.astype(np.float64), requires_grad=True) for a in (x, weight)]
        torch.nn.functional.batch_norm(
            tensors[0], *map(torch.tensor, fixed), tensors[1], training=training
        ).backward(torch.tensor(dy.astype(np.float64)))
        _, mean, invstd = fastbn.batch_norm_forward(
            x, running_mean=fixed[0], running_var=fixed[1], training=training
        )
        dx, dweight, _ = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, training=training)
        size = float(tensors[0].grad.abs().max())
        np.testing.assert_allclose(dx, tensors[0].grad.numpy(), atol=1e-6 * max(1, size))
        np.testing.assert_allclose(dweight, tensors[1].grad.numpy(), atol=1e-5 * np.abs(dy).sum())
