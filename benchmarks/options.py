# SPDX-License-Identifier: BSD-3-Clause
"""What options of statistics cost in batch norm, on ResNet-50's shapes, float32.

    python -m benchmarks.options --quick

Training and backward with each of them, in interleaved rounds: time of the plain operation, the
others as ratios to it. Ghost batches are of 8 and 16 of the 32 images. Prints Markdown and
writes options.json. Like `python -m benchmarks` it needs an idle machine.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fastbn
from benchmarks.cases import NETWORKS
from benchmarks.contenders import Contender
from benchmarks.fusion import QUICK, Fused, cases, contender, run
from benchmarks.machine import command, machine
from benchmarks.report import comparison
from benchmarks.results import Results, write

# name: arguments of forward; the first is what the others are compared with.
FORWARD: dict[str, dict] = {
    "plain": {},
    "ghost, 8": {"ghost_batch_size": 8},
    "ghost, 16": {"ghost_batch_size": 16},
    "update_running=False": {"update_running": False},
    "skip": {"on_nonfinite": "skip"},
    "biased": {"unbiased": False},
}
BACKWARD = ("plain", "ghost, 8", "ghost, 16")


def layer(a: Fused, kind: type, **options: object) -> Callable[[], object]:
    bn = kind(a.x.shape[a.case.layout.index("C")], layout=a.case.layout, **options)
    return lambda: bn(a.x, out=a.y)


def options(a: Fused) -> Iterator[Contender]:
    if a.case.op == "backward":
        for name in BACKWARD:
            _, *saved = a.forward(a.y, **FORWARD[name])
            call = lambda saved=saved, name=name: a.backward(*saved, a.dx, **FORWARD[name])  # noqa: E731
            yield contender(name, "fastbn", call, a)
        return
    for name, arguments in FORWARD.items():
        call = lambda arguments=arguments: a.forward(a.y, **arguments)  # noqa: E731
        yield contender(name, "fastbn", call, a)
    yield contender("pooled", "fastbn", layer(a, fastbn.BatchNorm, track="pooled"), a)
    yield contender("BatchRenorm", "fastbn", layer(a, fastbn.BatchRenorm), a)


def main() -> None:
    processors = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two shapes")
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, processors}))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each case, about")
    parser.add_argument("--output", type=Path, default=Path("benchmark-results"))
    arguments = parser.parse_args()
    shapes = QUICK if arguments.quick else NETWORKS["ResNet-50"]
    found = Results(machine(), command("benchmarks.options"), unit="plain")
    for threads in arguments.threads:
        fastbn.set_num_threads(threads)
        run(options, cases(shapes, threads, "training", "backward"), arguments.budget, found)
    arguments.output.mkdir(parents=True, exist_ok=True)
    print(f"\n# options\n\n{comparison(found)}")
    write(found, arguments.output / "options.json")


if __name__ == "__main__":
    main()
