# SPDX-License-Identifier: BSD-3-Clause
"""Switches fastbn's kernels on and off in PyTorch's dispatcher.

May: look functions up, count. May not compute, or touch the dispatcher before `enable`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import library as registry

from fastbn.torch import _dispatcher

_TENSORS = "Tensor input, Tensor? weight, Tensor? bias, "
_KEPT = "Tensor(a!) running_mean, Tensor(b!) running_var, "
_SIZES = "SymInt N, SymInt C, SymInt HxW, int group"
_THREE = "(Tensor, Tensor, Tensor)"
_BACKWARD = (
    "Tensor? running_mean, Tensor? running_var, Tensor? save_mean, "
    "Tensor? {}, bool {}, float eps, bool[3] output_mask"
)

#: What the kernels know of each operator. One that PyTorch declares otherwise is left alone.
_SCHEMAS = {
    "native_batch_norm": f"({_TENSORS}Tensor? running_mean, Tensor? running_var, "
    f"bool training, float momentum, float eps) -> {_THREE}",
    "_native_batch_norm_legit": f"({_TENSORS}{_KEPT}"
    f"bool training, float momentum, float eps) -> {_THREE}",
    "_native_batch_norm_legit.no_stats": f"({_TENSORS}"
    f"bool training, float momentum, float eps) -> {_THREE}",
    "_batch_norm_with_update": f"({_TENSORS}{_KEPT}"
    "float momentum, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    "native_batch_norm_backward": "(Tensor grad_out, Tensor input, Tensor? weight, "
    f"{_BACKWARD.format('save_invstd', 'train')}) -> {_THREE}",
    "batch_norm_backward": "(Tensor grad_out, Tensor input, Tensor weight, "
    f"{_BACKWARD.format('save_var', 'update')}, Tensor reserve) -> {_THREE}",
    "native_layer_norm": "(Tensor input, SymInt[] normalized_shape, Tensor? weight, "
    f"Tensor? bias, float eps) -> {_THREE}",
    "native_layer_norm_backward": "(Tensor grad_out, Tensor input, SymInt[] normalized_shape, "
    "Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    f"bool[3] output_mask) -> {_THREE}",
    "native_group_norm": f"({_TENSORS}{_SIZES}, float eps) -> {_THREE}",
    "native_group_norm_backward": "(Tensor grad_out, Tensor input, Tensor mean, Tensor rstd, "
    f"Tensor? weight, {_SIZES}, bool[3] output_mask) -> {_THREE}",
}

#: Errors of PyTorch's kernels, and the C++ classes that become them; the first is the rest.
_ERRORS = (
    (RuntimeError, "N3c105ErrorE", "_ZN3c105ErrorC1E"),
    (NotImplementedError, "N3c1019NotImplementedErrorE", "_ZN3c1019NotImplementedErrorC1E"),
    (IndexError, "N3c1010IndexErrorE", "_ZN3c1010IndexErrorC1E"),
    (ValueError, "N3c1010ValueErrorE", "_ZN3c1010ValueErrorC1E"),
    (TypeError, "N3c109TypeErrorE", "_ZN3c109TypeErrorC1E"),
)
_ARGUMENTS = "NS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"

_lock = threading.RLock()
_local = threading.local()
_calls = 0  # of enable, less those of disable
_blocks = 0  # of `enabled`
_names: tuple[str, ...] = ()  # operators that the kernels know
_on = False
_kept: list[Any] = []  # libraries and kernels, for the life of the process


def enable() -> None:
    """Let PyTorch's norms on the CPU run fastbn's kernels.

    It acts on the whole process, on every thread, and is counted: as many calls of
    `disable` undo it. A graph whose forward ran before may run backward after, and
    the other way round. The first call of a process should come before other threads
    compute norms: PyTorch's table of kernels, which it changes, has no lock for readers.

    Raises
    ------
    RuntimeError
        If this version of PyTorch lacks a function that the kernels need, or declares none
        of the operators as they know them.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.enable()
    >>> fastbn.torch.is_enabled()
    True
    >>> torch.nn.BatchNorm2d(3)(torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    >>> fastbn.torch.disable()
    """
    _change(calls=1)


def disable() -> None:
    """Undo one `enable`; without one, nothing.

    PyTorch's own kernels compute then, to the bit as before the first `enable`; a call of
    theirs takes some microseconds more, since fastbn's kernels pass it on.

    Examples
    --------
    >>> import fastbn.torch
    >>> fastbn.torch.disable()
    >>> fastbn.torch.is_enabled()
    False
    """
    _change(calls=-1)


def is_enabled() -> bool:
    """Say whether PyTorch's norms on the CPU run fastbn's kernels.

    Returns
    -------
    bool

    Examples
    --------
    >>> import fastbn.torch
    >>> fastbn.torch.is_enabled()
    False
    """
    return _on


@contextmanager
def enabled() -> Iterator[None]:
    """Enable fastbn's kernels in a block, and restore the state found on entry.

    Raises
    ------
    RuntimeError
        As `enable`.

    Notes
    -----
    Blocks nest, and those of other threads go on when one ends.

    Examples
    --------
    >>> import fastbn.torch
    >>> with fastbn.torch.enabled():
    ...     fastbn.torch.is_enabled()
    True
    >>> fastbn.torch.is_enabled()
    False
    """
    before = _balance()
    _change(blocks=1)
    try:
        yield
    finally:
        _change(calls=before - _balance(), blocks=-1)


def operators() -> tuple[str, ...]:
    """Return the names of the operators whose kernels are fastbn's now."""
    return _names if _on else ()


def _balance() -> int:
    # What this thread has called: another thread's calls are not undone by a block here.
    return getattr(_local, "balance", 0)


def _change(calls: int = 0, blocks: int = 0) -> None:
    global _calls, _blocks, _on
    with _lock:
        wanted = max(0, _calls + calls)
        on = wanted > 0 or _blocks + blocks > 0
        if on and not _kept:
            _prepare()
        _dispatcher.switch(on)
        _local.balance = _balance() + wanted - _calls
        _calls, _blocks, _on = wanted, _blocks + blocks, on


def _prepare() -> None:
    global _names
    _look_up()
    own = registry.Library("fastbn_pytorch", "FRAGMENT")
    kinds = tuple(kind for kind, _, _ in _ERRORS)
    names = []
    for name, schema in _SCHEMAS.items():
        operator, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, operator, None)
        found = getattr(packet, overload or "default", None)
        if found is None or str(found._schema) != f"aten::{name}{schema}":
            continue
        kernel = registry.get_kernel(f"aten::{name}", "CPU")
        alias = name.replace(".", "_")
        own.define(f"{alias}{schema}")
        blank = (torch.empty(0),) * _dispatcher.TABLE[name]
        own.impl(alias, _dispatcher.OwnKernel(kernel, kinds, blank), "CPU", with_keyset=True)
        names.append(name)
    if not names:
        raise RuntimeError(
            f"fastbn.torch.enable: PyTorch {torch.__version__} declares each of "
            f"{', '.join(_SCHEMAS)} otherwise than fastbn knows it"
        )
    _swallow_warning(names[0])
    _dispatcher.register(names)
    _names = tuple(names)
    _kept.append(own)


def _swallow_warning(name: str) -> None:
    # PyTorch warns once in a process that a kernel is overridden, as is wanted here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        aten = registry.Library("aten", "IMPL")
        aten.impl(name, lambda *arguments: None, "CPU")
        aten._destroy()


def _library(name: str) -> ctypes.CDLL:
    pattern = {"win32": f"{name}.dll", "darwin": f"lib{name}.dylib"}.get(
        sys.platform, f"lib{name}.so"
    )
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / pattern))


def _address(library: ctypes.CDLL | None, name: str) -> int:
    # 0: there is none.
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
    except AttributeError:
        return 0


def _look_up() -> None:
    cpu = _library("torch_cpu")
    needed = (*_dispatcher.NAMES, *_dispatcher.CONSTANTS, "aoti_torch_check")
    missing = [name for name in needed if not _address(cpu, name)]
    if missing:
        raise RuntimeError(
            f"fastbn.torch.enable: PyTorch {torch.__version__} lacks {', '.join(missing)}; "
            "expected PyTorch 2.10 or later"
        )
    throwers, allocators = [(0, 0)] * len(_ERRORS), (0, 0)
    if sys.platform == "linux":
        c10 = _library("c10")
        throwers = [
            (_address(c10, f"{constructor}{_ARGUMENTS}"), _address(c10, f"_ZTI{mangled}"))
            for _, mangled, constructor in _ERRORS
        ]
        allocators = (_address(c10, "__cxa_allocate_exception"), _address(c10, "__cxa_throw"))
    _dispatcher.look_up(
        [_address(cpu, name) for name in _dispatcher.NAMES],
        [_address(cpu, name) for name in _dispatcher.CONSTANTS],
        _address(cpu, "torch_delete_stable_ivalue"),
        throwers,
        (*allocators, _address(cpu, "aoti_torch_check")),
    )
