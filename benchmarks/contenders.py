# SPDX-License-Identifier: BSD-3-Clause
"""Who takes part in a case: copies, fastbn, and whoever of the peers can carry it out."""

from __future__ import annotations

import ctypes
import importlib
import timeit
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from tqdm import tqdm

import fastbn
from benchmarks import native
from benchmarks.cases import EPS, Arrays
from fastbn import _dispatch, _threads


@dataclass
class Contender:
    """`run(count)` calls `count` times and returns the seconds that took."""

    name: str
    kind: str  # "copy"; "fastbn", the best level first; "fastbn new"; "peer"; "other"
    run: Callable[[int], float]
    result: Callable[[], np.ndarray]  # of the last call, stored like x
    own_threads: bool = False  # its threads are not OpenMP's
    error: float = 0.0  # of the part that `Arrays.exact` has


def python_calls(function: Callable[[], object]) -> Callable[[int], float]:
    return timeit.Timer(function).timeit


def c_calls(function: Callable[[int], object]) -> Callable[[int], float]:
    def run(count: int) -> float:
        start = timeit.default_timer()
        function(count)
        return timeit.default_timer() - start

    return run


def first(result: object) -> object:
    """Return what was computed, without what comes with it."""
    return result[0] if isinstance(result, tuple) else result


def copy_contenders(a: Arrays) -> Iterator[Contender]:
    library = native.copies()
    source, to = ctypes.c_void_p(a.x.ctypes.data), ctypes.c_void_p(a.y.ctypes.data)
    size, threads = ctypes.c_size_t(a.x.nbytes), ctypes.c_int(a.case.threads)
    for streaming, name in enumerate(("copy", "copy, streaming stores")):

        def function(count: int, streaming: int = streaming) -> None:
            library.copy(source, to, size, streaming, threads, count)

        yield Contender(name, "copy", c_calls(function), lambda: a.y)
    yield Contender("np.copyto", "copy", python_calls(lambda: np.copyto(a.y, a.x)), lambda: a.y)


def fastbn_call(a: Arrays, out: np.ndarray | None) -> Callable[[], object]:
    """Return fastbn's function together with its arguments."""
    case = a.case
    function, forward, backward = (
        getattr(fastbn, f"{case.norm}_norm{part}") for part in ("", "_forward", "_backward")
    )
    features = case.shape[1:]
    what = {"layer": [features], "rms": [features], "group": [case.groups]}.get(case.norm, [])
    affine = a.weight, (a.bias if case.centred else EPS)
    options = {"rows": {}, "NCHW": {"layout": None}, "NHWC": {"layout": "N...C"}}[case.layout]
    if case.op == "backward":
        _, *saved = forward(a.x, *what, *affine, **options)
        return partial(backward, a.dy, a.x, *saved, *what, a.weight, **options, out=out)
    if case.norm == "batch":
        what = [a.running_mean, a.running_var]
        options["training"] = case.op == "training"
    elif case.norm == "instance":
        what = [None, None]
    return partial(function, a.x, *what, *affine, **options, out=out)


def fastbn_contenders(a: Arrays, levels: tuple[str, ...]) -> Iterator[Contender]:
    """Each CPU level with ``out=``, and the best one with a new array for each call."""
    fastbn.set_num_threads(a.case.threads)

    def at_level(level: str, function: Callable[[], object]) -> Callable[[int], float]:
        run = python_calls(function)

        def switched(count: int) -> float:
            _threads.always_parallel(False)  # forgets what other lanes' teams were like
            with _dispatch.using(level):
                return run(count)

        return switched

    existing, fresh = fastbn_call(a, a.y), fastbn_call(a, None)
    for level in levels:
        yield Contender(f"fastbn {level}", "fastbn", at_level(level, existing), lambda: a.y)

    def result() -> np.ndarray:
        with _dispatch.using(levels[0]):
            return first(fresh())

    yield Contender("fastbn, new array", "fastbn new", at_level(levels[0], fresh), result)


def contenders(a: Arrays, levels: tuple[str, ...], peers: tuple[str, ...]) -> list[Contender]:
    """Return everyone who can carry out the case, each having done so once."""
    found = [*copy_contenders(a), *checked(a, fastbn_contenders(a, levels))]
    for peer in peers:
        try:
            found += checked(a, _module(peer).contenders(a))
        except Exception as error:  # whatever it raises, the others go on
            tqdm.write(f"left out: {peer}, {a.case.name}: {error!r}")
    return found


def checked(a: Arrays, found: Iterator[Contender]) -> list[Contender]:
    """Let each carry out the case once, and look at its result."""
    members = list(found)
    for contender in members:
        a.y.fill(np.nan)  # what is not written shows
        contender.run(1)
        contender.error = a.error(contender.result())
    return members


def missing_peers(peers: tuple[str, ...]) -> list[str]:
    """Return those of `peers` that are not installed."""
    missing = []
    for peer in peers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _module(peer)
        except ImportError:
            missing.append(peer)
    return missing


def _module(peer: str):
    return importlib.import_module(f"benchmarks.peers.{peer}")
