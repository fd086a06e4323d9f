# SPDX-License-Identifier: BSD-3-Clause
"""Time of each operation as a ratio to the best copy of the same tensor.

    python benchmarks/ratios.py [--levels v4 v3 v2] [--threads 1 2] [--rounds 25]

The copy is the fastest of three, in the same rounds: NumPy's, and a copy in C
with ordinary and one with streaming stores, on the same number of threads,
compiled here. All outputs exist beforehand. Calls are interleaved, each figure
is the median of the rounds. Run it on an idle machine.
"""

import argparse
import ctypes
import functools
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

import fastbn
from fastbn import _dispatch

SHAPES = [
    ((32, 64, 112, 112), None),
    ((32, 112, 112, 64), "NHWC"),
    ((32, 64, 56, 56), None),
    ((32, 56, 56, 64), "NHWC"),
    ((32, 256, 14, 14), None),
    ((32, 512, 7, 7), None),
    ((32, 7, 7, 512), "NHWC"),
    ((1, 64, 56, 56), None),
    ((1, 56, 56, 64), "NHWC"),
    ((64, 1024), None),
]
OPERATIONS = ("inference", "training", "backward", "batch_stats")

COPY = """
#include <string.h>
#include <stdint.h>
#include <omp.h>
#if defined(__SSE2__)
#include <emmintrin.h>
static void streaming(const char *from, char *to, size_t n)
{
    size_t i = (64 - (uintptr_t)to % 64) % 64;
    if (n < 128) { memcpy(to, from, n); return; }
    memcpy(to, from, i);
    for (; i + 64 <= n; i += 64)
        for (int k = 0; k < 64; k += 16)
            _mm_stream_si128((__m128i *)(to + i + k),
                             _mm_loadu_si128((const __m128i *)(from + i + k)));
    memcpy(to + i, from + i, n - i);
    _mm_sfence();
}
#else
#define streaming memcpy
#endif
void copy(const char *from, char *to, size_t n, int stream, int threads)
{
    #pragma omp parallel num_threads(threads) if(threads > 1)
    {
        size_t share = (n / threads + 63) / 64 * 64;
        size_t start = share * omp_get_thread_num();
        size_t size = start >= n ? 0 : start + share > n ? n - start : share;
        if (stream) streaming(from + start, to + start, size);
        else memcpy(to + start, from + start, size);
    }
}
"""


def compiled_copy(folder: str):
    """Return the copy function in C, with prepared argument types."""
    source, library = Path(folder, "copy.c"), Path(folder, "copy.so")
    source.write_text(COPY)
    command = ["cc", "-O3", "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    copy = ctypes.CDLL(str(library)).copy
    copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    copy.restype = None
    return copy


def calls(copy, shape, layout, threads, rng):
    """Return the copies and the operations on one tensor, as calls without arguments."""
    x, dy = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    y = np.empty_like(x)
    channels = shape[1] if layout is None else shape[-1]
    weight, bias = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    running = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    _, mean, invstd = fastbn.batch_norm_forward(x, layout=layout, out=y)
    address = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data)
    size = ctypes.c_size_t(x.nbytes)
    copies = [functools.partial(copy, *address, size, stream, threads) for stream in (0, 1)]
    copies.append(functools.partial(np.copyto, y, x))
    norm = functools.partial(fastbn.batch_norm, x, *running, weight, bias, layout=layout, out=y)
    operations = [
        norm,
        functools.partial(norm, training=True),
        functools.partial(
            fastbn.batch_norm_backward, dy, x, mean, invstd, weight, layout=layout, out=y
        ),
        functools.partial(fastbn.batch_stats, x, layout=layout),
    ]
    return copies, operations


def medians(functions, rounds):
    """Return the median time of each function, called in turn."""
    repeats = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        repeats.append(max(1, int(2e-3 / (time.perf_counter() - start))))
    times = np.empty((rounds, len(functions)))
    for row in times:
        for k, function in enumerate(functions):
            start = time.perf_counter()
            for _ in range(repeats[k]):
                function()
            row[k] = (time.perf_counter() - start) / repeats[k]
    return np.median(times, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--levels", nargs="+", default=_dispatch.runnable()[:1])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    print("| level | threads | shape | copy, us |", " | ".join(OPERATIONS), "|")
    print("| --- | --- | --- | --- |", " | ".join("---" for _ in OPERATIONS), "|")
    with tempfile.TemporaryDirectory() as folder:
        copy = compiled_copy(folder)
        for level in arguments.levels:
            for threads in arguments.threads:
                for shape, layout in SHAPES:
                    rng = np.random.default_rng(0)
                    with _dispatch.using(level), fastbn.threads(threads):
                        copies, operations = calls(copy, shape, layout, threads, rng)
                        times = medians(copies + operations, arguments.rounds)
                    best = times[: len(copies)].min()
                    ratios = " | ".join(f"{time / best:.2f}" for time in times[len(copies) :])
                    name = "x".join(map(str, shape)) + f" {layout or 'NC...'}"
                    print(f"| {level} | {threads} | {name} | {best * 1e6:.1f} | {ratios} |")


if __name__ == "__main__":
    main()
