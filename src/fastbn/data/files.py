# SPDX-License-Identifier: BSD-3-Clause
"""The JSON of statistics: strict, and exact, so that files merge as arrays would."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastbn._build import VERSION
from fastbn.data._libraries import library
from fastbn.stats import BatchStats

SCHEMA = 1
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass
class Record:
    """What a file of statistics holds."""

    stats: BatchStats
    omitted: list[int]
    layout: str | None = None
    inputs: list[dict[str, Any]] = field(default_factory=list)


def _number(value: Any) -> int | float | str:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, int):
        return value
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _numbers(values: Any) -> list[int | float | str]:
    return [_number(value) for value in values]


def document(record: Record) -> dict[str, Any]:
    """Return a record as JSON's types."""
    stats = record.stats
    assert stats.min is not None
    return {
        "schema": SCHEMA,
        "fastbn": VERSION,
        "dtype": stats.min.dtype.name,
        "layout": record.layout,
        "channels": stats.mean.size,
        "count": [int(n) for n in stats.count],
        "mean": _numbers(stats.mean),
        "std": _numbers(stats.std()),
        "m2": _numbers(stats.m2),
        "min": _numbers(stats.min),
        "max": _numbers(stats.max),
        "omitted": [int(n) for n in record.omitted],
        "sum": stats.sum,
        "sum_of_squares": stats.sum_of_squares,
        "inputs": record.inputs,
    }


def text(record: Record) -> str:
    """Return a record as text of one line for each member."""
    members = document(record).items()
    lines = (f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in members)
    return "{\n" + ",\n".join(lines) + "\n}\n"


def write(path: Path, record: Record) -> None:
    """Write a record; a file of this name is whole or as it was."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text(record), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def described(part: Any, checksum: bool) -> dict[str, Any]:
    """Return the entry of an input."""
    entry: dict[str, Any] = {"name": part.name, "bytes": int(part.nbytes)}
    if checksum and part.path is not None and part.path.is_file():
        with part.path.open("rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return entry


# ---- reading


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def load(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; errors name the file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected an object, got {type(loaded).__name__}")
    return loaded


def _floats(values: Any, path: Path, name: str) -> list[float]:
    if not isinstance(values, list):
        values = [values]
    numbers = [_NAMES.get(v, v) if isinstance(v, str) else v for v in values]
    if not numbers or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in numbers):
        raise ValueError(f"{path}: {name}: expected a list of numbers")
    return [float(v) for v in numbers]


def read(path: Path) -> Record:
    """Return the record of a file that `stats` or `merge` wrote."""
    loaded = load(path)
    if loaded.get("schema") != SCHEMA or isinstance(loaded["schema"], bool):
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {loaded.get('schema')!r}")
    try:
        return _record(loaded, path)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a file of statistics ({error!r})") from error


def _record(loaded: dict[str, Any], path: Path) -> Record:
    if loaded["dtype"] == "bfloat16":
        library("ml_dtypes", "bfloat16")
    dtype = np.dtype(loaded["dtype"])

    def limits(name: str) -> Any:
        if dtype.kind in "iu":
            return np.array(loaded[name], dtype)
        return np.array(_floats(loaded[name], path, name)).astype(dtype)

    members = {name: _floats(loaded[name], path, name) for name in ("count", "mean", "m2")}
    stats = BatchStats(
        **members, min=limits("min"), max=limits("max"),
        sum=loaded["sum"], sum_of_squares=loaded["sum_of_squares"],
    )  # fmt: skip
    lengths = {len(loaded[name]) for name in ("count", "std", "omitted", "min", "max")}
    if lengths != {loaded["channels"]} or stats.mean.size != loaded["channels"]:
        raise ValueError(f"{path}: expected {loaded['channels']} channels, got {lengths}")
    return Record(stats, loaded["omitted"], loaded["layout"], loaded["inputs"])


def mean_and_std(path: Path) -> tuple[list[float], list[float], bool]:
    """Return mean and deviation of any file, and whether they are in the data's units."""
    loaded = load(path)
    if "schema" in loaded:
        stats = read(path).stats
        return stats.mean.tolist(), stats.std().tolist(), True
    if not {"mean", "std"} <= loaded.keys():
        raise ValueError(
            f'{path}: expected a file of statistics or {{"mean": [...], "std": [...]}}'
        )
    mean, std = (_floats(loaded[name], path, name) for name in ("mean", "std"))
    if len(mean) != len(std):
        raise ValueError(f"{path}: expected as many deviations as means, got {len(std)}")
    return mean, std, False


def merge(paths: list[Path]) -> Record:
    """Return the record of all files together."""
    first, *others = records = [read(path) for path in paths]
    for path, record in zip(paths[1:], others, strict=True):
        for name, mine, its in (
            ("layout", first.layout, record.layout),
            ("channels", first.stats.mean.size, record.stats.mean.size),
        ):
            if mine != its:
                raise ValueError(f"{path}: {name}: expected {mine!r} as in {paths[0]}, got {its!r}")
    return Record(
        BatchStats.merge(record.stats for record in records),
        [sum(numbers) for numbers in zip(*(r.omitted for r in records), strict=True)],
        first.layout,
        [entry for record in records for entry in record.inputs],
    )
