# SPDX-License-Identifier: BSD-3-Clause
"""What one module's forward function does with its children, as a graph; or why no graph shows it.

`torch.fx` calls the function with stand-ins for its tensors and writes down what they go
through; children are called as wholes. All else that the function does, it does once, now. So it
is refused where it might do more than the graph says:

- sets attributes or items, has `with` or `try`, prints, asks for types (found in the code, before
  it runs);
- draws random numbers, makes tensors, changes a list that the module keeps;
- runs children without gradients or in another precision, by whatever means;
- does something else in another of these modes: then its graphs differ.

It is traced as it is called with its tensors alone; whoever runs the graph must see to that.

May not: change anything. What tracing has changed is put back.
"""

from __future__ import annotations

import dis
import gc
import inspect
import operator
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.graph import inplace_methods


class UntraceableError(Exception):
    """A graph would not do what the function does."""


#: What a graph must not depend on: whether gradients are recorded, whether autocast is on.
MODES = [(True, False), (False, False), (True, True)]

PLAIN = (type(None), bool, int, float, complex, str, tuple, list, dict, slice, torch.Size)
LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for path in (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))
)
STANDARD = os.path.realpath(sysconfig.get_paths()["stdlib"]) + os.sep
REFUSED_CODE = {
    "STORE_ATTR": "it sets an attribute",
    "DELETE_ATTR": "it deletes an attribute",
    "STORE_GLOBAL": "it sets a global variable",
    "DELETE_GLOBAL": "it deletes a global variable",
    "STORE_SUBSCR": "it sets an item",
    "DELETE_SUBSCR": "it deletes an item",
    "BEFORE_WITH": "it has a with statement",
    "LOAD_SPECIAL": "it has a with statement",
    "PUSH_EXC_INFO": "it has a try statement",
}
REFUSED_NAMES = frozenset(
    # What a stand-in answers wrongly, and what does more than a graph says.
    {"isinstance", "issubclass", "type", "hasattr", "id", "print", "input", "open", "setattr",
     "delattr", "exec", "eval", "globals", "locals", "vars"}
)  # fmt: skip


def graph_of(module: nn.Module, training: bool) -> fx.Graph:
    """Return the graph of the module's forward function, its children as leaves.

    Raises
    ------
    UntraceableError
        With the reason.
    """
    kept = module.training, _generators(), _contents(module)
    module.__dict__["training"] = training
    try:
        graphs = [_traced(module, *mode) for mode in MODES]
    except UntraceableError:
        raise
    except Exception as error:  # whatever the module's own code may raise with a stand-in
        raise UntraceableError(" ".join(str(error).split())) from error
    finally:
        changed = _put_back(module, *kept)
    if changed:
        raise UntraceableError(changed)
    if len({str(graph) for graph in graphs}) > 1:
        raise UntraceableError("it looks whether gradients are recorded, or autocast is on")
    return graphs[0]


def signature(module: nn.Module) -> int:
    """Return how many tensors the forward function wants; others have defaults."""
    count = 0
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.default is parameter.empty:
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise UntraceableError(f"{parameter.name} has to be named")
            count += parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return count


# ---- tracing ---------------------------------------------------------------------------


class _Proxy(fx.Proxy):
    """One that knows ``+=`` from ``+``: the dtype of the result is another's."""


def _in_place(target: Callable[..., Any]) -> Callable[..., fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return method


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.modes = _modes()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, *_: Any) -> tuple[Any, list[Any]]:
        names = list(inspect.signature(root_fn).parameters)[1 : 1 + self.count]
        given = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return root_fn, [self.root, *given]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise UntraceableError("it changes the gradient mode, or autocast")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not self._is_kept(a):
            raise UntraceableError("it makes a tensor")
        if isinstance(a, (list, tuple, dict)) and type(a) not in PLAIN and not _is_named(a):
            raise UntraceableError(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def _is_kept(self, tensor: Tensor) -> bool:
        kept = chain(self.root.parameters(), self.root.buffers(), self.tensor_attrs)
        return any(tensor is t for t in kept)


def _is_named(a: Any) -> bool:
    return isinstance(a, tuple) and hasattr(a, "_fields")


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


def _traced(module: nn.Module, recorded: bool, lowered: bool) -> fx.Graph:
    with (
        torch.set_grad_enabled(recorded),
        torch.autocast("cpu", torch.bfloat16, enabled=lowered),
        _watched(module),
    ):
        return _Tracer(signature(module)).trace(module)


# ---- what the code does beside -----------------------------------------------------------


@contextmanager
def _watched(module: nn.Module) -> Iterator[None]:
    """Refuse functions that are not PyTorch's by their code, before they run."""

    def look(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not _is_library(frame.f_code):
            _check(frame, module)

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # what the collector calls, callbacks and finalizers, would be looked at, too
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def _is_library(code: CodeType) -> bool:
    path = code.co_filename
    if path.startswith(("<frozen", *LIBRARIES)):
        return True
    return path.startswith(STANDARD) and "-packages" not in path


def _check(frame: FrameType, module: nn.Module) -> None:
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if isinstance(first, nn.Module) and first is not module:
        raise UntraceableError(f"it calls {code.co_name} of a child")
    before = None
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL" and step.argval in REFUSED_NAMES:
            raise UntraceableError(f"it calls {step.argval}")
        if step.opname in REFUSED_CODE:
            raise UntraceableError(REFUSED_CODE[step.opname])
        if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
            raise UntraceableError("it sets a variable of another function")
        if step.opname == "IS_OP" and before is not None and before.argval is not None:
            raise UntraceableError("it asks whether two things are the same")
        before = step


def _contents(module: nn.Module) -> dict[str, Any]:
    """Return the module's attributes, and copies of those that are collections."""
    return {name: _copied(value) for name, value in module.__dict__.items()}


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict, set) else value


def _generators() -> tuple[Any, ...]:
    return random.getstate(), torch.get_rng_state(), np.random.get_state()  # noqa: NPY002


def _are_same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    of_numpy = a[2][2:] == b[2][2:] and np.array_equal(a[2][1], b[2][1])
    return bool(a[0] == b[0] and torch.equal(a[1], b[1]) and of_numpy)


def _put_back(
    module: nn.Module, training: bool, generators: tuple[Any, ...], contents: dict[str, Any]
) -> str:
    """Undo what tracing has changed, and say what that was."""
    module.__dict__["training"] = training
    changed = ""
    if not _are_same(generators, _generators()):
        random.setstate(generators[0])
        torch.set_rng_state(generators[1])
        np.random.set_state(generators[2])  # noqa: NPY002
        changed = "it draws random numbers"
    for name, value in contents.items():
        now = module.__dict__.get(name)
        if type(value) in (list, dict, set) and now is not None and not _same(now, value):
            now.clear()
            now.extend(value) if type(value) is list else now.update(value)
            changed = f"it changes its {name}"
    return changed


def _same(a: Any, b: Any) -> bool:
    # By identity: a stand-in has no answer to whether it is equal to something.
    if len(a) != len(b) or isinstance(a, set):
        return len(a) == len(b) and all(x in b for x in a)
    pairs = zip(a.items(), b.items(), strict=True) if isinstance(a, dict) else None
    if pairs is not None:
        return all(x[0] is y[0] and x[1] is y[1] for x, y in pairs)
    return all(x is y for x, y in zip(a, b, strict=True))
