# SPDX-License-Identifier: BSD-3-Clause
"""Times the contenders of a case: interleaved rounds, medians, spreads."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.cases import Case
from benchmarks.contenders import Contender
from benchmarks.results import Outcome

SHORTEST = 2e-3  # seconds that a contender runs in a round, at least
FEWEST, MOST = 5, 25
LAPPED = 4.0  # so many times slower than the fastest: FEWEST rounds will do
LONG = 0.05  # seconds; a call as long as that needs none before it that warms up
PAUSE = 6e-3  # seconds; OpenMP's threads spin for about as long after a call
SHORT_PAUSE = 2e-3  # and other threads for less


class Lane:
    """One contender, how often it is called in a round, and its times."""

    def __init__(self, contender: Contender):
        # It has been called before: what is made at the first call is there.
        self.contender = contender
        # The fastest of three: threads that sleep may take milliseconds to wake.
        calls = 1
        self.seconds = min(contender.run(1) for _ in range(3))
        while self.seconds * calls < SHORTEST / 4:
            calls *= 4
            self.seconds = min(self.seconds, contender.run(calls) / calls)
        self.calls = max(1, round(SHORTEST / self.seconds))
        self.times: list[float] = []

    def go(self) -> None:
        """One round."""
        if self.contender.own_threads:
            time.sleep(PAUSE)
        if self.seconds < LONG:
            self.contender.run(1)
        self.times.append(self.contender.run(self.calls) / self.calls)
        if self.contender.own_threads:
            time.sleep(SHORT_PAUSE)

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return float(np.median(self.times))

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles, as a part of the median."""
        low, high = np.percentile(self.times, [25, 75])
        return float((high - low) / 2 / self.median)


def race(contenders: Sequence[Contender], budget: float) -> list[Lane]:
    """Race for about `budget` seconds; longer where the spread hides who is faster."""
    lanes = [Lane(contender) for contender in contenders]
    fastest = min(lane.seconds for lane in lanes if lane.contender.kind != "copy")
    near = [lane for lane in lanes if lane.seconds < LAPPED * fastest]
    rounds = int(budget / sum(2 * lane.seconds * lane.calls for lane in near))
    rounds = min(MOST, max(FEWEST, rounds))
    _rounds(lanes, FEWEST)
    _rounds(near, rounds - FEWEST)
    if _undecided(lanes):
        _rounds(near, 2 * rounds)
    return lanes


def _rounds(lanes: Sequence[Lane], rounds: int) -> None:
    # Each in a random order, since a lane finds in the cache what the one before it left.
    for _ in range(rounds):
        for lane in random.sample(lanes, len(lanes)):
            lane.go()


def _undecided(lanes: Sequence[Lane]) -> bool:
    # Is the difference to the fastest peer less than the spread of the two?
    ours = next(lane for lane in lanes if lane.contender.kind == "fastbn")
    peers = [lane for lane in lanes if lane.contender.kind == "peer"]
    if not peers:
        return False
    first, second = sorted((ours, min(peers, key=_median)), key=_median)
    return second.median / first.median - 1 < first.spread + second.spread


def _median(lane: Lane) -> float:
    return lane.median


def outcome(case: Case, lanes: Sequence[Lane], unit: Lane) -> Outcome:
    """Return what is kept of a race: the unit's time, and ratios to it."""
    ratios = {lane.contender.name: ratio(lane, unit) for lane in lanes}
    kinds = {lane.contender.name: lane.contender.kind for lane in lanes}
    return Outcome(case, unit.median, ratios, kinds)


def ratio(lane: Lane, yardstick: Lane) -> float:
    """Return the median of the ratios in each round: what moves both, moves neither."""
    n = min(len(lane.times), len(yardstick.times))
    return float(np.median(np.array(lane.times[:n]) / np.array(yardstick.times[:n])))
