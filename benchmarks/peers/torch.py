# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch: its functions, and for backward what autograd calls.

Batch norm has kernels that write to an existing tensor. The `out=` of the other norms
computes a new tensor and copies it, so it is left out: it was slower wherever tried.
Beside x of 16 bits the vectors stay float32, which its kernels take; rms_norm does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional

from benchmarks.cases import EPS, MOMENTUM, Arrays
from benchmarks.contenders import Contender, first, python_calls

Calls = dict[str, Callable[[], object]]
aten = torch.ops.aten


class Tensors:
    """The arrays as tensors in the same memory, channels second."""

    def __init__(self, a: Arrays):
        self.case = a.case
        self.x, self.dy, self.y = (self._tensor(v) for v in (a.x, a.dy, a.y))
        self.weight, self.bias, self.running_mean, self.running_var = (
            torch.from_numpy(v) for v in (a.weight, a.bias, a.running_mean, a.running_var)
        )

    def _tensor(self, stored: np.ndarray) -> torch.Tensor:
        if self.case.dtype == "bfloat16":
            t = torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        else:
            t = torch.from_numpy(stored)
        if self.case.layout != "NHWC":
            return t
        if t.ndim == 3:  # it has no channels_last for (N, C, L), but (N * L, C) is the same
            return t.reshape(-1, t.shape[-1])
        return t.movedim(-1, 1)

    def stored(self, tensor: torch.Tensor) -> np.ndarray:
        """Return a result as an array that is stored like x."""
        if self.case.layout == "NHWC" and tensor.ndim > 2:
            tensor = tensor.movedim(1, -1)
        if self.case.dtype == "bfloat16":
            tensor = tensor.view(torch.int16)
        return tensor.numpy().view(self.case.dtype).reshape(self.case.stored)


def batch(t: Tensors) -> Calls:
    training = t.case.op != "inference"
    running = t.running_mean, t.running_var
    _, mean, invstd = aten.native_batch_norm(
        t.x, t.weight, t.bias, *(v.clone() for v in running), training, MOMENTUM, EPS
    )
    if t.case.op != "backward":
        options = training, MOMENTUM, EPS
        given = t.x, t.weight, t.bias, *running, *options
        return {
            "PyTorch": lambda: functional.batch_norm(t.x, *running, t.weight, t.bias, *options),
            "PyTorch out=": lambda: aten.native_batch_norm.out(
                *given, out=t.y, save_mean=mean, save_invstd=invstd
            ),
        }
    given = t.dy, t.x, t.weight, *running, mean, invstd, True, EPS, [True] * 3
    dweight, dbias = torch.empty_like(t.weight), torch.empty_like(t.bias)
    return {
        "PyTorch": lambda: aten.native_batch_norm_backward(*given),
        "PyTorch out=": lambda: aten.native_batch_norm_backward.out(
            *given, out0=t.y, out1=dweight, out2=dbias
        ),
    }


def layer(t: Tensors) -> Calls:
    features = t.x.shape[1:]
    if t.case.op == "forward":
        return {"PyTorch": lambda: functional.layer_norm(t.x, features, t.weight, t.bias, EPS)}
    _, *saved = aten.native_layer_norm(t.x, features, t.weight, t.bias, EPS)
    given = t.dy, t.x, features, *saved, t.weight, t.bias, [True] * 3
    return {"PyTorch": lambda: aten.native_layer_norm_backward(*given)}


def rms(t: Tensors) -> Calls:
    features, weight = t.x.shape[1:], t.weight.to(t.x.dtype)
    if t.case.op == "forward":
        return {"PyTorch": lambda: functional.rms_norm(t.x, features, weight, EPS)}
    return {"PyTorch": _gradients(lambda x, w: functional.rms_norm(x, features, w, EPS), t, weight)}


def group(t: Tensors) -> Calls:
    """With as many groups as channels this is instance norm as well."""
    groups = t.case.groups
    sizes = *t.x.shape[:2], t.x[0, 0].numel(), groups
    _, *saved = aten.native_group_norm(t.x, t.weight, t.bias, *sizes, EPS)
    rest = *saved, t.weight, *sizes, [True] * 3

    def forward(x: torch.Tensor) -> torch.Tensor:
        return functional.group_norm(x, groups, t.weight, t.bias, EPS)

    def backward(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
        return aten.native_group_norm_backward(dy, x, *rest)[0]

    call, given = (forward, [t.x]) if t.case.op == "forward" else (backward, [t.x, t.dy])
    calls = {"PyTorch": lambda: call(*given)}
    if t.case.layout == "NHWC":  # often so slow that it pays to reorder
        calls["PyTorch through NCHW"] = lambda: t.y.copy_(call(*(v.contiguous() for v in given)))
    return calls


def instance(t: Tensors) -> Calls:
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.instance_norm(x, weight=weight, bias=bias, eps=EPS)

    as_groups = {name.replace("PyTorch", "PyTorch group_norm"): c for name, c in group(t).items()}
    if t.case.op == "forward":
        return {"PyTorch": lambda: forward(t.x, t.weight, t.bias)} | as_groups
    return {"PyTorch": _gradients(forward, t, t.weight, t.bias)} | as_groups


def _gradients(forward: Callable[..., torch.Tensor], t: Tensors, *vectors: torch.Tensor):
    """Return a call of autograd for what has no backward of its own."""
    given = [v.detach().requires_grad_() for v in (t.x, *vectors)]
    with torch.enable_grad():
        y = forward(*given)
    # contiguous: of one image, channels last, instance_norm's gradient is wrong in PyTorch 2.13.
    return lambda: torch.autograd.grad(y, given, t.dy.contiguous(), retain_graph=True)


NORMS = {"batch": batch, "layer": layer, "rms": rms, "group": group, "instance": instance}


def contenders(a: Arrays) -> Iterator[Contender]:
    torch.set_num_threads(a.case.threads)
    torch.set_grad_enabled(False)
    tensors = Tensors(a)
    for name, call in NORMS[a.case.norm](tensors).items():

        def result(name: str = name, call: Callable[[], object] = call) -> np.ndarray:
            return a.y if "out=" in name else tensors.stored(first(call()))

        yield Contender(name, "peer", python_calls(call), result)
