# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm as other frameworks write it down: from their names and conventions, and to them.

A `Dialect` is a row of facts about one framework; `load` and `dump` are the same for all. No
framework is imported. May compute with vectors of channels only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbn._numpy import binding
from fastbn.layers import BatchNorm

__all__ = ["dump", "load"]

#: What Darknet adds to the standard deviation, outside the root.
DARKNET_EPS = 1e-6


class Dialect(NamedTuple):
    """What a framework calls things, and what it means by them.

    Names are None, and default values absent, where it has no such thing.
    """

    weight: str
    bias: str
    mean: str
    var: str
    defaults: dict[str, Any]  # of its config
    eps: str | None = None  # the name in its config
    momentum: str | None = None
    keeps_old: bool = True  # momentum is the share of the old value
    unbiased: bool = False  # what training adds to the running variance
    has_objects: bool = False  # layers or modules with these names
    always_affine: bool = True  # weight and bias are always there
    always_tracks: bool = True


DIALECTS = {
    "torch": Dialect(
        "weight", "bias", "running_mean", "running_var",
        {"eps": 1e-5, "momentum": 0.1, "affine": None, "track_running_stats": None},
        "eps", "momentum", keeps_old=False, unbiased=True, has_objects=True, always_affine=False,
        always_tracks=False,
    ),
    "keras": Dialect(
        "gamma", "beta", "moving_mean", "moving_variance",
        {"axis": -1, "momentum": 0.99, "epsilon": 1e-3, "center": None, "scale": None},
        "epsilon", "momentum", has_objects=True, always_affine=False,
    ),
    "flax": Dialect(
        "scale", "bias", "mean", "var", {"axis": -1, "momentum": 0.99, "epsilon": 1e-5},
        "epsilon", "momentum", has_objects=True, always_affine=False,
    ),
    "onnx": Dialect(
        "scale", "B", "input_mean", "input_var", {"epsilon": 1e-5, "momentum": 0.9},
        "epsilon", "momentum",
    ),
    "mxnet": Dialect(
        "gamma", "beta", "moving_mean", "moving_var",
        {"eps": 1e-3, "momentum": 0.9, "fix_gamma": True, "axis": 1}, "eps", "momentum",
    ),
    "darknet": Dialect("scales", "biases", "rolling_mean", "rolling_variance", {}),
}  # fmt: skip
# Layouts in which channels are last, by their axis.
_CHANNELS_LAST = {-1: "N...C", 2: "NTC", 3: "NHWC", 4: "NDHWC"}


def _dialect(name: str) -> Dialect:
    if not isinstance(name, str):
        raise TypeError(f"name: expected one of {list(DIALECTS)}, got {name!r}")
    if name not in DIALECTS:
        raise ValueError(f"name: expected one of {list(DIALECTS)}, got {name!r}")
    return DIALECTS[name]


# ---- what came ---------------------------------------------------------------------------


def _array(value: Any, name: str) -> NDArray:
    # Of a tensor, a variable or an array.
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    if not isinstance(value, np.ndarray):
        value = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    return binding.check_array(np.asarray(value), name)


def _of_object(name: str, dialect: Dialect, thing: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    # What a layer or a module has under the names of its framework.
    if not dialect.has_objects:
        raise TypeError(
            f"weights: expected a mapping of the names of {name}, got {type(thing).__name__}"
        )
    names = dialect.weight, dialect.bias, dialect.mean, dialect.var, "num_batches_tracked"
    weights = {key: getattr(thing, key, None) for key in names}
    config = {key: getattr(thing, key) for key in dialect.defaults if hasattr(thing, key)}
    rank = getattr(getattr(thing, "input_spec", None), "ndim", None)
    if rank is not None and config.get("axis") == rank - 1:
        config["axis"] = -1
    return {key: value for key, value in weights.items() if value is not None}, config


def _settings(dialect: Dialect, config: object) -> dict[str, Any]:
    # Of a mapping or an object, with defaults for what it does not say.
    if config is None:
        given: dict[str, Any] = {}
    elif isinstance(config, Mapping):
        given = {key: config[key] for key in dialect.defaults if key in config}
    else:
        given = {key: getattr(config, key) for key in dialect.defaults if hasattr(config, key)}
    return dialect.defaults | given


def _check_names(
    dialect: Dialect, weights: Mapping[str, Any], settings: dict[str, Any]
) -> tuple[bool, bool, bool]:
    # Returns whether there are a weight, a bias, and running statistics.
    def wanted(names: tuple[str, ...], said: str, always: bool) -> bool:
        there = any(name in weights for name in names)
        return always or (there if settings.get(said) is None else bool(settings[said]))

    affine = "affine" in settings
    scale = wanted((dialect.weight,), "affine" if affine else "scale", dialect.always_affine)
    center = wanted((dialect.bias,), "affine" if affine else "center", dialect.always_affine)
    moving = (dialect.mean, dialect.var)
    tracks = wanted(moving, "track_running_stats", dialect.always_tracks)
    expected = [
        *((dialect.weight,) if scale else ()), *((dialect.bias,) if center else ()),
        *(moving if tracks else ()),
    ]  # fmt: skip
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in (*expected, "num_batches_tracked")]
    if missing or unexpected:
        raise KeyError(
            f"weights: expected the names {expected}, got {list(weights)}, where {missing} are "
            f"missing and {unexpected} unexpected"
        )
    return scale, center, tracks


def _layout_of(axis: Any, layout: str | None) -> str | None:
    if layout is not None:
        return layout
    if isinstance(axis, (list, tuple)) and len(axis) == 1:
        axis = axis[0]
    axis = binding.check_integer(axis, "axis")
    if axis == 1:
        return None
    if axis not in _CHANNELS_LAST:
        raise ValueError(f"axis: expected 1 or the last one without layout=, got {axis}")
    return _CHANNELS_LAST[axis]


def _new_layer(
    arrays: dict[str, NDArray],
    channels: int | None,
    dialect: Dialect,
    settings: dict[str, Any],
    layout: str | None,
) -> BatchNorm:
    for name, array in arrays.items():
        channels = array.size if channels is None else channels
        if array.shape != (channels,):
            raise ValueError(f"{name}: expected the shape (C,) of all of them, got {array.shape}")
    if channels is None:
        raise ValueError("weights: expected arrays, which say how many channels there are")
    momentum = settings[dialect.momentum] if dialect.momentum else BatchNorm(1).momentum
    if momentum is not None and dialect.keeps_old and dialect.momentum:
        momentum = 1.0 - binding.check_momentum(momentum)
    double = dialect.eps is None or any(array.dtype == np.float64 for array in arrays.values())
    return BatchNorm(
        channels,
        settings[dialect.eps] if dialect.eps else 0.0,
        momentum,
        layout=_layout_of(settings.get("axis", 1), layout),
        unbiased=dialect.unbiased,
        dtype=np.float64 if double else np.float32,
    )


def load(name: str, weights: Any, config: Any = None, *, layout: str | None = None) -> BatchNorm:
    """Return the layer that goes on as a batch norm of another framework would have.

    Parameters
    ----------
    name : {"torch", "keras", "flax", "onnx", "mxnet", "darknet"}
        The framework.
    weights : mapping of str to array, or layer
        Its arrays under its names, see Notes. A layer or module of PyTorch, Keras or Flax
        (nnx) has its config, too. Variables of Flax may be in their two collections.
    config : mapping, or layer, optional
        Its options under its names. What is not given has the default of the framework;
        what the framework does not have, that of `BatchNorm`.
    layout : str, optional
        As for `BatchNorm`. Without it, that of the axis in `config`.

    Returns
    -------
    BatchNorm
        In training mode; that of Darknet, which cannot train, in evaluation mode.

    Raises
    ------
    KeyError
        If a name is missing from `weights`, or unexpected.
    ValueError
        If shapes differ; for another `name`; for an axis that needs `layout`.
    TypeError
        For anything of a wrong type.

    Notes
    -----
    ======= ============================================== =======================================
    name    weights                                        config
    ======= ============================================== =======================================
    torch   weight, bias, running_mean, running_var,       eps, momentum, affine,
            num_batches_tracked                            track_running_stats
    keras   gamma, beta, moving_mean, moving_variance      axis, momentum, epsilon, center, scale
    flax    scale, bias, mean, var                         axis, momentum, epsilon
    onnx    scale, B, input_mean, input_var                epsilon, momentum
    mxnet   gamma, beta, moving_mean, moving_var           eps, momentum, fix_gamma, axis
    darknet scales, biases, rolling_mean,                  -
            rolling_variance
    ======= ============================================== =======================================

    PyTorch's momentum is the share of the new value, and its running variance unbiased. That of
    the others is the share of the old value, and their variance biased (``unbiased=False``).
    Where there is no gamma or no beta, or ``fix_gamma`` is True, the layer has no `weight` or
    `bias`, so that it trains none. Darknet adds 1e-6 to the standard deviation, outside the
    root: the layer, which is float64, has ``running_var = (sqrt(v) + 1e-6) ** 2`` and
    ``eps=0``.

    Examples
    --------
    >>> import numpy as np, fastbn.dialects
    >>> one = np.ones(2, np.float32)
    >>> weights = {"gamma": one, "beta": one, "moving_mean": one, "moving_variance": one}
    >>> fastbn.dialects.load("keras", weights, {"momentum": 0.75, "epsilon": 1e-3})
    BatchNorm(2, eps=0.001, momentum=0.25, layout='N...C', unbiased=False)
    """
    dialect = _dialect(name)
    binding.check_layout(layout)
    training, channels = True, None
    if not isinstance(weights, Mapping):
        channels = getattr(weights, "num_features", None) if name == "torch" else None
        training = name != "torch" or bool(getattr(weights, "training", True))
        weights, own = _of_object(name, dialect, weights)
        config = own if config is None else config
    elif name == "flax" and "batch_stats" in weights:
        weights = {**weights.get("params", {}), **weights["batch_stats"]}
    settings = _settings(dialect, config)
    scale, center, tracks = _check_names(dialect, weights, settings)
    arrays = {key: _array(value, key) for key, value in weights.items()
              if key != "num_batches_tracked"}  # fmt: skip
    bn = _new_layer(arrays, channels, dialect, settings, layout)
    state = {"weight": dialect.weight, "bias": dialect.bias}
    state |= {"running_mean": dialect.mean, "running_var": dialect.var}
    loaded = {ours: arrays[theirs] for ours, theirs in state.items() if theirs in arrays}
    if dialect.eps is None:
        variance = loaded["running_var"].astype(np.float64)
        with np.errstate(invalid="ignore"):
            loaded["running_var"] = (np.sqrt(variance) + DARKNET_EPS) ** 2
    if "num_batches_tracked" in weights:
        loaded["num_batches_tracked"] = np.asarray(weights["num_batches_tracked"])
    bn.load_state_dict(loaded, strict=False)
    bn._leave_out(
        weight=not scale or bool(settings.get("fix_gamma")), bias=not center, running=not tracks
    )
    return bn.train(training and dialect.eps is not None)


# ---- what goes ---------------------------------------------------------------------------


def _old_share(name: str, bn: BatchNorm) -> float:
    if bn.momentum is None:
        raise ValueError(
            f"bn: expected a momentum that is a number, got None, the plain average, which "
            f"{name} does not have"
        )
    return 1.0 - bn.momentum


def _axis_of(bn: BatchNorm) -> int:
    if bn.layout is None:
        return 1
    return -1 if bn.layout == "N...C" else bn.layout.index("C")


def _darknet_variance(bn: BatchNorm) -> NDArray:
    assert bn.running_var is not None
    with np.errstate(invalid="ignore"):
        deviation = np.sqrt(bn.running_var.astype(np.float64) + bn.eps) - DARKNET_EPS
    if (deviation < 0).any():
        raise ValueError(
            f"bn: expected deviations of at least {DARKNET_EPS:g}, which Darknet adds to each, "
            f"got {(deviation + DARKNET_EPS).min():g}"
        )
    return deviation**2


def dump(name: str, bn: BatchNorm) -> tuple[dict[str, NDArray], dict[str, Any]]:
    """Return weights and config of a layer under the names of another framework.

    Parameters
    ----------
    name : {"torch", "keras", "flax", "onnx", "mxnet", "darknet"}
        The framework.
    bn : BatchNorm
        The layer, which must have no activation, since no framework has one there.

    Returns
    -------
    weights : dict of str to ndarray
        New arrays; `load` has the names. Of Darknet they are float32.
    config : dict
        Its options, `load` has the names.

    Raises
    ------
    ValueError
        If the framework has no counterpart: of ``momentum=None`` (but PyTorch), of a layer
        without running statistics (but PyTorch), of an activation; for another `name`.
    TypeError
        If `bn` is no `BatchNorm`.

    Notes
    -----
    Where a framework has always a weight and a bias, and the layer has none, they are 1 and 0.

    Examples
    --------
    >>> import fastbn.dialects
    >>> weights, config = fastbn.dialects.dump("flax", fastbn.BatchNorm(1, momentum=0.25))
    >>> list(weights), config
    (['scale', 'bias', 'mean', 'var'], {'axis': 1, 'momentum': 0.75, 'epsilon': 1e-05})
    """
    dialect = _dialect(name)
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn: expected a BatchNorm, got {type(bn).__name__}")
    if bn.activation is not None:
        raise ValueError(f"bn: expected a layer without activation, got {bn.activation!r}")
    if dialect.always_tracks and (bn.running_mean is None or bn.running_var is None):
        raise ValueError(f"bn: expected running statistics, which {name} always has, got none")
    arrays = {dialect.weight: bn.weight, dialect.bias: bn.bias}
    # PyTorch has both or none.
    if dialect.always_affine or (name == "torch" and (bn.weight is None) != (bn.bias is None)):
        arrays = {
            dialect.weight: np.ones(bn.num_features, bn.dtype) if bn.weight is None else bn.weight,
            dialect.bias: np.zeros(bn.num_features, bn.dtype) if bn.bias is None else bn.bias,
        }
    arrays |= {dialect.mean: bn.running_mean, dialect.var: bn.running_var}
    if dialect.eps is None:
        arrays[dialect.var] = _darknet_variance(bn)
    weights = {
        key: np.array(value, np.float32 if dialect.eps is None else None)
        for key, value in arrays.items()
        if value is not None
    }
    if name == "torch" and bn.num_batches_tracked is not None:
        weights["num_batches_tracked"] = np.array(bn.num_batches_tracked, np.int64)
    return weights, _config_of(name, dialect, bn, weights)


def _config_of(
    name: str, dialect: Dialect, bn: BatchNorm, weights: dict[str, NDArray]
) -> dict[str, Any]:
    said: dict[str, Callable[[], Any]] = {
        "axis": lambda: _axis_of(bn),
        "center": lambda: bn.bias is not None,
        "scale": lambda: bn.weight is not None,
        "fix_gamma": lambda: bn.weight is None,
        "affine": lambda: dialect.weight in weights,
        "track_running_stats": lambda: bn.running_mean is not None,
        "momentum": lambda: _old_share(name, bn) if dialect.keeps_old else bn.momentum,
        "eps": lambda: bn.eps,
        "epsilon": lambda: bn.eps,
    }
    return {key: said[key]() for key in dialect.defaults}
