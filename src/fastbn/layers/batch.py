# SPDX-License-Identifier: BSD-3-Clause
"""The layer of batch norm. May keep state. May not do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from fastbn import _view
from fastbn.functional import batch_norm_backward
from fastbn.layers.base import TrackingLayer

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from fastbn._types import Activation, Floating, Gradients


class BatchNorm(TrackingLayer):
    """Batch normalisation with parameters and running statistics.

    As ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in one, for NumPy arrays.

    Parameters
    ----------
    num_features : int
        C, the number of channels; at least 1.
    eps : float, default 1e-5
        Added to the variance, inside the root.
    momentum : float or None, default 0.1
        The share of the new value in a running statistic. ``None``: running
        statistics are the plain average over all batches so far.
    affine : bool, default True
        Keep `weight` and `bias`; otherwise both are ``None``.
    track_running_stats : bool, default True
        Keep running statistics; otherwise evaluation, too, normalises with the
        statistics of the batch.
    layout : str, optional
        As for `batch_norm`.
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
        How many batches the running statistics have seen.
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
    Ioffe & Szegedy 2015, algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(3, layout="NHWC")
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 4, 4, 3)).astype(np.float32)
    >>> y = bn(x)
    >>> bool(abs(y.mean()) < 1e-6), bool(abs(y.std() - 1) < 1e-5)
    (True, True)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.bias_grad
    array([128., 128., 128.], dtype=float32)
    >>> bn.eval()
    BatchNorm(3, eps=1e-05, momentum=0.1, layout='NHWC', training=False)
    """

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str | None = None,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self._prepared: _view.Prepared | None = None
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
            As `batch_norm`; and for another number of channels.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(2).eval()
        >>> bn(np.array([[1.0, 2.0]])).round(3)
        array([[1., 2.]])
        """
        if not self.training:
            y = self._infer(x, residual, out)
            self._forget()
            return y
        y, mean, invstd = _view.forward(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            True,
            self._next_momentum(),
            self.eps,
            self.layout,
            self.activation,
            self.negative_slope,
            residual,
            out,
            False,
            self.num_features,
        )
        self._count(x)
        self._keep(x, residual, out, mean, invstd)
        return y

    def _infer(
        self,
        x: NDArray[Floating],
        residual: NDArray[Floating] | None,
        out: NDArray[Floating] | None,
    ) -> NDArray[Floating]:
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        prepared = self._prepared
        if mean is None or var is None:
            mean = var = prepared = None
        # To compare the arrays costs less than to compute with them, and it cannot be
        # forgotten. Objects do not change, since another thread may be using this one.
        elif prepared is None or not prepared.fits(x, mean, var, weight, bias, self.eps):
            prepared = self._prepared = _view.Prepared(
                x, self.num_features, mean, var, weight, bias, self.eps
            )
        return _view.forward(
            x,
            weight,
            bias,
            mean,
            var,
            prepared is None,
            0.0,
            self.eps,
            self.layout,
            self.activation,
            self.negative_slope,
            residual,
            out,
            True,
            self.num_features,
            prepared,
        )

    def _gradients(
        self, dy: NDArray[Floating], saved: tuple, out: NDArray[Floating] | None
    ) -> Gradients[Floating]:
        x, residual, mean, invstd = saved
        return batch_norm_backward(
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
            affine=True,
            track_running_stats=True,
            layout=None,
        )
