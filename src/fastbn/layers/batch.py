# SPDX-License-Identifier: BSD-3-Clause
"""The layer of batch norm. May keep state. May not do arithmetic on tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self, SupportsIndex

import numpy as np

from fastbn._docs import filled
from fastbn._numpy import CHECKED, ONLY_Y, WITH_STATISTICS, binding
from fastbn.functional import batch_norm_backward, ghost
from fastbn.functional.counted import Counted, counted_of
from fastbn.functional.running import check_name, check_on_nonfinite
from fastbn.layers.population import TRACKS, PopulationLayer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from fastbn._types import Activation, Float64, Floating, Gradients, OnNonfinite
    from fastbn.sync._exchange import Exchange


class Normalised(NamedTuple):
    """What backward needs of a call, beside its inputs."""

    mean: Float64
    invstd: Float64
    training: bool  # with the statistics of the batch
    ghost_batch_size: int | None
    counted: Counted


@filled
class BatchNorm(PopulationLayer):
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
    track : {"average", "pooled"}, default "average"
        What running statistics are: the moving average that `momentum` says, or mean and
        variance of all that was seen, whatever `momentum` is.
    {ghost}
    {unbiased}
    {on_nonfinite}
    {activation}
    {negative_slope}
    {dtype: parameters and running statistics}

    Attributes
    ----------
    {weights: (C,)}
    {tracked}
        Each ghost batch is one of them.
    pooled : BatchStats or None
        With ``track="pooled"`` the statistics of all that was seen since the layer was
        made, `reset_running_stats` or `load_state_dict`.
    skipped : int
        How many batches ``on_nonfinite="skip"`` has kept away from running statistics, or
        from those of some channels.
    {gradients: (C,)}
    {training}
    frozen : bool
        Set by `freeze` and `unfreeze`.

    Raises
    ------
    {wrong_arguments}

    References
    ----------
    Ioffe & Szegedy 2015, algorithms 1 and 2. Ghost batches: E. Hoffer, I. Hubara,
    D. Soudry, "Train longer, generalize better", 2017, algorithm 1.

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

    _defaults = (
        *PopulationLayer._defaults, ("track", "average"), ("ghost_batch_size", None),
        ("unbiased", True), ("on_nonfinite", "propagate")
    )  # fmt: skip
    _prepared: binding.Prepared | None = None
    ghost_batch_size: int | None = None
    frozen: bool = False
    _frozen_affine: bool = False

    def __init__(
        self,
        num_features: SupportsIndex,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        layout: str | None = None,
        track: str = "average",
        ghost_batch_size: SupportsIndex | None = None,
        unbiased: bool = True,
        on_nonfinite: OnNonfinite = "propagate",
        activation: Activation | None = None,
        negative_slope: float = 0.01,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, layout=layout,
            activation=activation, negative_slope=negative_slope, dtype=dtype
        )  # fmt: skip
        self.track = check_name(track, "track", TRACKS)
        if track == "pooled" and not self.track_running_stats:
            raise ValueError('track: expected "average" without running statistics, got "pooled"')
        self.ghost_batch_size = ghost.check_size(ghost_batch_size)
        self.unbiased = binding.check_flag(unbiased, "unbiased")
        self.on_nonfinite = check_on_nonfinite(on_nonfinite)
        self._begin_anew()

    @filled
    def __call__(
        self,
        x: NDArray[Floating],
        out: NDArray[Floating] | None = None,
        *,
        residual: NDArray[Floating] | None = None,
        mask: NDArray[np.bool_] | None = None,
        lengths: ArrayLike | None = None,
        length_axis: str | None = None,
        update_running: bool = True,
    ) -> NDArray[Floating]:
        """Normalise `x`; in training, keep what `backward` needs.

        Parameters
        ----------
        {layer_channels}
        {layer_out}
        {layer_residual}
        {counted}
            `backward` uses what the call had.
        {update_running}

        Returns
        -------
        {y}

        Raises
        ------
        ValueError, TypeError
            As `batch_norm`; and for another number of channels. A call that is refused
            changes nothing.
        FloatingPointError
            See `on_nonfinite`. `out` may have been written, nothing else has changed.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(2)
        >>> y = bn(np.array([[1.0, 2.0], [3.0, 2.0]]), update_running=False)
        >>> bn.running_mean, bn.num_batches_tracked
        (array([0., 0.], dtype=float32), 0)
        """
        counted = counted_of(mask, lengths, length_axis)
        if self.training:
            moves = update_running is True or binding.check_flag(update_running, "update_running")
            y, statistics = self._train(x, residual, out, moves, counted)
            self._keep(x, residual, out, statistics)
            return y
        if update_running is not True:
            binding.check_flag(update_running, "update_running")
        y = self._infer(x, residual, out, counted)
        self._saved, self._overwritten = None, False
        return y

    def _infer(self, x: Any, residual: Any, out: Any, counted: Counted) -> Any:
        mean, var, weight, bias = self.running_mean, self.running_var, self.weight, self.bias
        if mean is None or var is None:
            return self._normalise_batch(x, residual, out, False, counted)[0]
        # To compare the arrays costs less than to compute with them, and it cannot be
        # forgotten. Objects do not change, since another thread may be using this one.
        prepared = self._prepared
        if prepared is None or not prepared.fits(x, mean, var, weight, bias, self.eps):
            prepared = binding.Prepared(x, self.num_features, mean, var, weight, bias, self.eps)
        y = binding.batch_forward(
            x, weight, bias, mean, var, residual, out, False, 0.0, self.eps, self.layout,
            self.activation, self.negative_slope, ONLY_Y, counted, self.num_features, prepared
        )  # fmt: skip
        self._prepared = prepared
        return y

    def _train(
        self, x: Any, residual: Any, out: Any, moves: bool, counted: Counted
    ) -> tuple[Any, tuple]:
        # y, and what `_gradients` gets back.
        if self.frozen:
            y, mean, invstd = binding.batch_forward(
                x, self.weight, self.bias, self.running_mean, self.running_var, residual, out,
                False, 0.0, self.eps, self.layout, self.activation, self.negative_slope,
                WITH_STATISTICS, counted, self.num_features
            )  # fmt: skip
            return y, Normalised(mean, invstd, False, None, counted)
        y, mean, invstd = self._normalise_batch(x, residual, out, moves, counted)
        return y, Normalised(mean, invstd, True, self.ghost_batch_size, counted)

    def _normalise_batch(
        self,
        x: Any,
        residual: Any,
        out: Any,
        moves: bool,
        counted: Counted,
        exchange: Exchange | None = None,
    ) -> tuple:
        # Whole, or slice after slice.
        size = self.ghost_batch_size
        if size is None:
            return self._normalise(x, residual, out, moves, counted, exchange)
        mean, var = (self.running_mean, self.running_var) if moves else (None, None)
        y = binding.batch_forward(
            x, self.weight, self.bias, mean, var, residual, out, True, 0.0, self.eps, self.layout,
            self.activation, self.negative_slope, ONLY_Y, counted, self.num_features, None,
            CHECKED, exchange
        )  # fmt: skip

        def normalise(
            x: Any, residual: Any, out: Any, counted: Counted, exchange: Exchange | None
        ) -> tuple:
            return self._normalise(x, residual, out, moves, counted, exchange)

        with self._as_before_on_error():
            return ghost.forward(x, residual, y, self.layout, size, normalise, counted, exchange)

    def _gradients(self, dy: Any, x: Any, statistics: tuple, residual: Any, out: Any) -> Gradients:
        mean, invstd, training, size, counted = statistics
        return batch_norm_backward(
            dy, x, mean, invstd, self.weight, bias=self.bias, training=training,
            layout=self.layout, ghost_batch_size=size, activation=self.activation,
            negative_slope=self.negative_slope, residual=residual, out=out, **counted._asdict()
        )  # fmt: skip

    def _set_gradients(self, gradients: list) -> None:
        if self.frozen and self._frozen_affine:
            self.weight_grad = self.bias_grad = None
        else:
            super()._set_gradients(gradients)

    def freeze(self, affine: bool = True) -> Self:
        """Normalise with the running statistics as they are, in training too; return self.

        Neither `train` nor `eval` undoes it. In training mode `backward` is that of fixed
        statistics.

        Parameters
        ----------
        affine : bool, default True
            Keep weight and bias, too, as they are: `backward` leaves their gradients
            ``None``.

        Returns
        -------
        the layer itself

        Raises
        ------
        ValueError
            If the layer has no running statistics.

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1).freeze().train()
        >>> bn(np.array([[1.0], [2.0]])).round(3).ravel()
        array([1., 2.])
        >>> bn.backward(np.array([[1.0], [0.0]])).round(3).ravel().tolist()
        [1.0, 0.0]
        >>> bn.num_batches_tracked, bn.weight_grad
        (0, None)
        """
        affine = binding.check_flag(affine, "affine")
        self._check_can_be_frozen()
        self.frozen, self._frozen_affine = True, affine
        if affine:
            self.weight_grad = self.bias_grad = None
        return self

    def _check_can_be_frozen(self) -> None:
        if self.running_mean is None or self.running_var is None:
            raise ValueError(
                "freeze: expected a layer with running statistics, got one with "
                f"track_running_stats={self.track_running_stats}"
            )

    def unfreeze(self) -> Self:
        """Undo `freeze`; return self.

        Returns
        -------
        the layer itself

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm(1).freeze().unfreeze().frozen
        False
        """
        self.frozen = self._frozen_affine = False
        return self

    def __getstate__(self) -> dict[str, object]:
        return super().__getstate__() | {"_prepared": None}
