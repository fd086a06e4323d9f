# SPDX-License-Identifier: BSD-3-Clause
"""Some calls for pytest-benchmark: to see a change's effect against the run before.

CONTRIBUTING.md has the commands. The yardstick, np.copyto, is among them: what
moves that moves everything.
"""

import numpy as np
import pytest

import fastbn
from benchmarks.cases import Arrays, Case
from benchmarks.contenders import fastbn_call

CASES = [
    ("batch", (32, 64, 56, 56), "NCHW", "inference", "float32"),
    ("batch", (32, 64, 56, 56), "NCHW", "training", "float32"),
    ("batch", (32, 64, 56, 56), "NCHW", "backward", "float32"),
    ("batch", (32, 64, 56, 56), "NHWC", "training", "float32"),
    ("batch", (32, 64, 56, 56), "NHWC", "backward", "float32"),
    ("batch", (32, 512, 7, 7), "NCHW", "training", "float32"),
    ("batch", (32, 512, 7, 7), "NHWC", "training", "float32"),
    ("batch", (256, 4096), "NCHW", "training", "float32"),
    ("batch", (1, 8, 4, 4), "NCHW", "inference", "float32"),
    ("batch", (1, 8, 4, 4), "NCHW", "training", "float32"),
    ("batch", (32, 64, 56, 56), "NCHW", "training", "bfloat16"),
    ("layer", (1024, 1024), "rows", "forward", "float32"),
    ("layer", (1024, 1024), "rows", "backward", "float32"),
    ("layer", (1024, 1024), "rows", "forward", "bfloat16"),
    ("layer", (10, 64), "rows", "forward", "float32"),
    ("rms", (1024, 1024), "rows", "forward", "bfloat16"),
    ("group", (4, 128, 128, 128), "NCHW", "forward", "float32"),
    ("group", (4, 128, 128, 128), "NHWC", "forward", "float32"),
    ("instance", (4, 128, 128, 128), "NCHW", "forward", "float32"),
]


def arrays(norm, shape, layout, op, dtype):
    return Arrays(Case(norm, "", shape, layout, op, dtype, fastbn.get_num_threads()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_call(benchmark, case):
    a = arrays(*case)
    benchmark.group = "x".join(map(str, a.case.shape))
    benchmark.extra_info["bytes"] = a.x.nbytes
    benchmark(fastbn_call(a, a.y))


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (32, 512, 7, 7)])
def test_copy(benchmark, shape):
    a = arrays("batch", shape, "NCHW", "inference", "float32")
    benchmark.group = "x".join(map(str, shape))
    benchmark(np.copyto, a.y, a.x)
