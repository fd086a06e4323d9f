# SPDX-License-Identifier: BSD-3-Clause
"""ChannelScaler for scikit-learn (``pip install "fastbn[sklearn]"``).

StandardScaler for arrays of any rank, that merges. The statistics are `batch_stats`, and those
of weighted samples NumPy's in float64.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

import fastbn
from fastbn._numpy import binding
from fastbn.data._libraries import library
from fastbn.data.sources import channel_axis, letters
from fastbn.stats import BatchStats

_base, _validation = (
    library("sklearn.base", "sklearn"),
    library("sklearn.utils.validation", "sklearn"),
)

__all__ = ["ChannelScaler"]

_TAKEN = [np.float64, np.float32, np.float16, np.uint8, np.int8, np.uint16, np.int16]


class ChannelScaler(_base.OneToOneFeatureMixin, _base.TransformerMixin, _base.BaseEstimator):  # type: ignore[misc, name-defined]
    """Standardise each channel: ``(X - mean_) / scale_``, for arrays of any rank.

    Parameters
    ----------
    layout : str, optional
        A letter for each axis, with one ``C`` for the channels, such as ``"NHWC"``; or
        ``"N...C"``. Without it, channels are axis 1.
    with_mean, with_std : bool, default True
        Subtract the mean; divide by the deviation.
    copy : bool, default True
        Otherwise floats are transformed in place.

    Attributes
    ----------
    n_samples_seen_ : int or ndarray of shape (C,)
        The number of positions, or the sum of their weights; an array where channels
        differ, since NaN is left out.
    mean_, var_ : ndarray of float64, shape (C,)
    scale_ : ndarray of float64, shape (C,)
        The deviation, 1 where it is 0. ``None`` without `with_std`.
    n_features_in_ : int
        The number of channels.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.sklearn import ChannelScaler
    >>> X = np.array([[0.0, 1.0], [2.0, 5.0]])
    >>> ChannelScaler().fit_transform(X)
    array([[-1., -1.],
           [ 1.,  1.]])
    """

    def __init__(
        self,
        *,
        layout: str | None = None,
        with_mean: bool = True,
        with_std: bool = True,
        copy: bool = True,
    ) -> None:
        self.layout = layout
        self.with_mean = with_mean
        self.with_std = with_std
        self.copy = copy

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Compute the statistics of `X`.

        Parameters
        ----------
        X : array_like
            NaN is left out.
        y : None
            Ignored.
        sample_weight : array_like of shape (n_samples,), optional
            Real numbers of at least 0.

        Returns
        -------
        ChannelScaler
            The estimator itself.
        """
        self._total: BatchStats | None = None
        return self.partial_fit(X, y, sample_weight)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Self:  # noqa: N803
        """Add the statistics of `X` to those so far.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.

        Returns
        -------
        ChannelScaler
            The estimator itself.
        """
        before = getattr(self, "_total", None)
        array, axis = self._checked(X, reset=before is None)
        layout = letters(array.ndim, axis)
        if sample_weight is None:
            part = fastbn.batch_stats(array, layout=layout, nan_policy="omit")
        else:
            part = self._weighted(array, axis, sample_weight)
        self._set(part if before is None else before + part)
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:  # noqa: N803
        """Return `X` standardised.

        Parameters
        ----------
        X : array_like
        copy : bool, optional
            In place of the one of the estimator.

        Returns
        -------
        ndarray
            Of the dtype of `X`, if that is a float, else float64.
        """
        return self._transformed(X, copy, inverse=False)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Any:  # noqa: N803
        """Return what `transform` standardised.

        Parameters
        ----------
        X, copy
            As for `transform`.

        Returns
        -------
        ndarray
        """
        return self._transformed(X, copy, inverse=True)

    def merge(self, other: ChannelScaler) -> ChannelScaler:
        """Return a new estimator with the statistics of both.

        Parameters
        ----------
        other : ChannelScaler
            Fitted, of the same number of channels.

        Returns
        -------
        ChannelScaler
        """
        if not isinstance(other, ChannelScaler):
            raise TypeError(f"other: expected a ChannelScaler, got {type(other).__name__}")
        for scaler in (self, other):
            _validation.check_is_fitted(scaler)
        merged: ChannelScaler = _base.clone(self)
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                setattr(merged, name, getattr(self, name))
        merged._set(self._total + other._total)  # type: ignore[operator]
        return merged

    # ---- what they share

    def _set(self, total: BatchStats) -> None:
        self._total = total
        count = total.count
        exact = count.astype(np.int64) if (count == np.floor(count)).all() else count
        self.n_samples_seen_ = exact[0].item() if (exact == exact[0]).all() else exact
        self.mean_, self.var_ = total.mean, total.var()
        # Channels of which nothing was seen have no mean.
        self.mean_ = np.where(count > 0, self.mean_, np.nan)
        scale = np.sqrt(self.var_)
        self.scale_ = np.where(scale == 0, 1.0, scale) if self.with_std else None

    def _checked(self, X: Any, reset: bool, **options: Any) -> tuple[Any, int]:  # noqa: N803
        """Return X as an array that the kernels take, and the axis of its channels."""
        binding.check_layout(self.layout)
        ndim = getattr(X, "ndim", None)
        tabular = (ndim is None or ndim <= 2) and self.layout in (None, "NC", "N...C")
        array = _validation.validate_data(
            self, X, reset=reset, accept_sparse=False, dtype=_TAKEN, allow_nd=True,
            ensure_2d=tabular, ensure_all_finite="allow-nan", **options,
        )  # fmt: skip
        axis = channel_axis(self.layout, array.shape)
        if reset:
            self.n_features_in_ = array.shape[axis]
        elif array.shape[axis] != self.n_features_in_:
            raise ValueError(
                f"X has {array.shape[axis]} features, but ChannelScaler is expecting "
                f"{self.n_features_in_} features as input: its channels"
            )
        return array, axis

    def _weighted(self, array: Any, axis: int, sample_weight: Any) -> BatchStats:
        """Return statistics in which each sample counts as often as its weight says."""
        layout = self.layout
        first = layout.index("N") if layout and "..." not in layout and "N" in layout else 0
        if first == axis:
            raise ValueError("layout: sample_weight needs an axis N for the samples")
        samples = array.shape[first]
        weights = np.asarray(sample_weight)
        if weights.dtype.kind not in "iufb":
            raise TypeError(f"sample_weight: expected real numbers, got dtype {weights.dtype}")
        weights = weights.astype(np.float64)
        if weights.ndim == 0:
            weights = np.full(samples, weights)
        if weights.shape != (samples,):
            raise ValueError(f"sample_weight: expected shape ({samples},), got {weights.shape}")
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError("sample_weight: expected finite numbers of at least 0")
        if not weights.any():
            raise ValueError("sample_weight: expected weights that are not all zero")
        moved = np.moveaxis(array, (first, axis), (0, -1)).reshape(samples, -1, array.shape[axis])
        values = moved.astype(np.float64)
        weight = np.where(np.isnan(values), 0.0, weights[:, None, None])
        values = np.where(weight == 0, 0.0, values)
        count = weight.sum((0, 1))
        with np.errstate(all="ignore"):
            mean = np.where(count > 0, (weight * values).sum((0, 1)) / count, 0.0)
        m2 = (weight * (values - mean) ** 2).sum((0, 1))
        return BatchStats(count, mean, m2)

    def _transformed(self, X: Any, copy: bool | None, inverse: bool) -> Any:  # noqa: N803
        _validation.check_is_fitted(self)
        copy = self.copy if copy is None else copy
        array, axis = self._checked(X, reset=False, force_writeable=not copy)
        if array.dtype.kind != "f":
            array, copy = array.astype(np.float64), False
        mean = self.mean_ if self.with_mean else np.zeros(self.n_features_in_)
        scale = self.scale_ if self.scale_ is not None else np.ones(self.n_features_in_)
        if not inverse and copy and np.isfinite(mean).all() and np.isfinite(scale).all():
            layout = letters(array.ndim, axis)
            return fastbn.normalize(array, mean, scale, layout=layout, dtype=array.dtype)
        along = [-1 if i == axis else 1 for i in range(array.ndim)]
        mean, scale = (value.reshape(along).astype(array.dtype) for value in (mean, scale))
        result = array.copy() if copy else array
        if inverse:
            result *= scale
            result += mean
        else:
            result -= mean
            result /= scale
        return result

    def __sklearn_is_fitted__(self) -> bool:
        return getattr(self, "_total", None) is not None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags
