# SPDX-License-Identifier: BSD-3-Clause
"""Groups of processes: `rank`, `size`, `allgather(array)`.

`allgather` takes a float64 array of one dimension, of a length of this rank's own, and
returns those of all ranks in a list, in their order. MPI and gloo gather arrays of one
length, or of lengths that are known. So all ranks send the same number of values, with the
length in front, and a second time only where one of them has more.

May send and receive. May not know what is sent. Imports neither mpi4py nor torch: who has a
group of theirs has imported them.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from fastbn._types import Float64


#: Values of the first block: what 256 channels need. At 10 GB/s and 2 us, a typical
#: network, its 4 KB cost less than a second collective.
BLOCK = 515


class Group(Protocol):
    """What a group of processes has to have."""

    rank: int
    size: int

    def allgather(self, array: Float64, /) -> list[Float64]:
        """Return the arrays of all ranks, in rank order."""


def gathered(array: Float64, gather: Callable[[Float64], Iterable[Float64]]) -> list[Float64]:
    """Return the arrays of all ranks by `gather`, which takes arrays of one length."""
    first = np.zeros(1 + BLOCK)
    first[0] = array.size
    first[1 : 1 + array.size] = array[:BLOCK]
    blocks = list(gather(first))
    lengths = [int(block[0]) for block in blocks]
    longest = max(lengths)
    if longest <= BLOCK:
        return [block[1 : 1 + n] for block, n in zip(blocks, lengths, strict=True)]
    rest = np.zeros(longest - BLOCK)
    rest[: max(0, array.size - BLOCK)] = array[BLOCK:]
    rests = gather(rest)
    return [
        np.concatenate((block[1:], more))[:n]
        for block, more, n in zip(blocks, rests, lengths, strict=True)
    ]


class _MPIGroup:
    def __init__(self, comm: Any) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size

    def allgather(self, array: Float64) -> list[Float64]:
        return gathered(array, self._gather)

    def _gather(self, array: Float64) -> Float64:
        whole = np.empty((self.size, array.size))
        self.comm.Allgather(array, whole)
        return whole


class _TorchGroup:
    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()

    def allgather(self, array: Float64) -> list[Float64]:
        return gathered(array, self._gather)

    def _gather(self, array: Float64) -> list[Float64]:
        torch = sys.modules["torch"]
        results = [torch.empty(array.size, dtype=torch.float64) for _ in range(self.size)]
        torch.distributed.all_gather(results, torch.from_numpy(array), group=self.group)
        return [result.numpy() for result in results]


def _is_from(group: object, module: str, name: str) -> bool:
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(group, kind)


def as_group(group: object) -> Group:
    """Return `group`, or what stands for it, with `rank`, `size` and `allgather`; or raise."""
    if _is_from(group, "mpi4py.MPI", "Comm"):
        if not _is_from(group, "mpi4py.MPI", "Intracomm") or not group:
            raise ValueError(
                f"group: expected a communicator that this process is a member of, got {group!r}"
            )
        return _MPIGroup(group)
    if _is_from(group, "torch.distributed", "ProcessGroup"):
        return _TorchGroup(group)
    try:
        rank, size = operator.index(group.rank), operator.index(group.size)  # type: ignore[attr-defined]
        fits = callable(group.allgather)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        fits = False
    if not fits:
        raise TypeError(
            "group: expected an mpi4py communicator, a torch.distributed.ProcessGroup, None, or "
            "an object with the integers rank and size and a method allgather(array), got "
            f"{type(group).__module__}.{type(group).__qualname__}"
        )
    if not 0 <= rank < size:
        raise ValueError(f"group: expected 0 <= rank < size, got rank {rank} and size {size}")
    return group  # type: ignore[return-value]
