# SPDX-License-Identifier: BSD-3-Clause
"""The layers of group and instance norm. May keep state. May not do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from fastbn import _view
from fastbn.functional import (
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
)
from fastbn.layers.base import Layer, TrackingLayer, checked_size

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from fastbn._types import Activation, Floating, Gradients


class GroupNorm(Layer):
    """Group normalisation with parameters.

    As ``torch.nn.GroupNorm``, for NumPy arrays.

    Parameters
    ----------
    num_groups : int
        G, the number of groups; it divides `num_channels`.
    num_channels : int
        C, the number of channels; at least 1.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    affine : bool, default True
        Keep `weight` and `bias`; otherwise both are ``None``.
    layout : str, optional
        As for `group_norm`.
    activation : {"relu", "relu6", "leaky_relu", "silu"}, optional
        What `y` goes through, in the same pass.
    negative_slope : float, default 0.01
        Of the leaky ReLU, below 0.
    dtype : dtype, default float32
        Of parameters: float32 or float64. The input may be either, float16 or
        bfloat16; `y` has the dtype of `x`.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,), or None
    weight_grad, bias_grad : ndarray of shape (C,), or None
        Set by `backward`.
    training : bool
        Set by `train` and `eval`. Evaluation gives the same `y`, but keeps
        nothing for `backward`.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of a wrong type.

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
        self.eps = _view.check_eps(eps)
        _view.check_layout(layout)
        self.layout = layout
        self.affine = _view.check_flag(affine, "affine")
        super().__init__(
            (self.num_channels,),
            dtype,
            activation,
            negative_slope,
            weight=self.affine,
            bias=self.affine,
        )

    def __call__(
        self,
        x: NDArray[Floating],
        out: NDArray[Floating] | None = None,
        *,
        residual: NDArray[Floating] | None = None,
    ) -> NDArray[Floating]:
        """Normalise `x`.

        Parameters
        ----------
        x : ndarray of float16, bfloat16, float32 or float64
            With `num_channels` channels. In training a reference to it is kept
            for `backward`, until the next call or `eval`.
        out : ndarray of the shape and dtype of `x`, optional
            Where to write `y`; `x` itself is allowed, but rules out `backward`.
        residual : ndarray of the shape and dtype of `x`, optional
            Added before the activation. In training it is kept as `x` is.

        Returns
        -------
        y : ndarray
            `out`, or a new array of the shape, dtype and memory order of `x`.

        Raises
        ------
        ValueError, TypeError
            As `group_norm`; and for another number of channels.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> gn = fastbn.GroupNorm(2, 4)
        >>> gn(np.array([[1.0, 3.0, 10.0, 30.0]])).round(3)
        array([[-1.,  1., -1.,  1.]])
        """
        _view.check_channels(x, self.layout, self.num_channels)
        if not self.training:
            self._forget()
            return group_norm(
                x,
                self.num_groups,
                self.weight,
                self.bias,
                self.eps,
                layout=self.layout,
                activation=self.activation,
                negative_slope=self.negative_slope,
                residual=residual,
                out=out,
            )
        y, mean, invstd = group_norm_forward(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            layout=self.layout,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            out=out,
        )
        self._keep(x, residual, out, mean, invstd)
        return y

    def _gradients(
        self, dy: NDArray[Floating], saved: tuple, out: NDArray[Floating] | None
    ) -> Gradients[Floating]:
        x, residual, mean, invstd = saved
        return group_norm_backward(
            dy,
            x,
            mean,
            invstd,
            self.num_groups,
            self.weight,
            bias=self.bias,
            layout=self.layout,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            out=out,
        )

    def __repr__(self) -> str:
        return self._described(
            f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}", affine=True, layout=None
        )


class InstanceNorm(TrackingLayer):
    """Instance normalisation, with parameters and running statistics on request.

    As ``torch.nn.InstanceNorm1d``, ``2d`` and ``3d`` in one, for NumPy arrays.

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    momentum : float, default 0.1
        The share of the new value in a running statistic.
    affine : bool, default False
        Keep `weight` and `bias`; otherwise both are ``None``.
    track_running_stats : bool, default False
        Keep running statistics, and normalise with them in evaluation;
        otherwise evaluation, too, normalises with the statistics of the input.
    layout : str, optional
        As for `group_norm`.
    activation : {"relu", "relu6", "leaky_relu", "silu"}, optional
        What `y` goes through, in the same pass.
    negative_slope : float, default 0.01
        Of the leaky ReLU, below 0.
    dtype : dtype, default float32
        Of parameters and running statistics: float32 or float64. The input may
        be either, float16 or bfloat16; `y` has the dtype of `x`.

    Attributes
    ----------
    weight, bias : ndarray of shape (C,), or None
    running_mean, running_var : ndarray of shape (C,), or None
    num_batches_tracked : int or None
        How many batches the running statistics have seen. PyTorch keeps it, but
        leaves it at 0.
    weight_grad, bias_grad : ndarray of shape (C,), or None
        Set by `backward`.
    training : bool
        Set by `train` and `eval`.

    Raises
    ------
    ValueError, TypeError
        For arguments out of range or of a wrong type.

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
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            layout,
            dtype,
            activation,
            negative_slope,
        )
        # No None: it is the average over batches in BatchNorm, and 0 in PyTorch's InstanceNorm.
        self.momentum: float = _view.check_momentum(momentum)

    def __call__(
        self,
        x: NDArray[Floating],
        out: NDArray[Floating] | None = None,
        *,
        residual: NDArray[Floating] | None = None,
    ) -> NDArray[Floating]:
        """Normalise `x`.

        Parameters
        ----------
        x : ndarray of float16, bfloat16, float32 or float64
            With `num_features` channels. In training a reference to it is kept
            for `backward`, until the next call or `eval`.
        out : ndarray of the shape and dtype of `x`, optional
            Where to write `y`; `x` itself is allowed, but rules out `backward`.
        residual : ndarray of the shape and dtype of `x`, optional
            Added before the activation. In training it is kept as `x` is.

        Returns
        -------
        y : ndarray
            `out`, or a new array of the shape, dtype and memory order of `x`.

        Raises
        ------
        ValueError, TypeError
            As `instance_norm`; and for another number of channels.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> norm = fastbn.InstanceNorm(2)
        >>> norm(np.array([[[1.0, 3.0], [10.0, 30.0]]])).round(3)
        array([[[-1.,  1.],
                [-1.,  1.]]])
        """
        _view.check_channels(x, self.layout, self.num_features)
        if not self.training:
            self._forget()
            return instance_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.running_mean is None,
                eps=self.eps,
                layout=self.layout,
                activation=self.activation,
                negative_slope=self.negative_slope,
                residual=residual,
                out=out,
            )
        y, mean, invstd = instance_norm_forward(
            x,
            self.weight,
            self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            momentum=self.momentum,
            eps=self.eps,
            layout=self.layout,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            out=out,
        )
        self._count(x)
        self._keep(x, residual, out, mean, invstd)
        return y

    def _gradients(
        self, dy: NDArray[Floating], saved: tuple, out: NDArray[Floating] | None
    ) -> Gradients[Floating]:
        x, residual, mean, invstd = saved
        return instance_norm_backward(
            dy,
            x,
            mean,
            invstd,
            self.weight,
            bias=self.bias,
            layout=self.layout,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            out=out,
        )

    def __repr__(self) -> str:
        return self._described(
            f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}",
            affine=False,
            track_running_stats=False,
            layout=None,
        )
