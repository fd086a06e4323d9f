# SPDX-License-Identifier: BSD-3-Clause
"""What a deep network keeps for backward, with BatchNorm and with InPlaceBatchNorm.

    python benchmarks/memory.py

DEPTH times a 1x1 convolution (a matrix product), batch norm, leaky ReLU; one step forward
and backward, in NumPy. With `BatchNorm` a layer keeps the output of its convolution and what
the next one gets; in place, the two are the same memory. Each network has a process of its
own, since the peak of a process never sinks. Their gradients are compared at the end.
Needs no idle machine: it times nothing.
"""

import resource
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

import fastbn

DEPTH = 50
SHAPE = (32, 28, 28, 64)  # NHWC
MB = 1e6


def forward(x: np.ndarray, kernels: list[np.ndarray], norms: list) -> tuple[np.ndarray, list]:
    """Return the output, and the input of each convolution."""
    inputs = []
    for kernel, norm in zip(kernels, norms, strict=True):
        inputs.append(x)
        x = norm(x @ kernel)
    return x, inputs


def backward(dy: np.ndarray, kernels: list[np.ndarray], norms: list, inputs: list) -> list:
    """Return the gradients of the input and of every parameter; forget what is done with."""
    gradients = []
    while norms:
        norm, x, kernel = norms.pop(), inputs.pop(), kernels.pop()
        dy = norm.backward(dy, out=dy)
        rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        gradients += [rows[0].T @ rows[1], norm.weight_grad, norm.bias_grad]
        dy = dy @ kernel.T
    return [dy, *gradients]


def step(name: str) -> tuple[float, float, float, list]:
    """Return MB kept for backward, MB at the peak, MB of the process; and the gradients."""
    rng = np.random.default_rng(0)
    channels = SHAPE[-1]
    kernels = [
        rng.normal(0.0, channels**-0.5, (channels, channels)).astype(np.float32)
        for _ in range(DEPTH)
    ]
    layer = getattr(fastbn, name)
    norms = [layer(channels, layout="NHWC", activation="leaky_relu") for _ in range(DEPTH)]
    x, dy = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    _, inputs = forward(x, kernels, norms)
    kept = tracemalloc.get_traced_memory()[0]
    gradients = backward(dy, kernels, norms, inputs)
    peak = tracemalloc.get_traced_memory()[1]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return kept / MB, peak / MB, grown / MB, gradients


def main() -> None:
    tensor = np.prod(SHAPE) * 4 / MB
    print(f"{DEPTH} layers of {'x'.join(map(str, SHAPE))} float32, {tensor:.1f} MB a tensor\n")
    print("| | kept for backward | peak of the arrays | growth of the process |")
    print("| --- | --- | --- | --- |")
    results = []
    for name in ("BatchNorm", "InPlaceBatchNorm"):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            *sizes, gradients = process.submit(step, name).result()
        results.append(gradients)
        print(f"| `{name}` | " + " | ".join(f"{size:.0f} MB" for size in sizes) + " |")
    difference = max(
        float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*results, strict=True)
    )
    print(f"\nLargest difference of a gradient, relative to its largest value: {difference:.1e}")


if __name__ == "__main__":
    main()
