# SPDX-License-Identifier: BSD-3-Clause
"""The layer of batch renormalisation. May keep state; may compute with vectors of channels, in
float64. May not do arithmetic on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, SupportsIndex, TypeAlias

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import CHECKED, INPUT, ONLY_Y, binding
from fastbn.functional.counted import Counted
from fastbn.functional.running import Batch
from fastbn.layers.base import TrackingLayer
from fastbn.layers.batch import BatchNorm

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

    from fastbn._types import Activation, Float64, Gradients

Limit: TypeAlias = float | Callable[[int], float]


class Renormalised(NamedTuple):
    """What backward needs of a call, beside its inputs."""

    mean: Float64
    invstd: Float64
    r: Float64
    d: Float64
    counted: Counted


def _checked_limit(value: Limit, name: str, least: float) -> Limit:
    if callable(value):
        return value
    number = float(binding.check_number(value, name))
    if not number >= least:
        raise ValueError(f"{name}: expected at least {least:g}, got {value!r}")
    return number


@filled
class BatchRenorm(BatchNorm):
    r"""Batch normalisation for small batches: corrected by the running statistics.

    In training y is what evaluation would give, as far as two limits allow:

    .. math:: y = (\hat x \, r + d) \cdot weight + bias, \quad
              r = \sigma / \sigma_{running}, \quad d = (\mu - \mu_{running}) / \sigma_{running}

    with :math:`\sigma = \sqrt{var + eps}`, r limited to [1 / r_max, r_max] and d to
    [-d_max, d_max]. Backward takes r and d for constants. The running statistics are those
    from before the batch. In evaluation this is `BatchNorm`.

    Parameters
    ----------
    {num_features}
    {eps}
    {average_momentum}
    {keep_affine: True}
    track_running_stats : bool, default True
        Keep running statistics; otherwise this is `BatchNorm`.
    r_max, d_max : float or callable, default 3 and 5
        At least 1 and at least 0. With 1 and 0 this is `BatchNorm`. A callable is given
        `num_batches_tracked` and returns the limit, which usually grows from there.
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
    r_max, d_max : float or callable
        They may be changed at any time.

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in
    Batch-Normalized Models", 2017: algorithm 1, but that the running average is that of the
    variance, as in `BatchNorm`.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchRenorm(1)
    >>> bn(np.array([[1.0], [3.0]])).round(3).ravel()
    array([1., 3.])
    >>> bn
    BatchRenorm(1, eps=1e-05, momentum=0.1)
    >>> bn.r_max = lambda batches: 1.0 if batches < 5000 else 3.0
    """

    _defaults = (*TrackingLayer._defaults, ("r_max", 3.0), ("d_max", 5.0))
    _while_estimated: ClassVar[Mapping[str, object]] = {"r_max": 1.0, "d_max": 0.0}

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        r_max: Limit = 3.0,
        d_max: Limit = 5.0,
        layout: str | None = None,
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout,
            activation=activation, negative_slope=negative_slope, dtype=dtype
        )  # fmt: skip
        self.r_max = _checked_limit(r_max, "r_max", 1.0)
        self.d_max = _checked_limit(d_max, "d_max", 0.0)

    def _limit(self, name: str, least: float) -> float:
        limit = getattr(self, name)
        if callable(limit):
            limit = limit(self.num_batches_tracked or 0)
        found = _checked_limit(limit, name, least)
        assert not callable(found)
        return found

    def _correction(self, batch: Batch, var: Float64) -> tuple[Float64, Float64]:
        # r and d.
        assert self.running_mean is not None
        assert self.running_var is not None
        r_max, d_max = self._limit("r_max", 1.0), self._limit("d_max", 0.0)
        mean, running_var = self.running_mean.astype(float), self.running_var.astype(float)
        with np.errstate(all="ignore"):
            sigma = np.sqrt(running_var + self.eps)
            r = np.clip(np.sqrt(var + self.eps) / sigma, 1.0 / r_max, r_max)
            return r, np.clip((batch.mean - mean) / sigma, -d_max, d_max)

    def _affine(self, r: Float64, d: Float64) -> tuple[Float64, Float64]:
        # The weight and the bias of a batch norm that does the same.
        weight = 1.0 if self.weight is None else self.weight.astype(float)
        bias = 0.0 if self.bias is None else self.bias.astype(float)
        with np.errstate(all="ignore"):
            return r * weight, d * weight + bias

    def _train(
        self, x: Any, residual: Any, out: Any, moves: bool, counted: Counted
    ) -> tuple[Any, tuple]:
        if self.frozen or self.running_mean is None or self.running_var is None:
            return super()._train(x, residual, out, moves, counted)
        y = binding.batch_forward(
            x, self.weight, self.bias, self.running_mean, self.running_var, residual, out, True,
            0.0, self.eps, self.layout, self.activation, self.negative_slope, ONLY_Y, counted,
            self.num_features, None, CHECKED
        )  # fmt: skip
        count, mean, m2, *_ = binding.batch_statistics(x, self.layout, counted)
        if count < 2:  # no variance: for the engine to answer
            return super()._train(x, residual, out, moves, counted)
        with np.errstate(all="ignore"):
            var = m2 / count
            batch = Batch(mean, 1.0 / np.sqrt(var + self.eps), count, m2)
        r, d = self._correction(batch, var)
        weight, bias = self._affine(r, d)
        binding.batch_forward(
            x, weight, bias, mean, var, residual, y, False, 0.0, self.eps, self.layout,
            self.activation, self.negative_slope, ONLY_Y, counted
        )  # fmt: skip
        self._follow(batch, moves)
        return y, Renormalised(mean, batch.invstd, r, d, counted)

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        if not isinstance(statistics, Renormalised):
            return super()._gradients(dy, x, statistics, residual, out)
        mean, invstd, r, d, counted = statistics
        weight, bias = self._affine(r, d)
        dx, of_scale, of_shift, *rest = binding.batch_backward(
            dy, x, mean, invstd, weight, bias, residual, out, True, self.layout, self.activation,
            self.negative_slope, INPUT, counted
        )  # fmt: skip
        with np.errstate(all="ignore"):
            dweight = of_scale * r + of_shift * d
            return (dx, dweight.astype(self.dtype), of_shift.astype(self.dtype), *rest)
