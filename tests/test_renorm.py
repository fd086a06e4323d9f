# SPDX-License-Identifier: BSD-3-Clause
"""Batch renormalisation, by its formula in float64."""

import pickle

import numpy as np
import oracle
import pytest
from arrays import batch
from oracle import channel_axis

import fastbn

CASES = [((5, 3, 4, 4), None), ((4, 3), None), ((3, 5, 4, 3), "NHWC")]


def along(vector, x, layout):
    axis = channel_axis(x.ndim, layout)
    return np.expand_dims(vector, tuple(i for i in range(x.ndim) if i != axis))


def correction(x, mean, var, r_max, d_max, eps, layout):
    batch_mean, batch_var = oracle.stats(x, layout)
    sigma = np.sqrt(var + eps)
    r = np.clip(np.sqrt(batch_var + eps) / sigma, 1 / r_max, r_max)
    return batch_mean, batch_var, r, np.clip((batch_mean - mean) / sigma, -d_max, d_max)


def formula(x, weight, bias, r, d, eps, layout):
    batch_mean, batch_var = oracle.stats(x, layout)
    normalised = oracle.normalise(x, batch_mean, batch_var, eps=eps, layout=layout)
    corrected = normalised * along(r, x, layout) + along(d, x, layout)
    return corrected * along(weight, x, layout) + along(bias, x, layout)


def layer(shape, layout, **options):
    bn = fastbn.BatchRenorm(3, 1e-3, 0.2, layout=layout, **options)
    if bn.affine:
        bn.weight[:], bn.bias[:] = [1.5, -2, 0.5], [0.1, 0.2, -0.3]
    bn.running_mean[:], bn.running_var[:] = [0, 0.5, -2], [3, 4, 0.1]
    return bn


@pytest.mark.parametrize(("shape", "layout"), CASES)
@pytest.mark.parametrize(("r_max", "d_max"), [(3, 5), (1.2, 0.3), (1, 0), (np.inf, np.inf)])
def test_the_formula(level, dtype, shape, layout, r_max, d_max):
    bn = layer(shape, layout, r_max=r_max, d_max=d_max, dtype=dtype)
    x, dy = batch(shape, dtype), batch(shape, dtype, 1)
    mean, var = bn.running_mean.astype(float), bn.running_var.astype(float)
    new_mean, new_var, r, d = correction(x, mean, var, r_max, d_max, 1e-3, layout)
    expected = formula(x, bn.weight, bn.bias, r, d, 1e-3, layout)
    room = 1e-12 if dtype == "float64" else 1e-5
    y = bn(x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=room * np.abs(expected).max())
    n = x.size // 3
    np.testing.assert_allclose(bn.running_mean, 0.8 * mean + 0.2 * new_mean, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(bn.running_var, 0.8 * var + 0.2 * new_var * n / (n - 1), rtol=1e-6)
    assert bn.num_batches_tracked == 1

    dx = bn.backward(dy)
    invstd = 1 / np.sqrt(new_var + 1e-3)
    expected = oracle.backward(dy, x, new_mean, invstd, bn.weight * r, layout=layout)
    np.testing.assert_allclose(dx, expected[0], rtol=0, atol=room * np.abs(expected[0]).max())
    dweight = expected[1] * r + expected[2] * d
    np.testing.assert_allclose(bn.weight_grad, dweight, rtol=0, atol=room * np.abs(dweight).max())
    np.testing.assert_allclose(bn.bias_grad, expected[2], rtol=0, atol=room * len(x) * 10)
    assert bn.weight_grad.dtype == bn.bias_grad.dtype == dtype
    if (r_max, d_max) == (1, 0):
        plain = fastbn.batch_norm(x, None, None, bn.weight, bn.bias, True, eps=1e-3, layout=layout)
        np.testing.assert_allclose(y, plain, rtol=0, atol=room)


def test_gradients_by_finite_differences():
    bn = layer((5, 3), None, dtype=np.float64, activation="silu", d_max=0.4)
    x, t, residual = (batch((5, 3), "float64", seed) for seed in range(3))
    state = bn.state_dict()
    limits = correction(x, bn.running_mean, bn.running_var, 3, 0.4, 1e-3, None)[2:]

    def loss(x, weight, bias, residual):
        z = formula(x, weight, bias, *limits, 1e-3, None) + residual
        return (t * z / (1 + np.exp(-z))).sum()

    bn(x, residual=residual)
    dx, dresidual = bn.backward(t)
    arguments = [x, state["weight"], state["bias"], residual]
    for i, found in enumerate((dx, bn.weight_grad, bn.bias_grad, dresidual)):
        for at in np.ndindex(found.shape):
            values = []
            for step in (1e-6, -1e-6):
                changed = [a.copy() for a in arguments]
                changed[i][at] += step
                values.append(loss(*changed))
            assert abs((values[0] - values[1]) / 2e-6 - found[at]) < 1e-6


def test_limits_may_depend_on_the_number_of_batches():
    seen = []

    def r_max(batches):
        seen.append(batches)
        return 1 + batches

    bn = fastbn.BatchRenorm(3, r_max=r_max, d_max=lambda batches: 0.0)
    x = batch((8, 3), "float32")
    plain = fastbn.batch_norm(x, None, None, training=True)
    np.testing.assert_allclose(bn(x), plain, atol=1e-6)
    bn(x)
    assert seen == [0, 1]
    bn.r_max, bn.d_max = 1, 0
    np.testing.assert_allclose(bn(x), plain, atol=1e-6)
    bn.r_max = lambda batches: 0.5
    before = bn.state_dict()
    with pytest.raises(ValueError, match=r"^r_max: expected at least 1, got 0.5"):
        bn(x)
    assert all((value == before[name]).all() for name, value in bn.state_dict().items())
    for options in ({"r_max": 0.9}, {"d_max": -1}, {"r_max": float("nan")}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
            fastbn.BatchRenorm(3, **options)
    with pytest.raises(TypeError, match="d_max: "):
        fastbn.BatchRenorm(3, d_max="5")


def test_it_is_batch_norm_otherwise():
    x = batch((8, 3, 2), "float32")
    bn = layer((8, 3, 2), None)
    other = fastbn.BatchNorm(3, 1e-3)
    other.load_state_dict(bn.state_dict())
    assert bn.eval()(x).tobytes() == other.eval()(x).tobytes()
    bn.train().freeze()
    assert bn(x).tobytes() == other(x).tobytes()
    assert bn.backward(x).shape == x.shape
    bn.unfreeze()
    assert bn(x[:0]).shape == (0, 3, 2)
    assert bn.backward(x[:0]).shape == (0, 3, 2)
    assert bn.num_batches_tracked == 0
    without = fastbn.BatchRenorm(3, track_running_stats=False, affine=False)
    assert without(x).tobytes() == fastbn.batch_norm(x, None, None, training=True).tobytes()
    assert pickle.loads(pickle.dumps(bn)).r_max == 3.0
    before = bn.state_dict()
    y = bn(x, update_running=False)
    assert all((value == before[name]).all() for name, value in bn.state_dict().items())
    assert bn(x).tobytes() == y.tobytes()


def test_what_is_refused():
    x = batch((8, 3), "float32")
    bn = fastbn.BatchRenorm(3)
    out = np.full_like(x, 7)
    for bad, message in ((x[:1], "x: expected more than one value"), (x[:, :2], "x: expected 3")):
        with pytest.raises(ValueError, match=message):
            bn(bad)
    with pytest.raises(ValueError, match="eps: expected a number > 0"):
        fastbn.BatchRenorm(3, 0)(x, out)
    assert (out == 7).all()
    assert bn.num_batches_tracked == 0


def test_precise_statistics_are_those_of_batch_norm():
    x = batch((8, 3), "float32", mean=50)
    first, second = fastbn.BatchRenorm(3), fastbn.BatchNorm(3)
    layers, others = [first, fastbn.BatchNorm(3)], [second, fastbn.BatchNorm(3)]
    for network in (layers, others):
        fastbn.update_statistics(network, lambda x, n=network: n[1](n[0](x)), [x, x + 1])
    for ours, theirs in zip(layers, others, strict=True):
        np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-5)
    assert (first.r_max, first.d_max) == (3, 5)
