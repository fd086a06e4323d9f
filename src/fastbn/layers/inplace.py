# SPDX-License-Identifier: BSD-3-Clause
"""The layer of batch norm in place. May keep state. May not do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import binding
from fastbn.functional import batch_norm, batch_norm_backward_inplace
from fastbn.functional.inplace import check_activation, check_weight
from fastbn.layers.base import Layer
from fastbn.layers.population import PopulationLayer

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from fastbn._types import Activation, Floating, Gradients


@filled
class InPlaceBatchNorm(PopulationLayer):
    """Batch normalisation that overwrites its input, in training too.

    A network of convolutions keeps the output of this layer as the input of the next one;
    with `BatchNorm` it keeps the input of this one beside it. Here that is the same memory,
    and `backward` finds the input from the output.

    Parameters
    ----------
    {num_features}
    {eps}
    {average_momentum}
    {keep_affine: True}
    {track}
    {layout}
    activation : {None, "leaky_relu"}, default "leaky_relu"
        What `y` goes through, in the same pass: one that can be undone.
    {negative_slope}
        At least 1.2e-38 itself.
    {dtype: parameters and running statistics}

    Attributes
    ----------
    {weights: (C,)}
        No weight may be 0 in training.
    {tracked}
    {gradients: (C,)}
    {training}

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    Rota Bulo, Porzi & Kontschieder 2018, section 3.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.InPlaceBatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (8, 3, 4, 4)).astype(np.float32)
    >>> y = bn(x)
    >>> y is x
    True
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn
    InPlaceBatchNorm(3, eps=1e-05, momentum=0.1, activation='leaky_relu')
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
        activation: Activation | None = "leaky_relu",
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        check_activation(activation, negative_slope)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout,
            activation=activation, negative_slope=negative_slope, dtype=dtype
        )  # fmt: skip

    # `out` would be another place, and backward knows of no residual.
    def __call__(self, x: NDArray[Floating]) -> NDArray[Floating]:  # type: ignore[override]
        """Overwrite `x` with its normalisation, and return it.

        Parameters
        ----------
        x : ndarray of float16, bfloat16, float32 or float64
            With `num_features` channels, and writable. In training `backward` needs what
            is in it after the call, until the next call or `eval`.

        Returns
        -------
        y : ndarray
            `x`.

        Raises
        ------
        ValueError, TypeError
            As `batch_norm`; for another number of channels; in training for a weight
            of 0. Nothing is written then.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.InPlaceBatchNorm(1, activation=None)
        >>> bn(np.array([[1.0], [3.0]])).round(3).ravel()
        array([-1.,  1.])
        """
        return Layer.__call__(self, x)

    def _forward(self, x: Any, residual: Any, out: Any, training: bool) -> Any:
        binding.check_channels(x, self.layout, self.num_features)
        if not x.flags.writeable:
            raise ValueError("x: expected a writable array, since y takes its place")
        if not training:
            return batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias,
                self.running_mean is None, eps=self.eps, layout=self.layout,
                activation=self.activation, negative_slope=self.negative_slope, out=x
            )  # fmt: skip
        check_activation(self.activation, self.negative_slope)
        check_weight(self.weight, self.num_features)
        _, _, invstd = self._normalise(x, None, x)
        return x, invstd

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        (invstd,) = statistics
        return batch_norm_backward_inplace(
            dy, x, invstd, self.weight, self.bias, layout=self.layout,
            activation=self.activation, negative_slope=self.negative_slope, out=out
        )  # fmt: skip
