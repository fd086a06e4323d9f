# SPDX-License-Identifier: BSD-3-Clause
"""Was this process forked from one that had an OpenMP runtime already?

Then threads of that runtime may be missing here, and it would wait for them for
ever. Has to be asked before fastbn's own modules load a runtime; later forks are
noticed when they happen. Reads files under /proc. May not: raise.
"""

from __future__ import annotations

from pathlib import Path

_FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC of Linux


def _with_openmp() -> bool:
    try:
        # The ninth field; the second one, in parentheses, may hold anything.
        flags = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[6])
        if not flags & _FORKED_WITHOUT_EXEC:
            return False
        maps = Path("/proc/self/maps").read_bytes()
    except (OSError, ValueError, IndexError):
        return False
    return any(runtime in maps for runtime in (b"/libgomp", b"/libomp", b"/libiomp"))


WITH_OPENMP = _with_openmp()
