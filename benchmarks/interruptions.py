# SPDX-License-Identifier: BSD-3-Clause
"""`fastbn normalize`, killed a hundred times at random points, and what it leaves each time.

    python -m benchmarks.interruptions [--times 100]

Each run goes on with what the last one left; after each, OUT is absent or complete and right.
Prints how many were killed and how many finished; exits with 1 at the first wrong output.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fastbn

SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=100)
    times = parser.parse_args().times
    with tempfile.TemporaryDirectory() as name:
        killed, finished, correct = interrupt(Path(name), times)
    print(f"{killed} interruptions, {finished} outputs, all right: {correct}")
    return 0 if correct else 1


def interrupt(folder: Path, times: int) -> tuple[int, int, bool]:
    x = np.random.default_rng(1).integers(0, 256, (2000, 64, 64, 3), np.uint8)
    np.save(folder / "x.npy", x)
    (folder / "p.json").write_text('{"mean": [0.5], "std": [0.25]}'.replace("0.5", "0.5, 0.4, 0.6")
                                   .replace("0.25", "0.25, 0.2, 0.3"))  # fmt: skip
    expected = fastbn.normalize(x, [0.5, 0.4, 0.6], [0.25, 0.2, 0.3], layout="NHWC",
                                out_layout="NCHW", max_value=255)  # fmt: skip
    killed = finished = 0
    # In the end nothing is killed: so that an output is checked in any case.
    while killed < times or finished == 0:
        target = folder / random.choice(["y.npy", "z.npy"])
        process = subprocess.Popen(
            [sys.executable, "-m", "fastbn", "normalize", folder / "x.npy", target, "--stats",
             folder / "p.json", "--layout", "NHWC", "--out-layout", "NCHW", "--max-value", "255",
             "--resume", "--jobs", "2"], stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if killed < times:
            time.sleep(random.uniform(0.1, 1.5))
            process.send_signal(random.choice(SIGNALS))
        killed += process.wait() != 0
        if target.exists():
            finished += 1
            if not np.array_equal(np.load(target), expected):
                return killed, finished, False
            target.unlink()
            shutil.rmtree(f"{target}.partial", ignore_errors=True)
    return killed, finished, True


if __name__ == "__main__":
    sys.exit(main())
