# SPDX-License-Identifier: BSD-3-Clause
"""Where `normalize` writes: a .npy file or a Zarr array, unit by unit, any unit again."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from fastbn.data._libraries import library
from fastbn.data.blocks import Index, Shape, lengths
from fastbn.data.sources import Array


class NpyFile:
    """A .npy file that is written at any place; it needs no address space for all of it."""

    name = "data.npy"

    def __init__(self, path: Path, shape: Shape, dtype: np.dtype[Any], block: Shape) -> None:
        self.shape, self.dtype = shape, dtype
        self.lock = threading.Lock()
        self.file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape
        }  # fmt: skip
        np.lib.format.write_array_header_1_0(self.file, header)
        self.offset = self.file.tell()
        self.file.truncate(self.offset + math.prod(shape) * dtype.itemsize)

    def write(self, index: Index, array: Array) -> None:
        """Write an array at the place of an index, run by run."""
        with self.lock:
            self._write(index, np.ascontiguousarray(array))

    def _write(self, index: Index, array: Array) -> None:
        split = next((axis for axis, n in enumerate(array.shape) if n > 1), None)
        runs = split is None or all(
            n == size
            for n, size in zip(array.shape[split + 1 :], self.shape[split + 1 :], strict=True)
        )
        if runs:
            start = sum(
                part.start * math.prod(self.shape[axis + 1 :]) for axis, part in enumerate(index)
            )
            self.file.seek(self.offset + start * self.dtype.itemsize)
            rest = memoryview(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            while rest:
                rest = rest[self.file.write(rest) :]
            return
        assert split is not None
        for i in range(array.shape[split]):
            place = index[split].start + i
            one = (*index[:split], slice(place, place + 1), *index[split + 1 :])
            self._write(one, array[(slice(None),) * split + (slice(i, i + 1),)])

    def flush(self) -> None:
        """Wait until what was written is on the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class ZarrArray:
    """A Zarr array, of which each unit is a chunk."""

    name = "data.zarr"

    def __init__(self, path: Path, shape: Shape, dtype: np.dtype[Any], block: Shape) -> None:
        zarr = library("zarr")
        if (path / "zarr.json").exists():
            self.array = zarr.open_array(str(path), mode="r+")
        else:
            chunks = tuple(max(1, n) for n in block)
            self.array = zarr.create_array(str(path), shape=shape, chunks=chunks, dtype=dtype)

    def write(self, index: Index, array: Array) -> None:
        """Write a chunk."""
        assert array.shape == lengths(index)
        self.array[index] = array

    def flush(self) -> None:
        """Do nothing: each chunk is a file, complete when it is written."""

    def close(self) -> None:
        """Do nothing."""


def kind_of(destination: Path) -> type[NpyFile] | type[ZarrArray]:
    """Return what a destination is, by its suffix."""
    kinds: dict[str, type[NpyFile] | type[ZarrArray]] = {".npy": NpyFile, ".zarr": ZarrArray}
    kind = kinds.get(destination.suffix.lower())
    if kind is None:
        raise ValueError(f"destination: expected a name with .npy or .zarr, got {destination}")
    if kind is ZarrArray:
        library("zarr")
    return kind
