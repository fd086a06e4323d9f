# SPDX-License-Identifier: BSD-3-Clause
"""Another forward function for one module, which keeps its class and all else.

The function lies in the module's own dictionary, under the name `forward`, where
`torch.nn.Module.__call__` finds it before the one of the class. It is a method of a `Forward`,
which knows the module, and so is copied and pickled with it. To whoever looks at it (at its
source, as `torch.jit.script` does, at its signature) it is the class's.

May not: compute, or touch anything of a module but that entry.
"""

from __future__ import annotations

import functools
from types import FunctionType, MethodType
from typing import Any, Self

from torch import nn


class Forward:
    """What stands for the forward function of a module; `run` of a subclass is what it does."""

    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do what the module's class does."""
        return type(self.module).forward(self.module, *args, **kwargs)

    @property
    def forward(self) -> MethodType:
        """What is put into the module; by this name a copy of it is unpickled."""
        return MethodType(_like(type(self.module).forward, type(self).run), self)

    def put(self) -> None:
        """Let the module call it."""
        # Not by setattr: a wrapper may send that to another module.
        self.module.__dict__["forward"] = self.forward

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """Return the one that the module has, if it is of this class."""
        found = getattr(module.__dict__.get("forward"), "__self__", None)
        return found if isinstance(found, cls) else None

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        """Let the module call its class's function again, if it calls one of this class."""
        if cls.of(module) is not None:
            del module.__dict__["forward"]


def is_replaceable(module: nn.Module) -> bool:
    """Say whether the module calls its class's function, and that function is written in Python."""
    return "forward" not in module.__dict__ and isinstance(function_of(module), FunctionType)


def function_of(module: nn.Module) -> Any:
    """Return the forward function of the class; None if it has none (`torch.jit`)."""
    return getattr(type(module), "forward", None)


def _like(original: Any, run: Any) -> FunctionType:
    def forward(self: Forward, *args: Any, **kwargs: Any) -> Any:
        return run(self, *args, **kwargs)

    # With the globals of the original, in which TorchScript looks up the names of its source.
    made = FunctionType(
        forward.__code__, original.__globals__, "forward", None, forward.__closure__
    )
    functools.update_wrapper(made, original)
    made.__name__ = "forward"  # by which a copy is unpickled
    return made
