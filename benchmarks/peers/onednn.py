# SPDX-License-Identifier: BSD-3-Clause
"""oneDNN from C: what a program would get that embeds it. For small tensors no peer of
calls from Python, whose overhead it does not have.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks import native
from benchmarks.cases import EPS, OPERATIONS, SMALL, Arrays
from benchmarks.contenders import Contender, c_calls

library = native.onednn()

# As onednn.c and oneDNN number them. Instance norm has as many groups as channels.
NORMS = {"batch": 0, "layer": 1, "rms": 2, "group": 3, "instance": 3}
TYPES = {"float16": 1, "bfloat16": 2, "float32": 3}


def contenders(a: Arrays) -> Iterator[Contender]:
    case = a.case
    if case.dtype not in TYPES:
        return
    if case.op == "backward":
        mean, var = (v.astype(np.float32) for v in a.moments)
    else:
        mean, var = a.running_mean.copy(), a.running_var.copy()
    vectors = [mean, var, a.weight, a.bias, np.empty_like(a.weight), np.empty_like(a.bias)]
    dims = np.array(case.shape, np.int64)
    prepared = library.norm_prepare(
        NORMS[case.norm], OPERATIONS.index(case.op), TYPES[case.dtype], case.groups,
        case.layout == "NHWC", len(dims), dims.ctypes.data, EPS,
        *(v.ctypes.data for v in (a.x, a.dy, a.y, *vectors)),
    )  # fmt: skip
    if not prepared:
        return

    class Owner:  # frees what oneDNN has when the contender goes
        arrays = a, vectors

        def __del__(self) -> None:
            library.norm_free(prepared)

    owner = Owner()

    def function(count: int) -> None:
        if library.norm_run(prepared, count):
            raise RuntimeError(f"oneDNN failed, {owner.arrays[0].case.name}")

    # By another name where it is no peer: a contender has one kind in all cases.
    small = a.x.nbytes < SMALL
    name, kind = ("oneDNN (C), small", "other") if small else ("oneDNN (C)", "peer")
    yield Contender(name, kind, c_calls(function), lambda: a.y)
