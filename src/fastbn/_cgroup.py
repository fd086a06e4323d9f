# SPDX-License-Identifier: BSD-3-Clause
"""How much processor time Linux control groups leave to this process.

A container sees every processor of its host, but may use a part of them only:
its quota. Reads files under /proc and /sys, versions 1 and 2. May not: raise,
decide on threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def processors(root: str = "/") -> float | None:
    """Return the least quota, in processors, of this process's group and those around it.

    ``None``: no quota, or no control groups. `root` is where /proc and /sys are.
    """
    quotas = [_quota(group) for group in _groups(Path(root))]
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path) -> Iterator[Path]:
    # The folders of this process's groups, each followed by those it is nested in.
    for mount, inside in _mounts(root):
        for folder in (inside, *inside.parents):
            yield mount / folder


def _mounts(root: Path) -> Iterator[tuple[Path, PurePosixPath]]:
    # Each mounted hierarchy that may hold quotas, and the path of our group in it.
    ours: dict[str, PurePosixPath] = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            ours["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind in ours and (kind == "cgroup2" or "cpu" in options.split(",")):
            top, point = (_unescaped(field) for field in mount.split(" ")[3:5])
            group = ours[kind]
            # A mount may show a part of the hierarchy; a group outside it is not seen.
            inside = group.relative_to(top) if group.is_relative_to(top) else PurePosixPath()
            yield root / point.lstrip("/"), inside


def _quota(group: Path) -> float | None:
    # cpu.max holds "max 100000" or "50000 100000" (quota and period in us); the
    # older files hold one of the two each, and -1 for no quota.
    words = " ".join(_lines(group / "cpu.max")).split()
    if not words:
        files = "cpu.cfs_quota_us", "cpu.cfs_period_us"
        words = [word for file in files for word in _lines(group / file)]
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    quota, period = map(int, words)
    return quota / period if quota and period else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(field: str) -> str:
    # mountinfo writes a space as \040.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
