# SPDX-License-Identifier: BSD-3-Clause
"""The layers of group and instance norm. May keep state. May not do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import binding
from fastbn.functional import (
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
)
from fastbn.functional.counted import Counted
from fastbn.layers.base import ChannelLayer, TrackingLayer, checked_size

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from fastbn._types import Activation, Gradients


@filled
class GroupNorm(ChannelLayer):
    """Group normalisation with parameters.

    As ``torch.nn.GroupNorm``, for NumPy arrays.

    Parameters
    ----------
    num_groups : int
        G, the number of groups; it divides `num_channels`.
    num_channels : int
        C, the number of channels; at least 1.
    {eps}
    {keep_affine: True}
    {instance_layout}
    {activation}
    {negative_slope}
    {dtype: parameters}

    Attributes
    ----------
    {weights: (C,)}
    {gradients: (C,)}
    {training}
        Evaluation gives the same `y`, but keeps nothing for `backward`.

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    Wu & He 2018, equations 1, 2 and 7.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> gn = fastbn.GroupNorm(2, 6, layout="NHWC")
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 4, 4, 6)).astype(np.float32)
    >>> y = gn(x)
    >>> bool(abs(y[0, ..., :3].mean()) < 1e-5), bool(abs(y[0, ..., :3].std() - 1) < 1e-4)
    (True, True)
    >>> dx = gn.backward(np.ones_like(y))
    >>> gn.bias_grad[:3]
    array([128., 128., 128.], dtype=float32)
    >>> gn.eval()
    GroupNorm(2, 6, eps=1e-05, layout='NHWC', training=False)
    """

    _defaults = (("affine", True), ("layout", None))

    def __init__(
        self,
        num_groups: SupportsIndex,
        num_channels: SupportsIndex,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        layout: str | None = None,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_groups = checked_size(num_groups, "num_groups")
        self.num_channels = checked_size(num_channels, "num_channels")
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_groups: expected a divisor of {num_channels} channels, got {num_groups}"
            )
        self.eps = binding.check_eps(eps)
        binding.check_layout(layout)
        binding.axis_of_instances(layout)
        self.layout = layout
        self.affine = binding.check_flag(affine, "affine")
        super().__init__(
            (self.num_channels,), dtype, activation, negative_slope, weight=self.affine,
            bias=self.affine
        )  # fmt: skip

    def _forward_counted(
        self, x: Any, residual: Any, out: Any, training: bool, counted: Counted
    ) -> Any:
        binding.check_channels(x, self.layout, self.num_channels)
        norm = group_norm_forward if training else group_norm
        return norm(
            x, self.num_groups, self.weight, self.bias, self.eps, layout=self.layout,
            activation=self.activation, negative_slope=self.negative_slope, residual=residual,
            out=out, **counted._asdict()
        )  # fmt: skip

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        mean, invstd, counted = statistics
        return group_norm_backward(
            dy, x, mean, invstd, self.num_groups, self.weight, bias=self.bias,
            layout=self.layout, activation=self.activation, negative_slope=self.negative_slope,
            residual=residual, out=out, **counted._asdict()
        )  # fmt: skip

    def _arguments(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}"


@filled
class InstanceNorm(TrackingLayer):
    """Instance normalisation, with parameters and running statistics on request.

    As ``torch.nn.InstanceNorm1d``, ``2d`` and ``3d`` in one, for NumPy arrays.

    Parameters
    ----------
    {num_features}
    {eps}
    {momentum}
    {keep_affine: False}
    track_running_stats : bool, default False
        Keep running statistics, and normalise with them in evaluation;
        otherwise evaluation, too, normalises with the statistics of the input.
    {instance_layout}
    {activation}
    {negative_slope}
    {dtype: parameters and running statistics}

    Attributes
    ----------
    {weights: (C,)}
    {tracked}
        PyTorch keeps it, but leaves it at 0.
    {gradients: (C,)}
    {training}

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky 2016, equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> norm = fastbn.InstanceNorm(3, affine=True)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 3, 4, 4)).astype(np.float32)
    >>> y = norm(x)
    >>> bool(abs(y[0, 0].mean()) < 1e-5), bool(abs(y[0, 0].std() - 1) < 1e-4)
    (True, True)
    >>> dx = norm.backward(np.ones_like(y))
    >>> norm.bias_grad
    array([128., 128., 128.], dtype=float32)
    >>> norm.eval()
    InstanceNorm(3, eps=1e-05, momentum=0.1, affine=True, training=False)
    """

    _defaults = (("affine", False), ("track_running_stats", False), ("layout", None))

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        layout: str | None = None,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout,
            activation=activation, negative_slope=negative_slope, dtype=dtype
        )  # fmt: skip
        binding.axis_of_instances(layout)
        # No None: it is the average over batches in BatchNorm, and 0 in PyTorch's InstanceNorm.
        self.momentum: float = binding.check_momentum(momentum)

    def _forward_counted(
        self, x: Any, residual: Any, out: Any, training: bool, counted: Counted
    ) -> Any:
        binding.check_channels(x, self.layout, self.num_features)
        norm = instance_norm_forward if training else instance_norm
        result = norm(
            x, weight=self.weight, bias=self.bias, running_mean=self.running_mean,
            running_var=self.running_var, use_input_stats=training or self.running_mean is None,
            momentum=self.momentum, eps=self.eps, layout=self.layout, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual, out=out, **counted._asdict()
        )  # fmt: skip
        if training:
            self._count(x, counted)
        return result

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        mean, invstd, counted = statistics
        return instance_norm_backward(
            dy, x, mean, invstd, self.weight, bias=self.bias, layout=self.layout,
            activation=self.activation, negative_slope=self.negative_slope, residual=residual,
            out=out, **counted._asdict()
        )  # fmt: skip
