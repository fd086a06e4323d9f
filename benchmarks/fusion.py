# SPDX-License-Identifier: BSD-3-Clause
"""What an activation and a residual cost in batch norm, on ResNet-50's shapes, float32.

    python -m benchmarks.fusion --quick

Each operation with and without them, in interleaved rounds: time of the plain one, the others
as ratios to it. And where PyTorch is installed, a training step of norm, add and ReLU,
forward and backward, beside PyTorch's three operations with autograd. Prints Markdown and
writes fused-operations.json and fused-training-step.json.
Like `python -m benchmarks` it needs an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import fastbn
from benchmarks.cases import EPS, MOMENTUM, NETWORKS, Arrays, Case
from benchmarks.contenders import Contender, python_calls
from benchmarks.machine import command, machine
from benchmarks.race import outcome, race
from benchmarks.report import comparison
from benchmarks.results import Results, write

try:
    import torch

    from benchmarks.peers.torch import Tensors
except ImportError:
    torch = None

QUICK = (32, 512, 7, 7), (32, 64, 28, 28)
# name: (activation, with a residual); the first is what the others are compared with.
FUSIONS = {
    "plain": (None, False),
    "relu": ("relu", False),
    "leaky_relu": ("leaky_relu", False),
    "silu": ("silu", False),
    "residual": (None, True),
    "residual, relu": ("relu", True),
}


class Fused(Arrays):
    """The arrays of a case, and a residual."""

    def __init__(self, case: Case):
        super().__init__(case)
        self.residual = np.random.default_rng(1).standard_normal(case.stored, dtype=self.x.dtype)
        self.dx = np.empty_like(self.x)

    def forward(self, out: np.ndarray | None, **fused: object) -> list[np.ndarray]:
        """Return y and the statistics, in training."""
        return fastbn.batch_norm_forward(
            self.x, self.weight, self.bias, running_mean=self.running_mean,
            running_var=self.running_var, layout=self.case.layout, out=out, **fused,
        )  # fmt: skip

    def backward(
        self, mean: np.ndarray, invstd: np.ndarray, out: np.ndarray | None, **fused: object
    ) -> tuple[np.ndarray, ...]:
        """Return the gradients."""
        return fastbn.batch_norm_backward(
            self.dy, self.x, mean, invstd, self.weight, bias=self.bias,
            layout=self.case.layout, out=out, **fused,
        )  # fmt: skip


def operation(a: Fused, activation: str | None, adds: bool) -> Callable[[], object]:
    fused = {"activation": activation, "residual": a.residual if adds else None}
    if a.case.op == "inference":
        vectors = a.running_mean, a.running_var, a.weight, a.bias
        return lambda: fastbn.batch_norm(a.x, *vectors, layout=a.case.layout, out=a.y, **fused)
    if a.case.op == "training":
        return lambda: a.forward(a.y, **fused)
    _, *saved = a.forward(a.y, **fused)
    return lambda: a.backward(*saved, a.dx, **fused)


def contender(name: str, kind: str, call: Callable[[], object], a: Fused) -> Contender:
    call()
    return Contender(name, kind, python_calls(call), lambda: a.y)


def fusions(a: Fused) -> Iterator[Contender]:
    for name, (activation, adds) in FUSIONS.items():
        yield contender(name, "fastbn", operation(a, activation, adds), a)


def steps(a: Fused) -> Iterator[Contender]:
    """Yield training steps of norm, add and ReLU; the last three are of PyTorch."""
    fused = {"activation": "relu", "residual": a.residual}

    def ours(y: np.ndarray | None, dx: np.ndarray | None) -> tuple[np.ndarray, ...]:
        _, *saved = a.forward(y, **fused)
        return a.backward(*saved, dx, **fused)

    yield contender("fastbn", "fastbn", lambda: ours(None, None), a)
    yield contender("fastbn out=", "fastbn new", lambda: ours(a.y, a.dx), a)
    t = Tensors(a)
    residual = t._tensor(a.residual)
    given = [v.detach().requires_grad_() for v in (t.x, t.weight, t.bias, residual)]

    def normalised() -> torch.Tensor:
        return torch.nn.functional.batch_norm(
            given[0], t.running_mean, t.running_var, given[1], given[2], True, MOMENTUM, EPS
        )

    def theirs(in_place: bool) -> tuple[torch.Tensor, ...]:
        z = normalised()
        y = z.add_(given[3]).relu_() if in_place else torch.relu(z + given[3])
        return torch.autograd.grad(y, given, t.dy)

    # As a whole: near 0 a rounding decides on which side of the ReLU an element is.
    for ours_, theirs_ in zip(ours(None, None), reordered(theirs(False), t), strict=True):
        if np.linalg.norm(ours_ - theirs_) > 1e-2 * np.linalg.norm(ours_):
            raise RuntimeError(f"{a.case.name}: fastbn and PyTorch differ")
    yield contender("PyTorch", "peer", lambda: theirs(False), a)
    yield contender("PyTorch in place", "peer", lambda: theirs(True), a)


def reordered(gradients: tuple[torch.Tensor, ...], t: Tensors) -> Iterator[np.ndarray]:
    """Yield PyTorch's gradients in the order and the layout of fastbn's."""
    dx, dweight, dbias, dresidual = gradients
    yield t.stored(dx)
    yield dweight.numpy()
    yield dbias.numpy()
    yield t.stored(dresidual)


def cases(shapes: Iterable[tuple[int, ...]], threads: int, *ops: str) -> list[Case]:
    return [
        Case("batch", "ResNet-50", shape, layout, op, "float32", threads)
        for layout, op, shape in itertools.product(("NCHW", "NHWC"), ops, shapes)
    ]


def run(
    make: Callable[[Fused], Iterator[Contender]], todo: list[Case], budget: float, found: Results
) -> None:
    """Add the cases to `found`; the first contender is the unit."""
    bar = tqdm(todo, unit="case")
    for case in bar:
        bar.set_postfix_str(case.name)
        lanes = race(list(make(Fused(case))), budget)
        found.add(outcome(case, lanes, lanes[0]))


def main() -> None:
    processors = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, processors}))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each case, about")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    arguments = parser.parse_args()
    shapes = QUICK if arguments.quick else NETWORKS["ResNet-50"]
    here = machine(), command("benchmarks.fusion")
    fused, stepped = Results(*here, unit="plain"), Results(*here, unit="fastbn")
    for threads in arguments.threads:
        fastbn.set_num_threads(threads)
        todo = cases(shapes, threads, "inference", "training", "backward")
        run(fusions, todo, arguments.budget, fused)
        if torch is not None:
            torch.set_num_threads(threads)
            run(steps, cases(shapes, threads, "step"), arguments.budget, stepped)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, found in ("fused-operations", fused), ("fused-training-step", stepped):
        if found.outcomes:
            print(f"\n# {name}\n\n{comparison(found)}")
            write(found, arguments.output / f"{name}.json")
    if torch is None:
        print("\nPyTorch is not installed: no training steps")


if __name__ == "__main__":
    main()
