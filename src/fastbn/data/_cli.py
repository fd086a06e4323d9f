# SPDX-License-Identifier: BSD-3-Clause
"""The command ``fastbn``: stats, merge, normalize. Arguments, tables, messages, exit codes.

What it computes is `scan`, `files` and `writing`. Results go to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fastbn.data import files, opening, scan, writing
from fastbn.stats import BatchStats

COMMANDS = ("stats", "merge", "normalize")
SAME, DIFFERS, BAD, INTERRUPTED = 0, 1, 2, 130
EXACT = (
    "Statistics of integers are sums of integers: the same bits for any order, chunks, shards, "
    "jobs and machines. Those of floats have the same bits for the same units in the same order."
)
PATHS = (
    "files, folders (images below them), globs; store.zarr/group/array, file.h5/group/dataset, "
    "file.npz/name, file.nc/variable"
)


# ---- arguments


def _shard(text: str) -> tuple[int, int]:
    try:
        number, of = (int(word) for word in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected K/N, got {text!r}") from None
    if not 0 <= number < of:
        raise argparse.ArgumentTypeError(f"expected K/N with 0 <= K < N, got {text!r}")
    return number, of


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number above 0, got {text!r}")
    return value


def _tolerance(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else _positive(text)


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _nodata(text: str) -> Any:
    def number(word: str) -> int | float:
        try:
            return int(word)
        except ValueError:
            return float(word)

    try:
        values = [number(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number, or one for each channel as V,V,..., got {text!r}"
        ) from None
    return values if len(values) > 1 else values[0]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(
        "fastbn", epilog=EXACT,
        description="Mean and deviation of each channel of data sets larger than memory.",
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", metavar="{stats,merge,normalize}")
    _stats_parser(commands)
    _merge_parser(commands)
    _normalize_parser(commands)
    return top


def _command(commands: Any, name: str, summary: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, epilog=EXACT, allow_abbrev=False
    )
    command.set_defaults(run=run)
    return command


def _reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layout",
        help="a letter for each axis, C for channels, such as NHWC; "
        "without it images are NHWC, and channels of other sources second",
    )
    command.add_argument("--mode", help="a mode of Pillow that images are converted to, as RGB")
    command.add_argument("--jobs", type=_jobs, default=1, help="how many threads read (1)")


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON in place of the table")
    command.add_argument("-o", "--output", type=Path, help="write JSON to this file")
    command.add_argument(
        "--max-value",
        type=_positive,
        default=1.0,
        metavar="V",
        help="divide mean, std, min, max of the table, and before comparing",
    )
    command.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help='compare with a file of stats, or {"mean": [...], "std": [...]}; exit 1 if it differs',
    )
    command.add_argument("--tolerance", type=_tolerance, default=1e-3,
                         help="largest deviation of --compare (1e-3)")  # fmt: skip


def _stats_parser(commands: Any) -> None:
    command = _command(commands, "stats", "statistics of each channel of a data set", _stats)
    command.add_argument("paths", nargs="+", metavar="PATH", help=PATHS)
    _reading(command)
    command.add_argument("--nan", choices=("propagate", "omit", "raise"), default="propagate",
                         help="what to do with NaN (propagate)")  # fmt: skip
    command.add_argument("--nodata", type=_nodata, metavar="V[,V...]",
                         help="a value that does not count; or one for each channel")  # fmt: skip
    command.add_argument("--shard", type=_shard, default=(0, 1), metavar="K/N",
                         help="take every N-th unit from the K-th (from 0)")  # fmt: skip
    command.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out, and count, images "
        "that cannot be read or have another number of channels than most",
    )
    command.add_argument("--checksum", action="store_true", help="add sha256 of regular files")
    _output(command)


def _merge_parser(commands: Any) -> None:
    command = _command(commands, "merge", "statistics of all parts together", _merge)
    command.add_argument("paths", nargs="+", metavar="FILE", type=Path, help="files of stats -o")
    _output(command)


def _normalize_parser(commands: Any) -> None:
    command = _command(commands, "normalize", "write a data set normalised", _normalize)
    command.add_argument("source", metavar="IN", help=PATHS)
    command.add_argument("destination", metavar="OUT", help="a .npy or .zarr that does not exist")
    command.add_argument("--stats", required=True, type=Path, metavar="FILE",
                         help='of stats -o, or {"mean": [...], "std": [...]}')  # fmt: skip
    _reading(command)
    command.add_argument("--out-layout", help="the letters of --layout in another order")
    command.add_argument(
        "--max-value",
        type=_positive,
        default=1.0,
        metavar="V",
        help="of published numbers on the unit interval: 255 for 8 bits",
    )
    command.add_argument("--dtype", default="float32", help="a float type (float32)")
    command.add_argument("--resume", action="store_true", help="go on where OUT.partial ends")


# ---- commands


def _tell(message: str) -> None:
    print(f"fastbn: {message}", file=sys.stderr)


def _progress() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None


def _stats(given: argparse.Namespace) -> int:
    source = opening.open_source(given.paths, given.layout, given.mode)
    found = scan.scan(
        source, scan.Options(given.nan, given.nodata), workers=given.jobs, progress=_progress(),
        shard=given.shard, skip_bad=given.skip_bad,
    )  # fmt: skip
    images = given.layout is None and all(part.is_image for part in source.known())
    record = files.Record(
        found.total.counted.stats, [int(n) for n in found.total.counted.omitted],
        "NHWC" if images else given.layout,
        [files.described(part, given.checksum) for part in found.inputs],
    )  # fmt: skip
    for reason in found.skipped.values():
        _tell(f"left out: {reason}")
    if found.skipped:
        _tell(f"{len(found.skipped)} images left out")
    _tell_of_deviations(found.total, given.max_value)
    return _finish(given, record)


def _tell_of_deviations(total: scan.Total, max_value: float) -> None:
    """Say when the mean of the images' deviations is another than that of the pixels."""
    if len(total.names) < 2:
        return
    with np.errstate(all="ignore"):
        mean = total.deviations / len(total.names)
        differs = np.abs(mean / total.counted.stats.std() - 1) > 0.01
    if differs.any():
        numbers = ", ".join(f"{value:.6g}" for value in mean / max_value)
        _tell(
            f"the mean of the images' deviations is {numbers}: more than 1% from the deviation of "
            "the pixels; published numbers are often that mean"
        )


def _merge(given: argparse.Namespace) -> int:
    return _finish(given, files.merge(given.paths))


def _finish(given: argparse.Namespace, record: files.Record) -> int:
    deviation = None
    if given.compare is not None:
        deviation = compared(record.stats, given.compare, given.max_value)
    if given.output is not None:
        files.write(given.output, record)
    if given.json:
        sys.stdout.write(files.text(record))
    else:
        print(table(record, given.max_value))
    if deviation is None:
        return SAME
    same = deviation <= given.tolerance
    word = "within" if same else "above"
    _tell(f"deviation from {given.compare}: {deviation:.3g}, {word} {given.tolerance:g}")
    return SAME if same else DIFFERS


def _normalize(given: argparse.Namespace) -> int:
    try:
        writing.normalize(
            given.source, given.destination, given.stats, layout=given.layout,
            out_layout=given.out_layout, max_value=given.max_value, dtype=given.dtype,
            mode=given.mode, workers=given.jobs, progress=_progress(), resume=given.resume,
        )  # fmt: skip
    except KeyboardInterrupt:
        _tell(f"{given.destination}.partial is kept: the same command with --resume goes on")
        raise
    except FileExistsError as error:
        hint = "" if given.resume else " (--resume goes on with a .partial)"
        raise FileExistsError(f"{error}{hint}") from error
    return SAME


# ---- results


def table(record: files.Record, max_value: float) -> str:
    """Return a table for people."""
    stats = record.stats
    with np.errstate(all="ignore"):
        columns = [
            np.asarray(values, np.float64) / max_value
            for values in (stats.mean, stats.std(), stats.min, stats.max)
        ]
    rows = [["channel", "count", "mean", "std", "min", "max", "omitted"]]
    for c, count in enumerate(stats.count):
        numbers = [f"{column[c]:.9g}" for column in columns]
        rows.append([str(c), f"{count:.0f}", *numbers, str(record.omitted[c])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(w.rjust(n) for w, n in zip(row, widths, strict=True)) for row in rows
    )


def compared(stats: BatchStats, path: Path, max_value: float) -> float:
    """Return the largest deviation from published numbers, in deviations and as a ratio."""
    mean, std, in_data_units = files.mean_and_std(path)
    if len(mean) != stats.mean.size:
        raise ValueError(f"{path}: expected {stats.mean.size} channels, got {len(mean)}")
    scale = max_value if in_data_units else 1.0
    ours, wide = stats.mean / max_value, stats.std() / max_value
    with np.errstate(all="ignore"):
        shift = _ratio(np.abs(ours - np.array(mean) / scale), wide)
        stretch = _ratio(np.abs(np.array(std) / scale - wide), wide)
    largest = float(np.max(np.concatenate((shift, stretch))))
    return math.inf if math.isnan(largest) else largest


def _ratio(difference: Any, wide: Any) -> Any:
    """Return differences in deviations; of a constant channel, 0 where there is none."""
    return np.where(difference == 0, 0.0, difference / wide)


# ---- the program


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    top = parser()
    try:
        given = top.parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    if given.command is None:
        top.print_help(sys.stderr)
        return BAD
    try:
        return int(given.run(given))
    except KeyboardInterrupt:
        _tell("interrupted")
        return INTERRUPTED
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        _tell(f"error: {error}")
        return BAD


if __name__ == "__main__":
    sys.exit(main())
