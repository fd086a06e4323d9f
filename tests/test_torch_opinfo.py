# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's own samples of its norms, with fastbn's kernels: what passes without passes with.

The samples are those of the installed PyTorch: operators (OpInfo) and modules (ModuleInfo).
"""

import re

import pytest
from tensors import torch

import fastbn.torch

pytest.importorskip("expecttest")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

NAMES = re.compile(
    r"(native_)?(batch|layer|group|instance|rms)_norm$|_norm_legit|_norm_with_update"
)
OPERATORS = {
    f"{op.name} {op.variant_test_name}".strip(): op
    for op in op_db
    if NAMES.search(op.name.removeprefix("nn.functional."))
}
MODULES = {m.name: m for m in module_db if "Norm" in m.name and "Local" not in m.name}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-9}


def outcome(function):
    """What it returns, or the kind and the words of its error."""
    try:
        return function()
    except Exception as error:
        return type(error), str(error)


def same(new, old, dtype):
    if isinstance(old, tuple) and isinstance(old[0], type):
        assert new == old
        return
    for a, b in zip(new, old, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype
            assert a.stride() == b.stride()
            # Both round; gradients of small groups are differences of large terms.
            limit = LIMITS.get(dtype, 0.02)
            scale = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0
            torch.testing.assert_close(a, b, rtol=limit, atol=5 * limit * (1 + scale),
                                       equal_nan=True)  # fmt: skip


def tensors_in(thing):
    if isinstance(thing, torch.Tensor):
        return [thing]
    return [t for t in thing if isinstance(t, torch.Tensor)] if isinstance(thing, tuple) else []


def with_gradients(function, inputs):
    results = tensors_in(function())
    inputs = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    reached = [r for r in results if r.requires_grad]
    gradients = []
    if reached and inputs:
        total = sum(r.double().square().sum() for r in reached[:1])
        gradients = list(torch.autograd.grad(total, inputs, allow_unused=True))
    return [r.detach() for r in results] + gradients


def test_there_are_samples():
    assert len(OPERATORS) >= 8
    assert len(MODULES) >= 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_samples(name, dtype):
    op = OPERATORS[name]
    if dtype not in op.supported_dtypes("cpu"):
        pytest.skip("not supported by PyTorch")

    def results():
        torch.manual_seed(0)
        # Gradients of halves: tests/test_torch_siblings.py, where they are not differences.
        wants = dtype in LIMITS
        for sample in op.sample_inputs("cpu", dtype, requires_grad=wants):
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
        same(new, old, dtype)


@pytest.mark.parametrize("name", OPERATORS)
def test_errors(name):
    op = OPERATORS[name]
    if op.error_inputs_func is None:
        pytest.skip("PyTorch has none")

    def results():
        for wrong in op.error_inputs("cpu"):
            sample = wrong.sample_input
            yield outcome(lambda s=sample: tensors_in(op(s.input, *s.args, **s.kwargs)))

    expected = list(results())
    with fastbn.torch.enabled():
        assert list(results()) == expected


@pytest.mark.parametrize("check", ["gradcheck", "gradgradcheck"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients(name, check):
    op = OPERATORS[name]
    if not op.supports_autograd or (check == "gradgradcheck" and not op.supports_gradgrad):
        pytest.skip("not supported by PyTorch")

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
        same(new, old, dtype)
