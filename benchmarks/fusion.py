# SPDX-License-Identifier: BSD-3-Clause
"""What an activation and a residual cost in batch norm, on ResNet-50's shapes, float32.

    python -m benchmarks.fusion --quick

Each operation with and without them, in interleaved rounds: time of the plain one, the others
as ratios to it. And where PyTorch is installed, a training step of norm, add and ReLU,
forward and backward, beside PyTorch's three operations with autograd. Prints Markdown.
Like `python -m benchmarks` it needs an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
from tqdm import tqdm

import fastbn
from benchmarks.cases import EPS, MOMENTUM, NETWORKS, Arrays, Case
from benchmarks.contenders import Contender, python_calls
from benchmarks.race import Lane, race, ratio

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


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def table(title: str, names: list[str], rows: dict[Case, list[Lane]]) -> None:
    """Print the first lane's time, the ratios of the others to it, and their means."""
    print(f"\n{title}\n")
    print(f"| layout | op | shape | {names[0]} | " + " | ".join(names[1:]) + " |")
    print("| --- " * (len(names) + 3) + "|")
    ratios = defaultdict(list)
    for case, lanes in rows.items():
        these = [ratio(lane, lanes[0]) for lane in lanes[1:]]
        ratios[case.layout, case.op].append(these)
        shape = "x".join(map(str, case.shape))
        cells = [f"{lanes[0].median * 1e3:.3f} ms", *(f"{r:.2f}" for r in these)]
        print(f"| {case.layout} | {case.op} | {shape} | " + " | ".join(cells) + " |")
    for (layout, op), these in ratios.items():
        means = [f"{geometric_mean(list(column)):.2f}" for column in zip(*these, strict=True)]
        print(f"| {layout} | {op} | geometric mean | | " + " | ".join(means) + " |")


def run(make: Callable[[Fused], Iterator[Contender]], cases: list[Case], budget: float):
    bar = tqdm(cases, unit="case")
    rows = {}
    for case in bar:
        bar.set_postfix_str(case.name)
        rows[case] = race(list(make(Fused(case))), budget)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusion", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each case, about")
    arguments = parser.parse_args()
    fastbn.set_num_threads(arguments.threads)
    shapes = QUICK if arguments.quick else NETWORKS["ResNet-50"]

    def cases(*ops: str) -> list[Case]:
        return [
            Case("batch", "ResNet-50", shape, layout, op, "float32", arguments.threads)
            for layout, op, shape in itertools.product(("NCHW", "NHWC"), ops, shapes)
        ]

    rows = run(fusions, cases("inference", "training", "backward"), arguments.budget)
    print(f"{arguments.threads} of {os.cpu_count()} processors")
    table("Batch norm, and ratios to it", list(FUSIONS), rows)
    if torch is None:
        print("\nPyTorch is not installed: no training steps")
        return
    torch.set_num_threads(arguments.threads)
    rows = run(steps, cases("step"), arguments.budget)
    names = ["fastbn", "fastbn out=", "PyTorch", "PyTorch in place"]
    table("A training step of norm, add and ReLU, and ratios to it", names, rows)


if __name__ == "__main__":
    main()
