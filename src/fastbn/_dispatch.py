# SPDX-License-Identifier: BSD-3-Clause
"""Which CPU level's kernels run: detection, FASTBN_ISA, `show_config`.

The level is picked once, at import, before a module of that level is loaded:
loading one may already execute its instructions. May not compute.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator

from fastbn import _build, _threads
from fastbn.engine import core

_current = ""


def runnable() -> tuple[str, ...]:
    """Return the levels that were built and that this CPU has, the best first."""
    have = _build.level()
    return tuple(level for level in _build.LEVELS if level == "baseline" or int(level[1:]) <= have)


def use(level: str) -> None:
    """Run the kernels of `level`, one of `runnable()`, from now on."""
    global _current
    if level not in runnable():
        raise ValueError(f"level: expected one of {', '.join(runnable())}, got {level!r}")
    modules = [
        importlib.import_module(f"fastbn.kernels._{level}_{dtype}")
        for dtype in ("float32", "float64", "float16", "bfloat16")
    ]
    images = importlib.import_module(f"fastbn.kernels._{level}_images")
    core.use(*(module.capsule for module in modules), images=images.capsule)
    _current = level


@contextlib.contextmanager
def using(level: str) -> Iterator[None]:
    """Run the kernels of `level` inside a with block: for tests and benchmarks."""
    before = _current
    use(level)
    try:
        yield
    finally:
        use(before)


def _choose() -> str:
    levels = runnable()
    forced = os.environ.get("FASTBN_ISA", "").strip()
    if forced and forced not in _build.LEVELS:
        raise ImportError(f"FASTBN_ISA: expected one of {', '.join(_build.LEVELS)}, got {forced!r}")
    if forced and forced not in levels:
        raise ImportError(f"FASTBN_ISA: this CPU has no {forced}, only {', '.join(levels)}")
    if not levels:
        raise ImportError("fastbn needs a CPU of level x86-64-v2 (SSE4.2, since about 2009)")
    return forced or levels[0]


def _torch_operators() -> list[str]:
    # `import fastbn` does not import PyTorch: without fastbn.torch there are none.
    module = sys.modules.get("fastbn.torch.dispatch")
    return [] if module is None else list(module.operators())


def show_config() -> dict[str, object]:
    """Return how this copy of fastbn was built and how it runs here.

    ``python -m fastbn`` prints the same.

    Returns
    -------
    dict
        ``version``, ``isa`` (the CPU level in use), ``isa_available``,
        ``compiler``, ``flags``, ``openmp`` (the runtime in this process and
        the standard's version as a date; ``None``: built without threads),
        ``threads``, ``threads_from`` and ``torch_operators`` (those of PyTorch whose
        kernels are fastbn's now: `fastbn.torch.enable`).

    Examples
    --------
    >>> import fastbn
    >>> config = fastbn.show_config()
    >>> config["isa"] in config["isa_available"]
    True
    """
    return {
        "version": _build.VERSION,
        "isa": _current,
        "isa_available": list(runnable()),
        "compiler": _build.compiler(),
        "flags": _build.FLAGS,
        "openmp": _threads.openmp(),
        "threads": _threads.get_num_threads(),
        "threads_from": _threads.source(),
        "torch_operators": _torch_operators(),
    }


use(_choose())
