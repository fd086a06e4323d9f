# SPDX-License-Identifier: BSD-3-Clause
"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.results import Results

# Said here once more, because only a worker may import NumPy: it counts processors then.
NORMS = ("batch", "layer", "rms", "group", "instance")
OPERATIONS = ("inference", "training", "forward", "backward")
LAYOUTS = ("NCHW", "NHWC", "rows")
DTYPES = ("float32", "float64", "float16", "bfloat16")
PEERS = ("numpy", "torch", "onnxruntime", "jax", "onednn")


def parsed() -> argparse.Namespace:
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time fastbn, its peers, and a copy of the same tensor. All filters "
        "may be combined. Writes results.json, results.md and plots.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a few shapes, the best level: 4 minutes")
    add("--norm", nargs="+", default=NORMS, choices=NORMS, dest="norms")
    add("--op", nargs="+", default=OPERATIONS, choices=OPERATIONS, dest="ops")
    add("--shape", default="", help='part of a network\'s name, or of a shape such as "x7x7"')
    add("--layout", nargs="+", default=LAYOUTS, choices=LAYOUTS, dest="layouts")
    add("--dtype", nargs="+", choices=DTYPES, dest="dtypes")
    add("--peer", nargs="*", default=PEERS, choices=PEERS, dest="peers")
    add("--level", nargs="+", dest="levels", help="CPU levels; default: all that run here")
    add("--threads", nargs="+", type=int, default=sorted({1, processors}))
    add("--budget", type=float, default=0.3, help="seconds for each case, about (default 0.3)")
    add("--output", type=Path, default=Path("benchmark-results"), help="folder for the results")
    add("--report", type=Path, help="only write the report of an earlier results.json")
    add("--again", type=Path, help="with --report: a second run, to say how far figures moved")
    add("--tables", type=Path, help="only write FOLDER/*.md from FOLDER/measurements/*.json",
        metavar="FOLDER")  # fmt: skip
    arguments = parser.parse_args()
    if max(arguments.threads) > processors or min(arguments.threads) < 1:
        parser.error(f"--threads: expected numbers from 1 to {processors}, the processors here")
    if arguments.dtypes is None:
        arguments.dtypes = ("float32", "bfloat16") if arguments.quick else DTYPES
    return arguments


def run_in_processes(arguments: argparse.Namespace) -> Results:
    """Run each number of threads in a process of its own; return all the results.

    A process is the one limit that every library obeys: XLA, for one, counts the
    processors it may use when it starts.
    """
    from benchmarks import machine, results

    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in arguments.threads:
            command = [sys.executable, "-m", "benchmarks", *sys.argv[1:]]
            command += ["--threads", str(threads), "--output", folder]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            environment["FASTBN_BENCHMARK_WORKER"] = "1"
            if subprocess.run(command, env=environment).returncode:
                raise SystemExit("no results")  # the process has said why
            parts.append(results.read(Path(folder, "results.json")))
    found = results.merged(parts)
    found.command = machine.command("benchmarks")
    return found


def limit_processors(threads: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


def run_cases(arguments: argparse.Namespace) -> Results:
    from tqdm import tqdm

    from benchmarks import cases, contenders, machine, race
    from benchmarks.results import Results
    from fastbn import _dispatch

    peers = tuple(arguments.peers)
    missing = contenders.missing_peers(peers)
    if missing:
        print(f"not installed, so left out: {', '.join(missing)}", file=sys.stderr)
    peers = tuple(peer for peer in peers if peer not in missing)
    runnable = _dispatch.runnable()
    levels = tuple(arguments.levels or (runnable[:1] if arguments.quick else runnable))
    todo = list(
        cases.grid(
            arguments.quick, arguments.norms, arguments.ops, arguments.layouts, arguments.dtypes,
            arguments.shape, arguments.threads[0],
        )
    )  # fmt: skip
    if not todo:
        raise SystemExit("no case is left by these filters")
    bar = tqdm(
        todo, unit="case", desc=f"threads: {arguments.threads[0]}", smoothing=0.05, mininterval=2
    )
    found = Results(machine.machine(), machine.command("benchmarks"))
    arrays = None
    for case in bar:
        bar.set_postfix_str(case.name)
        arrays = arrays.of(case) if arrays and arrays.fit(case) else cases.Arrays(case)
        lanes = race.race(contenders.contenders(arrays, levels, peers), arguments.budget)
        copies = [lane for lane in lanes if lane.contender.kind == "copy"]
        copy = min(copies, key=lambda lane: lane.median)
        others = [lane for lane in lanes if lane not in copies]
        found.add(race.outcome(case, others, copy))
        for contender in (lane.contender for lane in others):
            name = "fastbn" if "fastbn" in contender.kind else contender.name
            found.add_error((case.norm, case.dtype, case.op, name), contender.error)
    return found


def work(arguments: argparse.Namespace, file: Path) -> None:
    """Run the cases in this process, which has been started for one number of threads."""
    limit_processors(arguments.threads[0])
    from benchmarks import results

    results.write(run_cases(arguments), file)


def main() -> None:
    arguments = parsed()
    warnings.filterwarnings("ignore", message=".*os.fork.*")
    file = arguments.output / "results.json"
    if "FASTBN_BENCHMARK_WORKER" in os.environ:
        work(arguments, file)
        return
    from benchmarks import plots, report, results

    if arguments.tables:
        report.write_pages(arguments.tables)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.report:
        found = results.read(arguments.report)
    else:
        found = run_in_processes(arguments)
        results.write(found, file)
    print(report.summary(found))
    report.write(found, arguments.output)
    plots.write(found, arguments.output)
    if arguments.again:
        print("\n" + report.moved(found, results.read(arguments.again)))
    print(f"written: {', '.join(sorted(str(path) for path in arguments.output.iterdir()))}")


if __name__ == "__main__":
    main()
