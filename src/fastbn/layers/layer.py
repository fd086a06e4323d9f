# SPDX-License-Identifier: BSD-3-Clause
"""The layers of layer norm and RMS norm. May keep state. May not do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import binding
from fastbn.functional import (
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from fastbn.layers.base import Layer

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from fastbn._types import Activation, Gradients, Shape


@filled
class LayerNorm(Layer):
    """Layer normalisation with parameters.

    As ``torch.nn.LayerNorm``, for NumPy arrays.

    Parameters
    ----------
    {normalized_shape}
    {eps}
    elementwise_affine : bool, default True
        Keep `weight` and, with `bias`, also `bias`; otherwise both are ``None``.
    bias : bool, default True
        See `elementwise_affine`.
    {activation}
    {negative_slope}
    {dtype: parameters}

    Attributes
    ----------
    {weights: `normalized_shape`}
    {gradients: `normalized_shape`}
    {training}
        Evaluation gives the same `y`, but keeps nothing for `backward`.

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    Ba, Kiros & Hinton 2016, equation 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> ln = fastbn.LayerNorm(64)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 16, 64)).astype(np.float32)
    >>> y = ln(x)
    >>> bool(abs(y.mean(axis=-1)).max() < 1e-5), bool(abs(y.std(axis=-1) - 1).max() < 1e-4)
    (True, True)
    >>> dx = ln.backward(np.ones_like(y))
    >>> ln.bias_grad[:3]
    array([128., 128., 128.], dtype=float32)
    >>> ln.eval()
    LayerNorm((64,), eps=1e-05, training=False)
    """

    _defaults = (("elementwise_affine", True),)

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = binding.check_shape(normalized_shape)
        self.eps = binding.check_eps(eps)
        self.elementwise_affine = binding.check_flag(elementwise_affine, "elementwise_affine")
        bias = binding.check_flag(bias, "bias") and self.elementwise_affine
        super().__init__(
            self.normalized_shape, dtype, activation, negative_slope,
            weight=self.elementwise_affine, bias=bias
        )  # fmt: skip

    def _forward(self, x: Any, residual: Any, out: Any, training: bool) -> Any:
        norm = layer_norm_forward if training else layer_norm
        return norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps,
            activation=self.activation, negative_slope=self.negative_slope, residual=residual,
            out=out
        )  # fmt: skip

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        mean, invstd = statistics
        return layer_norm_backward(
            dy, x, mean, invstd, self.normalized_shape, self.weight, bias=self.bias,
            activation=self.activation, negative_slope=self.negative_slope, residual=residual,
            out=out
        )  # fmt: skip

    def _arguments(self) -> str:
        shown = f"{self.normalized_shape}, eps={self.eps:g}"
        without_bias = self.elementwise_affine and self.bias is None
        return shown + ", bias=False" if without_bias else shown


@filled
class RMSNorm(Layer):
    """Normalisation by the root of the mean square, with a weight.

    As ``torch.nn.RMSNorm``, for NumPy arrays.

    Parameters
    ----------
    {normalized_shape}
    {rms_eps}
    elementwise_affine : bool, default True
        Keep `weight`; otherwise it is ``None``.
    {activation}
    {negative_slope}
    {dtype: the weight}

    Attributes
    ----------
    weight : ndarray of shape `normalized_shape`, or None
    weight_grad : ndarray of shape `normalized_shape`, or None
        Set by `backward`.
    bias, bias_grad : None
        So that all layers can be treated alike.
    {training}
        Evaluation gives the same `y`, but keeps nothing for `backward`.

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    Zhang & Sennrich 2019, equation 4.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> norm = fastbn.RMSNorm(64)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 16, 64)).astype(np.float32)
    >>> y = norm(x)
    >>> bool(abs((y * y).mean(axis=-1) - 1).max() < 1e-4)
    True
    >>> dx = norm.backward(y)
    >>> bool(abs(norm.weight_grad.mean() - 128) < 1e-2)
    True
    >>> norm.eval()
    RMSNorm((64,), eps=None, training=False)
    """

    _defaults = (("elementwise_affine", True),)

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = binding.check_shape(normalized_shape)
        self.eps = None if eps is None else binding.check_eps(eps)
        self.elementwise_affine = binding.check_flag(elementwise_affine, "elementwise_affine")
        super().__init__(
            self.normalized_shape, dtype, activation, negative_slope,
            weight=self.elementwise_affine, bias=False
        )  # fmt: skip

    def _forward(self, x: Any, residual: Any, out: Any, training: bool) -> Any:
        norm = rms_norm_forward if training else rms_norm
        return norm(
            x, self.normalized_shape, self.weight, self.eps, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual, out=out
        )  # fmt: skip

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        (invrms,) = statistics
        return rms_norm_backward(
            dy, x, invrms, self.normalized_shape, self.weight, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual, out=out
        )  # fmt: skip

    def _arguments(self) -> str:
        eps = None if self.eps is None else f"{self.eps:g}"
        return f"{self.normalized_shape}, eps={eps}"
