# SPDX-License-Identifier: BSD-3-Clause
"""Dask arrays have the statistics of their arrays, on any scheduler, with a worker killed."""

import os
import signal
import time

import numpy as np
import pytest
from exact import bits
from extras import need
from test_data_sources import X

import fastbn

da = need("dask.array")
distributed = need("distributed")
import fastbn.dask  # noqa: E402

CHUNKS = [(7, 5, 6, 3), (2, 5, 6, 3), (3, 2, 4, 1), (1, 1, 1, 2)]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("layout", ["NHWC", "CNHW", None])
def test_any_chunks(chunks, layout):
    x = da.from_array(X, chunks=chunks)
    expected = bits(fastbn.batch_stats(X, layout=layout))
    for scheduler in "synchronous", "threads":
        delayed = fastbn.dask.batch_stats(x, layout=layout, compute=False)
        assert bits(delayed.compute(scheduler=scheduler)) == expected
    options = {"layout": "NHWC", "out_layout": "NCHW", "max_value": 255}
    y = fastbn.dask.normalize(x, [0.1, 0.2, 0.3], [0.5, 0.25, 1], **options)
    expected = fastbn.normalize(X, [0.1, 0.2, 0.3], [0.5, 0.25, 1], **options)
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(y.compute(), expected)


def test_floats_with_what_is_left_out():
    x = (X / 7).astype(np.float32)
    x[X < 20] = np.nan
    options = {"layout": "NHWC", "nan_policy": "omit", "nodata": [3, 4, 5]}
    stats = fastbn.dask.batch_stats(da.from_array(x, chunks=(2, 3, 6, 2)), **options)
    whole = fastbn.batch_stats(x, **options)
    np.testing.assert_array_equal(stats.count, whole.count)
    np.testing.assert_allclose(stats.var(), whole.var(), rtol=1e-6)
    with pytest.raises(ValueError, match="NaN"):
        fastbn.dask.batch_stats(da.from_array(x), layout="NHWC", nan_policy="raise")


def test_what_is_refused():
    for call in fastbn.dask.batch_stats, lambda a: fastbn.dask.normalize(a, 0, 1):
        with pytest.raises(TypeError, match="array: expected a dask"):
            call(X)
    x = da.from_array(X)
    with pytest.raises(ValueError, match="layout"):
        fastbn.dask.batch_stats(x, layout="NC")
    with pytest.raises(ValueError, match="std"):
        fastbn.dask.normalize(x, 0, [1, 2, 0], layout="NHWC")
    empty = fastbn.dask.batch_stats(da.zeros((0, 3), dtype="uint8"))
    assert empty.count.tolist() == [0, 0, 0]


def slow(block, pids):
    time.sleep(0.1)
    with open(pids, "a") as file:
        file.write(f"{os.getpid()}\n")
    return block


@pytest.mark.filterwarnings("ignore")  # distributed's own, of the worker that is gone
def test_a_cluster_whose_worker_is_killed(tmp_path):
    pids = tmp_path / "pids"
    x = np.concatenate([X] * 8)
    with (
        distributed.LocalCluster(2, threads_per_worker=1, dashboard_address=None,
                                 local_directory=str(tmp_path)) as cluster,
        distributed.Client(cluster) as client,
    ):  # fmt: skip
        array = da.from_array(x, chunks=(2, 5, 6, 3)).map_blocks(
            slow, str(pids), dtype=x.dtype, meta=x[:0]
        )
        future = client.compute(fastbn.dask.batch_stats(array, layout="NHWC", compute=False))
        while not pids.exists() or pids.read_text().count("\n") < 4:
            time.sleep(0.05)
        os.kill(int(pids.read_text().split()[0]), signal.SIGKILL)
        stats = future.result(timeout=60)
    assert bits(stats) == bits(fastbn.batch_stats(x, layout="NHWC"))
