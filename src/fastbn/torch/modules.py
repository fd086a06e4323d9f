# SPDX-License-Identifier: BSD-3-Clause
"""PyTorch's modules with another `forward`: same arguments, same state, same names.

Each is a subclass that keeps nothing of its own, so that `convert` can turn a module
into it, and back, by its class alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastbn.torch import functional
from fastbn.torch.functional import is_first_time


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(
        self,
        input: Tensor,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: Tensor | None = None,
    ) -> Tensor:
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats
        keeps = tracks or not self.training
        return functional.batch_norm(
            input,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            self._share_of_new() if tracks else 0.0,
            self.eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
        )

    def _share_of_new(self) -> float:
        # Counts the batch, unless a checkpoint only computes it again.
        if self.num_batches_tracked is not None:
            if is_first_time():
                self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm1d(8)
    >>> norm(torch.randn(4, 8, 10), activation="relu").shape
    torch.Size([4, 8, 10])
    """


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm2d(8)
    >>> norm(torch.randn(4, 8, 5, 5), activation="relu").shape
    torch.Size([4, 8, 5, 5])
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm3d(8)
    >>> norm(torch.randn(4, 8, 5, 5, 5), activation="relu").shape
    torch.Size([4, 8, 5, 5, 5])
    """


class LayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.LayerNorm(10)
    >>> norm(torch.randn(4, 10), activation="relu").shape
    torch.Size([4, 10])
    """

    def forward(
        self,
        input: Tensor,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised input."""
        return functional.layer_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
        )


class RMSNorm(nn.RMSNorm):
    """``torch.nn.RMSNorm``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.RMSNorm(10)
    >>> norm(torch.randn(4, 10), activation="relu").shape
    torch.Size([4, 10])
    """

    def forward(
        self,
        input: Tensor,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised input."""
        return functional.rms_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
        )


class GroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.GroupNorm(2, 8)
    >>> norm(torch.randn(4, 8, 5, 5), activation="relu").shape
    torch.Size([4, 8, 5, 5])
    """

    def forward(
        self,
        input: Tensor,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised input."""
        return functional.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=activation,
            negative_slope=negative_slope,
            residual=residual,
        )


class _InstanceNorm(nn.modules.instancenorm._InstanceNorm):
    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return functional.instance_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum if self.momentum is not None else 0.0,
            self.eps,
        )


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``: its arguments, its state, its errors.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.InstanceNorm1d(8)(torch.randn(4, 8, 10)).shape
    torch.Size([4, 8, 10])
    """


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``: its arguments, its state, its errors.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.InstanceNorm2d(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``: its arguments, its state, its errors.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.InstanceNorm3d(8)(torch.randn(4, 8, 5, 5, 5)).shape
    torch.Size([4, 8, 5, 5, 5])
    """
