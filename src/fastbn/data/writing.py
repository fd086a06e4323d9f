# SPDX-License-Identifier: BSD-3-Clause
"""`fastbn.data.normalize`: units of a source, normalised by threads, into a file or store."""

from __future__ import annotations

import math
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn.data import files
from fastbn.data.blocks import Index, cells
from fastbn.data.destinations import kind_of
from fastbn.data.journal import Journal, fingerprint
from fastbn.data.opening import open_source
from fastbn.data.scan import bar, checked_workers, in_order, shared_threads
from fastbn.data.stacks import Stack
from fastbn.stats import BatchStats

# Seconds between two notes in the journal: each waits until the file is on the disk.
INTERVAL = 1.0


class Conversion:
    """The numbers and the layouts; checked before anything is written."""

    def __init__(
        self, stack: Stack, numbers: Any, max_value: float, out_layout: str | None, dtype: Any
    ) -> None:
        mean, std = mean_and_std(numbers, max_value)
        channels = stack.shape[stack.axis]
        self.axis, self.layout = stack.axis, stack.letters()
        given = stack.layout
        options = {"out_layout": out_layout, "max_value": max_value, "dtype": dtype}
        nothing = [1] * len(stack.shape)
        nothing[stack.axis] = channels
        nothing[0 if stack.axis else -1] = 0 if len(nothing) > 1 else channels
        y = fastbn.normalize(np.empty(nothing, stack.dtype), mean, std, layout=given, **options)
        self.mean, self.std = (
            np.broadcast_to(np.asarray(v, np.float64), (channels,)) for v in (mean, std)
        )
        self.max_value, self.dtype = float(max_value), y.dtype
        if y.dtype.kind != "f":
            raise ValueError(f"dtype: expected one that files have, got {y.dtype}")
        self.out_layout = out_layout or self.layout
        self.order = [self.layout.index(letter) for letter in self.out_layout]

    def moved(self, sizes: Any) -> tuple[Any, ...]:
        """Return sizes or slices of x's axes in the order of y's."""
        return tuple(sizes[axis] for axis in self.order)

    def __call__(self, x: Any, index: Index) -> Any:
        """Return a unit normalised."""
        channels = index[self.axis]
        return fastbn.normalize(
            x, self.mean[channels], self.std[channels], layout=self.layout,
            out_layout=self.out_layout, max_value=self.max_value, dtype=self.dtype,
        )  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return what another run has to have in common."""
        return {
            "mean": [v.hex() for v in self.mean.tolist()],
            "std": [v.hex() for v in self.std.tolist()],
            "max_value": self.max_value.hex(),
            "layout": self.layout,
            "out_layout": self.out_layout,
            "dtype": self.dtype.name,
            "fastbn": fastbn.__version__,
        }


def mean_and_std(numbers: Any, max_value: float) -> tuple[Any, Any]:
    """Return mean and std of BatchStats, a pair or a file."""
    in_data_units = isinstance(numbers, BatchStats)
    if isinstance(numbers, BatchStats):
        mean, std = numbers.mean, numbers.std()
    elif isinstance(numbers, (str, os.PathLike)):
        mean, std, in_data_units = files.mean_and_std(Path(numbers))  # type: ignore[assignment]
    elif isinstance(numbers, (tuple, list)) and len(numbers) == 2:
        mean, std = numbers
    else:
        raise TypeError(
            "stats: expected BatchStats, a pair (mean, std) or the path of a file, "
            f"got {type(numbers).__name__}"
        )
    if in_data_units and max_value != 1:
        raise ValueError(
            "max_value: expected 1.0, since these statistics are in the units of the data, "
            f"got {max_value!r}"
        )
    return mean, std


def normalize(
    source: Any, destination: Any, stats: Any, *, layout: str | None = None,
    out_layout: str | None = None, max_value: float = 1.0, dtype: Any = "float32",
    mode: str | None = None, workers: int = 1, progress: bool = False, resume: bool = False
) -> None:  # fmt: skip
    """Do what `fastbn.data.normalize` says."""
    destination = Path(destination)
    workers = checked_workers(workers)
    kind = kind_of(destination)
    opened = open_source(source, layout, mode)
    if not opened.listed:
        raise TypeError(
            "source: expected files or arrays, whose shape is known before they are read, "
            f"got {type(source).__name__}"
        )
    stack = Stack(opened.known(), layout)
    convert = Conversion(stack, stats, max_value, out_layout, dtype)
    if not math.prod(stack.shape):
        units: list[Index] = []
    else:
        units = list(cells(stack.shape, stack.block))
    identity = convert.identity() | {
        "source": [fingerprint(part) for part in stack.parts],
        "block": list(stack.block),
        "mode": mode,
    }
    journal = Journal(destination, identity, kind.name, len(units), resume)
    if not journal.finished:
        target = kind(
            journal.data, convert.moved(stack.shape), convert.dtype, convert.moved(stack.block)
        )
        try:
            _write_all(stack, convert, units, journal, target, workers, progress)
        finally:
            target.close()
    journal.finish()


def _write_all(
    stack: Stack, convert: Conversion, units: list[Index], journal: Journal, target: Any,
    workers: int, progress: bool
) -> None:  # fmt: skip
    def write(number: int) -> None:
        index = units[number]
        target.write(convert.moved(index), convert(stack.read(index), index))

    missing = [number for number in range(len(units)) if number not in journal.done]
    written: list[int] = []
    noted = time.monotonic()

    def note() -> None:
        target.flush()
        journal.wrote(written)
        written.clear()

    with (
        shared_threads(workers),
        bar(progress, sum(part.nbytes for part in stack.parts)) as shown,
        closing(in_order(write, missing, workers)) as outcomes,
    ):
        share = sum(part.nbytes for part in stack.parts) / max(len(units), 1)
        if shown is not None:
            shown.update(share * len(journal.done))
        try:
            for number, outcome in outcomes:
                outcome()
                written.append(number)
                if shown is not None:
                    shown.update(share)
                if time.monotonic() - noted > INTERVAL:
                    note()
                    noted = time.monotonic()
        finally:
            note()
