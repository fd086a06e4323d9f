# SPDX-License-Identifier: BSD-3-Clause
"""Messages and bytes of a step of synchronised batch norm, counted on the loopback interface.

    python -m benchmarks.messages               # the table of docs/distributed.md

Starts 1, 2 and 4 processes of MPI and of gloo, whichever is installed. MPICH, too, is made to go
by TCP instead of shared memory (UCX_TLS=tcp, MPIR_CVAR_NOLOCAL=1). Linux, half a minute.
A step is one forward and one backward. Counted are what each rank gives to its collectives,
and what the interface has sent, with all headers of TCP and of the library.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fastbn import sync
from fastbn.sync import _groups

CHANNELS, STEPS = (64, 1024), 200
INTERFACE = Path("/sys/class/net/lo/statistics")


class Counted:
    """A group that counts what it gives to its engine's collectives."""

    def __init__(self, group):
        self.group, self.collectives, self.bytes = group, 0, 0
        self.rank, self.size = group.rank, group.size

    def allgather(self, array):
        """Count, and gather."""
        return _groups.gathered(array, self._gather)

    def _gather(self, array):
        self.collectives += 1
        self.bytes += array.nbytes
        return self.group._gather(array)


def sent():
    """Packets and bytes that the interface has sent."""
    return [int((INTERFACE / name).read_text()) for name in ("tx_packets", "tx_bytes")]


def measure(group, channels, barrier):
    """Print a line of the table, on rank 0."""
    counted = Counted(group)
    x = np.random.default_rng(group.rank).standard_normal((8, channels, 4), np.float32)

    def step():
        _, mean, invstd = sync.batch_norm_forward(x, group=counted)
        sync.batch_norm_backward(x, x, mean, invstd, group=counted)

    step()
    counted.collectives = counted.bytes = 0
    barrier()
    before = sent()
    barrier()
    for _ in range(STEPS):
        step()
    barrier()
    packets, size = (b - a for a, b in zip(before, sent(), strict=True))
    barrier()
    if group.rank == 0:
        print(
            f"| {sys.argv[1]} | {channels} | {group.size} | {counted.collectives / STEPS:g} | "
            f"{counted.bytes / STEPS:g} | {packets / STEPS:.0f} | {size / STEPS:.0f} |",
            flush=True,
        )


def rank_of_mpi():
    """One process of MPI."""
    from mpi4py import MPI

    for channels in CHANNELS:
        measure(_groups.as_group(MPI.COMM_WORLD), channels, MPI.COMM_WORLD.Barrier)


def rank_of_gloo(rank, size, file):
    """One process of gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo", f"file://{file}", rank=int(rank), world_size=int(size))
    for channels in CHANNELS:
        measure(_groups.as_group(dist.group.WORLD), channels, dist.barrier)
    dist.destroy_process_group()


def start(*command):
    """Start a process with one thread, whose MPI goes by TCP."""
    settings = {
        "FASTBN_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MPIR_CVAR_NOLOCAL": "1",
        "UCX_TLS": "tcp",
    }
    return subprocess.Popen([*map(str, command)], env=os.environ | settings)


def main():
    """Print the table."""
    print(f"A step, of {STEPS}\n")
    print(
        "| engine | channels | ranks | collectives of a rank | bytes it gives | packets of all | "
        "bytes |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    program = [sys.executable, "-m", "benchmarks.messages"]
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    for size in (1, 2, 4):
        if mpiexec and find_spec("mpi4py"):
            start(mpiexec, "-n", size, *program, "mpi").wait()
    for size in (1, 2, 4) if find_spec("torch") else ():
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                start(*program, "gloo", rank, size, Path(folder) / "store") for rank in range(size)
            ]
            for process in ranks:
                process.wait()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "mpi":
        rank_of_mpi()
    else:
        rank_of_gloo(*sys.argv[2:])
