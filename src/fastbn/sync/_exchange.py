# SPDX-License-Identifier: BSD-3-Clause
"""What ranks tell each other of their parts of a batch, and the batch that follows from it.

A message is an array of float64:

    kind, channels, count, then two numbers of each channel
        FORWARD     mean and M2
        BACKWARD    sum of dy, and of dy * xhat
    kind + SLICED, channels, instances, then how many values of a channel each of them has:
        before ghost batches, which are cut from the whole batch, and each of which has a
        message of its own
    ERROR, then the text of the error, a number for each byte of it

An error before the exchange is sent in the place of the numbers, so that no rank waits for
a message that does not come.

May merge vectors of channels. May not touch a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fastbn.stats import BatchStats

if TYPE_CHECKING:
    from fastbn._types import Float64
    from fastbn.sync._groups import Group

Result = TypeVar("Result")

ERROR, FORWARD, BACKWARD, SLICED = 0, 1, 2, 2
NAMES = {
    FORWARD: "forward",
    BACKWARD: "backward",
    FORWARD + SLICED: "forward with ghost batches",
    BACKWARD + SLICED: "backward with ghost batches",
}
HEADER = 3
LONGEST_TEXT = 400  # bytes


class Exchange:
    """One collective of a group: a part of the batch becomes the whole.

    With ghost batches the one collective of `instances`, then `again` for each of them.
    """

    def __init__(self, group: Group, kind: int) -> None:
        self.group, self.kind = group, kind
        self.begun = False
        #: Values of a channel in the whole batch, once it is known.
        self.count = 0.0

    def __call__(self, count: float, own: Float64) -> tuple[float, Float64]:
        """Return count and vectors of the whole batch, or raise what any rank has to tell."""
        channels = own.shape[1]
        messages = self._told(self.kind, channels, count, own.reshape(-1))
        parts = [(m[2], m[HEADER:].reshape(2, channels)) for m in messages]
        self.count = sum(float(n) for n, _ in parts)
        if self.count == 1.0:
            raise ValueError(
                "x: expected more than one value per channel in training, got one on all ranks "
                "together"
            )
        return self.count, (_merged if self.kind == FORWARD else _added)(parts)

    def instances(self, channels: int, counts: Float64) -> list[Float64]:
        """Return how many values of a channel each instance has, of the instances of all ranks."""
        messages = self._told(self.kind + SLICED, channels, len(counts), counts)
        return [message[HEADER:] for message in messages]

    def again(self, compute: Callable[[Exchange], Result]) -> Result:
        """Return `compute(exchange)` of another exchange, of the same group and kind."""
        return together(self.group, self.kind, compute)

    def refuse(self, error: Exception) -> None:
        """Tell the others that they will get no numbers from here."""
        text = f"{type(error).__name__}: {error}".encode()[:LONGEST_TEXT]
        self._gather(np.concatenate(([ERROR], np.frombuffer(text, np.uint8))))

    def _told(self, kind: int, channels: int, count: float, numbers: Float64) -> list[Float64]:
        # The messages of all ranks, once all of them fit this one.
        messages = self._gather(np.concatenate(([kind, channels, count], numbers)))
        for rank, other in enumerate(messages):
            _check(other, rank, kind, channels)
        return messages

    def _gather(self, message: Float64) -> list[Float64]:
        self.begun = True
        messages = self.group.allgather(np.ascontiguousarray(message, np.float64))
        if len(messages) != self.group.size:
            raise RuntimeError(
                f"group: expected {self.group.size} arrays of allgather, got {len(messages)}"
            )
        return [np.asarray(m, np.float64).reshape(-1) for m in messages]


def together(group: Group, kind: int, compute: Callable[[Exchange], Result]) -> Result:
    """Return `compute(exchange)`; what it raises before the exchange, the others hear of."""
    exchange = Exchange(group, kind)
    try:
        return compute(exchange)
    except Exception as error:
        if not exchange.begun:
            exchange.refuse(error)
        raise


def _check(message: Float64, rank: int, kind: int, channels: int) -> None:
    if message[0] == ERROR:
        text = message[1:].astype(np.uint8).tobytes().decode(errors="replace")
        raise RuntimeError(f"rank {rank} raised an error: {text}")
    if message[0] != kind:
        raise RuntimeError(
            f"rank {rank} is in {NAMES[int(message[0])]}, this rank in {NAMES[kind]}"
        )
    if message[1] != channels:
        raise RuntimeError(f"rank {rank} has {message[1]:.0f} channels, this rank {channels}")


def _merged(parts: list[tuple[float, Float64]]) -> Float64:
    # In rank order. Empty parts change no bit.
    whole = BatchStats.merge(BatchStats(count, *vectors) for count, vectors in parts)
    return np.stack((whole.mean, whole.m2))


def _added(parts: list[tuple[float, Float64]]) -> Float64:
    # The same: to add the zeros of an empty part would make 0 of -0.
    full = [vectors for count, vectors in parts if count > 0]
    if not full:
        return parts[0][1]
    with np.errstate(all="ignore"):
        whole = full[0].copy()
        for vectors in full[1:]:
            whole += vectors
    return whole
