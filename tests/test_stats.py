# SPDX-License-Identifier: BSD-3-Clause
"""BatchStats: merging, empty parts, arrays, pickles."""

import pickle

import numpy as np
import pytest
from arrays import batch

import fastbn
from fastbn import BatchStats

X = batch((30, 4, 5), "float64")


def same(a, b):
    return all(
        getattr(a, name).tobytes() == getattr(b, name).tobytes() for name in ("count", "mean", "m2")
    )


def test_fields(dtype):
    stats = fastbn.batch_stats(X.astype(dtype))
    for array in (stats.count, stats.mean, stats.m2):
        assert array.shape == (4,)
        assert array.dtype == np.float64
    np.testing.assert_allclose(stats.var(), X.var((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(stats.var(ddof=1), X.var((0, 2), ddof=1), rtol=1e-6)
    np.testing.assert_allclose(stats.std(ddof=1), X.std((0, 2), ddof=1), rtol=1e-6)


def test_parts_merge_to_the_whole():
    whole = fastbn.batch_stats(X)
    for cuts in ([7], [1, 2, 3], [10, 10, 20], []):
        merged = BatchStats.merge(fastbn.batch_stats(part) for part in np.split(X, cuts))
        np.testing.assert_array_equal(merged.count, whole.count)
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-14)


def test_empty_parts_are_the_identity():
    part, empty = fastbn.batch_stats(X), fastbn.batch_stats(X[:0])
    for parts in ([empty, part], [part, empty], [empty, empty, part, empty]):
        assert same(BatchStats.merge(parts), part)
    nothing = empty + empty
    assert same(nothing, empty)
    assert np.isnan(nothing.var()).all()
    mixed = BatchStats([0, 5], [0, 1], [0, 2]) + BatchStats([3, 0], [7, 0], [4, 0])
    assert same(mixed, BatchStats([3, 5], [7, 1], [4, 2]))


def test_infinite_means():
    inf, one = BatchStats(2, [np.inf], [np.nan]), BatchStats(2, [1.0], [1.0])
    for merged in (inf + one, one + inf):
        assert merged.mean == np.inf
        assert np.isnan(merged.m2)


def test_variance_without_freedom_is_nan():
    assert np.isnan(BatchStats(1, [3.0], [0.0]).var(ddof=1)).all()
    assert BatchStats(1, [3.0], [0.0]).var() == 0


def test_round_trips():
    stats = fastbn.batch_stats(X)
    assert stats.to_array().shape == (3, 4)
    assert same(BatchStats.from_array(stats.to_array()), stats)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert same(pickle.loads(pickle.dumps(stats, protocol)), stats)
    assert repr(stats) == "BatchStats(channels=4, count=150)"
    assert repr(BatchStats([1, 2], [0, 0], [0, 0])) == "BatchStats(channels=2, count=1..2)"


def test_merging_does_not_share_memory():
    stats = fastbn.batch_stats(X)
    merged = BatchStats.merge([stats])
    merged.mean[:] = 0
    assert stats.mean.all()


def test_errors():
    stats = fastbn.batch_stats(X)
    with pytest.raises(ValueError, match=r"parts: .*at least one"):
        BatchStats.merge([])
    with pytest.raises(TypeError, match=r"parts: .*int"):
        BatchStats.merge([stats, 1])
    with pytest.raises(TypeError):
        stats + 1
    with pytest.raises(ValueError, match="4 channels, got 1"):
        stats + BatchStats(1, [0.0], [0.0])
    with pytest.raises(ValueError, match=r"array: expected shape \(3, C\)"):
        BatchStats.from_array(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="mean, m2"):
        BatchStats(1, [0.0], [0.0, 1.0])
    for bad in ([1j], ["a"], np.ma.masked_array([1.0]), None, np.array([1], "M8[s]")):
        with pytest.raises(TypeError, match="mean: "):
            BatchStats(1, bad, [0.0])
    with pytest.raises(TypeError, match="count: "):
        BatchStats(None, [0.0], [0.0])
    with pytest.raises(TypeError, match="ddof: "):
        stats.var("1")
    with pytest.raises(TypeError, match="parts: "):
        BatchStats.merge(5)
    with pytest.raises(ValueError, match="count"):
        BatchStats([1, 2], [0.0], [0.0])
