# SPDX-License-Identifier: BSD-3-Clause
"""Ten calls for pytest-benchmark: to see a change's effect against the run before.

CONTRIBUTING.md has the commands. The yardstick, np.copyto, is among them: what
moves that moves everything.
"""

import numpy as np
import pytest

import fastbn
from benchmarks.cases import EPS, Arrays, Case

CASES = [
    ((32, 64, 56, 56), "NCHW", "inference"),
    ((32, 64, 56, 56), "NCHW", "training"),
    ((32, 64, 56, 56), "NCHW", "backward"),
    ((32, 64, 56, 56), "NHWC", "training"),
    ((32, 64, 56, 56), "NHWC", "backward"),
    ((32, 512, 7, 7), "NCHW", "training"),
    ((32, 512, 7, 7), "NHWC", "training"),
    ((256, 4096), "NCHW", "training"),
    ((1, 8, 4, 4), "NCHW", "inference"),
    ((1, 8, 4, 4), "NCHW", "training"),
]
IDS = [f"{'x'.join(map(str, shape))}-{layout}-{op}" for shape, layout, op in CASES]


def arrays(shape, layout, op):
    return Arrays(Case("", shape, layout, op, "float32", fastbn.get_num_threads()))


@pytest.mark.parametrize(("shape", "layout", "op"), CASES, ids=IDS)
def test_call(benchmark, shape, layout, op):
    a = arrays(shape, layout, op)
    benchmark.group = f"{'x'.join(map(str, shape))}"
    benchmark.extra_info["bytes"] = a.x.nbytes
    if op == "backward":
        mean, var = a.moments
        given = mean, 1 / np.sqrt(var + EPS), a.weight
        benchmark(fastbn.batch_norm_backward, a.dy, a.x, *given, layout=a.fastbn_layout, out=a.y)
    else:
        vectors = a.running_mean, a.running_var, a.weight, a.bias
        benchmark(
            fastbn.batch_norm, a.x, *vectors, op == "training", layout=a.fastbn_layout, out=a.y
        )


@pytest.mark.parametrize("shape", [(32, 64, 56, 56), (32, 512, 7, 7)])
def test_copy(benchmark, shape):
    a = arrays(shape, "NCHW", "inference")
    benchmark.group = f"{'x'.join(map(str, shape))}"
    benchmark(np.copyto, a.y, a.x)
