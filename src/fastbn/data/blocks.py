# SPDX-License-Identifier: BSD-3-Clause
"""How an array is cut into units: by chunks where a store has them, else by memory order.

A block is a shape; the units of an array are the cells of its grid. Knows shapes only.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

Shape = tuple[int, ...]
Index = tuple[slice, ...]

# Of a unit of what lies as it is. It is read, then summed, while it is in the cache; of a file
# the next one is read meanwhile.
WINDOW = 2 << 20
# Of chunks that are read together: some stores decode several at once.
SEVERAL_CHUNKS = 8 << 20
# What a chunk or a shard may have before it is read in parts.
LARGEST_CHUNK = 64 << 20


def contiguous_block(shape: Shape, itemsize: int, limit: int = WINDOW) -> Shape:
    """Return the largest block of at most `limit` bytes that is one run of C order."""
    block = [1] * len(shape)
    size = itemsize
    for axis in reversed(range(len(shape))):
        block[axis] = max(1, min(shape[axis], limit // max(size, 1)))
        if block[axis] < shape[axis]:
            break
        size *= shape[axis]
    return tuple(block)


def chunk_block(shape: Shape, chunks: Shape, itemsize: int, limit: int = SEVERAL_CHUNKS) -> Shape:
    """Return chunks put together, the last axis first, up to `limit` bytes; at least one."""
    block = [max(1, min(size, chunk)) for size, chunk in zip(shape, chunks, strict=True)]
    for axis in reversed(range(len(shape))):
        times = max(1, limit // max(itemsize * math.prod(block), 1))
        block[axis] = max(1, min(shape[axis], chunks[axis] * times))
        if block[axis] < shape[axis]:
            break
    return tuple(block)


def store_block(shape: Shape, shards: Shape | None, chunks: Shape | None, itemsize: int) -> Shape:
    """Return the block for a store: shards if they are not too large, else its chunks."""
    if shards is not None and itemsize * math.prod(shards) <= LARGEST_CHUNK:
        return chunk_block(shape, shards, itemsize)
    if chunks is not None:
        return chunk_block(shape, chunks, itemsize)
    return contiguous_block(shape, itemsize)


def cells(shape: Shape, block: Shape) -> Iterator[Index]:
    """Yield the indices of all units, in C order."""
    ranges = [
        [slice(i, min(i + step, size)) for i in range(0, size, step)]
        for size, step in zip(shape, block, strict=True)
    ]
    return itertools.product(*ranges)


def lengths(index: Index) -> Shape:
    """Return the shape of what an index with plain slices selects."""
    return tuple(part.stop - part.start for part in index)
