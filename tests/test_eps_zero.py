# SPDX-License-Identifier: BSD-3-Clause
"""eps = 0: what takes it, what refuses it, and what a variance of 0 then makes of its own numbers.

Running statistics would keep what a variance of 0 makes; so what updates them refuses eps = 0.
"""

import numpy as np
import pytest
from arrays import assert_near, batch
from cases import ACTIVATIONS, Case, Expected

import fastbn

# Small and large groups, in planes, rows and features.
CASES = [
    Case("layer", (6, 33), 33),
    Case("layer", (6, 4, 14, 15), (4, 14, 15)),
    Case("rms", (6, 33), 33),
    Case("rms", (6, 4, 14, 15), (4, 14, 15)),
    Case("group", (6, 8, 7, 7), 4),
    Case("group", (6, 7, 9, 30), 5, "NHWC"),
    Case("instance", (6, 5, 7, 7)),
    Case("instance", (6, 50, 5), layout="NLC"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
REFUSED = r"^eps: expected a number > 0"


def with_a_constant_sample(case, dtype):
    """x, and x whose third sample has one value all over: for rms norm, whose mean is 0, 0."""
    x = case.batch(dtype)
    flat = x.copy()
    flat[2] = 0.0 if case.op == "rms" else 0.75
    return x, flat


# ---- what takes it --------------------------------------------------------------------


@every_case
def test_values(level, any_dtype, case):
    parameters = case.parameters("float64" if any_dtype == "float64" else "float32")
    x, dy = case.batch(any_dtype), case.gradient(any_dtype)
    Expected(case, x, dy, *parameters, eps=0.0).check()


@every_case
def test_a_variance_of_zero_is_nan_for_its_own_numbers_only(level, any_dtype, case):
    x, flat = with_a_constant_sample(case, any_dtype)
    parameters = case.parameters("float32")
    clean, clean_saved = case.forward(x, *parameters, eps=0.0)
    y, saved = case.forward(flat, *parameters, eps=0.0)
    others = np.arange(len(x)) != 2
    assert np.isnan(y[2].astype(float)).all()
    assert y[others].tobytes() == clean[others].tobytes()
    assert np.isinf(saved[-1][2]).all()
    for found, expected in zip(saved, clean_saved, strict=True):
        assert found[others].tobytes() == expected[others].tobytes()
    assert case.only_y(flat, *parameters, eps=0.0).tobytes() == y.tobytes()


@every_case
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_goes_through_what_follows(any_dtype, case, activation):
    x, flat = with_a_constant_sample(case, any_dtype)
    options = {"activation": activation, "residual": case.batch(any_dtype, 6)}
    clean = case.forward(x, eps=0.0, **options)[0]
    y = case.forward(flat, eps=0.0, **options)[0]
    others = np.arange(len(x)) != 2
    assert np.isnan(y[2].astype(float)).all()
    assert y[others].tobytes() == clean[others].tobytes()


@every_case
def test_backward_leaves_the_others_alone(level, any_dtype, case):
    # It takes no eps: what is not finite is the saved 1 / std of the group.
    x, flat = with_a_constant_sample(case, any_dtype)
    dy, (weight, _) = case.gradient(any_dtype), case.parameters("float32")
    clean = case.backward(dy, x, case.forward(x, eps=0.0)[1], weight)[0]
    dx = case.backward(dy, flat, case.forward(flat, eps=0.0)[1], weight)[0]
    others = np.arange(len(x)) != 2
    assert dx[others].tobytes() == clean[others].tobytes()
    assert not np.isfinite(dx[2].astype(float)).any()


@every_case
def test_some_eps_still_makes_bias_of_it(any_dtype, case):
    _, flat = with_a_constant_sample(case, any_dtype)
    y = case.forward(flat, eps=1e-5)[0]
    assert not y[2].astype(float).any()


LAYERS = {
    "layer": (lambda **o: fastbn.LayerNorm(9, 0.0, **o), Case("layer", (6, 4, 9), 9)),
    "rms": (lambda **o: fastbn.RMSNorm(9, 0.0, **o), Case("rms", (6, 4, 9), 9)),
    "group": (lambda **o: fastbn.GroupNorm(2, 4, 0.0, **o), Case("group", (6, 4, 9), 2)),
    "instance": (lambda **o: fastbn.InstanceNorm(4, 0.0, **o), Case("instance", (6, 4, 9))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(any_dtype, name):
    make, case = LAYERS[name]
    x, flat = with_a_constant_sample(case, any_dtype)
    layer, dy = make(), case.gradient(any_dtype)
    for array in (x, flat):
        y, saved = case.forward(array, eps=0.0)
        assert layer.train()(array).tobytes() == y.tobytes()
        if array is x:
            dx = case.backward(dy, x, saved, getattr(layer, "weight", None))[0]
            assert layer.backward(dy).tobytes() == dx.tobytes()
        assert layer.eval()(array).tobytes() == y.tobytes()


# ---- running statistics that are read -----------------------------------------------------


@pytest.mark.parametrize("op", ["batch", "instance"])
@pytest.mark.parametrize("layout", [None, "NHWC"])
def test_inference(level, any_dtype, op, layout):
    case = Case(op, (6, 5, 7, 4), layout=layout)
    as_batch = Case("batch", case.shape, layout=layout)
    x, parameters = case.batch(any_dtype), case.parameters("float32")
    mean, var = case.parameters("float32", 4)
    var += 2
    only = {"training": False} if op == "batch" else {"use_input_stats": False}
    running = {"running_mean": mean, "running_var": var, "eps": 0.0, **only}
    expected = Expected(as_batch, x, x, *parameters, eps=0.0, frozen=(mean, var))
    y, _ = case.forward(x, *parameters, **running)
    assert_near(y, expected.y, expected.room_y)
    assert case.only_y(x, *parameters, **running).tobytes() == y.tobytes()
    # A running variance of 0 in one channel.
    running["running_var"] = np.where(np.arange(var.size) == 1, 0, var)
    channel = 1 if layout is None else 3
    spoiled, _ = case.forward(x, *parameters, **running)
    spoiled, y = (np.moveaxis(array, channel, 0) for array in (spoiled, y))
    others = np.arange(var.size) != 1
    assert not np.isfinite(spoiled[1].astype(float)).any()
    assert spoiled[others].tobytes() == y[others].tobytes()


def layers_with_running_statistics():
    return [
        fastbn.BatchNorm(4, 0.0),
        fastbn.InPlaceBatchNorm(4, 0.0),
        fastbn.InstanceNorm(4, 0.0, track_running_stats=True),
    ]


def test_evaluation_of_layers_with_running_statistics(any_dtype):
    x = batch((6, 4, 9), any_dtype)
    for layer in layers_with_running_statistics():
        plain = type(layer)(4, 1e-30, track_running_stats=True).eval()
        expected = plain(x.copy())  # the variance is 1
        assert layer.eval()(x.copy()).tobytes() == expected.tobytes()


# ---- what refuses it ------------------------------------------------------------------


def test_batch_statistics_refuse_it():
    x, running = batch((6, 4, 9), "float32"), (np.zeros(4), np.ones(4))
    out = np.full_like(x, 7)
    for call in (
        lambda: fastbn.batch_norm(x, None, None, training=True, eps=0.0, out=out),
        lambda: fastbn.batch_norm(x, *running, training=True, eps=0, out=out),
        lambda: fastbn.batch_norm_forward(x, eps=0.0, out=out),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert (out == 7).all()
    assert not running[0].any()
    assert (running[1] == 1).all()


@pytest.mark.parametrize("given", [("running_mean", "running_var"), ("running_mean",),
                                   ("running_var",)], ids=str)  # fmt: skip
def test_instance_norm_that_updates_running_statistics_refuses_it(given):
    x, out = batch((6, 4, 9), "float32"), np.full((6, 4, 9), 7, np.float32)
    running = {name: np.ones(4) for name in given}
    for function in (fastbn.instance_norm, fastbn.instance_norm_forward):
        with pytest.raises(ValueError, match=REFUSED):
            function(x, **running, eps=0.0, out=out)
    assert (out == 7).all()
    assert all((array == 1).all() for array in running.values())


def test_layers_refuse_it_where_they_update_running_statistics():
    for layer in layers_with_running_statistics():
        x, state = batch((6, 4, 9), "float32"), layer.state_dict()
        before = x.copy()
        with pytest.raises(ValueError, match=REFUSED):
            layer(x)
        assert x.tobytes() == before.tobytes()
        for name, value in layer.state_dict().items():
            assert value.tobytes() == state[name].tobytes(), name
    # Its statistics are those of the batch, in evaluation, too.
    layer = fastbn.BatchNorm(4, 0.0, track_running_stats=False)
    for mode in (layer.train, layer.eval):
        with pytest.raises(ValueError, match=REFUSED):
            mode()(before)


@pytest.mark.parametrize("bad", [-1e-5, -1e-300, -np.inf, np.nan])
def test_numbers_below_zero_and_nan_are_refused_everywhere(bad):
    x, running = (
        batch((6, 4, 9), "float32"),
        {"running_mean": np.ones(4), "running_var": np.ones(4)},
    )
    out = np.full_like(x, 7)
    for case in (*(case for _, case in LAYERS.values()), Case("batch", x.shape)):
        for function in (case.forward, case.only_y):
            with pytest.raises(ValueError, match=r"^eps: expected "):
                function(x, eps=bad, out=out)
    for call in (
        lambda: fastbn.batch_norm(x, **running, eps=bad, out=out),
        lambda: fastbn.batch_norm_forward(x, **running, training=False, eps=bad, out=out),
        lambda: fastbn.instance_norm(x, **running, use_input_stats=False, eps=bad, out=out),
        lambda: fastbn.instance_norm(x, **running, eps=bad, out=out),
    ):
        with pytest.raises(ValueError, match=r"^eps: expected "):
            call()
    for make in (fastbn.BatchNorm, fastbn.InPlaceBatchNorm, fastbn.InstanceNorm, fastbn.LayerNorm,
                 fastbn.RMSNorm, lambda n, eps: fastbn.GroupNorm(2, n, eps)):  # fmt: skip
        with pytest.raises(ValueError, match=r"^eps: expected "):
            make(4, bad)
    assert (out == 7).all()
