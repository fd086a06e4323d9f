# SPDX-License-Identifier: BSD-3-Clause
"""What the package says of itself; levels; the import."""

import numpy as np
import pytest
from processes import run

import fastbn
from fastbn import _build, _dispatch


def test_show_config():
    config = fastbn.show_config()
    assert config["version"] == fastbn.__version__
    assert config["isa"] == config["isa_available"][0]
    assert config["threads"] == fastbn.get_num_threads()
    for flag in ("-ffp-contract=off", "-O3"):
        assert flag in config["flags"]
    for flag in ("-ffast-math", "-Ofast", "-funsafe"):
        assert flag not in config["flags"]
    printed = run("import runpy; runpy.run_module('fastbn', run_name='__main__')")
    assert [line.split()[0] for line in printed.splitlines()] == list(config)


@pytest.mark.parametrize("level", _dispatch.runnable())
def test_a_level_can_be_forced(level):
    code = "import fastbn; print(fastbn.show_config()['isa'])"
    assert run(code, FASTBN_ISA=level) == level


# fastbn without its __init__, on a CPU that is said to be older.
OLDER_CPU = """
import importlib.util, sys, types
package = types.ModuleType("fastbn")
package.__path__ = importlib.util.find_spec("fastbn").submodule_search_locations
sys.modules["fastbn"] = package
import fastbn._build
fastbn._build.level = lambda: {level}
import fastbn._dispatch
print(fastbn._dispatch.show_config()["isa"])
"""


def test_levels_that_are_unknown_or_missing():
    with pytest.raises(RuntimeError, match=r"ImportError: FASTBN_ISA: expected one of .*'v9'"):
        run("import fastbn", FASTBN_ISA="v9")
    if "v4" in _build.LEVELS:
        assert run(OLDER_CPU.format(level=2)) == "v2"
        with pytest.raises(RuntimeError, match="FASTBN_ISA: this CPU has no v4, only v2"):
            run(OLDER_CPU.format(level=2), FASTBN_ISA="v4")
        with pytest.raises(RuntimeError, match="needs a CPU of level x86-64-v2"):
            run(OLDER_CPU.format(level=1))


def test_every_built_level_has_both_dtypes():
    for level in _dispatch.runnable():
        with _dispatch.using(level):
            for dtype in (np.float32, np.float64):
                x = np.ones((2, 3), dtype)
                assert (fastbn.batch_norm(x, np.ones(3), np.ones(3)) == 0).all()
    assert fastbn.show_config()["isa"] == _dispatch.runnable()[0]


def test_import_brings_no_other_package():
    code = (
        "import sys, numpy; before = set(sys.modules); import fastbn; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(*sorted(new - sys.stdlib_module_names))"
    )
    assert [name for name in run(code).split() if "cython" not in name and name != "numpy"] == [
        "fastbn"
    ]


def test_public_names():
    assert sorted(fastbn.__all__) == sorted(
        ["BatchNorm", "BatchStats", "__version__", "batch_norm", "batch_norm_backward",
         "batch_norm_forward", "batch_stats", "get_num_threads", "set_num_threads", "show_config",
         "threads"]
    )  # fmt: skip
    for name in fastbn.__all__:
        assert hasattr(fastbn, name)
