# SPDX-License-Identifier: BSD-3-Clause
"""Arrays that lie in a file as they are: .npy, members of .npz, uncompressed TIFF.

They are read by windows into two buffers of each thread, so that one may be counted while the
other is read: mapping a file needs address space for all of it, and new memory for each window
costs more than the reading.
"""

from __future__ import annotations

import io
import math
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastbn.data.blocks import Index, Shape, contiguous_block, lengths

_local = threading.local()


def _buffer(size: int) -> memoryview:
    """Return `size` bytes of one of the thread's two buffers, taken in turns."""
    last, other = getattr(_local, "buffers", (b"", b""))
    if len(other) < size:
        other = np.empty(size, np.uint8)
    _local.buffers = other, last
    return memoryview(other)[:size]


class RawArray:
    """An array of a file that can seek; `open_file` returns it anew for each window."""

    def __init__(
        self, open_file: Callable[[], IO[bytes]], offset: int, dtype: np.dtype[Any],
        shape: Shape, fortran: bool = False
    ) -> None:  # fmt: skip
        self.open_file, self.offset, self.dtype = open_file, offset, dtype
        self.shape, self.fortran = shape, fortran
        self.stored = shape[::-1] if fortran else shape

    def block(self) -> Shape:
        """Return the shape of a unit."""
        block = contiguous_block(self.stored, self.dtype.itemsize)
        return block[::-1] if self.fortran else block

    def read(self, index: Index) -> NDArray[Any]:
        """Return what an index selects; the read after the next of the thread may overwrite it."""
        if self._is_run(index):
            return self._read_run(index)
        order = range(len(index))
        axis = next(
            axis
            for axis in (reversed(order) if self.fortran else order)
            if index[axis].stop - index[axis].start > 1
        )
        one_by_one = [
            self.read((*index[:axis], slice(i, i + 1), *index[axis + 1 :])).copy()
            for i in range(index[axis].start, index[axis].stop)
        ]
        return np.concatenate(one_by_one, axis)

    def _read_run(self, index: Index) -> NDArray[Any]:
        stored = index[::-1] if self.fortran else index
        shape = lengths(stored)
        start = sum(
            part.start * math.prod(self.stored[axis + 1 :]) for axis, part in enumerate(stored)
        )
        size = math.prod(shape) * self.dtype.itemsize
        if not size:
            return np.empty(lengths(index), self.dtype)
        buffer = _buffer(size)
        with self.open_file() as file:
            file.seek(self.offset + start * self.dtype.itemsize)
            read = 0
            while read < size:
                got = file.readinto(buffer[read:])  # type: ignore[attr-defined]
                if not got:
                    raise ValueError("the file is shorter than its header says")
                read += got
        array = np.frombuffer(buffer, self.dtype, math.prod(shape)).reshape(shape)
        return array.T if self.fortran else array

    def _is_run(self, index: Index) -> bool:
        """Return whether the index selects one run of the file."""
        stored = index[::-1] if self.fortran else index
        whole = True
        for part, size in zip(reversed(stored), reversed(self.stored), strict=True):
            length = part.stop - part.start
            if not whole and length != 1:
                return False
            whole = whole and length == size
        return True


def _header(file: IO[bytes]) -> tuple[Shape, bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
        raise ValueError(f"version {version} of the .npy format is not read")
    shape, fortran, dtype = readers[version](file)
    if dtype.hasobject:
        raise ValueError(f"expected an array of numbers, got dtype {dtype}")
    return shape, fortran, dtype


def open_npy(path: Path) -> RawArray:
    """Return the array of a .npy file."""
    with path.open("rb") as file:
        shape, fortran, dtype = _header(file)
        offset = file.tell()
    if path.stat().st_size < offset + math.prod(shape) * dtype.itemsize:
        raise ValueError("the file is shorter than its header says")

    def open_file() -> IO[bytes]:
        return path.open("rb", buffering=0)

    return RawArray(open_file, offset, dtype, shape, fortran)


class _Member(io.RawIOBase):
    """A member of a zip file that stays open; closing it ends one use only."""

    def __init__(self, path: Path, name: str) -> None:
        self.file = zipfile.ZipFile(path).open(name)  # noqa: SIM115
        self.lock = threading.Lock()

    def __enter__(self) -> _Member:
        self.lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        return self.file.readinto(buffer)  # type: ignore[attr-defined]


def open_npz(path: Path, name: str | None) -> tuple[RawArray, str]:
    """Return the array of this name, or the only one, and its name."""
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.namelist() if m.endswith(".npy")]
    names = [member.removesuffix(".npy") for member in members]
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        raise ValueError(f"expected {path.name}/NAME with one of {names}, got {name!r}")
    member = _Member(path, f"{name}.npy")
    shape, fortran, dtype = _header(member)  # type: ignore[arg-type]
    offset = member.file.tell()
    raw = RawArray(lambda: member, offset, dtype, shape, fortran)  # type: ignore[arg-type,return-value]
    return raw, name
