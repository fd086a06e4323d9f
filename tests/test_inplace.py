# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm whose output takes the place of its input: the function and the layer."""

import copy
import pickle

import bounds
import numpy as np
import oracle
import pytest
from arrays import DTYPES, assert_near, batch, channels_of, half_ulp, in_order
from cases import ACTIVATIONS
from everywhere import assert_same

import fastbn

SLOPE = 0.2
SHAPES = [
    ((40, 3), None),
    ((65, 130), None),
    ((20, 2, 16), None),
    ((12, 5, 7, 7), None),
    ((3, 4, 33, 32), None),
    ((1, 2, 150, 151), None),
    ((4, 14, 15, 64), "NHWC"),
    ((3, 13, 17, 5), "NHWC"),
    ((6, 2, 9), "CHN"),
]
IDS = [f"{'x'.join(map(str, shape))}-{layout or 'NC...'}" for shape, layout in SHAPES]


def parameters(channels, dtype="float32"):
    """Weights of both signs, away from 0; biases."""
    rng = np.random.default_rng(channels)
    weight = rng.uniform(0.5, 1.5, channels) * rng.choice([-1, 1], channels)
    weight[0] = -0.75
    return weight.astype(dtype), rng.uniform(-1, 1, channels).astype(dtype)


class Exact:
    """The gradients in float64, and how far off they may be if only y is known."""

    def __init__(self, x, dy, y, weight, bias, slope, layout, eps=1e-5):
        wide, dtype = x.astype(np.float64), x.dtype.name
        mean, var = oracle.stats(wide, layout)
        invstd = 1 / np.sqrt(var + eps)
        z = oracle.normalise(wide, mean, var, weight, bias, eps, layout)
        # On which side of the kink an element is, y says.
        passes = np.where(y > 0, 1.0, slope)
        self.y = oracle.activated(z, "leaky_relu", slope)
        dz = dy.astype(np.float64) * passes
        self.gradients = oracle.backward(dz, wide, mean, invstd, weight, layout=layout)

        of = bounds.Bounds("batch", x, mean, invstd, weight, bias, layout=layout, exact=False)
        of_z = of.of_z(z)
        self.room_y = bounds.of_y(z, of_z, dtype, "leaky_relu", slope)
        # z is off by what forward made of it, by the rounding of y, and by the roundings of
        # the slope and its inverse: so much of xhat is lost. The pivot now is the bias.
        of_z = of_z + half_ulp(self.y, dtype) / passes + bounds.roundings(4, dtype) * np.abs(z)
        of.off = of_z / of.gain
        of.xhat = of.xhat + bounds.roundings(1, dtype) * of.bias / of.gain
        self.rooms = of.of_gradients(dz, bounds.roundings(2, dtype) * np.abs(dz))

    def check(self, dx, dweight, dbias):
        for actual, exact, room in zip(
            (dx, dweight, dbias), self.gradients, self.rooms, strict=True
        ):
            assert_near(actual, exact, room)


def forward_and_backward(x, dy, weight, bias, slope, layout, **options):
    """Return y, which is where x was, and the gradients."""
    fused = {"layout": layout, "activation": "leaky_relu", "negative_slope": slope}
    y, _, invstd = fastbn.batch_norm_forward(x, weight, bias, out=x, **fused)
    assert y is x
    return y, fastbn.batch_norm_backward_inplace(dy, y, invstd, weight, bias, **fused, **options)


# ---- the function -------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=IDS)
def test_gradients_from_the_output_alone(level, any_dtype, shape, layout):
    x, dy = batch(shape, any_dtype), batch(shape, any_dtype, 1)
    weight, bias = parameters(channels_of(shape, layout))
    y, gradients = forward_and_backward(x.copy(), dy, weight, bias, SLOPE, layout)
    exact = Exact(x, dy, y, weight, bias, SLOPE, layout)
    assert_near(y, exact.y, exact.room_y)
    assert [g.dtype for g in gradients] == [any_dtype, np.float32, np.float32]
    exact.check(*gradients)


def test_the_reference_is_autograds(dtype):
    # The derivative by finite differences, of the whole: so not by the oracle's formulas.
    x, dy = batch((6, 2), "float64"), batch((6, 2), "float64", 1)
    weight, bias = parameters(2, "float64")

    def loss(x, weight, bias):
        y = fastbn.batch_norm_forward(
            x, weight, bias, activation="leaky_relu", negative_slope=SLOPE
        )[0]
        return (y * dy).sum()

    _, gradients = forward_and_backward(x.copy(), dy, weight, bias, SLOPE, None)
    arguments = [x, weight, bias]
    for k, gradient in enumerate(gradients):
        for where in np.ndindex(gradient.shape):
            moved = []
            for step in (1e-6, -1e-6):
                changed = [a.copy() for a in arguments]
                changed[k][where] += step
                moved.append(loss(*changed))
            np.testing.assert_allclose(gradient[where], (moved[0] - moved[1]) / 2e-6, atol=1e-7)


def test_without_parameters_and_activation(any_dtype):
    x, dy = batch((12, 5, 7), any_dtype), batch((12, 5, 7), any_dtype, 1)
    y, _, invstd = fastbn.batch_norm_forward(x)
    gradients = fastbn.batch_norm_backward_inplace(dy, y, invstd)
    exact = Exact(x, dy, y, None, None, 1.0, None)
    kept = np.float64 if any_dtype == "float64" else np.float32
    assert [g.dtype for g in gradients] == [any_dtype, kept, kept]
    exact.check(*gradients)


@pytest.mark.parametrize("order", ["C", "F", "channels last", "sliced", "reversed", "cropped"])
def test_memory_orders_and_outputs(dtype, order):
    x, dy = batch((6, 5, 4, 3), dtype), batch((6, 5, 4, 3), dtype, 1)
    weight, bias = parameters(5)
    z = in_order(x.copy(), order)
    y, gradients = forward_and_backward(z, dy, weight, bias, SLOPE, None)
    Exact(x, dy, y, weight, bias, SLOPE, None).check(*gradients)
    # The same bits, wherever dx is written.
    for name in ("new", "dy", "y"):
        z, own = in_order(x.copy(), order), in_order(dy.copy(), order)
        given = {"new": np.empty_like(z), "dy": own, "y": z}[name]
        _, again = forward_and_backward(z, own, weight, bias, SLOPE, None, out=given)
        assert again[0] is given
        for a, b in zip(again, gradients, strict=True):
            assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


@pytest.mark.usefixtures("always_parallel")
def test_the_same_bits_everywhere():
    dy = batch((8, 17, 12, 12), "float32", 1)
    weight, bias = parameters(17)

    def results():
        x = batch(dy.shape, "float32")
        y, gradients = forward_and_backward(x, dy, weight, bias, SLOPE, None)
        return [a.tobytes() for a in (y, *gradients)]

    assert_same(results, threads=[1, 3])


@pytest.mark.parametrize("kept", [*DTYPES, "swapped"])
def test_gradients_have_the_dtype_of_the_weight(kept):
    pytest.importorskip("ml_dtypes")
    x, dy = batch((12, 5), "float32"), batch((12, 5), "float32", 1)
    native = "float32" if kept == "swapped" else kept
    weight, bias = (v.astype(native) for v in parameters(5))
    given = (v.astype(v.dtype.newbyteorder()) if kept == "swapped" else v for v in (weight, bias))
    y, (dx, *gradients) = forward_and_backward(x.copy(), dy, *given, SLOPE, None)
    assert [g.dtype for g in gradients] == [native, native]
    Exact(x, dy, y, weight, bias, SLOPE, None).check(dx, *gradients)


def test_no_values():
    x = np.empty((0, 3), np.float32)
    dx, dweight, dbias = fastbn.batch_norm_backward_inplace(x, x, np.ones(3), np.ones(3))
    assert dx.shape == (0, 3)
    assert dweight.tolist() == dbias.tolist() == [0, 0, 0]
    x = np.empty((4, 0), np.float32)
    dx, *gradients = fastbn.batch_norm_backward_inplace(x, x, np.empty(0))
    assert dx.shape == (4, 0)
    assert [g.shape for g in gradients] == [(0,), (0,)]


def test_nan_stays_in_its_channel():
    x, dy = batch((12, 3, 5), "float32"), batch((12, 3, 5), "float32", 1)
    weight, bias = parameters(3)
    _, clean = forward_and_backward(x.copy(), dy, weight, bias, SLOPE, None)
    x[3, 1, 2] = np.nan
    y, (dx, dweight, _) = forward_and_backward(x, dy, weight, bias, SLOPE, None)
    assert np.isnan(y[:, 1]).all()
    assert np.isnan(dx[:, 1]).all()
    assert np.isnan(dweight[1])
    assert dx[:, ::2].tobytes() == clean[0][:, ::2].tobytes()
    assert dweight[::2].tobytes() == clean[1][::2].tobytes()


X = batch((6, 3, 4), "float32")
ONES = np.ones(3, np.float32)
# What cannot be undone.
REFUSED = [
    ({"activation": name}, ValueError, "activation") for name in ACTIVATIONS if name != "leaky_relu"
]


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"dy": X[:5]}, ValueError, "dy"),
        ({"dy": X.astype(np.float64)}, TypeError, "dy"),
        ({"dy": X.tolist()}, TypeError, "dy"),
        ({"y": X.astype(int)}, TypeError, "y"),
        ({"y": X.tolist()}, TypeError, "y"),
        ({"y": X[0, 0], "dy": X[0, 0]}, ValueError, "y"),
        ({"invstd": ONES[:2]}, ValueError, "invstd"),
        ({"invstd": None}, TypeError, "invstd"),
        ({"invstd": ONES.astype(np.float16)}, TypeError, "invstd"),
        ({"weight": ONES[:2]}, ValueError, "weight"),
        ({"weight": np.zeros((2, 3), np.float32)}, ValueError, "weight"),
        ({"weight": [1.0, 1.0, 1.0]}, TypeError, "weight"),
        ({"weight": ONES.astype(int)}, TypeError, "weight"),
        ({"bias": ONES[None]}, ValueError, "bias"),
        ({"bias": [1.0, 1.0, 1.0]}, TypeError, "bias"),
        ({"layout": "NCHW"}, ValueError, "layout"),
        *REFUSED,
        ({"activation": "gelu"}, ValueError, "activation"),
        ({"activation": 3}, TypeError, "activation"),
        ({"activation": "leaky_relu", "negative_slope": 0.0}, ValueError, "negative_slope"),
        ({"activation": "leaky_relu", "negative_slope": -0.1}, ValueError, "negative_slope"),
        ({"activation": "leaky_relu", "negative_slope": 1e-39}, ValueError, "negative_slope"),
        ({"negative_slope": "0.1"}, TypeError, "negative_slope"),
        ({"out": X[:5]}, ValueError, "out"),
        ({"out": X.astype(np.float64)}, TypeError, "out"),
    ],
)
def test_errors(arguments, error, name):
    given = {"dy": X, "y": X, "invstd": ONES, "weight": ONES, "bias": ONES} | arguments
    with pytest.raises(error, match=f"^{name}: "):
        fastbn.batch_norm_backward_inplace(**given)


def test_a_batch_of_one_value():
    with pytest.raises(ValueError, match=r"^y: .*one"):
        fastbn.batch_norm_backward_inplace(X[:1, :, 0], X[:1, :, 0], ONES)


@pytest.mark.parametrize("bad", [0.0, -0.0, np.nan, np.inf, -np.inf])
def test_a_weight_that_cannot_be_undone_is_named(bad, any_dtype):
    weight = np.array([1, bad, 1]).astype(any_dtype)
    out = np.full_like(X, 3)
    with pytest.raises(ValueError, match=r"^weight: .* for channel 1$"):
        fastbn.batch_norm_backward_inplace(X, X, ONES, weight, out=out)
    assert (out == 3).all()


@pytest.mark.parametrize("name", ["invstd", "weight", "bias"])
def test_an_output_over_a_parameter(name):
    memory = np.ones(X.size, np.float32)
    given = {"invstd": ONES, "weight": ONES, "bias": ONES} | {name: memory[: ONES.size]}
    dy, y, out = X.copy(), X.copy(), memory.reshape(X.shape)
    with pytest.raises(ValueError, match=f"^out: expected memory of its own, .* overlaps {name}$"):
        fastbn.batch_norm_backward_inplace(dy, y, out=out, **given)
    assert (memory == 1).all()


# ---- the layer ----------------------------------------------------------------------


def pair(channels, **options):
    """The layer in place, and the one beside it, with the same parameters."""
    activation = options.pop("activation", "leaky_relu")
    options |= {"activation": activation, "negative_slope": SLOPE}
    layers = fastbn.InPlaceBatchNorm(channels, **options), fastbn.BatchNorm(channels, **options)
    for layer in layers:
        if layer.weight is not None:
            layer.weight[:], layer.bias[:] = parameters(channels, layer.dtype)
    return layers


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "layout"), SHAPES, ids=IDS)
def test_beside_batch_norm(any_dtype, shape, layout, affine, activation):
    channels = channels_of(shape, layout)
    ours, plain = pair(channels, affine=affine, layout=layout, activation=activation)
    x, dy = batch(shape, any_dtype), batch(shape, any_dtype, 1)
    z = x.copy()
    y, expected = ours(z), plain(x)
    assert y is z
    assert y.tobytes() == expected.tobytes()
    slope = 1.0 if activation is None else SLOPE
    exact = Exact(x, dy, y, ours.weight, ours.bias, slope, layout)
    dx, from_x = ours.backward(dy), plain.backward(dy)
    # Each within its room of the exact one.
    for result, layer in ((dx, ours), (from_x, plain)):
        assert_near(result, exact.gradients[0], exact.rooms[0])
        if affine:
            exact.check(result, layer.weight_grad, layer.bias_grad)
    assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("momentum", [0.1, 0.25, None])
def test_running_statistics_are_those_of_batch_norm(dtype, momentum):
    ours, plain = pair(5, momentum=momentum, dtype=dtype)
    for seed in range(4):
        x = batch((6, 5, 4, 3), "float32", seed)
        plain(x)
        ours(x)
        assert ours.num_batches_tracked == plain.num_batches_tracked == seed + 1
        for name in ("running_mean", "running_var"):
            assert getattr(ours, name).tobytes() == getattr(plain, name).tobytes()
    ours.eval(), plain.eval()
    x = batch((6, 5, 4, 3), "float32", 9)
    z = x.copy()
    assert ours(z) is z
    assert z.tobytes() == plain(x).tobytes()
    assert ours.num_batches_tracked == 4


def test_without_tracking():
    ours, plain = pair(5, track_running_stats=False)
    x = batch((6, 5, 4, 3), "float32")
    for layer in (ours, plain):
        layer.eval()
    assert ours(x.copy()).tobytes() == plain(x).tobytes()


def test_evaluation_needs_no_inverse():
    ours, plain = pair(3)
    x = X.copy()
    for layer in (ours, plain):
        layer.eval().weight[1] = 0.0
    assert ours(x) is x
    assert x.tobytes() == plain(X).tobytes()


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_nothing_is_written_where_the_weight_cannot_be_undone(bad):
    bn, _ = pair(3)
    bn.weight[2] = bad
    x, state = X.copy(), bn.state_dict()
    with pytest.raises(ValueError, match=r"^weight: .* for channel 2$"):
        bn(x)
    assert x.tobytes() == X.tobytes()
    for name, value in bn.state_dict().items():
        assert value.tobytes() == state[name].tobytes()


def test_weights_of_another_shape_are_named():
    bn, _ = pair(3)
    for bad in (np.zeros((2, 3), np.float32), np.ones(2, np.float32)):
        bn.weight = bad
        with pytest.raises(ValueError, match=r"^weight: "):
            bn(X.copy())


def test_when_backward_is_refused():
    bn, _ = pair(3)
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)
    y = bn(X.copy())
    bn.backward(X)
    bn.backward(X, out=y)  # where y was
    with pytest.raises(RuntimeError, match="overwritten"):
        bn.backward(X)
    bn(X.copy())
    bn.eval()
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)
    bn.train()
    with pytest.raises(RuntimeError, match="training mode"):
        bn.backward(X)


def test_gradients_are_set():
    bn, _ = pair(3)
    bn(X.copy())
    dx = bn.backward(X)
    first = dx.tobytes(), bn.weight_grad.tobytes(), bn.bias_grad.tobytes()
    dx = bn.backward(X)
    assert (dx.tobytes(), bn.weight_grad.tobytes(), bn.bias_grad.tobytes()) == first


def test_x_that_cannot_be_overwritten():
    bn, _ = pair(3)
    x = X.copy()
    x.flags.writeable = False
    for layer in (bn, bn.eval(), bn.train()):
        with pytest.raises(ValueError, match=r"^x: .*writable"):
            layer(x)
    with pytest.raises(ValueError, match=r"^x: expected 3 channels"):
        bn(np.zeros((6, 4, 4), np.float32))
    with pytest.raises(TypeError, match=r"^x: "):
        bn(X.astype(int))
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        *REFUSED,
        ({"activation": "tanh"}, ValueError, "activation"),
        ({"negative_slope": 0.0}, ValueError, "negative_slope"),
        ({"negative_slope": -1.0}, ValueError, "negative_slope"),
        ({"negative_slope": float("nan")}, ValueError, "negative_slope"),
        ({"num_features": 0}, ValueError, "num_features"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"dtype": np.float16}, TypeError, "dtype"),
    ],
)
def test_arguments(arguments, error, name):
    with pytest.raises(error, match=f"^{name}: "):
        fastbn.InPlaceBatchNorm(**{"num_features": 3} | arguments)


def test_state_is_that_of_batch_norm():
    ours, plain = pair(3)
    ours(X.copy())
    plain.load_state_dict(ours.state_dict())
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        with pytest.raises(RuntimeError):
            clone.backward(X)
        assert clone.eval()(X.copy()).tobytes() == plain.eval()(X).tobytes()


def test_repr():
    expected = "InPlaceBatchNorm(3, eps=1e-05, momentum=0.1, activation='leaky_relu')"
    assert repr(fastbn.InPlaceBatchNorm(3)) == expected
    bn = fastbn.InPlaceBatchNorm(2, 1e-3, None, layout="NTC", activation=None, dtype=np.float64)
    assert repr(bn.eval()) == (
        "InPlaceBatchNorm(2, eps=0.001, momentum=None, layout='NTC', dtype=float64, training=False)"
    )


def test_weights_that_are_small_beside_the_bias_cost_digits():
    # What docs/numerics.md says: half a unit in the last place of y, over the weight.
    x, dy = batch((64, 1, 5), "float32"), batch((64, 1, 5), "float32", 1)
    errors = []
    for weight in (1.0, 1e-3):
        vectors = np.float32([weight]), np.float32([1.0])
        y, (dx, dweight, _) = forward_and_backward(x.copy(), dy, *vectors, SLOPE, None)
        exact = Exact(x, dy, y, *vectors, SLOPE, None)
        exact.check(dx, dweight, exact.gradients[2])
        errors.append(abs(dweight[0] - exact.gradients[1][0]))
    assert errors[1] > errors[0]


def test_gradients_of_half_parameters_are_rounded_once():
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    # By way of float32 this becomes a tie, and goes to 1.
    total = 1.0 + 2.0**-8 + 2.0**-26
    dy = np.array([[total], [0.0], [0.0], [0.0]])
    weight, x = np.ones(1, bfloat16), np.arange(4.0).reshape(4, 1)
    y, _, invstd = fastbn.batch_norm_forward(x, weight, weight)
    dbias = fastbn.batch_norm_backward_inplace(dy, y, invstd, weight, weight)[2]
    assert float(dbias[0]) == 1.0 + 2.0**-7
