# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm, addition and activation as one call, where a graph shows that they are neighbours.

The graph is a new module over the same submodules: batch norm is told at each call what
to do beside, and so needs no state for it. The original works as before.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional

from fastbn.torch import modules

Model = TypeVar("Model", bound=nn.Module)

BATCH_NORMS = modules.BatchNorm1d, modules.BatchNorm2d, modules.BatchNorm3d
ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
#: By the name of the activation: functions and methods, and the module.
ACTIVATIONS: dict[str, tuple[tuple[Any, ...], type[nn.Module]]] = {
    "relu": (
        (functional.relu, functional.relu_, torch.relu, torch.relu_, "relu", "relu_"), nn.ReLU
    ),
    "relu6": ((functional.relu6,), nn.ReLU6),
    "silu": ((functional.silu,), nn.SiLU),
    "hardswish": ((functional.hardswish,), nn.Hardswish),
    "hardsigmoid": ((functional.hardsigmoid,), nn.Hardsigmoid),
}  # fmt: skip
IN_PLACE = {getattr(operator, name) for name in dir(operator)
            if name.startswith("i") and hasattr(operator, f"__{name}__")}  # fmt: skip


class _Tracer(fx.Tracer):
    """Sees the modules of fastbn as wholes, as it sees PyTorch's own."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__ == modules.__name__ or super().is_leaf_module(
            m, module_qualified_name
        )


def fused(model: Model) -> Model | fx.GraphModule:
    """Return a graph module that does the same, or the model, with a warning."""
    try:
        graph = _graph(model)
    except Exception as error:  # whatever the model's own code may raise with a proxy
        warnings.warn(f"{type(model).__name__} is not fused: {error}", stacklevel=3)
        return model
    made = fx.GraphModule(model, graph, type(model).__name__)
    _fuse(made)
    return made


def separated(model: nn.Module) -> None:
    """Put the additions and activations of a fused graph back beside their batch norms."""
    if not isinstance(model, fx.GraphModule):
        return
    for norm in model.graph.nodes:
        if norm.kwargs.get("activation") and _has_type(model, norm, BATCH_NORMS):
            _separate(norm)
    model.recompile()


def _separate(norm: fx.Node) -> None:
    users, residual, last = list(norm.users), norm.kwargs.get("residual"), norm
    activation = getattr(functional, str(norm.kwargs["activation"]))
    norm.kwargs = {}
    if residual is not None:
        with norm.graph.inserting_after(last):
            last = norm.graph.call_function(operator.add, (norm, residual))
    with norm.graph.inserting_after(last):
        last = norm.graph.call_function(activation, (last,))
    for user in users:
        user.replace_input_with(norm, last)


def _graph(model: nn.Module) -> fx.Graph:
    # Of both modes: code that looks at the mode (dropout as a function) would be frozen.
    modes = {module: module.training for module in model.modules()}
    try:
        graphs = [_Tracer().trace(model.train(training)) for training in (False, True)]
    finally:
        for module, training in modes.items():
            module.training = training
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError("what it computes depends on its mode (training or not)")
    return graphs[0]


def _fuse(made: fx.GraphModule) -> None:
    for norm in list(made.graph.nodes):
        if _is_batch_norm(made, norm):
            user = _only_user(norm)
            after = _only_user(user)
            if _activation(made, user):
                _replace(norm, _activation(made, user), user)
            elif _is_addition(made, norm, user) and _activation(made, after):
                _replace(norm, _activation(made, after), after, user)
    made.recompile()


def _replace(
    norm: fx.Node, activation: str, relu: fx.Node, addition: fx.Node | None = None
) -> None:
    told: dict[str, Any] = {"activation": activation}
    with norm.graph.inserting_before(addition or relu):
        if addition is not None:
            told["residual"] = next(a for a in addition.args if a is not norm)
        new = norm.graph.call_module(str(norm.target), norm.args, told)
    relu.replace_all_uses_with(new)
    for node in (relu, addition, norm):
        if node is not None:
            norm.graph.erase_node(node)


def _only_user(node: fx.Node | None) -> fx.Node | None:
    return next(iter(node.users)) if node is not None and len(node.users) == 1 else None


def _is_batch_norm(made: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module" or node.kwargs:
        return False
    called_again = sum(other.target == node.target for other in made.graph.nodes) > 1
    return not called_again and _has_type(made, node, BATCH_NORMS)


def _activation(made: fx.GraphModule, node: fx.Node | None) -> str:
    """Return which one the node is, or nothing."""
    for name, (targets, module) in ACTIVATIONS.items():
        if node is not None and (_calls(node, targets) or _has_type(made, node, (module,))):
            return name
    return ""


def _calls(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    # A module's name could be the name of a method.
    return node.op in ("call_function", "call_method") and node.target in targets


def _is_addition(made: fx.GraphModule, norm: fx.Node, node: fx.Node | None) -> bool:
    """Say whether `norm` and another tensor are added, which can be done where `node` is."""
    if node is None or not _calls(node, ADDITIONS) or len(node.args) != 2:
        return False
    if set(node.kwargs) - {"inplace"} or not all(isinstance(a, fx.Node) for a in node.args):
        return False
    if node.args[0] is node.args[1] or (_writes(made, node) and node.args[0] is not norm):
        return False
    between = norm.next
    while between is not node:
        if _writes(made, between):
            return False
        between = between.next
    return True


def _has_type(made: fx.GraphModule, node: fx.Node, types: tuple[type, ...]) -> bool:
    # Hooks want to see what is between.
    if node.op != "call_module":
        return False
    module = made.get_submodule(str(node.target))
    hooks = (
        module._forward_hooks, module._forward_pre_hooks,
        module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return type(module) in types and not any(hooks)


def _writes(made: fx.GraphModule, node: fx.Node) -> bool:
    # In place: by a name with an underscore, an operator like +=, an argument.
    if node.op == "call_module":
        return bool(getattr(made.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op in ("call_function", "call_method") and (
        name.endswith("_") or name == "setitem" or getattr(operator, name, None) in IN_PLACE
    )
    return in_place or bool(node.kwargs.get("inplace") or node.kwargs.get("out"))
