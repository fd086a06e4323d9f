# SPDX-License-Identifier: BSD-3-Clause
"""How a module of PyTorch's normalises by fastbn's functions; and classes that do.

What a class's `forward` does, with an activation and a residual beside, is one function for
each kind of norm, which takes the module: one of PyTorch's (`convert`, `fuse`), or one of the
classes here. Those are subclasses that keep nothing of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fastbn.torch import _formulas, functional
from fastbn.torch._call import Call
from fastbn.torch.functional import is_first_time


def batch(
    module: _BatchNorm,
    x: Tensor,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Do what the `forward` of batch norm does."""
    module._check_input_dim(x)
    tracks = module.training and module.track_running_stats
    keeps = tracks or not module.training
    return functional.batch_norm(
        x,
        module.running_mean if keeps else None,
        module.running_var if keeps else None,
        module.weight,
        module.bias,
        module.training or (module.running_mean is None and module.running_var is None),
        _share_of_new(module) if tracks else 0.0,
        module.eps,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
    )


def _share_of_new(module: _BatchNorm) -> float:
    # Counts the batch, unless a checkpoint only computes it again.
    if module.num_batches_tracked is not None:
        if is_first_time():
            module.num_batches_tracked.add_(1)
        if module.momentum is None:
            return 1.0 / float(module.num_batches_tracked)
    return 0.0 if module.momentum is None else module.momentum


def layer(
    module: nn.LayerNorm,
    x: Tensor,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Do what the `forward` of layer norm does."""
    return functional.layer_norm(
        x,
        module.normalized_shape,
        module.weight,
        module.bias,
        module.eps,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
    )


def rms(
    module: nn.RMSNorm,
    x: Tensor,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Do what the `forward` of RMS norm does."""
    return functional.rms_norm(
        x,
        module.normalized_shape,
        module.weight,
        module.eps,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
    )


def group(
    module: nn.GroupNorm,
    x: Tensor,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Do what the `forward` of group norm does."""
    return functional.group_norm(
        x,
        module.num_groups,
        module.weight,
        module.bias,
        module.eps,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual,
    )


def instance(
    module: _InstanceNorm,
    x: Tensor,
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """Do what the `forward` of instance norm does."""
    module._check_input_dim(x)
    unbatched = x.dim() == module._get_no_batch_dim()
    if x.size(x.dim() - module._get_no_batch_dim()) != module.num_features:
        y = _InstanceNorm.forward(module, x)  # PyTorch's error, or its warning
        call = Call("instance", activation=activation, negative_slope=negative_slope)
        return _formulas.ended(call, residual, y)
    y = functional.instance_norm(
        x.unsqueeze(0) if unbatched else x,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        module.momentum if module.momentum is not None else 0.0,
        module.eps,
        activation=activation,
        negative_slope=negative_slope,
        residual=residual.unsqueeze(0) if unbatched and residual is not None else residual,
    )
    return y.squeeze(0) if unbatched else y


#: By the forward function of a class: what does the same.
KINDS: dict[object, Callable[..., Tensor]] = {
    _BatchNorm.forward: batch,
    nn.LayerNorm.forward: layer,
    nn.RMSNorm.forward: rms,
    nn.GroupNorm.forward: group,
    _InstanceNorm.forward: instance,
}


class _Fusing:
    # PyTorch's constructor, state and errors; a call can be told what comes after.
    _normalise: Callable[..., Tensor]

    def forward(
        self,
        input: Tensor,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the normalised input, with the residual and the activation."""
        return self._normalise(input, activation, negative_slope, residual)


class BatchNorm1d(_Fusing, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm1d(8)
    >>> norm(torch.randn(4, 8, 10), activation="relu").shape
    torch.Size([4, 8, 10])
    """

    _normalise = batch


class BatchNorm2d(_Fusing, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm2d(8)
    >>> norm(torch.randn(4, 8, 5, 5), activation="relu").shape
    torch.Size([4, 8, 5, 5])
    """

    _normalise = batch


class BatchNorm3d(_Fusing, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.BatchNorm3d(8)
    >>> norm(torch.randn(4, 8, 5, 5, 5), activation="relu").shape
    torch.Size([4, 8, 5, 5, 5])
    """

    _normalise = batch


class LayerNorm(_Fusing, nn.LayerNorm):
    """``torch.nn.LayerNorm``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.LayerNorm(10)
    >>> norm(torch.randn(4, 10), activation="relu").shape
    torch.Size([4, 10])
    """

    _normalise = layer


class RMSNorm(_Fusing, nn.RMSNorm):
    """``torch.nn.RMSNorm``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.RMSNorm(10)
    >>> norm(torch.randn(4, 10), activation="relu").shape
    torch.Size([4, 10])
    """

    _normalise = rms


class GroupNorm(_Fusing, nn.GroupNorm):
    """``torch.nn.GroupNorm``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> norm = fastbn.torch.GroupNorm(2, 8)
    >>> norm(torch.randn(4, 8, 5, 5), activation="relu").shape
    torch.Size([4, 8, 5, 5])
    """

    _normalise = group


class InstanceNorm1d(_Fusing, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.InstanceNorm1d(8)(torch.randn(4, 8, 10)).shape
    torch.Size([4, 8, 10])
    """

    _normalise = instance


class InstanceNorm2d(_Fusing, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.InstanceNorm2d(8)(torch.randn(4, 8, 5, 5)).shape
    torch.Size([4, 8, 5, 5])
    """

    _normalise = instance


class InstanceNorm3d(_Fusing, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d``: its arguments, its state, its errors.

    Calls take `activation`, `negative_slope` and `residual` as the function does.

    Examples
    --------
    >>> import torch, fastbn.torch
    >>> fastbn.torch.InstanceNorm3d(8)(torch.randn(4, 8, 5, 5, 5)).shape
    torch.Size([4, 8, 5, 5, 5])
    """

    _normalise = instance


def _own(module: _Fusing, *given: object) -> Tensor:
    return module._normalise(*given)


KINDS[_Fusing.forward] = _own
