# SPDX-License-Identifier: BSD-3-Clause
"""What a run has found, in memory and as a file. Measures nothing, and knows no table.

A file is JSON with one line for each case, so that it stays small and two runs can be
compared line by line:

    machine     date, processor, versions
    command     what was run
    unit        what ratios are relative to: COPY, or the name of a contender
    kinds       the kind of each contender, in the order of the ratios below
    errors      norm, dtype, operation, contender, its largest absolute error
    cases       norm, network, shape, layout, operation, dtype, threads, seconds of the unit
                (null: not kept), then the ratio of each contender (null: it took no part)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.cases import Case

COPY = "copy"  # the best copy of x: the unit of all results but those of fusion.py
# Contenders that count as peers. Of a "fastest" one only the cases are kept that it won
# against the other peers, so no figure about it alone can be given.
PEERS = ("peer", "fastest")

ErrorKey = tuple[str, str, str, str]  # norm, dtype, operation, contender


@dataclass(frozen=True)
class Outcome:
    """One case: times as ratios to that of the unit in the same rounds."""

    case: Case
    seconds: float | None
    ratios: dict[str, float]
    kinds: Mapping[str, str]

    def of_kind(self, *kinds: str) -> list[str]:
        """Return the contenders of these kinds that took part."""
        return [name for name in self.ratios if self.kinds[name] in kinds]

    @property
    def best(self) -> float:
        """The ratio of fastbn's best CPU level."""
        return self.ratios[self.of_kind("fastbn")[0]]

    @property
    def peer(self) -> str | None:
        """The fastest peer."""
        return min(self.of_kind(*PEERS), key=self.ratios.__getitem__, default=None)

    @property
    def lead(self) -> float:
        """How many times faster than the fastest peer fastbn is."""
        return self.ratios[self.peer] / self.best

    @property
    def tensor(self) -> tuple[object, ...]:
        """What cases with other dtypes, threads and operations have in common with this one."""
        return self.case.norm, self.case.layout, self.case.network, self.case.shape


@dataclass
class Results:
    """All outcomes of a run."""

    machine: dict[str, object]
    command: str
    unit: str = COPY
    kinds: dict[str, str] = field(default_factory=dict)
    errors: dict[ErrorKey, float] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Keep another case."""
        self.kinds |= outcome.kinds
        self.outcomes.append(outcome)

    def add_error(self, key: ErrorKey, error: float) -> None:
        """Keep the largest error; a NaN counts as the largest."""
        self.errors[key] = float(np.maximum(error, self.errors.get(key, 0.0)))

    @property
    def index(self) -> dict[tuple[object, ...], Outcome]:
        """The outcomes by tensor, dtype, threads and operation."""
        return {(o.tensor, o.case.dtype, o.case.threads, o.case.op): o for o in self.outcomes}


def merged(parts: Sequence[Results]) -> Results:
    """Return the results of several processes as those of one run."""
    whole = Results(parts[0].machine, parts[0].command, parts[0].unit)
    for part in parts:
        for outcome in part.outcomes:
            whole.add(outcome)
        for key, error in part.errors.items():
            whole.add_error(key, error)
    return whole


def write(results: Results, file: Path) -> None:
    """Write `results`, with four digits of each number."""
    head = {
        "machine": results.machine,
        "command": results.command,
        "unit": results.unit,
        "kinds": results.kinds,
    }
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    errors = ([*key, _short(error)] for key, error in results.errors.items())
    cases = (_row(outcome, results.kinds) for outcome in results.outcomes)
    entries += [f'"errors": {_lines(errors)}', f'"cases": {_lines(cases)}']
    file.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def _row(outcome: Outcome, names: Iterable[str]) -> list[object]:
    case = outcome.case
    return [
        case.norm, case.network, case.shape, case.layout, case.op, case.dtype, case.threads,
        _short(outcome.seconds), *(_short(outcome.ratios.get(name)) for name in names),
    ]  # fmt: skip


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")


def _lines(rows: Iterable[list[object]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows) + "\n]"


def read(file: Path) -> Results:
    """Return the results that `write` has written."""
    found = json.loads(file.read_text())
    kinds = found["kinds"]
    outcomes = []
    for norm, network, shape, layout, op, dtype, threads, seconds, *ratios in found["cases"]:
        case = Case(norm, network, tuple(shape), layout, op, dtype, threads)
        named = zip(kinds, ratios, strict=True)
        took_part = {name: ratio for name, ratio in named if ratio is not None}
        outcomes.append(Outcome(case, seconds, took_part, kinds))
    errors = {tuple(key): error for *key, error in found["errors"]}
    return Results(found["machine"], found["command"], found["unit"], kinds, errors, outcomes)
