# SPDX-License-Identifier: BSD-3-Clause
"""Layer and group norm in PyTorch's dispatcher beside PyTorch's own kernels."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
from tensors import DTYPES, torch
from torch.nn import functional

import fastbn
import fastbn.torch

GROUPS = 4
CASES = [
    ("layer", (6, 33), None),
    ("layer", (4, 7, 33), None),
    ("layer", (1, 3, 4, 5), None),
    ("group", (3, 24), None),
    ("group", (3, 8, 9), None),
    ("group", (3, 8, 5, 6), None),
    ("group", (3, 8, 5, 6), torch.channels_last),
    ("group", (2, 8, 3, 4, 3), torch.channels_last_3d),
]
each_case = pytest.mark.parametrize(("norm", "shape", "order"), CASES, ids=str)


def state(on):
    return fastbn.torch.enabled() if on else nullcontext()


def normalise(norm, x, weight=None, bias=None):
    if norm == "group":
        return functional.group_norm(x, GROUPS, weight, bias)
    return functional.layer_norm(x, x.shape[1:], weight, bias)


def given(norm, shape, order, dtypes=(torch.float32, torch.float32), affine=True, mean=0.0):
    generator = torch.Generator().manual_seed(5)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtypes[0])
    if order is not None:
        x = x.contiguous(memory_format=order)
    parameters = []
    if affine:
        size = shape[1:] if norm == "layer" else shape[1:2]
        parameters = [torch.rand(size, generator=generator).to(dtypes[1]) for _ in range(2)]
    dy = torch.randn(shape, generator=generator).to(dtypes[0])
    return [x.requires_grad_(), *(p.requires_grad_() for p in parameters)], dy


def step(norm, tensors, dy, forward_on, backward_on):
    with state(forward_on):
        y = normalise(norm, *tensors)
    with state(backward_on):
        return [y.detach(), *torch.autograd.grad(y, tensors, dy)]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@each_case
def test_both_states_in_each_half(norm, shape, order, dtypes, affine):
    tensors, dy = given(norm, shape, order, dtypes, affine)
    expected = step(norm, tensors, dy, False, False)
    for halves in (True, True), (True, False), (False, True):
        for new, old in zip(step(norm, tensors, dy, *halves), expected, strict=True):
            assert new.dtype == old.dtype
            assert new.stride() == old.stride()
            # PyTorch adds gradients of parameters in half precision.
            tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtypes[0], 0.12)
            torch.testing.assert_close(new, old, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_saved_has_pytorchs_type_and_shape(dtype):
    x, w = torch.randn(3, 8, 5, 6).to(dtype), torch.ones(8)
    calls = [
        lambda: torch.native_layer_norm(x, (6,), None, None, 1e-5),
        lambda: torch.native_layer_norm(x, (5, 6), None, None, 1e-5),
        lambda: torch.native_group_norm(x, None, None, 3, 8, 30, 2, 1e-5),
    ]
    if dtype is torch.bfloat16:
        calls.append(lambda: torch.native_group_norm(x, w, w, 3, 8, 30, 2, 1e-5))
    for call in calls:
        expected = call()
        with fastbn.torch.enabled():
            found = call()
        for new, old in zip(found, expected, strict=True):
            assert (new.dtype, new.shape, new.stride()) == (old.dtype, old.shape, old.stride())
            torch.testing.assert_close(new, old, rtol=0.02, atol=0.02)


@each_case
def test_the_bits_of_fastbn(norm, shape, order):
    tensors, _ = given(norm, shape, order, mean=1e4)
    x, weight, bias = (t.detach().numpy() for t in tensors)
    with fastbn.torch.enabled():
        y = normalise(norm, *tensors).detach().numpy()
    if norm == "group":
        wanted = fastbn.group_norm(x, GROUPS, weight, bias)
    else:
        wanted = fastbn.layer_norm(x, shape[1:], weight, bias)
    assert np.array_equal(y, wanted)


@each_case
def test_an_instance_alone_has_the_bits_that_it_has_among_others(norm, shape, order):
    tensors, dy = given(norm, shape, order)
    with fastbn.torch.enabled():
        y, dx, *_ = step(norm, tensors, dy, True, True)
        alone = [tensors[0].detach()[:1].clone().requires_grad_(), *tensors[1:]]
        one, of_one, *_ = step(norm, alone, dy[:1].clone(), True, True)
    assert torch.equal(y[:1], one)
    assert torch.equal(dx[:1], of_one)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("way", ["plain", "save_on_cpu", "copied"])
def test_dx_at_a_large_mean(norm, way):
    # `copied`: PyTorch's float32 is all that is left of the statistics; docs/torch.md.
    tensors, dy = given(norm, (4, 8, 6, 5), None, mean=3e4)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(normalise(norm, *wide), wide, dy.double())[0]
    hooks = {
        "plain": nullcontext(),
        "save_on_cpu": torch.autograd.graph.save_on_cpu(),
        "copied": torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t),
    }[way]
    with fastbn.torch.enabled(), hooks:
        y = normalise(norm, *tensors)
    with fastbn.torch.enabled():
        dx = torch.autograd.grad(y, tensors, dy)[0]
    limit = 2e-5 if way == "plain" else 0.2
    assert (dx.double() - wanted).abs().max() < limit


def test_not_contiguous_inputs():
    x = torch.randn(6, 5, 8).transpose(0, 1)
    for call in (
        lambda x: functional.layer_norm(x, (8,)),
        lambda x: functional.group_norm(x.transpose(1, 2).reshape(5, 8, 6), 2),
        lambda x: functional.layer_norm(x[:, ::2, 1:], (7,)),
    ):
        x.requires_grad_()
        expected = call(x)
        with fastbn.torch.enabled():
            found = call(x)
            dx = torch.autograd.grad(found.square().sum(), x)[0]
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx, torch.autograd.grad(expected.square().sum(), x)[0],
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, False), (False, False, True), (True, False, True)],
    ids=str,
)
def test_gradients_that_are_wanted(norm, wanted):
    tensors, dy = given(norm, (3, 8, 5, 6), None)
    for tensor, flag in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(flag)
    chosen = [t for t in tensors if t.requires_grad]
    expected = torch.autograd.grad(normalise(norm, *tensors), chosen, dy)
    with fastbn.torch.enabled():
        found = torch.autograd.grad(normalise(norm, *tensors), chosen, dy)
    for new, old in zip(found, expected, strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=2e-5)


EMPTY = [(0, 8, 5), (3, 8, 0), (0, 8)]


@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_empty(norm, shape):
    tensors, dy = given(norm, shape, None)

    def results():
        try:
            return [t.tolist() for t in step(norm, tensors, dy, False, False)]
        except Exception as error:
            return type(error), str(error)

    expected = results()
    with fastbn.torch.enabled():
        assert repr(results()) == repr(expected)


WRONG = {
    "layer shape": lambda: functional.layer_norm(torch.ones(2, 3), (4,)),
    "layer weight": lambda: functional.layer_norm(torch.ones(2, 3), (3,), torch.ones(4)),
    "layer integers": lambda: functional.layer_norm(torch.ones(2, 3, dtype=torch.int32), (3,)),
    "layer nothing": lambda: torch.native_layer_norm(torch.ones(2, 3), (), None, None, 1e-5),
    "layer mixed": lambda: functional.layer_norm(
        torch.ones(2, 3), (3,), torch.ones(3).double(), torch.ones(3).double()
    ),
    "layer halves": lambda: functional.layer_norm(
        torch.ones(2, 3).half(), (3,), torch.ones(3).half(), torch.ones(3)
    ),
    "group channels": lambda: functional.group_norm(torch.ones(2, 3, 4), 2),
    "group weight": lambda: functional.group_norm(torch.ones(2, 4, 4), 2, torch.ones(3)),
    "group sizes": lambda: torch.native_group_norm(
        torch.ones(2, 4, 4), None, None, 2, 8, 2, 2, 1e-5
    ),
    "group none": lambda: functional.group_norm(torch.ones(2, 4, 4), 0),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_pytorchs(name):
    def outcome():
        try:
            return [t.tolist() for t in WRONG[name]()]
        except Exception as error:
            return type(error), str(error)

    expected = outcome()
    with fastbn.torch.enabled():
        assert outcome() == expected


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # in PyTorch itself
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_derivatives_and_transformations(norm):
    tensors, dy = given(norm, (3, 8, 5), None, (torch.float64, torch.float64))
    with fastbn.torch.enabled():
        assert torch.autograd.gradcheck(lambda *t: normalise(norm, *t), tensors,
                                        check_forward_ad=True)  # fmt: skip
        assert torch.autograd.gradgradcheck(lambda *t: normalise(norm, *t), tensors)

    def programs(x):
        def loss(x):
            return normalise(norm, x, *tensors[1:]).square().sum()

        yield torch.func.grad(loss)(x)
        yield torch.func.jvp(loss, (x,), (dy,))[1]
        yield torch.func.jacrev(loss)(x)
        yield torch.func.vmap(lambda x: normalise(norm, x, *tensors[1:]))(x.unsqueeze(0))
        yield torch.func.hessian(loss)(x).sum()
        with torch.inference_mode():
            yield normalise(norm, x, *tensors[1:]).clone()
        with torch.autocast("cpu", torch.bfloat16):
            yield normalise(norm, x.float(), *(t.float() for t in tensors[1:])).float()

    x = tensors[0].detach()
    expected = list(programs(x))
    with fastbn.torch.enabled():
        for new, old in zip(programs(x), expected, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [
    lambda: torch.nn.LayerNorm(6), lambda: torch.nn.GroupNorm(2, 8), lambda: torch.nn.RMSNorm(6),
    lambda: torch.nn.InstanceNorm2d(8, affine=True),
], ids=["layer", "group", "rms", "instance"])  # fmt: skip
def test_modules(make, backend):
    torch.manual_seed(0)
    module, x = make(), torch.randn(3, 8, 5, 6, requires_grad=True)
    expected = module(x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *module.parameters()])
    torch._dynamo.reset()
    for model in module, copy.deepcopy(module), torch.compile(module, backend=backend):
        with fastbn.torch.enabled():
            y = model(x)
            found = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        for new, old in zip(found, wanted, strict=True):
            torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-3)
