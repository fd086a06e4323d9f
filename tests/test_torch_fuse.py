# SPDX-License-Identifier: BSD-3-Clause
"""fastbn.torch.fuse: what it takes, what it leaves and says why, and that nothing else changes."""

import copy
import gc
import pickle
import random
import warnings

import pytest
from tensors import nodes, torch
from torch import nn
from torch.nn import functional

import fastbn.torch

X = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def add_then_relu(y, x):
    y += x
    return functional.relu(y, inplace=True)


class Block(nn.Module):
    """A norm and its ReLU; then another, and what `end` does with it and x."""

    def __init__(self, end=lambda y, x: y, first=None, relu=None):
        super().__init__()
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = first or nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = relu or nn.ReLU(inplace=True)
        self.beside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.end = end

    def forward(self, x):
        y = self.relu(self.first(self.convolution(x)))
        return self.end(self.second(self.convolution(y)), x)


def block(*args, **kwargs):
    torch.manual_seed(0)
    made = Block(*args, **kwargs)
    for norm in made.first, made.second:
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    return made


def results(model, x=X, steps=2):
    """What two steps of training, and an evaluation, make of a model."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for _ in range(steps):
        own = x.clone().requires_grad_()
        y = model(own)
        optimizer.zero_grad()
        y.square().mean().backward()
        found += [y.detach(), own.grad]
        optimizer.step()
    training = model.training
    with torch.no_grad():
        found.append(model.eval()(x))
    model.train(training)
    return [*found, *model.state_dict().values()]


def assert_same(model, other, x=X):
    for a, b in zip(results(model, x), results(other, x), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def norms(model, x=X):
    """How many norms fastbn computed, and PyTorch."""
    names = nodes(model(x.clone().requires_grad_()))
    return names.count("NormaliseBackward"), sum("Norm" in n for n in names) - names.count(
        "NormaliseBackward"
    )


# ---- what is taken --------------------------------------------------------------------------

ENDS = {
    "operators": add_then_relu,
    "functions": lambda y, x: torch.relu(torch.add(y, x)),
    "methods": lambda y, x: y.add(x).relu(),
    "the other way round": lambda y, x: functional.relu(x + y),
    "addition alone": lambda y, x: y + x,
    "slope": lambda y, x: functional.leaky_relu(x + y, 0.3),
    "default slope": lambda y, x: functional.leaky_relu(x + y),
    "nothing added": lambda y, x: functional.hardswish(y),
    "between": lambda y, x: torch.relu(y + torch.tanh(x)),
    "used again": lambda y, x: torch.relu(y) * x,
    "two users of the sum": lambda y, x: (y + x) * torch.sigmoid(y + x),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_what_is_taken(end):
    model, other = block(end), block(end)
    assert fastbn.torch.fuse(model) is model
    assert norms(model) == ((1, 1) if end is ENDS["two users of the sum"] else (2, 0))
    other(X)
    assert_same(model, other)


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch without statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "batch averaged": lambda: nn.BatchNorm2d(4, momentum=None),
    "group": lambda: nn.GroupNorm(2, 4),
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "layer": lambda: nn.LayerNorm(6),
    "rms": lambda: nn.RMSNorm(6),
    "fastbn's": lambda: fastbn.torch.BatchNorm2d(4),
}
ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": lambda: nn.SiLU(inplace=True),
    "hardswish": lambda: nn.Hardswish(),
    "hardsigmoid": lambda: nn.Hardsigmoid(),
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms(norm, convert):
    model, other = (block(first=norm()) for _ in range(2))
    fuse = (lambda m: fastbn.torch.convert(m, fuse=True)) if convert else fastbn.torch.fuse
    assert fuse(model) is model
    assert norms(model)[0] == (2 if convert else 1)
    assert "ReluBackward0" not in nodes(model(X))
    other(X), other(X)
    assert_same(model, other)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(activation):
    model, other = (
        nn.Sequential(nn.BatchNorm2d(4), nn.Identity(), nn.Dropout(0.0), activation()) for _ in "ab"
    )
    for m in model, other:
        nn.init.constant_(m[0].weight, 5.0)
    assert nodes(fastbn.torch.fuse(model)(X)) == [
        "NormaliseBackward",
        "AccumulateGrad",
        "AccumulateGrad",
    ]
    other(X)
    assert_same(model, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_dtypes(dtype):
    """What is added, has another dtype, under autocast: the steps are done one by one."""
    model, other = block(add_then_relu), block(add_then_relu)
    fastbn.torch.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        for x in X, X.to(dtype):
            y, expected = model(x), other(x)
            assert y.dtype is expected.dtype
            torch.testing.assert_close(y, expected, atol=0.1, rtol=0.02)


# ---- what is left ---------------------------------------------------------------------------


def drawn(y, x):
    return torch.relu(y) if random.random() < 0.5 else y


LEFT = {
    "two users": (lambda y, x: torch.relu(y + x) + y, "another one needs its result"),
    "written between": (
        lambda y, x: torch.relu((y * 1).mul_(2) + y), "another one needs its result"
    ),
    "branch": (lambda y, x: torch.relu(y) if y.sum() > 0 else y, "control flow"),
    "type": (lambda y, x: torch.relu(y) if isinstance(y, list) else y, "calls isinstance"),
    "random": (drawn, "random numbers"),
    "noise": (lambda y, x: torch.relu(y) + torch.randn(3, 4, 6, 6), "makes a tensor"),
    "grad mode": (lambda y, x: torch.relu(y) if torch.is_grad_enabled() else y, "recorded"),
    "autocast": (lambda y, x: torch.relu(y) if torch.is_autocast_enabled("cpu") else y, "autocast"),
    "print": (lambda y, x: print("seen") or torch.relu(y), "calls print"),
}  # fmt: skip


@pytest.mark.parametrize(("end", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_left_and_why(end, reason):
    model, other = block(end), block(end)
    state = random.getstate(), torch.get_rng_state()
    with pytest.warns(UserWarning, match=f"left as they are: Block: .*{reason}"):
        assert fastbn.torch.fuse(model) is model
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    with torch.random.fork_rng():
        random.seed(0), torch.manual_seed(0)
        mine = results(model)
        random.seed(0), torch.manual_seed(0)
        for a, b in zip(mine, results(other), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


#: Of which only the first norm is taken, and nothing is to be said.
QUIET = {
    "nothing": lambda y, x: y,
    "scaled": lambda y, x: torch.relu(torch.add(y, x, alpha=2)),
    "itself": lambda y, x: torch.relu(y + y) + x,
    "a number": lambda y, x: torch.relu(y + 1.0) + x,
    "into the other": lambda y, x: torch.relu(x.clone().add_(y)),
}


@pytest.mark.parametrize("end", QUIET.values(), ids=QUIET)
def test_what_is_left_without_a_word(end):
    model, other = block(end), block(end)
    fastbn.torch.fuse(model)
    assert norms(model) == (1, 1)
    other(X)
    assert_same(model, other)


def test_writes_between():
    def late(y, x):
        y = y + x
        x = x.clone()
        x.mul_(2)
        return torch.relu(y) + x

    def later(y, x):
        x = x * 1
        y = y + x
        x.mul_(2)
        return torch.relu(y) + x

    for end in late, later:
        model, other = block(end), block(end)
        with pytest.warns(UserWarning, match="may write to what it takes"):
            fastbn.torch.fuse(model)
        assert_same(model, other)


class Kinds(Block):
    """The same with a forward function of many kinds."""

    def set_attribute(self, x):
        self.seen = x.shape
        return self.relu(self.first(x))

    def keep_in_list(self, x):
        self.log.append(1)
        return self.relu(self.first(x))

    def without_gradients(self, x):
        with torch.no_grad():
            return self.relu(self.first(x))

    @torch.no_grad()
    def decorated(self, x):
        return self.relu(self.first(x))

    def by_function(self, x):
        torch.set_grad_enabled(False)
        y = self.relu(self.first(x))
        torch.set_grad_enabled(True)
        return y

    def with_gradients(self, x):
        with torch.enable_grad():
            return self.relu(self.first(x))

    def in_full_precision(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.relu(self.first(x))

    def optional(self, x, other=None):
        y = self.relu(self.first(x))
        return y if other is None else y + other

    def flag(self, x, double=False):
        return self.relu(self.first(x)) * (2 if double else 1)

    def by_mode(self, x):
        y = self.relu(self.first(x))
        return functional.dropout(y, 0.5, self.training)

    def one_or_many(self, x):
        x = x if isinstance(x, torch.Tensor) else torch.cat(x)
        return self.relu(self.first(x))

    def any_number(self, *xs):
        return self.relu(self.first(xs[0]))

    def remembered(self, x):
        return self.relu(self.first(x)) if self.wanted else x

    def tried(self, x):
        try:
            return self.relu(self.first(x))
        except ValueError:
            return x

    def compared(self, x):
        return self.relu(self.first(x)) if x.dtype is torch.float32 else x

    def pair(self, x):
        return {"y": self.relu(self.first(x)), "x": (x, [x])}


def kind_of_block(name):
    made = block()
    made.__class__ = type(name, (Block,), {"forward": getattr(Kinds, name)})
    made.log, made.wanted = [], True
    return made


REFUSED = {
    "set_attribute": "sets an attribute",
    "keep_in_list": "changes its log",
    "without_gradients": "with statement",
    "decorated": "gradient mode",
    "by_function": "gradient mode",
    "with_gradients": "with statement",
    "in_full_precision": "with statement",
    "any_number": "",
    "one_or_many": "calls isinstance",
    "tried": "try statement",
    "compared": "the same",
}


@pytest.mark.parametrize("name", REFUSED)
def test_forward_functions_that_no_graph_shows(name):
    model = kind_of_block(name)
    before = dict(model.__dict__)
    with pytest.warns(UserWarning, match=f"{name}: .*{REFUSED[name]}"):
        fastbn.torch.fuse(model)
    assert model.__dict__ == before
    assert model.log == []
    assert torch.is_grad_enabled()
    assert torch.equal(model(X), kind_of_block(name)(X))


@pytest.mark.parametrize(
    ("name", "args"),
    [("optional", (X,)), ("optional", (X, X)), ("flag", (X, True)), ("flag", (X, False)),
     ("by_mode", (X,)), ("remembered", (X,))],
)  # fmt: skip
def test_arguments_and_attributes_that_decide(name, args):
    models = [kind_of_block(name) for _ in range(2)]
    fastbn.torch.fuse(models[0])
    assert norms(models[0]) == (1, 0)
    models[1](X)
    for training in True, False:
        found = []
        for model in models:
            model.train(training)
            torch.manual_seed(0)
            found.append(model(*args))
        torch.testing.assert_close(*found)
    models[0].wanted = False
    assert name != "remembered" or models[0](X) is X


def test_results_that_are_no_tensors():
    model, other = kind_of_block("pair"), kind_of_block("pair")
    y, expected = fastbn.torch.fuse(model)(X), other(X)
    assert type(y) is dict
    assert y["x"][0] is X
    torch.testing.assert_close(y, expected)


def test_hooks_and_norms_that_are_called_twice():
    for spoil, reason in [
        (lambda m: m.first.register_forward_hook(lambda *_: None), "first has a hook"),
        (lambda m: m.relu.register_forward_pre_hook(lambda *_: None), "relu has a hook"),
        (lambda m: m.first.register_full_backward_hook(lambda *_: None), "first has a hook"),
        (lambda m: setattr(m, "second", m.first), "called twice"),
    ]:
        model = block(relu=nn.ReLU())
        spoil(model)
        with pytest.warns(UserWarning, match=f"Block: first: .*{reason}"):
            fastbn.torch.fuse(model)
        assert norms(model)[0] == 0


# ---- what changes afterwards ------------------------------------------------------------------


def test_changes_after_fusing():
    """A hook, another module, a dropout that drops: seen at the next call."""
    model = fastbn.torch.fuse(nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.0), nn.ReLU()))
    seen = []
    for watched in model[0], model[1], model[2]:
        hook = watched.register_forward_hook(lambda m, a, y: seen.append(type(m)))
        assert norms(model) == (0, 1)
        assert seen.pop() is type(watched)
        hook.remove()
        assert norms(model) == (1, 0)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    assert norms(model) == (0, 1)
    assert len(seen) == 4
    hook.remove()
    model[1].p = 0.5
    assert norms(model) == (0, 1)
    assert norms(model.eval())[1] == 0
    model[1].p = 0.0
    model.train()
    model[2] = nn.Tanh()
    assert model(X).min() < 0
    model[2] = nn.LeakyReLU(0.5)
    assert norms(model) == (1, 0)
    torch.testing.assert_close(model(X), functional.leaky_relu(model[0](X), 0.5))
    model.append(nn.Flatten())
    assert model(X).shape == (3, 144)
    model[0] = nn.GroupNorm(2, 4)
    assert norms(model) == (1, 0)
    del model[2]
    assert norms(model)[1] == 1


def test_another_forward_function_is_left():
    model = block()
    model.forward = lambda x: x
    with pytest.warns(UserWarning, match="not its class's"):
        fastbn.torch.fuse(model)
    assert model(X) is X
    model = fastbn.torch.fuse(block())
    model.first.forward = lambda x: x * 0
    assert not model.relu(model.first(X)).any()
    assert norms(model)[0] == 0


# ---- what stays -------------------------------------------------------------------------------


class Whole(nn.Module):
    """Parameters before and after, unused ones, a frozen part, hooks of its state."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(4, 4, 1)
        self.body = block(add_then_relu)
        self.unused = nn.Linear(4, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("count", torch.zeros(1))

    def train(self, mode=True):
        super().train(mode)
        self.body.first.eval()
        return self

    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
        return self.head(x) * self.scale


def test_all_else_stays():
    torch.manual_seed(0)
    model = Whole().train()
    other = copy.deepcopy(model)
    modules, parameters = list(model.named_modules()), list(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    seen = []
    for m in model, model.body, model.head:
        m.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
        m.register_forward_hook(lambda m, a, y: seen.append(m) or y + 1)
    model._register_state_dict_hook(lambda m, state, *_: state.update(mark=torch.ones(1)))
    expected = model(X)
    del seen[:]
    assert fastbn.torch.fuse(model) is model
    assert type(model) is Whole
    assert list(model.named_modules()) == modules
    assert all(a is b for (_, a), (_, b) in zip(model.named_parameters(), parameters, strict=True))
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in parameters]
    assert list(model.state_dict()) == [*other.state_dict(), "mark"]
    assert not model.body.first.training
    model.body.second.reset_running_stats()
    torch.testing.assert_close(model(X), expected)
    assert seen == [model.body, model.head, model]
    model(X).sum().backward()
    assert model.body.first.weight.grad is None
    optimizer.step()
    assert model.train() is model
    assert not model.body.first.training
    assert model.body.second.training


def test_copies_and_pickles(tmp_path):
    model = fastbn.torch.convert(block(add_then_relu), fuse=True)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    torch.save(model, tmp_path / "model")
    copies.append(torch.load(tmp_path / "model", weights_only=False))
    expected = model(X)
    for copied in copies:
        with torch.no_grad():
            copied.first.weight.add_(1)
        assert norms(copied) == (2, 0)
        assert not torch.equal(copied(X), expected)
    model.first.running_mean.zero_()
    copies[0](X)
    assert not model.first.running_mean.any()


def test_unfuse_any_wrapper():
    def wrapped():
        return fastbn.torch.fuse(block(add_then_relu))

    for model in [
        nn.Sequential(wrapped()),
        torch.optim.swa_utils.AveragedModel(wrapped()),
        nn.DataParallel(wrapped()),
        torch.compile(wrapped(), backend="eager"),
        nn.ModuleDict({"a": wrapped()}),
    ]:
        assert fastbn.torch.unfuse(model) is model
        assert not any("forward" in m.__dict__ for m in model.modules() if isinstance(m, Block))
    model = fastbn.torch.convert(block(add_then_relu), fuse=True)
    assert "AddBackward0" in nodes(fastbn.torch.unfuse(model)(X))
    assert norms(model) == (2, 0)
    assert fastbn.torch.restore(fastbn.torch.fuse(model)) is model
    assert norms(model) == (0, 2)
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_twice():
    model = fastbn.torch.fuse(block())
    before = model.forward
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastbn.torch.fuse(model)
    assert model.forward == before


def test_lists_of_modules():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(
                nn.ModuleDict({"norm": nn.GroupNorm(2, 4), "act": nn.SiLU()}) for _ in range(2)
            )

        def forward(self, x):
            for layer in self.layers:
                x = layer["act"](layer["norm"](x))
            return x

    assert norms(fastbn.torch.fuse(Stack())) == (2, 0)


def test_a_forward_function_of_another_name():
    class Other(Block):
        pass

    Other.forward = Kinds.pair
    model = Other()
    fastbn.torch.fuse(model)
    assert copy.deepcopy(model).forward.__self__.module is not model
    assert model.forward.__name__ == "forward"


def test_what_is_added_may_be_another_chain():
    class Two(Block):
        def forward(self, x):
            y = self.relu(self.first(self.convolution(x)))
            return torch.relu(self.second(self.convolution(y)) + y)

    models = [block() for _ in "ab"]
    for model in models:
        model.__class__ = Two
    fastbn.torch.fuse(models[0])
    assert "AddBackward0" not in nodes(models[0](X))
    models[1](X)
    assert_same(*models)


def test_the_collectors_callbacks_are_nobodys_forward():
    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return torch.relu(self.norm(x))

    def callback(phase, info):
        global collected
        collected = phase

    before, callbacks = gc.get_threshold(), list(gc.callbacks)
    gc.callbacks.append(callback)
    gc.set_threshold(1, 1, 1)
    try:
        model = fastbn.torch.fuse(Collecting())
    finally:
        gc.set_threshold(*before)
        gc.callbacks[:] = callbacks
    assert "forward" in vars(model)
    assert gc.isenabled()
