# SPDX-License-Identifier: BSD-3-Clause
"""The layer of batch norm. May keep state. May not do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastbn._docs import filled
from fastbn._numpy import binding
from fastbn.functional import batch_norm_backward
from fastbn.layers.base import TrackingLayer

if TYPE_CHECKING:
    from fastbn._types import Gradients


@filled
class BatchNorm(TrackingLayer):
    """Batch normalisation with parameters and running statistics.

    As ``torch.nn.BatchNorm1d``, ``2d`` and ``3d`` in one, for NumPy arrays.

    Parameters
    ----------
    {num_features}
    {eps}
    {average_momentum}
    {keep_affine: True}
    {track}
    {layout}
    {activation}
    {negative_slope}
    {dtype: parameters and running statistics}

    Attributes
    ----------
    {weights: (C,)}
    {tracked}
    {gradients: (C,)}
    {training}

    Raises
    ------
    {wrong_arguments}

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

    _prepared: binding.Prepared | None = None

    def _forward(
        self, x: Any, residual: Any, out: Any, training: bool, mask: Any = None,
        lengths: Any = None, length_axis: Any = None
    ) -> Any:  # fmt: skip
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        momentum, prepared = 0.0, None
        if training:
            momentum = self._average_momentum() if self.momentum is None else self.momentum
        elif mean is None or var is None:
            mean = var = None
        else:
            # To compare the arrays costs less than to compute with them, and it cannot be
            # forgotten. Objects do not change, since another thread may be using this one.
            prepared = self._prepared
            if prepared is None or not prepared.fits(x, mean, var, weight, bias, self.eps):
                prepared = binding.Prepared(x, self.num_features, mean, var, weight, bias, self.eps)
        result = binding.batch_forward(
            x, weight, bias, mean, var, residual, out, prepared is None, momentum, self.eps,
            self.layout, self.activation, self.negative_slope, not training, self.num_features,
            prepared, mask, lengths, length_axis
        )  # fmt: skip
        if training:
            self._count(x, mask, lengths)
            return *result, mask, lengths, length_axis
        self._prepared = prepared
        return result

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        mean, invstd, mask, lengths, length_axis = statistics
        return batch_norm_backward(
            dy, x, mean, invstd, self.weight, bias=self.bias, layout=self.layout,
            activation=self.activation, negative_slope=self.negative_slope, residual=residual,
            out=out, mask=mask, lengths=lengths, length_axis=length_axis
        )  # fmt: skip

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_prepared": None}
