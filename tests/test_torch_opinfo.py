# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's own samples of its norms, with fastbn's kernels: what passes without passes with.

The samples are those of the installed PyTorch: operators (OpInfo) and modules (ModuleInfo).
"""

import re

import pytest
from tensors import NEAR, differentiable, op_db, torch
from torch.testing._internal.common_modules import module_db

import fastbn.torch

NORMS = re.compile(
    r"(native_)?(batch|layer|group|instance|rms)_norm$|_norm_legit|_norm_with_update"
)
OPERATORS = {
    f"{op.name} {op.variant_test_name}".strip(): op
    for op in op_db
    if NORMS.search(op.name.removeprefix("nn.functional."))
}
MODULES = {m.name: m for m in module_db if "Norm" in m.name and "Local" not in m.name}
SUPPORTED = [
    (name, dtype)
    for name, op in OPERATORS.items()
    for dtype in NEAR
    if dtype in op.supported_dtypes("cpu")
]
CHECKED = [
    (name, check)
    for name, op in OPERATORS.items()
    for check in ("gradcheck", "gradgradcheck")
    if op.supports_autograd and (check == "gradcheck" or op.supports_gradgrad)
]


def outcome(function):
    """What it returns, or the kind and the words of its error."""
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def assert_alike(new, old, dtype):
    """Errors are the same; tensors have the same type and strides, and are near."""
    if isinstance(old, tuple):
        assert new == old
        return
    for a, b in zip(new, old, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())
            torch.testing.assert_close(a, b, equal_nan=True, **NEAR[dtype])


def tensors_in(thing):
    if isinstance(thing, torch.Tensor):
        return [thing]
    return [t for t in thing if isinstance(t, torch.Tensor)] if isinstance(thing, tuple) else []


def with_gradients(function, inputs):
    """Return what it computes, and the gradients of the first of it."""
    found = tensors_in(function())
    inputs = [t for t in inputs if differentiable(t)]
    gradients = []
    if found and found[0].requires_grad and inputs:
        seed = torch.linspace(-1, 1, found[0].numel(), dtype=torch.float64)
        seed = seed.reshape(found[0].shape).to(found[0].dtype)
        gradients = torch.autograd.grad(found[0], inputs, seed, allow_unused=True)
    return [*(t.detach() for t in found), *gradients]


def test_there_are_samples():
    assert len(OPERATORS) >= 8
    assert len(MODULES) >= 8


@pytest.mark.parametrize(("name", "dtype"), SUPPORTED, ids=str)
def test_samples(name, dtype):
    op = OPERATORS[name]

    def results():
        torch.manual_seed(0)
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            arguments = (sample.input, *sample.args)
            yield outcome(
                lambda s=sample, a=arguments: with_gradients(
                    lambda: op(s.input, *s.args, **s.kwargs), [*a, *s.kwargs.values()]
                )
            )

    expected = list(results())
    with fastbn.torch.enabled():
        found = list(results())
    for new, old in zip(found, expected, strict=True):
        assert_alike(new, old, dtype)


@pytest.mark.parametrize("name", [n for n, op in OPERATORS.items() if op.error_inputs_func])
def test_errors(name):
    op = OPERATORS[name]

    def results():
        for wrong in op.error_inputs("cpu"):
            sample = wrong.sample_input
            yield outcome(lambda s=sample: tensors_in(op(s.input, *s.args, **s.kwargs)))

    expected = list(results())
    with fastbn.torch.enabled():
        assert list(results()) == expected


@pytest.mark.parametrize(("name", "check"), CHECKED)
def test_gradients(name, check):
    op = OPERATORS[name]

    def results():
        torch.manual_seed(0)
        for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
            given = [sample.input, *sample.args]
            places = [i for i, t in enumerate(given)
                      if isinstance(t, torch.Tensor) and t.requires_grad]  # fmt: skip

            def function(*tensors, s=sample, given=given, places=places):
                arguments = list(given)
                for place, tensor in zip(places, tensors, strict=True):
                    arguments[place] = tensor
                y = op(*arguments, **s.kwargs)
                if s.output_process_fn_grad is not None:
                    y = s.output_process_fn_grad(y)
                return y if isinstance(y, torch.Tensor) else y[0]

            tensors = [given[i] for i in places]
            run = getattr(torch.autograd, check)
            yield outcome(lambda f=function, t=tensors, run=run: run(f, t)) is True

    expected = list(results())
    with fastbn.torch.enabled():
        found = list(results())
    assert all(new or not old for new, old in zip(found, expected, strict=True))
    assert any(expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_module_samples(name, dtype, training):
    info = MODULES[name]

    def results():
        torch.manual_seed(0)
        for sample in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True,
                                              training=training):  # fmt: skip
            made, call = sample.constructor_input, sample.forward_input

            def function(made=made, call=call):
                torch.manual_seed(1)
                module = info.module_cls(*made.args, **made.kwargs).to(dtype).train(training)
                inputs = [t for t in (*call.args, *module.parameters())
                          if isinstance(t, torch.Tensor) and t.is_floating_point()]  # fmt: skip
                found = with_gradients(lambda: module(*call.args, **call.kwargs), inputs)
                return [*found, *(b.clone() for b in module.buffers())]

            yield outcome(function)

    expected = list(results())
    with fastbn.torch.enabled():
        found = list(results())
    for new, old in zip(found, expected, strict=True):
        assert_alike(new, old, dtype)
