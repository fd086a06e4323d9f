# SPDX-License-Identifier: BSD-3-Clause
"""What a call is made of, and where its result lies in memory.

May not compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

#: The memory format, by the number of axes.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Call(NamedTuple):
    """Which norm, and its arguments that are not tensors."""

    norm: str
    #: `normalized_shape` of layer and rms; the number of groups of group; else nothing.
    sizes: tuple[int, ...] = ()
    training: bool = True
    momentum: float = 0.1
    eps: float | None = 1e-5
    activation: str | None = None
    negative_slope: float = 0.01


class Tensors(NamedTuple):
    """The tensors of a call. Running statistics are those that are used or updated."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    #: Of bool, with the axes of x but that of the channels; None: all counts.
    mask: Tensor | None = None


def empty_output(norm: str, x: Tensor) -> Tensor:
    """Return memory for `y` or `dx`, in the order in which PyTorch's own norms return it."""
    if x.is_contiguous():
        keep = norm in ("group", "rms")  # the strides of axes of length 1
        return torch.empty_like(
            x, memory_format=torch.preserve_format if keep else torch.contiguous_format
        )
    if norm == "batch" and x.ndim in CHANNELS_LAST:
        # Sizes of 1 can leave the order open: batch norm, and it alone, takes this one then.
        order = CHANNELS_LAST[x.ndim]
        if x.is_contiguous(memory_format=order):
            return torch.empty_like(x, memory_format=order)
    if norm in ("layer", "instance"):
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=suggest_memory_format(x))


def statistics_shape(norm: str, x: Tensor, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of mean and invstd as one tensor; rms has no mean."""
    if norm == "batch":
        return 2, x.shape[1]
    if norm == "group":
        return 2, x.shape[0], sizes[0]
    if norm == "instance":
        return 2, x.shape[0], x.shape[1]
    return 1 if norm == "rms" else 2, *x.shape[: x.ndim - len(sizes)]
