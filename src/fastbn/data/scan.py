# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of a source: its units are counted by threads, and merged in their order.

Decoders and kernels release the GIL, so that threads are enough. At most two units for each
worker are under way; of what lies in files as it is, a single worker counts one while the next
is read. The arithmetic is `batch_stats` and `BatchStats`.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fastbn._threads import get_num_threads, threads
from fastbn.data._libraries import library
from fastbn.data.blocks import Index
from fastbn.data.opening import Source
from fastbn.data.sources import Array, Part, letters
from fastbn.functional import batch_stats
from fastbn.functional.selection import checked_policy
from fastbn.stats import BatchStats, unit_of

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = tuple[Part, Index | None]


@dataclass
class Options:
    """How a unit is counted."""

    nan_policy: str = "propagate"
    nodata: Any = None

    def __post_init__(self) -> None:
        checked_policy(self.nan_policy)


@dataclass
class Counted:
    """Statistics, and how many positions of each channel were left out."""

    stats: BatchStats
    omitted: np.ndarray[Any, Any]

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.stats + other.stats, self.omitted + other.omitted)


@dataclass
class Total:
    """What parts of one number of channels have together; of images, their names, too."""

    counted: Counted
    names: list[str] = field(default_factory=list)
    deviations: Any = 0.0

    def note(self, part: Part, counted: Counted) -> None:
        """Note a part, for messages about images."""
        if part.is_image:
            self.names.append(part.name)
            self.deviations = self.deviations + counted.stats.std()


@dataclass
class Scan:
    """The result: statistics, and what they are of."""

    total: Total
    inputs: list[Part]
    skipped: dict[str, str]


# ---- threads


def checked_workers(workers: Any) -> int:
    """Return a number of workers, or raise."""
    try:
        number = operator.index(workers)
    except TypeError:
        raise TypeError(f"workers: expected an integer, got {workers!r}") from None
    if number < 1:
        raise ValueError(f"workers: expected at least 1, got {number}")
    return number


Outcomes = Generator[tuple[Item, Callable[[], Result]], None, None]


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Outcomes[Item, Result]:
    """Yield each item with what gives its result, or raises its error, in their order."""
    if workers > 1:
        yield from in_threads(function, items, workers, 2 * workers)
        return
    for item in items:
        yield item, partial(function, item)


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, under_way: int
) -> Outcomes[Item, Result]:
    """Do what `in_order` does by threads, which have at most so many items under way."""
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, "fastbn.data")
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) == under_way:
                first, future = waiting.popleft()
                yield first, future.result
        for first, future in waiting:
            yield first, future.result
    finally:
        pool.shutdown(cancel_futures=True)


def shared_threads(workers: int, ahead: bool = False) -> Any:
    """Return a context in which the kernels' threads are shared out among the workers.

    One that reads `ahead` leaves a processor to what reads: idle threads of OpenMP spin.
    """
    if ahead:
        return threads(max(1, get_num_threads() - 1))
    return nullcontext() if workers == 1 else threads(max(1, get_num_threads() // workers))


def bar(progress: bool, size: int | None) -> Any:
    """Return a progress bar on a terminal, or what takes its place elsewhere."""
    if not progress:
        return nullcontext()
    return library("tqdm").tqdm(total=size, unit="B", unit_scale=True, disable=None)


# ---- counting


def read(work: Work) -> Array:
    """Return the array of a unit; the read after the next of the thread may overwrite it."""
    part, unit = work
    try:
        return part.read(unit)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{part.name}: {error}") from error


def count(work: Work, given: Callable[[], Array], options: Options) -> Counted:
    """Return the statistics of a unit, whose array is given on request."""
    part, unit = work
    array = given()
    axis = part.axis_of(array)
    chosen = part.channels(unit)
    nodata = options.nodata
    if chosen is not None and np.ndim(nodata):
        nodata = list(nodata)[chosen[0]]
    try:
        stats = batch_stats(
            array, layout=letters(array.ndim, axis), nan_policy=options.nan_policy, nodata=nodata
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{part.name}: {error}") from error
    positions = array.size // array.shape[axis] if array.size else 0
    omitted = positions - stats.count.astype(np.int64)
    if chosen is None:
        return Counted(stats, omitted)
    whole = np.zeros(chosen[1], np.int64)
    whole[chosen[0]] = omitted
    return Counted(spread(stats, *chosen), whole)


def counted_units(
    works: Iterable[Work], options: Options, workers: int, ahead: bool
) -> Outcomes[Work, Counted]:
    """Yield each unit with what counts it; `ahead`: while a thread reads the next one."""
    if not ahead:
        yield from in_order(lambda work: count(work, partial(read, work), options), works, workers)
        return
    for work, given in in_threads(read, works, 1, 2):
        yield work, partial(count, work, given, options)


def spread(stats: BatchStats, where: slice, channels: int) -> BatchStats:
    """Return statistics of `channels` channels, of which all but some have counted nothing."""

    def put(values: Any, rest: Any) -> Any:
        array = np.full(channels, rest, np.asarray(values).dtype)
        array[where] = values
        return array

    def put_integers(values: Any) -> Any:
        return (
            None if values is None else [0] * where.start + values + [0] * (channels - where.stop)
        )

    assert stats.min is not None
    low, high = (unit_of(stats.min.dtype, name) for name in ("min", "max"))
    return BatchStats(
        put(stats.count, 0), put(stats.mean, 0), put(stats.m2, 0),
        min=put(stats.min, low), max=put(stats.max, high),
        sum=put_integers(stats.sum), sum_of_squares=put_integers(stats.sum_of_squares),
    )  # fmt: skip


def nothing_of(counted: Counted) -> Counted:
    """Return the statistics of no position of the same channels and type."""
    stats, channels = counted.stats, counted.stats.mean.size
    assert stats.min is not None
    assert stats.max is not None
    integers: list[int] | None = None if stats.sum is None else []
    empty = BatchStats(
        stats.count[:0], stats.mean[:0], stats.m2[:0], min=stats.min[:0], max=stats.max[:0],
        sum=integers, sum_of_squares=integers,
    )  # fmt: skip
    return Counted(spread(empty, slice(0, 0), channels), np.zeros(channels, np.int64))


class Gatherer:
    """Merges units into parts, and parts into totals; leaves out bad images if it may."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.totals: dict[int, Total] = {}
        self.skipped: dict[str, str] = {}
        self.parts: list[Part] = []
        self.part: Part | None = None
        self.counted: Counted | None = None
        self.error: str | None = None

    def unit(self, part: Part, outcome: Callable[[], Counted]) -> None:
        """Merge the next unit."""
        if part is not self.part:
            self.close()
            self.part = part
        if self.error is not None:
            return
        try:
            counted = outcome()
        except ValueError as error:
            if not (self.skip_bad and part.is_image):
                raise
            self.error = str(error)
            return
        self.counted = counted if self.counted is None else self.counted + counted

    def close(self) -> None:
        """Merge the part whose units have all come."""
        part, counted = self.part, self.counted
        if part is not None and self.error is not None:
            self.skipped[part.name] = self.error
        elif part is not None and counted is not None:
            self._merge(part, counted)
        self.part = self.counted = self.error = None

    def _merge(self, part: Part, counted: Counted) -> None:
        channels, totals = counted.stats.mean.size, self.totals
        if totals and channels not in totals and not part.is_image:
            raise ValueError(
                f"{part.name}: expected {next(iter(totals))} channels, as before, got {channels}"
            )
        if channels in totals:
            totals[channels].counted += counted
        else:
            totals[channels] = Total(counted)
        totals[channels].note(part, counted)

    def only_total(self) -> Total:
        """Return the total there is, or that of most images if the others may be left out."""
        totals, skipped = self.totals, self.skipped
        if not totals:
            unread = (
                f"; {len(skipped)} images are bad: {next(iter(skipped.values()))}"
                if skipped
                else ""
            )
            raise ValueError(f"source: nothing to count{unread}")
        most = max(totals, key=lambda channels: len(totals[channels].names))
        others = {c: total.names for c, total in totals.items() if c != most}
        if others and not self.skip_bad:
            listed = "; ".join(f"{c} channels: {', '.join(names)}" for c, names in others.items())
            raise ValueError(
                f"source: most images have {most} channels, others have not: {listed}; "
                "mode RGB makes them alike"
            )
        for channels, names in others.items():
            for name in names:
                skipped[name] = f"{name}: {channels} channels, most have {most}"
        return totals[most]


def scan(
    source: Source, options: Options, *, workers: int = 1, progress: bool = False,
    shard: tuple[int, int] = (0, 1), skip_bad: bool = False
) -> Scan:  # fmt: skip
    """Count a source; of its units only every N-th from the K-th, for a shard (K, N)."""
    parts = source.known()
    # What an iterable gives may be overwritten when it gives the next.
    workers = min(checked_workers(workers), workers if source.listed else 1)
    # Decoders have Python to run, for which another thread would have to wait.
    ahead = workers == 1 and bool(parts) and all(part.is_raw for part in parts)
    every = ((part, unit) for part in (parts or source.parts) for unit in part.units())
    mine: Iterable[Work] = itertools.islice(every, shard[0], None, shard[1])
    size = sum(part.nbytes for part in parts) // shard[1] if parts else None
    gatherer, inputs = Gatherer(skip_bad), []
    with (
        shared_threads(workers, ahead),
        bar(progress, size) as shown,
        closing(counted_units(mine, options, workers, ahead)) as counted,
    ):
        for (part, unit), outcome in counted:
            if source.listed and part is not gatherer.part:
                inputs.append(part)
            gatherer.unit(part, outcome)
            if shown is not None:
                shown.update(part.size_of(unit))
    gatherer.close()
    if not inputs and parts:
        first = parts[0]
        work = first, next(iter(first.units()))
        nothing = nothing_of(count(work, partial(read, work), options))
        gatherer.totals[nothing.stats.mean.size] = Total(nothing)
    total = gatherer.only_total()
    kept = [part for part in inputs if part.name not in gatherer.skipped]
    return Scan(total, kept, gatherer.skipped)
