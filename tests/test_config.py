# SPDX-License-Identifier: BSD-3-Clause
"""What the package says of itself; levels; the import."""

import inspect

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


def test_a_level_that_is_unknown():
    with pytest.raises(RuntimeError, match=r"ImportError: FASTBN_ISA: expected one of .*'v9'"):
        run("import fastbn", FASTBN_ISA="v9")


@pytest.mark.skipif("v4" not in _build.LEVELS, reason="built for one level: no CPU has too few")
def test_levels_that_a_cpu_does_not_have():
    assert run(OLDER_CPU.format(level=2)) == "v2"
    with pytest.raises(RuntimeError, match="FASTBN_ISA: this CPU has no v4, only v2"):
        run(OLDER_CPU.format(level=2), FASTBN_ISA="v4")
    with pytest.raises(RuntimeError, match="needs a CPU of level x86-64-v2"):
        run(OLDER_CPU.format(level=1))


def test_every_built_level_has_every_dtype(any_dtype):
    x = np.ones((2, 3), any_dtype)
    for level in _dispatch.runnable():
        with _dispatch.using(level):
            assert (fastbn.batch_norm(x, np.ones(3), np.ones(3)) == 0).all()
            assert (fastbn.layer_norm(x, 3) == 0).all()
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
        ["BatchNorm", "BatchRenorm", "BatchStats", "GroupNorm", "InPlaceBatchNorm", "InstanceNorm",
         "LayerNorm", "RMSNorm", "StatsAccumulator", "SyncBatchNorm", "__version__", "batch_norm",
         "batch_norm_backward", "batch_norm_backward_inplace", "batch_norm_forward", "batch_stats",
         "denormalize", "fold_batch_norm", "fold_batch_norm_into_next", "freeze", "get_include",
         "get_num_threads", "group_norm", "group_norm_backward", "group_norm_forward",
         "instance_norm", "instance_norm_backward", "instance_norm_forward", "layer_norm",
         "layer_norm_backward", "layer_norm_forward", "normalize", "rms_norm", "rms_norm_backward",
         "rms_norm_forward", "scale_shift", "set_num_threads", "show_config", "threads",
         "unfreeze", "update_statistics"]
    )  # fmt: skip
    for name in fastbn.__all__:
        assert hasattr(fastbn, name)


# Order, defaults and keywords: those of PyTorch's functions and modules, where it has them.
FUSED = "activation=None, negative_slope=0.01, residual=None, "
CHANNELS = f"mask=None, lengths=None, length_axis=None, {FUSED}"
LAYER = "activation=None, negative_slope=0.01, "
SIGNATURES = {
    "layer_norm": f"x, normalized_shape, weight=None, bias=None, eps=1e-05, *, {FUSED}out=None",
    "layer_norm_backward": (
        f"dy, x, mean, invstd, normalized_shape, weight=None, *, bias=None, {FUSED}out=None"
    ),
    "rms_norm": f"x, normalized_shape, weight=None, eps=None, *, {FUSED}out=None",
    "rms_norm_backward": f"dy, x, invrms, normalized_shape, weight=None, *, {FUSED}out=None",
    "group_norm": (
        f"x, num_groups, weight=None, bias=None, eps=1e-05, *, layout=None, {CHANNELS}out=None"
    ),
    "group_norm_backward": (
        f"dy, x, mean, invstd, num_groups, weight=None, *, bias=None, layout=None, "
        f"{CHANNELS}out=None"
    ),
    "instance_norm": (
        f"x, running_mean=None, running_var=None, weight=None, bias=None, "
        f"use_input_stats=True, momentum=0.1, eps=1e-05, *, layout=None, {CHANNELS}out=None"
    ),
    "instance_norm_forward": (
        f"x, weight=None, bias=None, *, running_mean=None, running_var=None, "
        f"use_input_stats=True, momentum=0.1, eps=1e-05, layout=None, {CHANNELS}out=None"
    ),
    "instance_norm_backward": (
        f"dy, x, mean, invstd, weight=None, *, bias=None, layout=None, {CHANNELS}out=None"
    ),
    "LayerNorm": (
        f"normalized_shape, eps=1e-05, elementwise_affine=True, bias=True, *, {LAYER}dtype"
    ),
    "RMSNorm": f"normalized_shape, eps=None, elementwise_affine=True, *, {LAYER}dtype",
    "GroupNorm": f"num_groups, num_channels, eps=1e-05, affine=True, *, layout=None, {LAYER}dtype",
    "InstanceNorm": (
        f"num_features, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False, "
        f"*, layout=None, {LAYER}dtype"
    ),
}
SIGNATURES["layer_norm_forward"] = SIGNATURES["layer_norm"]
SIGNATURES["rms_norm_forward"] = SIGNATURES["rms_norm"]
SIGNATURES["group_norm_forward"] = SIGNATURES["group_norm"]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    parts = []
    for parameter in inspect.signature(getattr(fastbn, name)).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        if parameter.name == "dtype":
            assert parameter.default is np.float32
            parts.append("dtype")
        else:
            default = "" if parameter.default is parameter.empty else f"={parameter.default}"
            parts.append(parameter.name + default)
    assert ", ".join(parts) == SIGNATURES[name]
