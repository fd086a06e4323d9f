# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures: every CPU level that runs here, in one process; threads; dtypes."""

import pytest

import fastbn
from fastbn import _dispatch


@pytest.fixture(params=_dispatch.runnable())
def level(request):
    with _dispatch.using(request.param):
        yield request.param


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def default_threads():
    yield
    fastbn.set_num_threads(None)
