# SPDX-License-Identifier: BSD-3-Clause
"""Norm, addition and activation as one call, where a module's graph shows that they are neighbours.

    _graphs.py      the graph of one module's forward function, its children as leaves
    here            chains in it; the function that `torch.fx` writes of it, with one call for each
    _forward.py     puts that function in the place of the module's own

A call takes the modules of its chain, and looks at them each time: where one has got a hook, or is
another one, or drops, it does what the graph said, step by step. Where the call is not
an ordinary one (compiled, traced, transformed, with more than tensors), or the module has other
children or attributes than it had, the class's function runs.

May not: change anything of a module but which function `forward` is.
"""

from __future__ import annotations

import logging
import operator
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.nn import functional
from torch.nn.modules import module as of_all_modules

from fastbn.torch import _direct, modules
from fastbn.torch._forward import Forward, function_of, is_replaceable
from fastbn.torch._graphs import UntraceableError, graph_of, signature

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("fastbn.torch")

ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
#: Functions and methods, by name of the activation.
ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "relu": (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"),
    "relu6": (functional.relu6,),
    "leaky_relu": (functional.leaky_relu, functional.leaky_relu_),
    "silu": (functional.silu,),
    "hardswish": (functional.hardswish,),
    "hardsigmoid": (functional.hardsigmoid,),
}
ACTIVATION_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
}
DROPOUTS = frozenset({nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout})
#: Their results are memory of their own.
FRESH = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase,
         nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)  # fmt: skip
IN_PLACE = {getattr(operator, name) for name in dir(operator)
            if name.startswith("i") and hasattr(operator, f"__{name}__")}  # fmt: skip


def fuse(model: Model) -> Model:
    """Let norms do the addition and the activation after them in the same pass, in place.

    Parameters
    ----------
    model : Module
        Changed in place. Where the forward function of a module in it calls a batch, group,
        instance, layer or RMS norm, and then adds, or applies ReLU, ReLU6, leaky ReLU, SiLU,
        hardswish or hardsigmoid, or both, directly or through ``nn.Identity`` and dropout that
        drops nothing, the module gets another forward function, which ``torch.fx`` writes of
        the module's own. Nothing else changes: not the class, hooks, parameters, buffers,
        modes, or children.

    Returns
    -------
    Module
        `model`.

    Warns
    -----
    UserWarning
        Of modules that have norms and were left as they are, and of norms that were left in the
        others, with the reasons. How much was fused, the logger ``fastbn.torch`` says
        (level INFO).

    Notes
    -----
    A module is left alone where a graph would not say all that its forward function does:
    where it branches on data, changes the gradient mode or autocast, draws random numbers,
    keeps state in Python. A norm is left alone where a hook, or anything else, needs the
    result that would no longer be there.

    ``torch.compile``, ``torch.export``, ``torch.jit``, ``torch.fx`` and ``torch.func`` see
    the module's own function. Copies by `copy.deepcopy` and pickles are fused, too;
    `copy.copy` of a fused module calls the module that it was made from. Not while
    other threads run modules: ``torch.fx`` traces in the whole process.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> y = fastbn.torch.fuse(model)(torch.randn(4, 8, 9, 9))
    >>> y.grad_fn.name(), type(model).__name__
    ('NormaliseBackward', 'Sequential')
    """
    report = _Report()
    for name, module in model.named_modules():
        if _has_function(module) and _has_norms(module) and Fused.of(module) is None:
            report.add(name, module, _fuse(module))
    report.publish()
    return model


def unfuse(model: Model) -> Model:
    """Undo `fuse`, in place.

    Parameters
    ----------
    model : Module
        What `fuse` returned, a copy of it, or any module that contains one.

    Returns
    -------
    Module
        `model`.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> y = fastbn.torch.unfuse(fastbn.torch.fuse(model))(torch.randn(4, 8, 9, 9))
    >>> y.grad_fn.name()
    'ReluBackward0'
    """
    for module in model.modules():
        Fused.remove(module)
    return model


def _has_norms(module: nn.Module) -> bool:
    return any(_kind(child) is not None for child in _called_children(module))


def _has_function(module: nn.Module) -> bool:
    # Lists of modules have none.
    return function_of(module) not in (None, nn.Module.forward)


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    # Lists of modules have no function of their own.
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_children(child)
        else:
            yield child


def _fuse(module: nn.Module) -> _Plan:
    if not is_replaceable(module) or isinstance(module, torch.jit.ScriptModule):
        return _Plan([], {}, _State.of(module), 0, ["its forward function is not its class's"])
    fused = Fused(module)
    plan = fused.planned()
    if plan.chains:
        fused.put()
    return plan


@dataclass
class _Report:
    """What was done, and what was not, of all modules."""

    chains: int = 0
    reasons: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, module: nn.Module, plan: _Plan) -> None:
        self.chains += len(plan.chains)
        for reason in plan.reasons:
            self.reasons.setdefault(f"{type(module).__name__}: {reason}", []).append(name)

    def publish(self) -> None:
        _log.info("fuse: %d norms with what follows them", self.chains)
        if self.reasons:
            parts = [f"{what} ({', '.join(map(repr, at))})" for what, at in self.reasons.items()]
            warnings.warn(
                f"fuse: {self.chains} norms fused; left as they are: {'; '.join(parts)}",
                stacklevel=3,
            )


# ---- running ----------------------------------------------------------------------------


class Fused(Forward):
    """The forward function of a module with chains of norms."""

    __slots__ = ("plan",)

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.plan: _Plan | None = None  # made at the first call, if not before: of copies

    def planned(self) -> _Plan:
        """Return the plan that fits the module as it is now."""
        if self.plan is None or not self.plan.state.is_of(self.module):
            with _planning:
                self.plan = _planned(self.module)
        return self.plan

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Call what was planned, or the module's own function."""
        if not kwargs and not is_compiling() and _direct.are_plain(args):
            plan = self.planned()
            if len(args) == plan.count:
                function = plan.functions.get(self.module.training)
                if function is not None:
                    return function(self.module, *args)
        return super().run(*args, **kwargs)


#: Tracing patches PyTorch's Module.
_planning = threading.RLock()


class _State(NamedTuple):
    """What a forward function may look at beside its arguments."""

    function: Any
    names: tuple[str, ...]
    types: tuple[type, ...]
    missing: tuple[str, ...]
    attributes: tuple[str, ...]
    values: list[Any]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        own = module.__dict__
        attributes = tuple(
            name for name, value in own.items() if name not in COMMON and not _is_tensor(value)
        )
        return cls(
            function_of(module),
            tuple(own["_modules"]),
            tuple(map(type, own["_modules"].values())),
            _missing(own),
            attributes,
            [_copied(own[name]) for name in attributes],
        )

    def is_of(self, module: nn.Module) -> bool:
        """Say whether the module is as it was."""
        own = module.__dict__
        children = own["_modules"]
        return (
            function_of(module) is self.function
            and tuple(children) == self.names
            and tuple(map(type, children.values())) == self.types
            and _missing(own) == self.missing
            and (not self.attributes or _equal([own.get(n) for n in self.attributes], self.values))
        )


#: Attributes of every module.
COMMON = frozenset(nn.Module().__dict__) | {"forward"}


def _missing(own: dict[str, Any]) -> tuple[str, ...]:
    if not own["_parameters"] and not own["_buffers"]:
        return ()
    both = *own["_parameters"].items(), *own["_buffers"].items()
    return tuple(name for name, value in both if value is None)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else value


def _equal(a: list[Any], b: list[Any]) -> bool:
    try:
        return bool(a == b)
    except Exception:  # arrays, for example, have no one answer
        return False


@dataclass
class _Chain:
    """A norm and what is done with its result; a function in the graph."""

    nodes: list[fx.Node]
    added: fx.Node | None = None
    residual: fx.Node | None = None
    #: A function's; a module says at each call which one it is.
    activation: str | None = None
    negative_slope: float = 0.01
    ends_in_module: bool = False
    #: What is done after the norm, each with the result before, the residual and the modules.
    steps: list[Callable[..., Tensor]] = field(default_factory=list)

    def run(
        self, norm: nn.Module, x: Tensor, residual: Tensor | None, beside: tuple[nn.Module, ...]
    ) -> Tensor:
        """Return what the chain makes of `x`."""
        kind = modules.KINDS.get(function_of(norm))
        if kind is not None and self._is_one(norm, x, residual, beside):
            if not self.ends_in_module:
                return kind(norm, x, self.activation, self.negative_slope, residual)
            last = beside[-1]
            slope = last.negative_slope if type(last) is nn.LeakyReLU else 0.01
            return kind(norm, x, ACTIVATION_MODULES[type(last)], slope, residual)
        y = norm(x)
        for step in self.steps:
            y = step(y, residual, beside)
        return y

    def _is_one(
        self, norm: nn.Module, x: Tensor, residual: Tensor | None, beside: tuple[nn.Module, ...]
    ) -> bool:
        if residual is None:
            plain = _direct.are_plain((x,))
        else:
            plain = (
                _direct.are_plain((x, residual))
                and x.shape == residual.shape
                and x.dtype is residual.dtype
            )
        if not plain or _is_hooked(norm) or _has_global_hooks():
            return False
        skipped = beside
        if self.ends_in_module:
            skipped, last = beside[:-1], beside[-1]
            if type(last) not in ACTIVATION_MODULES or _is_hooked(last):
                return False
        return all(_passes(module) and not _is_hooked(module) for module in skipped)


def _is_hooked(module: nn.Module) -> bool:
    # Or its function is another one.
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or ("forward" in module.__dict__ and Forward.of(module) is None)
    )


def _has_global_hooks() -> bool:
    return bool(
        of_all_modules._global_forward_hooks
        or of_all_modules._global_forward_pre_hooks
        or of_all_modules._global_backward_hooks
        or of_all_modules._global_backward_pre_hooks
    )


def _passes(module: nn.Module) -> bool:
    """Say whether the result is the argument."""
    kind = type(module)
    return kind is nn.Identity or (kind in DROPOUTS and not (module.training and module.p))


# ---- planning ----------------------------------------------------------------------------


@dataclass
class _Plan:
    """What is called in the place of a module's function, and what was not fused."""

    chains: list[_Chain]
    functions: dict[bool, Callable[..., Any]]  # by mode: training or not
    state: _State
    count: int
    reasons: list[str]


def _planned(module: nn.Module) -> _Plan:
    state = _State.of(module)
    plan = _Plan([], {}, state, 0, [])
    try:
        plan.count = signature(module)
        for training in False, True:
            graph = graph_of(module, training)
            chains, reasons = _chains(module, graph)
            plan.reasons += [reason for reason in reasons if reason not in plan.reasons]
            if chains:
                plan.functions[training] = _written(graph, chains)
                plan.chains = max(plan.chains, chains, key=len)
    except UntraceableError as error:
        return _Plan([], {}, state, 0, [str(error)])
    return plan


def _written(graph: fx.Graph, chains: list[_Chain]) -> Callable[..., Any]:
    for chain in chains:
        _replace(graph, chain)
    for node in graph.nodes:
        node.type = None  # annotations need names of their own
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(compile(code.src, "<fastbn.torch.fuse>", "exec"), namespace)
    return namespace["forward"]


def _replace(graph: fx.Graph, chain: _Chain) -> None:
    """Put one call in the place of the chain's last node."""
    norm, last = chain.nodes[0], chain.nodes[-1]
    if chain.added is not None:  # its other argument may be another chain by now
        before = chain.nodes[chain.nodes.index(chain.added) - 1]
        chain.residual = next(a for a in chain.added.args if a is not before)
    beside = [node for node in chain.nodes[1:] if node.op == "call_module"]
    chain.steps = [_step(chain, node, beside) for node in chain.nodes[1:]]
    run = chain.run

    def fused(norm: nn.Module, x: Tensor, residual: Tensor | None, *beside: nn.Module) -> Tensor:
        return run(norm, x, residual, beside)

    with graph.inserting_before(last):
        found = [graph.get_attr(str(node.target)) for node in (norm, *beside)]
        made = graph.call_function(fused, (found[0], norm.args[0], chain.residual, *found[1:]))
    last.replace_all_uses_with(made)
    for node in reversed(chain.nodes):
        graph.erase_node(node)


def _step(chain: _Chain, node: fx.Node, beside: list[fx.Node]) -> Callable[..., Tensor]:
    """Return what the node does, for a chain that is not one call."""
    if node.op == "call_module":
        place = beside.index(node)
        return lambda y, residual, modules: modules[place](y)
    target, kwargs, residual_node = node.target, dict(node.kwargs), chain.residual
    template = [_RESIDUAL if a is residual_node else _RESULT if isinstance(a, fx.Node) else a
                for a in node.args]  # fmt: skip

    def step(y: Tensor, residual: Tensor | None, _: Any) -> Tensor:
        args = [residual if a is _RESIDUAL else y if a is _RESULT else a for a in template]
        if isinstance(target, str):
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    return step


_RESIDUAL, _RESULT = object(), object()


# ---- chains ------------------------------------------------------------------------------


def _chains(module: nn.Module, graph: fx.Graph) -> tuple[list[_Chain], list[str]]:
    """Return chains that can be one call, and why others cannot."""
    chains: list[_Chain] = []
    reasons: list[str] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_module" or _kind(_child(module, node)) is None:
            continue
        try:
            chain = _chain(module, node, taken)
        except UntraceableError as error:
            reasons.append(f"{node.target}: {error}")
            continue
        if chain is not None:
            taken.update(chain.nodes)
            chains.append(chain)
    return chains, reasons


def _chain(module: nn.Module, norm: fx.Node, taken: set[fx.Node]) -> _Chain | None:
    chain = _Chain([norm])
    while not (chain.activation or chain.ends_in_module):
        users = list(chain.nodes[-1].users)
        if len(users) > 1:
            if chain.residual is None and any(_would_end(module, user) for user in users):
                raise UntraceableError("another one needs its result")
            break
        if not users or users[0] in taken or not _extend(module, chain, users[0]):
            break
    while len(chain.nodes) > 1 and _role(module, chain.nodes[-1]) == "skip":
        chain.nodes.pop()
    if len(chain.nodes) == 1:
        return None
    _check(module, chain)
    return chain


def _would_end(module: nn.Module, node: fx.Node) -> bool:
    """Say whether the node is an activation, or an addition before one."""
    if _role(module, node) == "add" and len(node.users) == 1:
        node = next(iter(node.users))
    return _role(module, node) not in ("", "add", "skip")


def _extend(module: nn.Module, chain: _Chain, user: fx.Node) -> bool:
    role, node = _role(module, user), chain.nodes[-1]
    if not role:
        return False
    if role == "add":
        others = [a for a in user.args if a is not node]
        if chain.residual is not None or len(others) != 1 or not isinstance(others[0], fx.Node):
            return False
        if _writes(module, user) and user.args[0] is not node:
            return False
        chain.added, chain.residual = user, others[0]
    elif role != "skip":
        chain.ends_in_module = user.op == "call_module"
        if not chain.ends_in_module:
            chain.activation = role
            slope = user.kwargs.get("negative_slope", user.args[1] if len(user.args) > 1 else 0.01)
            chain.negative_slope = float(slope)
    chain.nodes.append(user)
    return True


def _role(module: nn.Module, node: fx.Node) -> str:
    """Return "add", "skip", the name of an activation, or nothing."""
    if node.op == "call_module":
        child = _child(module, node)
        if len(node.args) != 1 or node.kwargs:
            return ""
        if type(child) is nn.Identity or type(child) in DROPOUTS:
            return "skip"
        return ACTIVATION_MODULES.get(type(child), "")
    if node.op not in ("call_function", "call_method"):
        return ""
    if node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs:
        return "add"
    for name, targets in ACTIVATIONS.items():
        allowed = {"inplace", "negative_slope"} if name == "leaky_relu" else {"inplace"}
        numbers = all(isinstance(a, (int, float)) for a in (*node.args[1:], *node.kwargs.values()))
        if node.target in targets and numbers and not set(node.kwargs) - allowed:
            return name
    return ""


def _check(module: nn.Module, chain: _Chain) -> None:
    """Refuse a chain whose parts have to be apart."""
    norm, last = chain.nodes[0], chain.nodes[-1]
    if len(norm.args) != 1 or norm.kwargs:
        raise UntraceableError("it is called with more than a tensor")
    for node in chain.nodes:
        if node.op == "call_module":
            if _is_hooked(_child(module, node)):
                raise UntraceableError(f"{node.target} has a hook")
            if node is norm and _calls(module, norm) > 1:
                raise UntraceableError("it is called twice")
    added = chain.added or last
    kept = _is_fresh(module, norm.args[0])
    for node, until in _between(norm, last, added):
        if node not in chain.nodes and not _is_pure(module, node) and not (kept and until is added):
            raise UntraceableError(f"{node.target} may write to what it takes")


def _between(norm: fx.Node, last: fx.Node, added: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    until, node = added, norm.next
    while node is not last:
        yield node, until
        until = last if node is added else until
        node = node.next


def _calls(module: nn.Module, norm: fx.Node) -> int:
    child = _child(module, norm)
    return sum(
        node.op == "call_module" and _child(module, node) is child for node in norm.graph.nodes
    )


def _child(module: nn.Module, node: fx.Node) -> nn.Module:
    return module.get_submodule(str(node.target))


def _kind(module: nn.Module) -> Callable[..., Tensor] | None:
    return modules.KINDS.get(function_of(module))


def _is_fresh(module: nn.Module, node: Any) -> bool:
    """Say whether the node's result is memory that only the norm sees."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_module"
        and len(node.users) == 1
        and isinstance(_child(module, node), FRESH)
    )


def _is_pure(module: nn.Module, node: fx.Node) -> bool:
    """Say whether the node certainly writes to no tensor that it is given."""
    if node.op == "call_module":
        return all(
            type(m).__module__.startswith(("torch.nn.modules.", "fastbn.torch."))
            and not getattr(m, "inplace", False)
            and not _is_hooked(m)
            for m in _child(module, node).modules()
        )
    if node.op in ("call_function", "call_method"):
        return not _writes(module, node) and _is_known(node)
    return True


def _is_known(node: fx.Node) -> bool:
    home = getattr(node.target, "__module__", None) or ""
    return node.op == "call_method" or home.startswith(("torch", "_operator", "builtins")) or (
        getattr(torch, getattr(node.target, "__name__", ""), None) is node.target
    )  # fmt: skip


def _writes(module: nn.Module, node: fx.Node) -> bool:
    # In place: by a name with an underscore, an operator like +=, an argument.
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op in ("call_function", "call_method") and (
        name.endswith("_") or name == "setitem" or node.target in IN_PLACE
    )
    return in_place or bool(node.kwargs.get("inplace") or node.kwargs.get("out"))
