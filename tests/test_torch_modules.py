# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.torch's modules beside PyTorch's, conversion both ways, and fusion."""

import copy
import pickle
import warnings

import pytest
from tensors import assert_same, kernels, results, torch  # noqa: F401
from torch import nn
from torch.nn import functional

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastbn.torch
from fastbn.torch.convert import BACK, CLASSES

pytestmark = pytest.mark.usefixtures("kernels")
NAMES = [theirs.__name__ for theirs in CLASSES]
INFOS = {m.name.removeprefix("nn."): m for m in module_db if m.module_cls in CLASSES}
assert INFOS.keys() == set(NAMES)


# ---- PyTorch's inputs ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_inputs(name, training, dtype):
    info = INFOS[name]
    inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert inputs
    for given in inputs:
        made = given.constructor_input
        theirs = info.module_cls(*made.args, **made.kwargs, dtype=dtype)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        mine = getattr(fastbn.torch, name)(*made.args, **made.kwargs, dtype=dtype)
        mine.load_state_dict(theirs.state_dict())
        assert repr(mine) == repr(theirs)
        found = []
        for module in mine, theirs:
            module.train(training)
            args = [a.detach().clone().requires_grad_() for a in given.forward_input.args]
            everything = [*args, *module.parameters(), *module.buffers()]
            found.append(results(lambda: module(*args), everything))  # noqa: B023
        assert_same(*found, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    info = INFOS[name]
    errors = info.module_error_inputs_func
    if errors is None:
        return
    for case in errors(info, "cpu", torch.float32, requires_grad=False, training=True):
        given = case.module_error_input
        made = given.constructor_input
        if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(case.error_type, match=case.error_regex):
                getattr(fastbn.torch, name)(*made.args, **made.kwargs)
        else:
            module = getattr(fastbn.torch, name)(*made.args, **made.kwargs)
            with pytest.raises(case.error_type, match=case.error_regex):
                module(*given.forward_input.args)


def test_wrong_shapes_are_refused_in_pytorchs_words():
    for name, shape in [("BatchNorm2d", (2, 3)), ("BatchNorm2d", (2, 4, 5, 5)),
                        ("BatchNorm1d", (1, 3)), ("GroupNorm", (2, 5, 4)), ("LayerNorm", (2, 4)),
                        ("RMSNorm", (2, 4)), ("InstanceNorm2d", (2, 3, 1, 1))]:  # fmt: skip
        arguments = (3, 6) if name == "GroupNorm" else (3,)
        errors = []
        for namespace in fastbn.torch, nn:
            with pytest.raises((ValueError, RuntimeError)) as caught:
                getattr(namespace, name)(*arguments)(torch.zeros(shape))
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1]


def test_the_average_over_batches():
    mine, theirs = (m.BatchNorm1d(3, momentum=None) for m in (fastbn.torch, nn))
    for _ in range(4):
        x = torch.randn(20, 3)
        torch.testing.assert_close(mine(x), theirs(x))
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


# ---- state ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_state_comes_and_goes(name):
    arguments = (2, 6) if name == "GroupNorm" else (6,)
    tracked = {"track_running_stats": True} if "Norm1d" in name else {}
    mine, theirs = (getattr(m, name)(*arguments, **tracked) for m in (fastbn.torch, nn))
    for tensor in theirs.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 9)
    mine.load_state_dict(theirs.state_dict())
    back = getattr(nn, name)(*arguments, **tracked)
    back.load_state_dict(mine.state_dict())
    for kept in mine.state_dict(), back.state_dict():
        assert list(kept) == list(theirs.state_dict())
        assert all(torch.equal(kept[key], value) for key, value in theirs.state_dict().items())
    for copied in copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)):
        assert type(copied) is type(mine)
        assert copied.state_dict().keys() == mine.state_dict().keys()


# ---- convert and restore ---------------------------------------------------------------------


class Block(nn.Module):
    """What residual networks are made of; `shared` is used twice."""

    def __init__(self, relu=None):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.shared = nn.GroupNorm(2, 4)
        self.relu = relu or nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.first(self.convolution(x)))
        y = self.second(self.convolution(self.shared(y)))
        y += x
        return self.relu(self.shared(y) + y)


class Residual(nn.Module):
    def __init__(self, end, relu=nn.ReLU):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = relu(inplace=True)
        self.end = end

    def forward(self, x):
        y = self.relu(self.first(self.convolution(x)))
        return self.end(self.second(self.convolution(y)), x)


def module_types(model):
    return {type(m) for m in model.modules()}


def trained(model, x, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_convert_and_restore():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    other = copy.deepcopy(model)
    before = {name: id(module) for name, module in model.named_modules()}
    seen = []
    model[0].first.register_forward_hook(lambda module, *_: seen.append(type(module)))
    model[0].second.eval()
    other[0].second.eval()
    model[1].first.weight.requires_grad_(False)
    other[1].first.weight.requires_grad_(False)

    assert fastbn.torch.convert(model) is model
    assert {nn.BatchNorm2d, nn.GroupNorm}.isdisjoint(module_types(model))
    x = torch.randn(3, 4, 6, 6)
    torch.testing.assert_close(trained(model, x), trained(other, x))
    assert seen == [fastbn.torch.BatchNorm2d] * 2
    assert not model[0].second.training
    assert model[1].first.weight.grad is None
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)

    assert fastbn.torch.restore(model) is model
    assert module_types(model) == module_types(other)
    assert {name: id(module) for name, module in model.named_modules()} == before
    torch.testing.assert_close(trained(model, x), trained(other, x))


@pytest.mark.parametrize("name", NAMES)
def test_each_class_is_converted(name):
    model = getattr(nn, name)(*((2, 6) if name == "GroupNorm" else (6,)))
    assert type(fastbn.torch.convert(model)) is getattr(fastbn.torch, name)
    assert type(fastbn.torch.restore(model)) is getattr(nn, name)
    assert BACK[CLASSES[type(model)]] is type(model)


def test_derived_and_lazy_modules_are_left_alone():
    class Mine(nn.BatchNorm1d):
        pass

    model = nn.Sequential(Mine(3), nn.LazyBatchNorm1d())
    assert module_types(fastbn.torch.convert(model)) == {nn.Sequential, Mine, nn.LazyBatchNorm1d}


# ---- fusion --------------------------------------------------------------------------------------


def add_then_relu(y, x):
    y += x
    return functional.relu(y, inplace=True)


ENDS = {
    "operators": add_then_relu,
    "functions": lambda y, x: torch.relu(torch.add(y, x)),
    "methods": lambda y, x: y.add(x).relu(),
    "the other way round": lambda y, x: functional.relu(x + y),
}
#: What must stay, since something else needs what is between, or changes it.
OTHER_ENDS = {
    "no relu": lambda y, x: y + x,
    "scaled": lambda y, x: torch.relu(torch.add(y, x, alpha=2)),
    "used twice": lambda y, x: torch.relu(y + x) + y,
    "itself": lambda y, x: torch.relu(y + y) + x,
    "a number": lambda y, x: torch.relu(y + 1.0) + x,
    "into the other": lambda y, x: torch.relu(x.clone().add_(y)),
    "written between": lambda y, x: torch.relu(y + x.clone().mul_(2)),
}


def fused_calls(model):
    return [node.kwargs for node in model.graph.nodes if node.kwargs.get("activation")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("end", [*ENDS, *OTHER_ENDS])
def test_fuse(end, training):
    torch.manual_seed(0)
    model = Residual((ENDS | OTHER_ENDS)[end]).train(training)
    other = copy.deepcopy(model)
    x = torch.randn(3, 4, 6, 6)
    fused = fastbn.torch.convert(model, fuse=True)
    assert fused.training is training
    assert [sorted(kwargs) for kwargs in fused_calls(fused)] == [
        ["activation"], *([["activation", "residual"]] if end in ENDS else [])
    ]  # fmt: skip
    assert fused.state_dict().keys() == other.state_dict().keys()
    torch.testing.assert_close(trained(fused, x), trained(other, x))
    for a, b in zip(fused.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)

    fused.eval()
    other.eval()
    for copied in copy.deepcopy(fused), fused:
        assert fastbn.torch.restore(copied) is copied
        assert fused_calls(copied) == []
        assert module_types(copied).isdisjoint(BACK)
        torch.testing.assert_close(copied(x), other(x))
    # The same modules, without the graph.
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_fuse_relu6(inplace):
    torch.manual_seed(0)
    model = Residual(lambda y, x: functional.relu6(y + x, inplace), nn.ReLU6)
    nn.init.constant_(model.first.weight, 5.0)
    nn.init.constant_(model.second.weight, 5.0)
    other = copy.deepcopy(model)
    x = torch.randn(3, 4, 6, 6)
    assert copy.deepcopy(model)(x).max() == 6
    fused = fastbn.torch.convert(model, fuse=True)
    assert [kwargs["activation"] for kwargs in fused_calls(fused)] == ["relu6", "relu6"]
    torch.testing.assert_close(trained(fused, x), trained(other, x))
    fused.eval()
    other.eval()
    torch.testing.assert_close(fastbn.torch.restore(fused)(x), other(x))


def test_a_fused_model_can_be_pickled():
    fused = fastbn.torch.convert(Residual(add_then_relu), fuse=True)
    x = torch.randn(3, 4, 6, 6)
    copied = pickle.loads(pickle.dumps(fused))
    assert len(fused_calls(copied)) == 2
    assert torch.equal(copied(x), fused(x))


def test_hooks_and_shared_modules_are_not_fused():
    for spoil in [
        lambda m: m.first.register_forward_hook(lambda *_: None),
        lambda m: m.relu.register_forward_pre_hook(lambda *_: None),
        lambda m: setattr(m, "second", m.first),
    ]:
        model = Residual(lambda y, x: y)
        spoil(model)
        assert fused_calls(fastbn.torch.convert(model, fuse=True)) == []


def test_what_cannot_be_fused_is_converted_with_a_warning():
    class Branch(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    class Dropout(nn.Sequential):
        def forward(self, x):
            return functional.dropout(super().forward(x), training=self.training)

    for kind, reason in (Branch, "control flow"), (Dropout, "depends on its mode"):
        model = kind(nn.BatchNorm1d(3), nn.ReLU())
        with pytest.warns(UserWarning, match=f"{kind.__name__} is not fused: .*{reason}"):
            assert fastbn.torch.convert(model, fuse=True) is model
        assert type(model[0]) is fastbn.torch.BatchNorm1d
        assert model.training
