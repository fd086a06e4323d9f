# SPDX-License-Identifier: BSD-3-Clause
"""Masks in fastbn.torch: the bits of fastbn's functions, and derivatives of any order."""

import numpy as np
import pytest
from tensors import torch

import fastbn
import fastbn.torch

OPS = ["batch", "instance", "group"]
SHAPE = (4, 6, 9)
LENGTHS = [9, 3, 1, 5]


def call(op, x, weight=None, bias=None, running=(None, None), **options):
    function = getattr(fastbn.torch, f"{op}_norm")
    if op == "group":
        return function(x, 3, weight, bias, **options)
    if op == "batch":
        options = {"training": True} | options
    return function(x, *running, weight, bias, **options)


def given(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x, residual, dy = (torch.randn(SHAPE, dtype=dtype) for _ in range(3))
    weight, bias = (torch.rand(6, dtype=dtype) + 0.5 for _ in range(2))
    return [v.requires_grad_() for v in (x, weight, bias, residual)], dy


def counted(lengths=LENGTHS):
    return torch.arange(9) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("by", ["mask", "lengths"])
def test_the_bits_of_numpys_functions(op, activation, by):
    (x, weight, bias, residual), dy = given()
    options = {by: counted() if by == "mask" else torch.tensor(LENGTHS)}
    y = call(op, x, weight, bias, residual=residual, activation=activation, **options)
    gradients = torch.autograd.grad(y, (x, weight, bias, residual), dy)
    arrays = [v.detach().numpy() for v in (x, weight, bias, residual)]
    fused = {"residual": arrays[3], "activation": activation, "mask": counted().numpy()}
    sizes = (3,) if op == "group" else ()
    wanted, mean, invstd = getattr(fastbn, f"{op}_norm_forward")(
        arrays[0], *sizes, *arrays[1:3], **fused)  # fmt: skip
    assert y.detach().numpy().tobytes() == wanted.tobytes()
    found = getattr(fastbn, f"{op}_norm_backward")(
        dy.numpy(), arrays[0], mean, invstd, *sizes, arrays[1], bias=arrays[2], **fused
    )
    for one, other in zip(gradients, found, strict=True):
        assert one.numpy().tobytes() == other.tobytes()


@pytest.mark.parametrize("op", OPS)
def test_nothing_that_does_not_count_matters(op):
    (x, weight, bias, residual), dy = given()
    outside = ~counted().unsqueeze(1).expand(SHAPE)
    results = []
    for value in (0.0, torch.nan, torch.inf):
        tensors = [v.detach().masked_fill(outside, value).requires_grad_() for v in (x, residual)]
        y = call(op, tensors[0], weight, bias, residual=tensors[1], activation="relu",
                 mask=counted())  # fmt: skip
        gradients = torch.autograd.grad(y, (*tensors, weight, bias), dy.masked_fill(outside, value))
        results.append([v.detach().numpy().tobytes() for v in (y, *gradients)])
        assert not y[outside].any()
        assert not gradients[0][outside].any()
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_derivatives_of_derivatives(op, activation):
    tensors, _ = given(torch.float64)

    def function(x, weight, bias, residual):
        return call(op, x, weight, bias, residual=residual, activation=activation, mask=counted())

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # in PyTorch itself
@pytest.mark.parametrize("op", OPS)
def test_formulas_have_the_values_of_the_kernels(op):
    (x, weight, bias, residual), _ = given()
    running = [[torch.zeros(6), torch.ones(6)] for _ in range(2)]
    options = {"residual": residual, "activation": "relu", "mask": counted([9, 1, 0, 5])}
    with torch.no_grad():
        plain = call(op, x, weight, bias, running[0], **options)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
            y = call(op, dual, weight, bias, running[1], **options)
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).primal, plain)
    if op != "group":
        for kept, other in zip(*running, strict=True):
            assert not torch.equal(kept, torch.zeros(6))
            torch.testing.assert_close(kept, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves(dtype):
    (x, weight, bias, _), dy = given()
    half = x.detach().to(dtype).requires_grad_()
    y = call("batch", half, weight, bias, lengths=LENGTHS)
    wanted = call("batch", half.detach().float(), weight, bias, lengths=LENGTHS)
    torch.testing.assert_close(y.float(), wanted, rtol=0.01, atol=0.01)
    assert torch.autograd.grad(y, half, dy.to(dtype))[0].dtype is dtype


def test_evaluation_and_running_statistics():
    (x, weight, bias, _), dy = given()
    running = [torch.zeros(6), torch.ones(6)]
    call("batch", x, weight, bias, running, mask=counted())
    arrays = np.zeros(6, np.float32), np.ones(6, np.float32)
    fastbn.batch_norm(x.detach().numpy(), *arrays, training=True, mask=counted().numpy())
    assert running[0].numpy().tobytes() == arrays[0].tobytes()
    assert running[1].numpy().tobytes() == arrays[1].tobytes()
    y = call("batch", x, weight, bias, running, mask=counted(), training=False)
    plain = call("batch", x, weight, bias, running, training=False)
    inside = counted().unsqueeze(1).expand(SHAPE)
    torch.testing.assert_close(y[inside], plain[inside])
    dx = torch.autograd.grad(y, x, dy)[0]
    assert not dx[~inside].any()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mask": torch.ones(4, 9)}, TypeError, "mask: expected a tensor of dtype torch.bool"),
        ({"mask": torch.ones(4, 6, 9, dtype=torch.bool)}, ValueError, "mask: expected the shape"),
        ({"mask": counted(), "lengths": [1] * 4}, ValueError, "at most one of them"),
        ({"lengths": [1.0] * 4}, TypeError, "lengths: expected integers"),
        ({"lengths": [1, 2]}, ValueError, "lengths: expected shape"),
        ({"lengths": [10, 1, 1, 1]}, ValueError, "lengths: expected integers from 0 to 9"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_refused(op, options, error, message):
    with pytest.raises(error, match=message):
        call(op, torch.zeros(SHAPE), **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_memory_orders_and_broadcast_masks(op, order):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 7).to(memory_format=order).requires_grad_()
    mask = torch.rand(4, 1, 7) < 0.5
    whole = mask.expand(4, 5, 7)
    y = call(op, x, mask=mask)
    assert y.stride() == call(op, x).stride()
    assert torch.equal(y, call(op, x, mask=whole.clone()))
    assert torch.equal(y, call(op, x, mask=whole))
    dx = torch.autograd.grad(y.square().sum(), x)[0]
    assert not dx[~whole.unsqueeze(1).expand(x.shape)].any()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(op, backend):
    (x, weight, bias, residual), dy = given()

    def function(x, weight, bias, residual, mask):
        return call(op, x, weight, bias, residual=residual, activation="relu", mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    tensors = x, weight, bias, residual
    wanted, y = (f(*tensors, counted()) for f in (function, compiled))
    torch.testing.assert_close(y, wanted)
    for one, other in zip(
        torch.autograd.grad(y, tensors, dy), torch.autograd.grad(wanted, tensors, dy), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_one_value_that_counts():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="more than one value per channel"):
        call("batch", x, lengths=[1, 0, 0, 0])
    y = call("batch", x, lengths=[0] * 4)
    assert not y.any()
    assert not call("instance", x, lengths=[1, 0, 0, 0]).any()
