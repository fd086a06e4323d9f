# SPDX-License-Identifier: BSD-3-Clause
"""The time of one small call of fastbn.torch beside PyTorch's.

Run ``python -m benchmarks.torch_overhead``.
The two take turns; the fastest of many rounds counts. One thread, x of 1x8x4x4.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable

import torch
from torch.nn import functional

import fastbn.torch

CALLS, ROUNDS = 500, 31
SHAPE = 1, 8, 4, 4


def calls(f, x: torch.Tensor, running: list[torch.Tensor], vectors: list[torch.Tensor]):
    """Return a call of each function of `f`, PyTorch's or fastbn's."""
    weight, bias, row_weight, row_bias = vectors
    return {
        "batch_norm, evaluation": lambda: f.batch_norm(x, *running, weight, bias),
        "batch_norm, training": lambda: f.batch_norm(x, *running, weight, bias, True),
        "layer_norm": lambda: f.layer_norm(x, (4,), row_weight, row_bias),
        "rms_norm": lambda: f.rms_norm(x, (4,), row_weight),
        "group_norm": lambda: f.group_norm(x, 2, weight, bias),
        "instance_norm": lambda: f.instance_norm(x, weight=weight, bias=bias),
    }


def microseconds(pair: list[Callable[[], object]]) -> list[float]:
    best = [float("inf")] * len(pair)
    for _ in range(ROUNDS):
        for i, call in enumerate(pair):
            best[i] = min(best[i], timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return best


def backward(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    seed = torch.ones(SHAPE)
    return lambda: torch.autograd.backward(call(), seed)


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(SHAPE)
    running = [torch.zeros(8), torch.ones(8)]
    vectors = [torch.randn(n) for n in (8, 8, 4, 4)]
    for how in "without gradients", "forward", "forward and backward":
        print(how)
        for tensor in (x, *vectors):
            tensor.requires_grad_(how != "without gradients")
        mine, theirs = (calls(f, x, running, vectors) for f in (fastbn.torch, functional))
        for name in mine:
            pair = [theirs[name], mine[name]]
            if "backward" in how:
                pair = [backward(call) for call in pair]
            other, own = microseconds(pair)
            ratio = own / other
            print(f"  {name:24} PyTorch {other:6.2f} us   fastbn {own:6.2f} us   {ratio:.2f}")


if __name__ == "__main__":
    main()
