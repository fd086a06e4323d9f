# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures: every CPU level that runs here, in one process; threads; dtypes."""

import pytest

import fastbn
from fastbn import _dispatch, _threads


@pytest.fixture(params=_dispatch.runnable())
def level(request):
    with _dispatch.using(request.param):
        yield request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture
def always_parallel():
    """Small calls, too, use the number of threads that is set."""
    _threads.always_parallel(True)
    yield
    _threads.always_parallel(False)


@pytest.fixture(autouse=True)
def default_threads():
    yield
    fastbn.set_num_threads(None)
