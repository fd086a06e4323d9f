# SPDX-License-Identifier: BSD-3-Clause
"""ChannelScaler beside StandardScaler, and scikit-learn's own checks of estimators."""

import pickle

import numpy as np
import pytest
from extras import need

sklearn = need("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from fastbn.sklearn import ChannelScaler  # noqa: E402

RNG = np.random.default_rng(3)
X = RNG.normal(5, 3, (60, 4))


@pytest.mark.filterwarnings("ignore")  # the checks provoke some, and look at them themselves
@parametrize_with_checks([ChannelScaler(), ChannelScaler(with_std=False)])
def test_estimator_checks(estimator, check):
    check(estimator)


def assert_like(ours, theirs):
    np.testing.assert_array_equal(ours.n_samples_seen_, theirs.n_samples_seen_)
    for name in ("mean_", "var_", "scale_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-10)


@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_as_standard_scaler(nan, weighted):
    x = np.where(RNG.random(X.shape) < 0.2, np.nan, X) if nan else X
    weights = RNG.random(60) * 2 if weighted else None
    ours, theirs = (s.fit(x, sample_weight=weights) for s in (ChannelScaler(), StandardScaler()))
    assert_like(ours, theirs)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), rtol=1e-9)
    np.testing.assert_allclose(ours.inverse_transform(ours.transform(x)), x, rtol=1e-9)
    ours, theirs = ChannelScaler(), StandardScaler()
    for part in np.array_split(np.arange(60), 4):
        for scaler in ours, theirs:
            scaler.partial_fit(x[part], sample_weight=None if weights is None else weights[part])
    assert_like(ours, theirs)
    if not nan and not weighted:
        assert type(ours.n_samples_seen_) is int


def test_any_rank_and_integers():
    images = RNG.integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    rows = images.reshape(-1, 3)
    scaler = ChannelScaler(layout="NHWC").fit(images)
    np.testing.assert_allclose(scaler.var_, rows.var(0))
    assert scaler.n_samples_seen_ == 120
    y = scaler.transform(images)
    assert (y.shape, y.dtype) == (images.shape, np.float64)
    np.testing.assert_allclose(y, (images - rows.mean(0)) / rows.std(0), atol=1e-12)
    wide = ChannelScaler(layout="NHWC").fit(images.astype(np.int64))
    np.testing.assert_allclose(wide.var_, scaler.var_)
    weights = np.array([0, 1, 2, 0.5, 1, 3])
    weighted = ChannelScaler(layout="NHWC").fit(images, sample_weight=weights)
    np.testing.assert_allclose(weighted.mean_, np.average(rows, 0, np.repeat(weights, 20)))
    with pytest.raises(ValueError, match="3 features"):
        scaler.transform(images[..., :2])


def test_merge_clone_pickle_pipeline():
    a, b = ChannelScaler().fit(X[:20]), ChannelScaler().fit(X[20:])
    merged = a.merge(b)
    assert_like(merged, StandardScaler().fit(X))
    assert a.n_samples_seen_ == 20
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(merged)).transform(X), merged.transform(X)
    )
    assert clone(ChannelScaler(layout="NC", with_std=False)).get_params()["layout"] == "NC"
    np.testing.assert_allclose(
        make_pipeline(ChannelScaler(), StandardScaler()).fit_transform(X).std(0), 1
    )
    assert list(merged.get_feature_names_out()) == ["x0", "x1", "x2", "x3"]
    with pytest.raises(TypeError, match="other"):
        a.merge(StandardScaler())


def test_constants_options_and_weights():
    x = np.c_[np.full(5, 7.0), np.arange(5.0)]
    scaler = ChannelScaler().fit(x)
    assert scaler.scale_.tolist() == [1, np.sqrt(2)]
    assert ChannelScaler(with_std=False).fit(x).scale_ is None
    for options in {"with_mean": False}, {"with_std": False}:
        ours, theirs = ChannelScaler(**options).fit(x), StandardScaler(**options).fit(x)
        np.testing.assert_allclose(ours.transform(x), theirs.transform(x))
    given = x.copy()
    assert ChannelScaler(copy=False).fit(given).transform(given) is given
    for wrong, kind in ([1, 2], ValueError), (-np.ones(5), ValueError), ([1j] * 5, TypeError):
        with pytest.raises(kind, match="sample_weight"):
            ChannelScaler().fit(x, sample_weight=wrong)
