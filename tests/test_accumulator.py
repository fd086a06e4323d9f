# SPDX-License-Identifier: BSD-3-Clause
"""StatsAccumulator is the merge of the batches; data sets need no library but for their files."""

import pickle
import sys
import threading

import numpy as np
import pytest
from exact import bits
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run

import fastbn
from fastbn import BatchStats, StatsAccumulator

TYPES = ["uint8", "int8", "uint16", "int16", "float32", "float64", "float16"]


def batches(seed, dtype, sizes):
    rng = np.random.default_rng(seed)
    for size in sizes:
        x = rng.integers(0, 100, (size, 3, 2))
        if np.dtype(dtype).kind == "f":
            x = np.where(rng.random(x.shape) < 0.1, np.nan, x + 0.1)
        yield x.astype(dtype), rng.random((size, 2)) < 0.7


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 99), st.sampled_from(TYPES), st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.sampled_from(["propagate", "omit"]), st.sampled_from([None, 3, [1, 2, 3]]), st.booleans(),
)  # fmt: skip
def test_updates_are_the_merge_of_the_batches(seed, dtype, sizes, nan_policy, nodata, masked):
    options = {"layout": "NCL", "nan_policy": nan_policy, "nodata": nodata}
    total, parts = StatsAccumulator(**options), []
    for x, mask in batches(seed, dtype, sizes):
        mask = mask if masked else None
        assert total.update(x, mask) is total
        parts.append(fastbn.batch_stats(x, mask=mask, **options))
    assert bits(total.result()) == bits(BatchStats.merge(parts))
    assert bits(pickle.loads(pickle.dumps(total)).result()) == bits(total.result())


def test_merge_changes_the_first_only():
    x = np.arange(12, dtype=np.uint8).reshape(6, 2)
    a, b = StatsAccumulator().update(x[:2]), StatsAccumulator().update(x[2:])
    before = bits(b.result())
    assert a.merge(b) is a
    assert bits(a.result()) == bits(fastbn.batch_stats(x))
    assert bits(b.result()) == before
    assert bits(a.merge(StatsAccumulator()).result()) == bits(fastbn.batch_stats(x))
    assert a.merge(a).result().count[0] == 12
    assert a.merge(fastbn.batch_stats(x)).result().count[0] == 18
    with pytest.raises(
        TypeError, match="other: expected a StatsAccumulator or BatchStats, got int"
    ):
        a.merge(3)


def test_a_result_is_a_snapshot():
    total = StatsAccumulator().update(np.ones((2, 2)))
    first = total.result()
    first.mean[:] = 9
    total.update(np.zeros((2, 2)))
    assert first.count.tolist() == [2, 2]
    assert total.result().mean.tolist() == [0.5, 0.5]


def test_nothing_and_what_is_refused():
    total = StatsAccumulator()
    with pytest.raises(ValueError, match="at least one update"):
        total.result()
    total.update(np.ones((2, 3), np.uint8))
    before = bits(total.result())
    for x, kind in (np.ones((2, 4), np.uint8), ValueError), (np.ones((2, 3), int), TypeError):
        with pytest.raises(kind, match=r"^x: "):
            total.update(x)
    with pytest.raises(ValueError, match="other: expected 3 channels"):
        total.merge(fastbn.batch_stats(np.ones((2, 4))))
    assert bits(total.result()) == before
    mixed = total.update(np.ones((2, 3), np.float32)).result()
    assert mixed.sum is None
    assert mixed.count[0] == 4
    for wrong in {"layout": "NN"}, {"nan_policy": "no"}:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StatsAccumulator(**wrong)


def test_threads_lose_no_update():
    x = np.arange(60, dtype=np.uint8).reshape(20, 3)
    total = StatsAccumulator()

    def work():
        for _ in range(50):
            total.update(x)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert bits(total.result()) == bits(fastbn.batch_stats(np.concatenate([x] * 200)))


OPTIONAL = ("fastbn.data", "PIL", "tifffile", "zarr", "h5py", "xarray", "tqdm", "dask", "sklearn")


def test_fastbn_imports_none_of_it():
    code = f"import fastbn, sys; print([n for n in {OPTIONAL} if n in sys.modules])"
    assert run(code) == "[]"


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    from fastbn.data import stats

    (tmp_path / "a.png").write_bytes(b"")
    for name, file, extra in (("PIL.Image", "a.png", "data"),):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=rf"fastbn\[{extra}\]"):
            stats(tmp_path / file)
