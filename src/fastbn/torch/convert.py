# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's norms on fastbn's kernels in one model, and back.

A module keeps its class and all else: only its forward function is another one (`_forward.py`).
In a graph (compiled, exported, traced, transformed) it is the class's own again.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from typing import Any, TypeVar

from torch import nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fastbn.torch import _direct, modules
from fastbn.torch._forward import Forward, function_of, is_replaceable
from fastbn.torch.fuse import fuse as fuse_
from fastbn.torch.fuse import unfuse

Model = TypeVar("Model", bound=nn.Module)

_log = logging.getLogger("fastbn.torch")

NORMS = _NormBase, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm
#: By the class of fastbn: PyTorch's.
BACK = {
    getattr(modules, name): getattr(nn, name)
    for name in [
        "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "LayerNorm", "RMSNorm", "GroupNorm",
        "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
    ]
}  # fmt: skip


class _Converted(Forward):
    """The forward function of a norm, by fastbn's kernels where they can."""

    __slots__ = ()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and not is_compiling() and _direct.are_plain(args):
            return modules.KINDS[type(self.module).forward](self.module, args[0])
        return super().run(*args, **kwargs)


def convert(model: Model, *, fuse: bool = False) -> Model:
    """Let the norms of `model` run on fastbn's kernels, in place.

    Parameters
    ----------
    model : Module
        Changed in place: each batch, layer, RMS, group and instance norm in it, or itself, gets
        another forward function, and nothing else. It keeps its class, parameters, hooks and
        mode.
    fuse : bool, default False
        Also `fuse` it: ``convert(model, fuse=True)`` is ``fuse(convert(model))``.

    Returns
    -------
    Module
        `model`.

    Warns
    -----
    UserWarning
        Of norms that were left as they are: subclasses of PyTorch's norms with a forward
        function of their own, lazy modules that have not seen a batch, and other modules
        that their class's name calls a norm. How many were converted, the logger
        ``fastbn.torch`` says (level INFO).

    Notes
    -----
    ``torch.compile``, ``torch.export``, ``torch.jit``, ``torch.fx`` and ``torch.func`` see
    PyTorch's norm, so what they make of the model needs no fastbn.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    >>> y = fastbn.torch.convert(model)(torch.randn(4, 3, 9, 9))
    >>> y.grad_fn.name(), type(model[1]).__name__
    ('NormaliseBackward', 'BatchNorm2d')
    """
    converted, left = 0, Counter[str]()
    for module in model.modules():
        if _is_convertible(module):
            _Converted(module).put()
            converted += 1
        elif _is_left(module):
            left[_name(type(module))] += 1
    _log.info("convert: %d norms converted, %d left", converted, left.total())
    if left:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(left.items()))
        warnings.warn(
            f"convert: {converted} norms converted; left as they are: {names}", stacklevel=2
        )
    return fuse_(model) if fuse else model


def restore(model: Model) -> Model:
    """Undo `convert`, and `fuse`, in place.

    Parameters
    ----------
    model : Module
        What `convert` returned, or a copy of it, or a module that wraps it. Training and
        loading since then are kept. Modules of fastbn's own classes become PyTorch's.

    Returns
    -------
    Module
        `model`.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> model = fastbn.torch.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(8)))
    >>> y = fastbn.torch.restore(model)(torch.randn(4, 8, 9, 9))
    >>> y.grad_fn.name()
    'NativeBatchNormBackward0'
    """
    for module in unfuse(model).modules():
        _Converted.remove(module)
        if type(module) in BACK:
            object.__setattr__(module, "__class__", BACK[type(module)])
    return model


def _is_convertible(module: nn.Module) -> bool:
    return (
        isinstance(module, NORMS)
        and not isinstance(module, tuple(BACK))
        and is_replaceable(module)
        and function_of(module) in modules.KINDS
        and not _is_lazy(module)
    )


def _is_lazy(module: nn.Module) -> bool:
    tensors = *module._parameters.values(), *module._buffers.values()
    return any(is_lazy(t) for t in tensors if t is not None)


def _is_left(module: nn.Module) -> bool:
    kind = type(module)
    if isinstance(module, tuple(BACK)) or _Converted.of(module) is not None:
        return False
    if isinstance(module, NORMS):
        return True
    named = "norm" in kind.__name__.lower() and next(module.children(), None) is None
    return named and not kind.__module__.startswith("torch.nn.modules")


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
