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
    ours = _own_groups(root)
    strangers: dict[str, Path | None] = {}
    for line in _lines(root / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        places, kinds = mount.split(" "), system.split(" ")
        if len(places) < 5 or len(kinds) < 3 or kinds[0] not in ours:
            continue
        if kinds[0] == "cgroup" and "cpu" not in kinds[2].split(","):
            continue
        top, point = (_unescaped(field) for field in places[3:5])
        group = ours[kinds[0]]
        if group.is_relative_to(top):
            strangers[kinds[0]] = None
            yield root / point.lstrip("/"), group.relative_to(top)
        elif kinds[0] not in strangers:
            strangers[kinds[0]] = root / point.lstrip("/")
    # Where no mount shows our group, the first one of its kind is all there is to see.
    for folder in strangers.values():
        if folder is not None:
            yield folder, PurePosixPath()


def _own_groups(root: Path) -> dict[str, PurePosixPath]:
    # By the kind of file system: version 1 and version 2.
    ours = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path and (not controllers or "cpu" in controllers.split(",")):
            ours["cgroup" if controllers else "cgroup2"] = PurePosixPath(path)
    return ours


def _quota(group: Path) -> float | None:
    # cpu.max holds "max 100000" or "50000 100000" (quota and period in us); the
    # older files hold one of the two each, and -1 for no quota.
    words = " ".join(_lines(group / "cpu.max")).split()
    if not words:
        files = "cpu.cfs_quota_us", "cpu.cfs_period_us"
        words = " ".join(line for file in files for line in _lines(group / file)).split()
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return None
    quota, period = map(int, words)
    return quota / period if quota and period else None


def _lines(file: Path) -> list[str]:
    try:
        # Not as lines of text, which end at more than a newline.
        return file.read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError:
        return []


def _unescaped(field: str) -> str:
    # mountinfo writes a space as \040.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
