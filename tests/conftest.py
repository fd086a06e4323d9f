# SPDX-License-Identifier: BSD-3-Clause
"""Fixtures: every CPU level that runs here, in one process; threads; dtypes; the caller's FPU."""

import ctypes
import platform
import sys

import everywhere
import pytest
from arrays import DTYPES, FLOATS, HALVES

import fastbn
from fastbn import _dispatch, _threads


def pytest_report_header(config):
    return everywhere.report()


def pytest_terminal_summary(terminalreporter):
    # Once more at the end, where it is read: what this run has not compared.
    for line in everywhere.report()[1:]:
        terminalreporter.write_line(line)


@pytest.fixture(params=_dispatch.runnable())
def level(request):
    with _dispatch.using(request.param):
        yield request.param


@pytest.fixture(params=FLOATS)
def dtype(request):
    return request.param


@pytest.fixture(params=FLOATS)
def kept(request):
    """The dtype of running statistics."""
    return request.param


def half_type(name):
    if name == "bfloat16":
        # Importing it is what teaches NumPy the name.
        pytest.importorskip("ml_dtypes")
    return name


@pytest.fixture(params=HALVES)
def half(request):
    return half_type(request.param)


@pytest.fixture(params=DTYPES)
def any_dtype(request):
    return half_type(request.param)


@pytest.fixture(params=DTYPES)
def parameters(request):
    """The dtype of weight and bias."""
    return half_type(request.param)


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


@pytest.fixture
def flushing():
    """The calling thread rounds upwards and flushes subnormals, as x86 can."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        pytest.skip("sets the control register of an x86 CPU through glibc's fenv_t")
    libm = ctypes.CDLL("libm.so.6")
    before, changed = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    libm.fegetenv(before)
    libm.fegetenv(changed)
    changed[7] |= 0x8040 | 0x4000
    yield lambda on: libm.fesetenv(changed if on else before)
    libm.fesetenv(before)
