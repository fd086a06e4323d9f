# SPDX-License-Identifier: BSD-3-Clause
"""``torch.nn.SyncBatchNorm`` on the CPU: module, conversion.

The arithmetic is that of the NumPy binding, on the memory of the tensors; bfloat16, which
NumPy has no type for, in float32, and rounded at the end.

May: describe, check, keep state. May not: compute with elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fastbn._numpy import INPUT, MOVED, WITH_STATISTICS, binding
from fastbn.sync._exchange import BACKWARD, FORWARD, Exchange, together
from fastbn.sync._groups import Group, as_group
from fastbn.torch import functional

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _array(tensor: Tensor | None) -> Any:
    # The tensor's memory, but of bfloat16.
    if tensor is None:
        return None
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _kept(tensor: Tensor | None) -> Any:
    # Running statistics: half precision in float32.
    if tensor is None:
        return None
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()


def _like(array: np.ndarray, tensor: Tensor) -> Tensor:
    return torch.from_numpy(array).to(tensor.dtype)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        exchange: Exchange,
    ) -> Tensor:
        mean, var = kept = [_kept(tensor) for tensor in running]
        torch.get_num_threads()  # makes OpenMP's number, one for each Python thread, PyTorch's
        y, *ctx.statistics = binding.batch_forward(
            _array(x), _array(weight), _array(bias), mean, var, None, None, True, momentum, eps,
            None, None, 0.0, WITH_STATISTICS, None, None, None, MOVED, exchange
        )  # fmt: skip
        for tensor, array in zip(running, kept, strict=True):
            if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
                tensor.copy_(torch.from_numpy(array))
        ctx.group, ctx.has_bias = exchange.group, bias is not None
        ctx.save_for_backward(x, weight)
        return _like(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return together(ctx.group, BACKWARD, lambda exchange: _gradients(ctx, dy, exchange))


def _gradients(ctx: Any, dy: Tensor, exchange: Exchange) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    mean, invstd = ctx.statistics
    torch.get_num_threads()
    dx, dweight, dbias = binding.batch_backward(
        _array(dy), _array(x), mean, invstd, _array(weight), None, None, None, True, None,
        None, 0.0, INPUT, None, None, MOVED, exchange
    )  # fmt: skip
    return (
        _like(dx, x),
        None if weight is None else _like(dweight, weight),
        None if weight is None or not ctx.has_bias else _like(dbias, weight),
        *[None] * 4,
    )


class SyncBatchNorm(_BatchNorm):
    """``torch.nn.SyncBatchNorm`` for tensors on the CPU: its arguments, its state.

    It is no subclass of it, since ``DistributedDataParallel`` refuses those on the CPU.

    Parameters
    ----------
    num_features : int
        C, of an input of shape (N, C, ...).
    eps : float, default 1e-5
        Added to the variance, inside the root.
    momentum : float or None, default 0.1
        The share of the new value in the running statistics; ``None``: their plain average.
    affine, track_running_stats : bool, default True
        Have weight and bias; keep running statistics.
    process_group : ProcessGroup, optional
        The processes whose batches are one batch. ``None``: the default group, or, where
        ``torch.distributed`` is not initialised, this process alone.
    device, dtype : optional
        Of parameters and running statistics.
    bias : bool, default True
        Have a bias, where `affine`.

    Notes
    -----
    Synchronised is what is in training mode; anything else is batch norm. The gradients of
    weight and bias are this rank's own share, as ``DistributedDataParallel`` expects them.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.SyncBatchNorm(8)
    >>> norm(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        # Older PyTorch has no such argument.
        options = {} if bias else {"bias": False}
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, **options
        )
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.size(1) == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input."""
        group = self._group()
        if group is None:
            self._check_input_dim(input)
            return self._alone(input)
        return together(group, FORWARD, lambda exchange: self._in_group(input, exchange))

    def _group(self) -> Group | None:
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group = as_group(self.process_group or distributed.group.WORLD)
        return group if group.size > 1 else None

    def _alone(self, input: Tensor) -> Tensor:
        tracks = self.training and self.track_running_stats
        keeps = tracks or not self.training
        y = functional.batch_norm(
            input,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            self._share_of_new() if tracks else 0.0,
            self.eps,
        )
        self._count(tracks)
        return y

    def _in_group(self, input: Tensor, exchange: Exchange) -> Tensor:
        self._check_input_dim(input)
        if input.device.type != "cpu" or input.dtype not in DTYPES:
            raise TypeError(
                "input: expected a tensor of float32, float64, float16 or bfloat16 on the CPU, "
                f"got {input.dtype} on {input.device}"
            )
        if input.size(1) != self.num_features:
            raise ValueError(
                f"input: expected {self.num_features} channels, got shape {tuple(input.shape)}"
            )
        # What a checkpoint computes again has been counted.
        tracks = self.track_running_stats and functional.is_first_time()
        running = (self.running_mean, self.running_var) if tracks else (None, None)
        share = self._share_of_new() if tracks else 0.0
        y = _Normalise.apply(input, self.weight, self.bias, running, share, self.eps, exchange)
        self._count(tracks)
        return y

    def _share_of_new(self) -> float:
        # As PyTorch has it after counting the batch; here it is counted when all is done.
        if self.momentum is not None:
            return self.momentum
        batches = self.num_batches_tracked
        return 0.0 if batches is None else 1.0 / (int(batches) + 1)

    def _count(self, tracks: bool) -> None:
        if tracks and self.num_batches_tracked is not None and functional.is_first_time():
            self.num_batches_tracked.add_(1)

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Any | None = None
    ) -> nn.Module:
        """Turn the batch norms of a model into synchronised ones.

        Parameters
        ----------
        module : Module
            Changed in place, but where it is a batch norm itself.
        process_group : ProcessGroup, optional
            As for the class.

        Returns
        -------
        Module
            `module`, or the layer that takes its place. Parameters, running statistics and
            modes are those of the layers that were there.

        Examples
        --------
        >>> import torch, fastbn.torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = fastbn.torch.SyncBatchNorm.convert_sync_batchnorm(model)
        >>> type(model[1]).__name__
        'SyncBatchNorm'
        """
        result = module
        if isinstance(module, _BatchNorm):
            result = cls(
                module.num_features, module.eps, module.momentum, module.affine,
                module.track_running_stats, process_group
            )  # fmt: skip
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                setattr(result, name, getattr(module, name))
            result.training = module.training
            if hasattr(module, "qconfig"):
                result.qconfig = module.qconfig
        for name, child in module.named_children():
            result.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return result
