# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.torch's modules beside PyTorch's; conversion both ways, and what PyTorch makes of it."""

import copy
import io
import logging
import os
import pickle
import warnings

import pytest
from tensors import assert_same, nodes, results, torch
from torch import nn
from torch.nn import functional

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastbn.torch
from fastbn.torch.convert import BACK

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")
NAMES = [theirs.__name__ for theirs in BACK.values()]
INFOS = {m.name.removeprefix("nn."): m for m in module_db if m.module_cls in BACK.values()}
assert INFOS.keys() == set(NAMES)


# ---- PyTorch's inputs ---------------------------------------------------------------------


@pytest.mark.parametrize("way", ["convert", "class"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_inputs(name, training, way):
    info = INFOS[name]
    dtype = torch.float32 if training else torch.float64
    inputs = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert inputs
    for given in inputs:
        made = given.constructor_input
        theirs = info.module_cls(*made.args, **made.kwargs, dtype=dtype)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter)
        if way == "class":
            mine = getattr(fastbn.torch, name)(*made.args, **made.kwargs, dtype=dtype)
            mine.load_state_dict(theirs.state_dict())
        else:
            mine = fastbn.torch.convert(copy.deepcopy(theirs))
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
        for module in (
            getattr(fastbn.torch, name)(*arguments),
            fastbn.torch.convert(getattr(nn, name)(*arguments)),
            getattr(nn, name)(*arguments),
        ):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                module(torch.zeros(shape))
            errors.append((caught.type, str(caught.value)))
        assert errors[0] == errors[1] == errors[2]


def test_the_average_over_batches():
    mine, theirs = (m.BatchNorm1d(3, momentum=None) for m in (fastbn.torch, nn))
    for _ in range(4):
        x = torch.randn(20, 3)
        torch.testing.assert_close(mine(x), theirs(x))
    for a, b in zip(mine.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_told_what_comes_after(name):
    module = getattr(fastbn.torch, name)(*((2, 6) if name == "GroupNorm" else (6,)))
    x = torch.randn(4, 6, *[6] * (int(name[-2]) if name[-1] == "d" else 1))
    y = module(x, activation="relu", residual=x)
    torch.testing.assert_close(y, functional.relu(module(x) + x))


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


def is_converted(model):
    return ["forward" in m.__dict__ for m in model.modules() if isinstance(m, tuple(BACK.values()))]


class Block(nn.Module):
    """What residual networks are made of; `shared` is used twice."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.shared = nn.GroupNorm(2, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.first(self.convolution(x)))
        y = self.second(self.convolution(self.shared(y)))
        y += x
        return self.relu(self.shared(y) + y)


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


def test_convert_and_restore(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    other = copy.deepcopy(model)
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    seen = []
    model[0].first.register_forward_hook(lambda module, *_: seen.append(type(module)))
    model[0].second.eval()
    other[0].second.eval()
    model[1].first.weight.requires_grad_(False)
    other[1].first.weight.requires_grad_(False)

    with caplog.at_level(logging.INFO, "fastbn.torch"):
        assert fastbn.torch.convert(model) is model
    assert caplog.messages == ["convert: 6 norms converted, 0 left"]
    x = torch.randn(3, 4, 6, 6)
    names = nodes(model(x))
    assert names.count("NormaliseBackward") == 8
    assert not any("NormBackward" in name for name in names)
    other(x)
    torch.testing.assert_close(trained(model, x), trained(other, x))
    assert seen == [nn.BatchNorm2d] * 3
    assert not model[0].second.training
    assert model[1].first.weight.grad is None
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)

    for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(other)):
        assert is_converted(copied) == [copied[0].first.forward.__name__ == "forward"
                                        and "forward" in copied[0].first.__dict__] * 6  # fmt: skip
        torch.testing.assert_close(copied(x), model(x))

    assert fastbn.torch.restore(model) is model
    assert not any(is_converted(model))
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
    torch.testing.assert_close(trained(model, x), trained(other, x))


@pytest.mark.parametrize("name", NAMES)
def test_each_class_is_converted(name):
    model = getattr(nn, name)(*((2, 6) if name == "GroupNorm" else (6,)))
    for converted in (
        fastbn.torch.convert(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    ):  # fmt: skip
        assert type(converted) is getattr(nn, name)
        assert converted.forward.__self__.module is converted
        assert not is_converted(fastbn.torch.restore(converted))[0]
    mine = getattr(fastbn.torch, name)(*((2, 6) if name == "GroupNorm" else (6,)))
    assert type(fastbn.torch.convert(mine)) is getattr(fastbn.torch, name)
    assert type(fastbn.torch.restore(mine)) is getattr(nn, name)


class Renamed(nn.BatchNorm1d):
    """Of another name only."""


class WithAct(nn.BatchNorm1d):
    def forward(self, x):
        return functional.relu(super().forward(x))


class FrozenNorm(nn.Module):
    def forward(self, x):
        return x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3)


def test_what_is_left_is_named():
    left = [WithAct(3), WithAct(3), FrozenNorm(), nn.LazyBatchNorm1d(), nn.SyncBatchNorm(3)]
    model = nn.Sequential(*left, Renamed(3), Attention(), nn.LocalResponseNorm(2))
    types = [type(m) for m in model.modules()]
    with pytest.warns(UserWarning, match=r"convert: 2 norms converted; left as they are: ") as seen:
        fastbn.torch.convert(model)
    assert [type(m) for m in model.modules()] == types
    names = str(seen[0].message).partition("they are: ")[2]
    assert sorted(names.split(", ")) == [
        f"{__name__}.FrozenNorm (1)", f"{__name__}.WithAct (2)",
        "torch.nn.modules.batchnorm.LazyBatchNorm1d (1)",
        "torch.nn.modules.batchnorm.SyncBatchNorm (1)",
    ]  # fmt: skip
    assert len(seen) == 1
    x = torch.randn(5, 3)
    assert "NormaliseBackward" in nodes(model[5](x))
    assert (model[0](x) >= 0).all()


class Wrapper(nn.Module):
    """Sends attributes on to what it wraps."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.__dict__["done"] = True

    def __setattr__(self, name, value):
        if self.__dict__.get("done"):
            setattr(self.wrapped, name, value)
        else:
            super().__setattr__(name, value)


def test_nothing_but_norms_is_touched():
    inner = nn.Sequential(nn.ReLU())
    wrapper = Wrapper(inner)
    x = torch.randn(2, 4, 3, 3)
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    for model in wrapper, torch.jit.trace(nn.Conv2d(4, 4, 1), x), scripted:
        types = [type(m) for m in model.modules()]
        for change in (fastbn.torch.convert, fastbn.torch.fuse, fastbn.torch.unfuse,
                       fastbn.torch.restore):  # fmt: skip
            assert change(model) is model
        assert [type(m) for m in model.modules()] == types
        model(x) if model is not wrapper else None
    assert list(inner.__dict__) == list(nn.Sequential(nn.ReLU()).__dict__)


# ---- what PyTorch makes of converted and fused models ------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4), nn.Flatten(), nn.LayerNorm(64), nn.RMSNorm(64),
    )  # fmt: skip


IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def exported_to_onnx(model):
    torch.onnx.export(model, (IMAGE,), io.BytesIO(), dynamo=False)


def fused_by_pytorch(model):
    fused = torch.ao.quantization.fuse_modules(model, [["0", "1"]])
    torch.testing.assert_close(fused(IMAGE), model(IMAGE))


PROGRAMS = {
    "fx": torch.fx.symbolic_trace,
    "script": torch.jit.script,
    "trace": lambda m: torch.jit.trace(m, (IMAGE,)),
    "make_fx": lambda m: torch.fx.experimental.proxy_tensor.make_fx(m)(IMAGE),
    "export": lambda m: torch.export.export(m, (IMAGE,), strict=False).module(),
    "strict export": lambda m: torch.export.export(m, (IMAGE,), strict=True).module(),
    "compile": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
    "fuse_conv_bn_eval": lambda m: nn.Sequential(
        torch.nn.utils.fusion.fuse_conv_bn_eval(m[0], m[1]), *m[2:]
    ),
    "functional_call": lambda m: lambda x: torch.func.functional_call(m, m.state_dict(), (x,)),
    "vmap": lambda m: lambda x: torch.vmap(m)(x.unsqueeze(0)).squeeze(0),
    "swa": torch.optim.swa_utils.AveragedModel,
    "checkpoint": lambda m: lambda x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False),
}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.export")
def test_programs(program, fuse):
    model = fastbn.torch.convert(network().eval(), fuse=fuse)
    made = program(model)
    x = IMAGE.clone()
    torch.testing.assert_close(made(x), network().eval()(x), atol=1e-5, rtol=1e-5)
    assert "NormaliseBackward" in nodes(model(x))


@pytest.mark.parametrize("program", ["script", "compile", "fx"])
def test_training_programs(program):
    made, other = fastbn.torch.convert(network(), fuse=True), network()
    mine = PROGRAMS[program](made)
    for model in mine, other:
        model(IMAGE).pow(3).sum().backward()
    for a, b in zip(mine.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)
    for a, b in zip(mine.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")  # PyTorch's own, of what it would rather have used
def test_onnx_and_fuse_modules():
    model = fastbn.torch.convert(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)).eval())
    fused_by_pytorch(model)
    if os.environ.get("FASTBN_REQUIRE_PEERS") != "1":
        pytest.importorskip("onnx")
    exported_to_onnx(model)


def test_sync_batchnorm_and_parametrisations():
    model = fastbn.torch.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse=True)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    x = torch.randn(3, 4, 5, 5)
    expected = functional.batch_norm(x, None, None, model[0].weight, model[0].bias, True).relu()
    torch.testing.assert_close(model(x), expected)
    model = fastbn.torch.convert(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), fuse=True)
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is nn.SyncBatchNorm
    expected = functional.batch_norm(x, None, None, training=True).relu()
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(model)(x), expected)
