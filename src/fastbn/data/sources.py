# SPDX-License-Identifier: BSD-3-Clause
"""Parts of a source: one for each array or image, with its units.

A part knows its name, where its channels are, and how to read a unit. A unit is an index of
plain slices (of an image: None, the whole). May not compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbn.data._libraries import library
from fastbn.data.blocks import Index, Shape, cells, contiguous_block, store_block
from fastbn.data.raw import RawArray

Array = NDArray[Any]
LETTERS = "ABDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def letters(ndim: int, axis: int) -> str:
    """Return a layout of `ndim` axes whose channels are at `axis`."""
    return LETTERS[:axis] + "C" + LETTERS[axis : ndim - 1]


def channel_axis(layout: str | None, shape: Shape) -> int:
    """Return the axis of the channels of an array of this shape, or raise."""
    if layout is None or layout == "N...C":
        if len(shape) < 2:
            raise ValueError(f"layout: expected a letter for each axis of shape {shape}, got none")
        return 1 if layout is None else len(shape) - 1
    if len(layout) != len(shape):
        raise ValueError(
            f"layout: expected {len(shape)} letters for an array of shape {shape}, got {layout!r}"
        )
    return layout.index("C")


class Part:
    """What all parts have."""

    is_image = False
    is_raw = False  # lies in a file as it is: reading it is waiting for the system

    def __init__(self, name: str, nbytes: int, path: Path | None = None) -> None:
        self.name, self.nbytes, self.path = name, nbytes, path

    def units(self) -> Iterator[Index | None]:
        """Yield the units, in the order of the store."""
        raise NotImplementedError

    def read(self, unit: Index | None) -> Array:
        """Return the array of a unit; the read after the next of the thread may overwrite it."""
        raise NotImplementedError

    def axis_of(self, array: Array) -> int:
        """Return where the channels of a unit are."""
        raise NotImplementedError

    def size_of(self, unit: Index | None) -> int:
        """Return how many bytes of `nbytes` a unit is."""
        return self.nbytes

    def channels(self, unit: Index | None) -> tuple[slice, int] | None:
        """Return which channels of how many a unit has, or None for all of them."""
        return None


class ArrayPart(Part):
    """An array that is read by indices."""

    def __init__(
        self, name: str, shape: Shape, dtype: np.dtype[Any], block: Shape, axis: int,
        reader: Callable[[Index], Array], path: Path | None = None
    ) -> None:  # fmt: skip
        super().__init__(name, math.prod(shape) * dtype.itemsize, path)
        self.shape, self.dtype, self.block, self.axis = shape, dtype, block, axis
        self.reader = reader

    def units(self) -> Iterator[Index]:
        """Yield the units."""
        if self.nbytes == 0:
            # Its only unit says what type and how many channels it has.
            return iter([tuple(slice(0, size) for size in self.shape)])
        return cells(self.shape, self.block)

    def read(self, unit: Index | None) -> Array:
        """Return the array of a unit."""
        assert unit is not None
        return self.reader(unit)

    def axis_of(self, array: Array) -> int:
        """Return where the channels are."""
        return self.axis

    def size_of(self, unit: Index | None) -> int:
        """Return how many bytes a unit is."""
        assert unit is not None
        return self.dtype.itemsize * math.prod(part.stop - part.start for part in unit)

    def channels(self, unit: Index | None) -> tuple[slice, int] | None:
        """Return which channels a unit has."""
        assert unit is not None
        part, whole = unit[self.axis], self.shape[self.axis]
        return None if part.stop - part.start == whole else (part, whole)


class BrokenPart(Part):
    """An image of which not even the header can be read: reading it says why."""

    is_image = True

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(str(path), path.stat().st_size, path)
        self.error = error

    def units(self) -> Iterator[None]:
        """Yield the units."""
        return iter([None])

    def read(self, unit: Index | None = None) -> Array:
        """Return the array of a unit."""
        raise self.error


class ImagePart(Part):
    """An image that Pillow decodes: HWC, grey has one channel."""

    is_image = True

    def __init__(self, path: Path, mode: str | None) -> None:
        super().__init__(str(path), path.stat().st_size, path)
        self.mode = mode

    def units(self) -> Iterator[None]:
        """Yield the units."""
        return iter([None])

    def read(self, unit: Index | None = None) -> Array:
        """Return the array of a unit."""
        assert self.path is not None
        with library("PIL.Image").open(self.path) as image:
            array = np.asarray(converted(image, self.mode))
        return array if array.ndim == 3 else array[:, :, None]

    def axis_of(self, array: Array) -> int:
        """Return where the channels are."""
        return 2

    def shape_and_dtype(self) -> tuple[Shape, np.dtype[Any]]:
        """Return those of the array; only the header is read, if that is enough."""
        assert self.path is not None
        with library("PIL.Image").open(self.path) as image:
            mode = target_mode(image, self.mode)
            if mode in ("L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA"):
                return (
                    image.height,
                    image.width,
                    len(image.getbands())
                    if mode == image.mode
                    else len(library("PIL.ImageMode").getmode(mode).bands),
                ), np.dtype("u1")
        array = self.read()
        return array.shape, array.dtype


def target_mode(image: Any, mode: str | None) -> str:
    """Return the mode that an image is counted in: what a palette expands to, or `mode`."""
    if mode is not None:
        return mode
    if image.mode == "1":
        return "L"
    if image.mode in ("P", "PA"):
        return "RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB"
    return str(image.mode)


def converted(image: Any, mode: str | None) -> Any:
    """Return the image in the mode that it is counted in."""
    wanted = target_mode(image, mode)
    return image if image.mode == wanted else image.convert(wanted)


def of_raw(name: str, raw: RawArray, layout: str | None, path: Path | None) -> ArrayPart:
    """Return the part of an array that lies in a file as it is."""
    axis = channel_axis(layout, raw.shape)
    part = ArrayPart(name, raw.shape, raw.dtype, raw.block(), axis, raw.read, path)
    part.is_raw = True
    return part


def of_array(name: str, array: Any, layout: str | None, path: Path | None = None) -> ArrayPart:
    """Return the part of anything with a shape, a dtype and indices, chunks if it has any."""
    shape, dtype = tuple(array.shape), np.dtype(array.dtype)
    if isinstance(array, np.ndarray):
        order = sorted(range(array.ndim), key=lambda axis: -abs(array.strides[axis]))
        inner = contiguous_block(tuple(shape[axis] for axis in order), dtype.itemsize)
        block = tuple(inner[order.index(axis)] for axis in range(array.ndim))
        read: Callable[[Index], Array] = array.__getitem__
    else:
        chunks = _plain(getattr(array, "chunks", None), shape)
        shards = _plain(getattr(array, "shards", None), shape)
        block = store_block(shape, shards, chunks, dtype.itemsize)
        read = lambda index: np.asarray(array[index])  # noqa: E731
    return ArrayPart(name, shape, dtype, block, channel_axis(layout, shape), read, path)


def _plain(chunks: Any, shape: Shape) -> Shape | None:
    """Return chunks as one shape, where all but the last ones are alike."""
    if chunks is None or len(chunks) != len(shape):
        return None
    return tuple(int(chunk[0] if isinstance(chunk, tuple) else chunk) for chunk in chunks)


def of_data_array(name: str, array: Any, layout: str | None) -> ArrayPart:
    """Return the part of a DataArray of xarray."""
    variable = array.variable
    shape, dtype = tuple(variable.shape), np.dtype(variable.dtype)
    chunks = _plain(variable.encoding.get("chunksizes") or variable.chunks, shape)
    block = store_block(shape, None, chunks, dtype.itemsize)
    axis = channel_axis(layout, shape)
    return ArrayPart(name, shape, dtype, block, axis, lambda index: variable[index].values)
