# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm over processes: MPI, and PyTorch's gloo. What each process does is in rank.py.

Skipped without mpi4py, mpiexec or PyTorch; with FASTBN_REQUIRE_RANKS=1 that is a failure.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
REQUIRED = os.environ.get("FASTBN_REQUIRE_RANKS") == "1"
#: Two cores are enough for four: they wait most of the time.
PROCESSES = 4
LINES = 20  # of cases, at least


def missing(module):
    return importlib.util.find_spec(module) is None


# Beside the interpreter, where pip puts it.
MPIEXEC = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
needs_mpi = pytest.mark.skipif(
    not REQUIRED and (missing("mpi4py") or MPIEXEC is None),
    reason='needs an MPI: python -m pip install "fastbn[mpi]"',
)
needs_torch = pytest.mark.skipif(not REQUIRED and missing("torch"), reason="needs PyTorch")
needs_demo = pytest.mark.skipif(
    not REQUIRED and any(map(missing, ("matplotlib", "sklearn", "threadpoolctl", "tqdm"))),
    reason='needs the examples\' packages: python -m pip install "fastbn[demo]"',
)
environment = {**os.environ, "FASTBN_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def start(*command):
    return subprocess.Popen(
        [*map(str, command)], env=environment, cwd=TESTS, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )  # fmt: skip


def mpi(size, *arguments):
    return start(MPIEXEC, "-n", size, sys.executable, *arguments)


def gloo(size, work, folder):
    return [
        start(sys.executable, "rank.py", "gloo", work, rank, size, folder / "store")
        for rank in range(size)
    ]


def output_of(process, timeout=240):
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()


@needs_mpi
def test_mpi():
    process = mpi(PROCESSES, "rank.py", "mpi", "all")
    output = output_of(process)
    assert process.returncode == 0, output
    assert output.count("equality") >= LINES
    assert output.count("done") == PROCESSES


@needs_torch
def test_gloo(tmp_path):
    processes = gloo(PROCESSES, "all", tmp_path)
    outputs = [output_of(process) for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output.count("modules") + output.count("equality") >= LINES
        assert "data parallel" in output


@needs_mpi
def test_mpi_loses_a_rank():
    began = time.monotonic()
    process = mpi(3, "rank.py", "mpi", "lose")
    output = output_of(process)
    assert process.returncode != 0, output
    assert time.monotonic() - began < 60, "30 s, and the time to start"
    assert "done" not in output
    assert not survivors("rank.py mpi lose")


@needs_torch
def test_gloo_loses_a_rank(tmp_path):
    processes = gloo(3, "lose", tmp_path)
    outputs = [output_of(process) for process in processes]
    for process, output in zip(processes[:-1], outputs, strict=False):
        assert process.returncode == 0, output
        assert "survived" in output
        assert float(output.split("survived")[1].split()[2]) < 30
    assert processes[-1].returncode < 0


def check_example(process, picture):
    # The curves of two processes beside that of one.
    output = output_of(process)
    assert process.returncode == 0, output
    difference = output.split("largest difference of the losses:")[1].split()[0]
    assert float(difference) < 1e-4, output
    assert picture.stat().st_size > 1000


@needs_mpi
@needs_demo
def test_example_of_mpi(tmp_path):
    picture = tmp_path / "curves.png"
    check_example(mpi(2, EXAMPLES / "digits_mpi.py", "--steps", 10, "--out", picture), picture)


@needs_torch
@needs_demo
def test_example_of_gloo(tmp_path):
    picture = tmp_path / "curves.png"
    program = EXAMPLES / "digits_ddp.py", "--steps", 10, "--out", picture
    torchrun = sys.executable, "-m", "torch.distributed.run", "--standalone"
    check_example(start(*torchrun, "--nproc-per-node", 2, *program), picture)


def survivors(words):
    """The processes that have these words in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in command and "mpiexec" not in command:
            found.append(command)
    return found
