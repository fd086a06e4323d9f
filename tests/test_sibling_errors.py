# SPDX-License-Identifier: BSD-3-Clause
"""Wrong arguments of the siblings: the exception, the name in its message, nothing written."""

import numpy as np
import pytest
from arrays import batch
from cases import Case
from numpy.lib.stride_tricks import as_strided

import fastbn

X = batch((4, 6, 5), "float32")


def read_only(array):
    array.flags.writeable = False
    return array


WRONG_X = [
    ({"x": None}, TypeError, "x: expected a numpy.ndarray, got None"),
    ({"x": X.tolist()}, TypeError, "x: expected a numpy.ndarray, got list"),
    ({"x": np.ma.masked_array(X)}, TypeError, "x: .*mask"),
    ({"x": X.astype(np.int64)}, TypeError, r"x: .*got int64.*x\.astype\(np\.float32\)"),
    ({"x": X.astype(np.uint16)}, TypeError, r"x: (?=.*uint16)(?=.*\.view\()(?=.*ml_dtypes)"),
    ({"x": X.astype(np.longdouble)}, TypeError, f"x: .*got {np.dtype(np.longdouble)}"),
    ({"x": X.astype(complex)}, TypeError, "x: .*got complex128"),
    ({"x": X.astype(object)}, TypeError, "x: .*got object"),
]
WRONG_OUT = [
    ({"out": X[:3].copy()}, ValueError, r"out: expected the shape of x.*got \(3, 6, 5\)"),
    ({"out": X.astype(float)}, TypeError, "out: expected the dtype of x, float32, got float64"),
    ({"out": X.astype(np.float16)}, TypeError, "out: expected the dtype of x, float32.*float16"),
    ({"out": X.tolist()}, TypeError, "out: "),
    ({"out": read_only(X.copy())}, ValueError, "out: .*read-only"),
    ({"out": as_strided(X.copy(), X.shape, (0, 20, 4))}, ValueError, "out: .*apart"),
]
WRONG_EPS = [
    ({"eps": -1e-5}, ValueError, "eps: "),
    ({"eps": float("nan")}, ValueError, "eps: .*nan"),
    ({"eps": 10**400}, ValueError, "eps: .*range of float64"),
    ({"eps": "1e-5"}, TypeError, "eps: expected a real number, got str"),
    ({"eps": 1j}, TypeError, "eps: .*complex"),
]
# An eps of 0 is in test_eps_zero.py.
NO_EPS = [({"eps": None}, TypeError, "eps: .*None")]
WRONG_SHAPE = [
    ({"normalized_shape": 4}, ValueError, r"normalized_shape: .*\(4, 6, 5\)"),
    ({"normalized_shape": (4, 5)}, ValueError, "normalized_shape: "),
    ({"normalized_shape": (4,)}, ValueError, "normalized_shape: "),
    ({"normalized_shape": 30}, ValueError, "normalized_shape: "),
    ({"normalized_shape": (2, 4, 6, 5)}, ValueError, "normalized_shape: "),
    ({"normalized_shape": (1, 5)}, ValueError, "normalized_shape: "),
    ({"normalized_shape": -1}, ValueError, "normalized_shape: "),
    ({"normalized_shape": ()}, ValueError, "normalized_shape: "),
    ({"normalized_shape": 5.0}, TypeError, "normalized_shape: "),
    ({"normalized_shape": (6.0, 5)}, TypeError, "normalized_shape: "),
    ({"normalized_shape": "5"}, TypeError, "normalized_shape: "),
    ({"normalized_shape": None}, TypeError, "normalized_shape: "),
]
WRONG_GROUPS = [
    ({"num_groups": 4}, ValueError, "num_groups: .*6.*4"),
    ({"num_groups": 0}, ValueError, "num_groups: "),
    ({"num_groups": -2}, ValueError, "num_groups: "),
    ({"num_groups": 12}, ValueError, "num_groups: "),
    ({"num_groups": 2.0}, TypeError, "num_groups: "),
    ({"num_groups": None}, TypeError, "num_groups: "),
    ({"num_groups": True}, TypeError, "num_groups: "),
]
WRONG_LAYOUT = [
    ({"layout": "LCH"}, ValueError, "layout: .*'N'.*'LCH'"),
    ({"layout": "NHWC"}, ValueError, r"layout: expected 3 letters.*\(4, 6, 5\).*'NHWC'"),
    ({"layout": "NTD"}, ValueError, "layout: .*'NTD'"),
    ({"layout": "NNC"}, ValueError, "layout: "),
    ({"layout": "NC1"}, ValueError, "layout: "),
    ({"layout": 1}, TypeError, "layout: expected a string"),
    ({"x": X[0, 0]}, ValueError, r"x: expected at least 2 dimensions.*got 1, shape \(5,\)"),
]
LAST = [
    ({"weight": np.ones(6)}, ValueError, r"weight: expected shape \(5,\).*got \(6,\)"),
    ({"weight": np.ones((1, 5))}, ValueError, r"weight: .*\(1, 5\)"),
    ({"weight": np.ones(5, int)}, TypeError, "weight: .*int64"),
    ({"weight": 2.0}, TypeError, "weight: .*float"),
]
CHANNELS = [
    ({"weight": np.ones(5)}, ValueError, r"weight: expected shape \(6,\).*got \(5,\)"),
    ({"weight": np.ones((6, 1))}, ValueError, r"weight: .*\(6, 1\)"),
    ({"bias": np.ones(2)}, ValueError, "bias: "),
    ({"bias": np.ones(6, np.uint8)}, TypeError, "bias: .*uint8"),
]
RUNNING = [
    ({"running_mean": np.ones(5)}, ValueError, "running_mean: "),
    ({"running_var": np.ones(6, int)}, TypeError, "running_var: .*int64"),
    ({"running_var": np.ones(6, np.float16)}, TypeError, "running_var: .*float16"),
    ({"running_mean": np.ones(6, np.float16)}, TypeError, "running_mean: .*float16"),
    ({"running_mean": read_only(np.ones(6))}, ValueError, "running_mean: .*read-only"),
    ({"running_mean": X.reshape(-1)[:6]}, ValueError, "running_mean: .*overlaps x"),
    ({"momentum": float("nan")}, ValueError, "momentum: "),
    ({"momentum": None}, TypeError, "momentum: "),
    ({"use_input_stats": 1}, TypeError, "use_input_stats: expected True or False, got 1"),
    ({"use_input_stats": None}, TypeError, "use_input_stats: "),
]
ONE_VALUE = [({"x": X[:, :, :1]}, ValueError, r"x: expected more than one value.*\(4, 6, 1\)")]
FORWARD = {
    "layer_norm": WRONG_X + WRONG_OUT + WRONG_EPS + NO_EPS + WRONG_SHAPE + LAST + [
        ({"bias": np.ones((6, 5))}, ValueError, r"bias: expected shape \(5,\)"),
        ({"bias": np.ones(5, int)}, TypeError, "bias: "),
    ],
    "rms_norm": WRONG_X + WRONG_OUT + WRONG_EPS + WRONG_SHAPE + LAST,
    "group_norm": WRONG_X + WRONG_OUT + WRONG_EPS + NO_EPS + WRONG_GROUPS + WRONG_LAYOUT
    + CHANNELS + [
        ({"x": X[:, :, :1], "num_groups": 6}, ValueError, "x: expected more than one value"),
    ],
    "instance_norm": WRONG_X + WRONG_OUT + WRONG_EPS + NO_EPS + WRONG_LAYOUT + CHANNELS + RUNNING
    + ONE_VALUE,
}  # fmt: skip
ALL_FORWARD = [(name, *wrong) for name, table in FORWARD.items() for wrong in table]


@pytest.mark.parametrize("suffix", ["", "_forward"])
@pytest.mark.parametrize(("name", "changed", "error", "message"), ALL_FORWARD)
def test_wrong_arguments_forward(name, changed, error, message, suffix):
    arguments = {"x": X, "weight": np.full(6, 2.0), "out": np.full_like(X, 7)}
    if name in ("layer_norm", "rms_norm"):
        arguments |= {"normalized_shape": 5, "weight": np.full(5, 2.0)}
    if name == "group_norm":
        arguments["num_groups"] = 3
    if name == "instance_norm":
        arguments |= {"running_mean": np.full(6, 5.0), "running_var": np.full(6, 6.0)}
    arguments |= changed
    if arguments["x"] is not X:
        del arguments["out"]
    before = {k: v.copy() for k, v in arguments.items() if isinstance(v, np.ndarray)}
    with pytest.raises(error, match=f"^{message}"):
        getattr(fastbn, name + suffix)(**arguments)
    for key, value in before.items():
        np.testing.assert_array_equal(arguments[key], value)


WRONG_DY = [
    ({"dy": None}, TypeError, "dy: "),
    ({"dy": X[:2]}, ValueError, r"dy: expected the shape of x, \(4, 6, 5\), got \(2, 6, 5\)"),
    ({"dy": X.astype(float)}, TypeError, "dy: expected the dtype of x, float32, got float64"),
    ({"dy": X.astype(np.float16)}, TypeError, "dy: expected the dtype of x, float32.*float16"),
]
WRONG_MEAN = [
    ({"mean": None}, TypeError, "mean: .*None"),
    ({"mean": np.ones(4)}, ValueError, r"mean: expected shape \(4, \d\).*got \(4,\)"),
    ({"invstd": None}, TypeError, "invstd: .*None"),
    ({"invstd": np.ones((6, 4))}, ValueError, r"invstd: expected shape \(4, \d\)"),
    ({"mean": np.ones((4, 6), int)}, TypeError, "mean: .*int64"),
    ({"invstd": np.ones((4, 6), np.float16)}, TypeError, "invstd: .*float16"),
]
BACKWARD = {
    "layer_norm": WRONG_X + WRONG_OUT + WRONG_DY + WRONG_MEAN + WRONG_SHAPE + LAST,
    "rms_norm": WRONG_X + WRONG_OUT + WRONG_DY + WRONG_SHAPE + LAST + [
        ({"invrms": None}, TypeError, "invrms: .*None"),
        ({"invrms": np.ones(4)}, ValueError, r"invrms: expected shape \(4, 6\).*got \(4,\)"),
        ({"invrms": np.ones((4, 6), int)}, TypeError, "invrms: .*int64"),
    ],
    "group_norm": WRONG_X + WRONG_OUT + WRONG_DY + WRONG_MEAN[:4] + WRONG_GROUPS + WRONG_LAYOUT
    + CHANNELS[:2] + [
        ({"x": X[:, :, :1], "num_groups": 6, "mean": np.ones((4, 6)), "invstd": np.ones((4, 6))},
         ValueError, "x: expected more than one value"),
    ],
    "instance_norm": WRONG_X + WRONG_OUT + WRONG_DY + WRONG_MEAN + WRONG_LAYOUT + CHANNELS[:2]
    + ONE_VALUE,
}  # fmt: skip
ALL_BACKWARD = [(name, *wrong) for name, table in BACKWARD.items() for wrong in table]


@pytest.mark.parametrize(("name", "changed", "error", "message"), ALL_BACKWARD)
def test_wrong_arguments_backward(name, changed, error, message):
    statistic = np.ones((4, 3) if name == "group_norm" else (4, 6))
    arguments = {"dy": X, "x": X, "mean": 0 * statistic, "invstd": statistic}
    if name == "rms_norm":
        arguments = {"dy": X, "x": X, "invrms": statistic}
    if name in ("layer_norm", "rms_norm"):
        arguments["normalized_shape"] = 5
    if name == "group_norm":
        arguments["num_groups"] = 3
    arguments |= {"out": np.full_like(X, 7)} | changed
    if arguments["x"] is not X:
        del arguments["out"]
        if isinstance(arguments["x"], np.ndarray):
            arguments["dy"] = arguments["x"]
    out = arguments.get("out")
    before = out.copy() if isinstance(out, np.ndarray) else None
    names = message.partition(":")[0]
    names = "(x|dy)" if names == "x" else names
    with pytest.raises(error, match=f"^{names}:{message.partition(':')[2]}"):
        getattr(fastbn, f"{name}_backward")(**arguments)
    if before is not None:
        np.testing.assert_array_equal(out, before)


def test_running_statistics_that_are_missing():
    for missing in ("running_mean", "running_var"):
        running = {"running_mean": np.ones(6), "running_var": np.ones(6), missing: None}
        for function in (fastbn.instance_norm, fastbn.instance_norm_forward):
            with pytest.raises(TypeError, match=rf"^{missing}: .*\(6,\).*got None"):
                function(X, **running, use_input_stats=False)


@pytest.mark.parametrize(
    "case",
    [
        Case("layer", X.shape, 5),
        Case("rms", X.shape, (6, 5)),
        Case("group", X.shape, 2),
        Case("instance", X.shape),
    ],
    ids=str,
)
def test_out_may_be_an_input_but_not_overlap_it_in_part(case):
    memory = np.ones((6, 6, 5), np.float32)
    x = memory[:4]
    for out in (memory[1:5], memory[2:], x[::-1], x[:, ::-1]):
        with pytest.raises(ValueError, match=r"^out: expected x itself or memory apart"):
            case.forward(x, out=out)
    assert (memory == 1).all()
    _, saved = case.forward(X)
    dy = X.copy()
    with pytest.raises(ValueError, match=r"^out: expected dy itself"):
        case.backward(dy, X, saved, out=dy.reshape(-1)[::-1].reshape(dy.shape))
    flat = np.ones(X.size, np.float32)
    weight = flat[: int(np.prod(case.parameter_shape))].reshape(case.parameter_shape)
    with pytest.raises(ValueError, match=r"^(out|weight): .*overlaps (out|weight)"):
        case.forward(X, weight, out=flat.reshape(X.shape))
    with pytest.raises(ValueError, match=r"^(out|weight): .*overlaps (out|weight)"):
        case.backward(dy, X, saved, weight, out=flat.reshape(X.shape))
    assert (flat == 1).all()
    interleaved = np.ones((8, 6, 5), np.float32)
    interleaved[::2] = X
    case.forward(interleaved[::2], out=interleaved[1::2])
    np.testing.assert_array_equal(interleaved[1::2], case.forward(X)[0])


def test_keywords_only():
    statistic = np.ones((4, 6))
    for call in (
        lambda: fastbn.layer_norm(X, 5, None, None, 1e-5, np.empty_like(X)),
        lambda: fastbn.rms_norm(X, 5, None, None, np.empty_like(X)),
        lambda: fastbn.group_norm(X, 2, None, None, 1e-5, "NCL"),
        lambda: fastbn.instance_norm(X, None, None, None, None, True, 0.1, 1e-5, "NCL"),
        lambda: fastbn.instance_norm_forward(X, None, None, np.zeros(6)),
        lambda: fastbn.instance_norm_backward(X, X, statistic, statistic, None, "NCL"),
    ):
        with pytest.raises(TypeError, match="positional"):
            call()
