# SPDX-License-Identifier: BSD-3-Clause
"""The journal of `normalize`: what is written, of which units, so that it can go on.

DEST.partial is a folder with the data and the journal: a line that identifies source, numbers
and options, then a line for each unit, written after the unit. A unit is written whole again
if its line is missing or torn.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastbn.data.sources import ArrayPart, Part


class Journal:
    """DEST.partial and its journal. `done` has the numbers of the units that are written."""

    def __init__(
        self, destination: Path, identity: dict[str, Any], data: str, units: int, resume: bool
    ) -> None:  # fmt: skip
        self.destination = destination
        self.folder = destination.with_name(destination.name + ".partial")
        self.data = self.folder / data
        self.path = self.folder / "journal"
        self.done: set[int] = set()
        self.finished = False
        self._begin(json.dumps(identity, sort_keys=True), units, resume)

    def _begin(self, identity: str, units: int, resume: bool) -> None:
        exists = os.path.lexists(self.folder)
        if exists and resume and self._has_journal():
            self._read(identity)
            moved = os.path.lexists(self.destination) and not self.data.exists()
            self.finished = moved and len(self.done) == units
            if self.finished:
                return
        if os.path.lexists(self.destination):
            raise FileExistsError(f"destination: {self.destination} exists")
        if exists and not resume:
            raise FileExistsError(f"destination: {self.folder} exists; resume goes on with it")
        if exists and not self._has_journal():
            self._clear()
        if not self._has_journal():
            self.folder.mkdir(exist_ok=exists)
            new = self.folder / "journal.new"
            new.write_text(identity + "\n", encoding="utf-8")
            os.replace(new, self.path)

    def _has_journal(self) -> bool:
        return self.path.is_file()

    def _clear(self) -> None:
        """Empty a folder that was left before its journal began; raise if it is another's."""
        names = (
            sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else ["?"]
        )
        if set(names) - {"journal.new"}:
            raise ValueError(f"destination: {self.folder} has no journal, but {names}")
        for name in names:
            (self.folder / name).unlink()

    def _read(self, identity: str) -> None:
        lines = self.path.read_bytes().split(b"\n")
        if lines[0] != identity.encode():
            raise ValueError(
                f"resume: {self.folder} was begun with another source, other statistics or options"
            )
        # The last line is torn, or empty.
        self.done = {int(line) for line in lines[1:-1]}
        whole = sum(len(line) + 1 for line in lines[:-1])
        os.truncate(self.path, whole)

    def wrote(self, units: list[int]) -> None:
        """Note units, which are written by now."""
        with self.path.open("ab", buffering=0) as file:
            file.write(b"".join(b"%d\n" % unit for unit in units))
        self.done.update(units)

    def finish(self) -> None:
        """Give the data its name, and remove the rest."""
        if not self.finished:
            if os.path.lexists(self.destination):
                raise FileExistsError(f"destination: {self.destination} exists")
            os.rename(self.data, self.destination)
        shutil.rmtree(self.folder)


def fingerprint(part: Part) -> list[Any]:
    """Return what tells one part from another: the state of its files, else its contents."""
    entry: list[Any] = [part.name, part.nbytes]
    if isinstance(part, ArrayPart):
        entry += [list(part.shape), str(part.dtype), part.axis]
    if part.path is None:
        entry.append(_digest(part))
    elif part.path.is_dir():
        states = sorted(
            (path.relative_to(part.path).as_posix(), *_state(path))
            for path in part.path.rglob("*")
            if path.is_file()
        )
        entry.append(hashlib.sha256(json.dumps(states).encode()).hexdigest())
    else:
        entry += _state(part.path)
    return entry


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _digest(part: Part) -> str:
    digest = hashlib.sha256()
    for unit in part.units():
        digest.update(part.read(unit).tobytes())
    return digest.hexdigest()
