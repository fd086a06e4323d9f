# SPDX-License-Identifier: BSD-3-Clause
"""Comparisons over CPU levels and numbers of threads, which say where there is nothing to compare.

Numbers of threads may be larger than that of processors: OpenMP then makes as many all the same.
"""

import itertools

import pytest

import fastbn
from fastbn import _dispatch

ONE_LEVEL = "only one level runs here: nothing to compare"
NO_THREADS = "built without OpenMP, numbers of threads are all one: nothing to compare"


def has_threads():
    return fastbn.show_config()["openmp"] is not None


def ways(threads):
    """(level, number of threads), for a comparison; with one, the test is skipped."""
    if not has_threads():
        threads = [1]
    pairs = list(itertools.product(_dispatch.runnable(), threads))
    if len(pairs) == 1:
        pytest.skip(ONE_LEVEL if has_threads() else f"{NO_THREADS}; {ONE_LEVEL}")
    return pairs


def assert_same(results, threads=(1,)):
    """Raise unless what `results()` returns is the same at each level, with each number."""
    expected = None
    for level, number in ways(threads):
        with _dispatch.using(level), fastbn.threads(number):
            actual = results()
        expected = actual if expected is None else expected
        assert actual == expected, (level, number)


def report():
    """What the comparisons of this run compare."""
    lines = [f"fastbn: levels {', '.join(_dispatch.runnable())}"]
    if len(_dispatch.runnable()) == 1:
        lines.append(f"fastbn: {ONE_LEVEL} where tests compare levels")
    if not has_threads():
        lines.append(f"fastbn: {NO_THREADS} where tests compare them")
    return lines
