# SPDX-License-Identifier: BSD-3-Clause
"""The parts of a source as one array, for `normalize`: joined along N, images stacked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fastbn.data.blocks import WINDOW, Index, Shape
from fastbn.data.sources import Array, ArrayPart, BrokenPart, ImagePart, Part, letters


class Stack:
    """One array of all parts; `block` is the unit that it is read by."""

    def __init__(self, parts: list[Part], layout: str | None) -> None:
        if not parts:
            raise ValueError("source: expected at least one array, got none")
        self.parts = parts
        self.images = all(part.is_image for part in parts)
        members = [_shape_and_dtype(part, self.images) for part in parts]
        (shape, self.dtype), first = members[0], parts[0]
        self.layout = "NHWC" if self.images else layout
        if self.images:
            self.axis, self.join = 3, 0
        else:
            assert isinstance(first, ArrayPart)
            self.axis = first.axis
            named = layout is not None and "..." not in layout and "N" in layout
            self.join = layout.index("N") if named and layout is not None else 0
        self._check(members)
        counts = [member_shape[self.join] for member_shape, _ in members]
        self.starts = np.concatenate(([0], np.cumsum(counts)))
        self.shape = (*shape[: self.join], int(self.starts[-1]), *shape[self.join + 1 :])
        self.block = self._block(shape)

    def _check(self, members: list[tuple[Shape, np.dtype[Any]]]) -> None:
        def alike(member: tuple[Shape, np.dtype[Any]]) -> object:
            shape, dtype = member
            return shape[: self.join], shape[self.join + 1 :], dtype

        if len(self.parts) > 1 and self.join == self.axis:
            raise ValueError("source: several arrays are joined along N, which layout must name")
        for part, member in zip(self.parts, members, strict=True):
            if alike(member) != alike(members[0]):
                raise ValueError(
                    f"{part.name}: expected shape {members[0][0]} and dtype {members[0][1]} as of "
                    f"{self.parts[0].name}, got {member[0]} and {member[1]}"
                )

    def _block(self, shape: Shape) -> Shape:
        if self.images:
            size = math.prod(shape) * self.dtype.itemsize
            return (max(1, min(self.shape[0], WINDOW // max(size, 1))), *shape[1:])
        first = self.parts[0]
        assert isinstance(first, ArrayPart)
        return first.block

    def letters(self) -> str:
        """Return the layout with a letter for each axis."""
        if self.layout is None or self.layout == "N...C":
            return letters(len(self.shape), self.axis)
        return self.layout

    def read(self, index: Index) -> Array:
        """Return what an index selects; the read after the next of the thread may overwrite it."""
        part_index = index[self.join]
        first = int(np.searchsorted(self.starts, part_index.start, "right")) - 1
        last = max(first + 1, int(np.searchsorted(self.starts, part_index.stop, "left")))
        if last == first + 1 and not self.images:
            return self._read_part(first, index)
        pieces = [np.array(self._read_part(i, index)) for i in range(first, last)]
        return np.concatenate(pieces, self.join)

    def _read_part(self, number: int, index: Index) -> Array:
        start, part = int(self.starts[number]), self.parts[number]
        stop = int(self.starts[number + 1])
        along = index[self.join]
        own = slice(max(along.start, start) - start, min(along.stop, stop) - start)
        try:
            if self.images:
                return _image(part)
            return part.read((*index[: self.join], own, *index[self.join + 1 :]))
        except (ImportError, MemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{part.name}: {error}") from error


def _image(part: Part) -> Array:
    """Return an image as an array of shape (1, H, W, C)."""
    unit = None if not isinstance(part, ArrayPart) else tuple(slice(0, n) for n in part.shape)
    array = part.read(unit)
    return np.moveaxis(array, part.axis_of(array), 2)[None]


def _shape_and_dtype(part: Part, as_image: bool) -> tuple[Shape, np.dtype[Any]]:
    if isinstance(part, BrokenPart):
        raise ValueError(f"{part.name}: {part.error}")
    try:
        if isinstance(part, ImagePart):
            shape, dtype = part.shape_and_dtype()
            return (1, *shape), dtype
        assert isinstance(part, ArrayPart)
        if not as_image:
            return part.shape, part.dtype
        others = [n for axis, n in enumerate(part.shape) if axis != part.axis]
        return (1, *others, part.shape[part.axis]), part.dtype
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{part.name}: {error}") from error
