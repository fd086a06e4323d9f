# SPDX-License-Identifier: BSD-3-Clause
"""Running statistics under control: whether they move, and what they are of."""

import copy
import pickle

import numpy as np
import oracle
import pytest
from arrays import batch

import fastbn

X = batch((6, 3, 4, 4), "float32")
N = X.size // 3
BAD = X.copy()
BAD[2, 1, 0, 0] = np.nan


def running(kept="float32"):
    return np.arange(3).astype(kept), np.arange(1, 4).astype(kept)


def bits(*arrays):
    return [a.tobytes() for a in arrays]


def state(bn):
    """All of a layer that a call could change."""
    kept = {k: v for k, v in bn.__dict__.items() if k not in ("_saved", "_prepared")}
    return pickle.dumps({k: kept[k] for k in sorted(kept)}), id(bn._saved)


# ---- functions -----------------------------------------------------------------------------


def test_statistics_of_the_batch_that_move_nothing(level, any_dtype, kept):
    x = X.astype(any_dtype)
    mean, var = running(kept)
    mean.flags.writeable = var.flags.writeable = False
    y, *statistics = fastbn.batch_norm_forward(x)
    options = {"running_mean": mean, "running_var": var, "update_running": False}
    z, *others = fastbn.batch_norm_forward(x, **options)
    assert bits(y, *statistics) == bits(z, *others)
    assert bits(fastbn.batch_norm(x, mean, var, training=True, update_running=False)) == bits(y)
    assert bits(mean, var) == bits(*running(kept))


def test_the_biased_variance(level, kept):
    mean, var = running(kept)
    expected = oracle.stats(X)
    fastbn.batch_norm(X, mean, var, training=True, momentum=0.25, unbiased=False)
    for mine, old, new in zip((mean, var), running(kept), expected, strict=True):
        np.testing.assert_allclose(mine, oracle.running(old, new, 0.25), rtol=1e-6)
    # The mean has the bits of the default; so have y and the statistics.
    other = running(kept)
    a = fastbn.batch_norm_forward(X, running_mean=other[0], running_var=other[1], momentum=0.25)
    b = fastbn.batch_norm_forward(
        X, running_mean=running(kept)[0], running_var=running(kept)[1], momentum=0.25,
        unbiased=False,
    )  # fmt: skip
    assert bits(mean, *a) == bits(other[0], *b)
    stats = fastbn.batch_stats(X)
    one = [a.astype("float64") for a in running()]
    fastbn.batch_norm(X, *one, training=True, momentum=1.0, unbiased=False)
    assert bits(*one) == bits(stats.mean, stats.var())


@pytest.mark.parametrize("value", ["skip", "raise"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_guard_changes_no_bit_of_finite_channels(level, dtype, kept, value, unbiased):
    plain, guarded = running(kept), running(kept)
    for arrays, on in ((plain, "propagate"), (guarded, value)):
        fastbn.batch_norm(
            X.astype(dtype), *arrays, training=True, unbiased=unbiased, on_nonfinite=on
        )
    assert bits(*plain) == bits(*guarded)


def test_mixed_dtypes_have_the_bits_of_the_engine():
    weight = np.ones(3)
    for kinds in (("float32", "float64"), ("float64", "float32"), (">f4", ">f8")):
        arrays = [[a.astype(k) for a, k in zip(running(), kinds, strict=True)] for _ in range(2)]
        for (mean, var), on in zip(arrays, ("propagate", "skip"), strict=True):
            fastbn.batch_norm(X, mean, var, weight, training=True, on_nonfinite=on)
        assert bits(*arrays[0]) == bits(*arrays[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_skipping_is_by_channel(level, kept, value):
    x = X.copy()
    x[2, 1] = value  # the variance of 3e38 is infinite in float32 only
    plain, skipping = running(kept), running(kept)
    fastbn.batch_norm(x, *plain, training=True)
    y = fastbn.batch_norm(x, *skipping, training=True, on_nonfinite="skip")
    np.testing.assert_array_equal(y, fastbn.batch_norm(x, None, None, training=True))
    left_out = [1] if value != 3e38 or kept == "float32" else []
    for mine, old, moved in zip(skipping, running(kept), plain, strict=True):
        moved[left_out] = old[left_out]
        assert bits(mine) == bits(moved)


def test_raising_names_the_channels():
    mean, var = running()
    x = X.copy()
    x[0, 0], x[0, 2] = np.inf, np.nan
    out = np.empty_like(x)
    with pytest.raises(FloatingPointError, match=r"2 of 3 channels: \[0, 2\]"):
        fastbn.batch_norm(x, mean, var, training=True, on_nonfinite="raise", out=out)
    assert bits(mean, var) == bits(*running())
    with pytest.raises(FloatingPointError, match=r"\[0, 2\]"):
        fastbn.batch_norm_forward(x, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match=r"50 channels: \[0, 1, .*19, \.\.\.\]"):
        fastbn.batch_norm_forward(np.full((2, 50), np.nan), on_nonfinite="raise")
    # Fixed statistics are nobody's fault.
    fastbn.batch_norm(x, mean, var, on_nonfinite="raise")
    fastbn.batch_norm(x[:0], mean, var, training=True, on_nonfinite="raise")
    assert bits(mean, var) == bits(*running())


@pytest.mark.parametrize("channels", [0, 3])
def test_empty_batches(channels):
    mean, var = np.zeros(channels), np.ones(channels)
    for options in ({"unbiased": False}, {"on_nonfinite": "skip"}, {"ghost_batch_size": 2}):
        x = np.empty((0, channels, 2))
        y = fastbn.batch_norm(x, mean, var, training=True, **options)
        assert y.shape == x.shape
        x = np.empty((3, 0, 2))
        assert fastbn.batch_norm_forward(x, **options)[0].shape == x.shape
    assert (mean == 0).all()
    assert (var == 1).all()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"update_running": 1}, TypeError),
        ({"unbiased": "no"}, TypeError),
        ({"on_nonfinite": "ignore"}, ValueError),
        ({"on_nonfinite": None}, TypeError),
        ({"ghost_batch_size": 0}, ValueError),
        ({"ghost_batch_size": 2.0}, TypeError),
        ({"ghost_batch_size": True}, TypeError),
    ],
)
def test_wrong_options(options, error):
    (name,) = options
    mean, var = running()
    with pytest.raises(error, match=f"^{name}: expected"):
        fastbn.batch_norm(X, mean, var, training=True, **options)
    with pytest.raises(error, match=f"^{name}: expected"):
        fastbn.batch_norm_forward(X, **options)
    if name == "update_running":
        for bn in (fastbn.BatchNorm(3), fastbn.BatchNorm(3).eval()):
            with pytest.raises(error, match=f"^{name}: expected"):
                bn(X, **options)
    else:
        with pytest.raises(error, match=f"^{name}: expected"):
            fastbn.BatchNorm(3, **options)
    assert bits(mean, var) == bits(*running())


def test_what_is_held_is_checked_before_anything_is_written():
    mean, var = running()
    out = np.full_like(X, 7)
    for options in ({"on_nonfinite": "skip"}, {"update_running": False}, {"ghost_batch_size": 2}):
        with pytest.raises(ValueError, match=r"^running_var: expected shape \(3,\)"):
            fastbn.batch_norm(X, mean, np.ones(2), training=True, out=out, **options)
        with pytest.raises(ValueError, match=r"^eps: "):
            fastbn.batch_norm(X, mean, var, training=True, eps=0, out=out, **options)
    with pytest.raises(ValueError, match=r"^(out|running_mean): expected memory of its own"):
        fastbn.batch_norm(
            X, out.ravel()[:3], var, training=True, out=out, on_nonfinite="skip"
        )  # fmt: skip
    assert (out == 7).all()


# ---- the layer -------------------------------------------------------------------------------


def test_the_layer_that_moves_nothing():
    bn, other = fastbn.BatchNorm(3), fastbn.BatchNorm(3)
    y = bn(X, update_running=False)
    assert bits(y) == bits(other(X))
    assert bits(bn.backward(X)) == bits(other.backward(X))
    assert bn.num_batches_tracked == 0
    assert (
        bits(bn.running_mean, bn.running_var)
        == bits(*fastbn.BatchNorm(3).state_dict().values())[2:4]
    )


def test_skipping_in_the_layer():
    bn, other = fastbn.BatchNorm(3, on_nonfinite="skip"), fastbn.BatchNorm(3)
    for x in (X, BAD, X):
        bn(x)
        other(x)
    assert bn.skipped == 1
    assert bn.num_batches_tracked == 3
    good = [0, 2]
    assert bits(bn.running_mean[good], bn.running_var[good]) == bits(
        other.running_mean[good], other.running_var[good]
    )
    assert np.isfinite(bn.running_var).all()
    assert np.isnan(other.running_var[1])
    assert np.isfinite(bn.eval()(X)).all()
    bn.train()(np.full_like(X, np.nan))
    assert (bn.skipped, bn.num_batches_tracked) == (2, 3)
    assert "skipped" not in bn.state_dict()
    assert pickle.loads(pickle.dumps(bn)).skipped == 2


def test_the_plain_average_leaves_out_what_was_skipped():
    bn = fastbn.BatchNorm(3, momentum=None, on_nonfinite="skip", dtype=np.float64)
    other = X + np.float32(1)
    for x in (BAD, np.full_like(X, np.inf), X, other):
        bn(x)
    for channel, seen in ((0, (BAD, X, other)), (1, (X, other)), (2, (BAD, X, other))):
        means = [fastbn.batch_stats(x).mean[channel] for x in seen]
        np.testing.assert_allclose(bn.running_mean[channel], np.mean(means), rtol=1e-12)


def test_raising_in_the_layer():
    for ghost in (None, 2):
        bn = fastbn.BatchNorm(3, on_nonfinite="raise", ghost_batch_size=ghost)
        bn(X)
        before = state(bn)
        with pytest.raises(FloatingPointError):
            bn(BAD)
        assert state(bn) == before
        assert bn.backward(X).shape == X.shape


# ---- freezing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_a_frozen_layer(affine, level):
    bn = fastbn.BatchNorm(3, activation="relu")
    bn(X)
    bn.backward(X)
    before = bn.state_dict()
    assert not bn.frozen
    assert bn.freeze(affine) is bn
    assert bn.frozen
    bn.eval().train()
    dy = batch(X.shape, "float32", 1)
    y = bn(X)
    dx = bn.backward(dy)
    options = {"activation": "relu"}
    z, mean, invstd = fastbn.batch_norm_forward(
        X, bn.weight, bn.bias, running_mean=bn.running_mean, running_var=bn.running_var,
        training=False, **options,
    )  # fmt: skip
    expected = fastbn.batch_norm_backward(
        dy, X, mean, invstd, bn.weight, bias=bn.bias, training=False, **options
    )
    assert bits(y, dx) == bits(z, expected[0]) == bits(bn.eval()(X), dx)
    bn.train()(X)
    bn.backward(dy)
    if affine:
        assert bn.weight_grad is bn.bias_grad is None
    else:
        assert bits(bn.weight_grad, bn.bias_grad) == bits(*expected[1:])
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(RuntimeError, match="training mode"):
        bn.eval().backward(dy)
    for clone in (pickle.loads(pickle.dumps(bn)), copy.deepcopy(bn)):
        assert clone.frozen
        clone.train()(X)
        clone.backward(dy)
        assert (clone.weight_grad is None) == affine
    bn.train().unfreeze()
    bn(X)
    bn.backward(dy)
    assert bn.num_batches_tracked == 2
    assert bn.weight_grad is not None


def test_backward_is_that_of_the_call():
    dy = batch(X.shape, "float32", 1)
    bn = fastbn.BatchNorm(3)
    bn(X)
    expected = bn.backward(dy)
    bn.freeze()
    assert bits(bn.backward(dy)) == bits(expected)
    assert bn.weight_grad is None
    bn(X)
    expected = bn.backward(dy)
    bn.unfreeze()
    assert bits(bn.backward(dy)) == bits(expected)


def test_what_can_be_frozen():
    without = fastbn.BatchNorm(3, track_running_stats=False)
    with pytest.raises(ValueError, match="freeze: expected a layer with running statistics"):
        without.freeze()
    with pytest.raises(TypeError, match="affine: "):
        fastbn.BatchNorm(3).freeze("all")
    network = [fastbn.BatchNorm(3), fastbn.LayerNorm(3), object(), fastbn.BatchRenorm(3)]
    with pytest.raises(ValueError, match="freeze: "):
        fastbn.freeze([*network, without])
    assert not network[0].frozen
    fastbn.freeze(iter(network), affine=False)
    assert network[0].frozen
    assert network[3].frozen
    fastbn.unfreeze(network)
    assert not network[0].frozen
    for function in (fastbn.freeze, fastbn.unfreeze):
        with pytest.raises(TypeError, match="layers: expected an iterable"):
            function(fastbn.BatchNorm(3))


# ---- everything that was seen --------------------------------------------------------------------


def batches_of(sizes):
    return [batch((n, 3, 2, 2), "float32", n, mean=n) for n in sizes]


@pytest.mark.parametrize("unbiased", [True, False])
def test_pooled(unbiased):
    bn = fastbn.BatchNorm(3, momentum=0.9, track="pooled", unbiased=unbiased, dtype=np.float64)
    assert (bn.pooled.count == 0).all()
    assert bn.running_var.tolist() == [1, 1, 1]
    parts = batches_of([3, 1, 7])
    for x in parts:
        bn(x)
    whole = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(bn.running_mean, whole.mean((0, 2, 3)), rtol=1e-12)
    expected = whole.var((0, 2, 3), ddof=int(unbiased))
    np.testing.assert_allclose(bn.running_var, expected, rtol=1e-6)
    merged = fastbn.BatchStats.merge(map(fastbn.batch_stats, parts))
    assert bits(merged.mean, merged.m2) == bits(bn.pooled.mean, bn.pooled.m2)
    assert bits(bn.running_mean) == bits(merged.mean)
    clone = pickle.loads(pickle.dumps(bn))
    assert bits(clone.pooled.m2) == bits(merged.m2)
    assert "pooled" not in bn.state_dict()
    clone.load_state_dict(bn.state_dict())
    assert (clone.pooled.count == 0).all()
    assert bits(clone.running_mean) == bits(bn.running_mean)
    bn.reset_running_stats()
    assert (bn.pooled.count == 0).all()
    assert bn.num_batches_tracked == 0
    bn(parts[0])
    assert bits(bn.pooled.m2) == bits(fastbn.batch_stats(parts[0]).m2)


def test_pooled_and_skipped():
    bn = fastbn.BatchNorm(3, track="pooled", on_nonfinite="skip", dtype=np.float64)
    bn(BAD)
    assert bn.pooled.count.tolist() == [N, 0, N]
    assert (bn.running_mean[1], bn.running_var[1]) == (0, 1)
    bn(X)
    assert bn.pooled.count.tolist() == [2 * N, N, 2 * N]
    np.testing.assert_allclose(bn.running_mean[1], X[:, 1].mean(dtype=float), rtol=1e-7)


def test_what_pooled_needs():
    with pytest.raises(ValueError, match='track: expected "average" without running statistics'):
        fastbn.BatchNorm(3, track_running_stats=False, track="pooled")
    with pytest.raises(ValueError, match="track: expected one of"):
        fastbn.BatchNorm(3, track="median")
    assert fastbn.BatchNorm(3).pooled is None
    assert repr(fastbn.BatchNorm(3, track="pooled").freeze()) == (
        "BatchNorm(3, eps=1e-05, momentum=0.1, track='pooled', frozen=True)"
    )


# ---- precise batch norm --------------------------------------------------------------------


def network():
    layers = [fastbn.BatchNorm(3, 1e-3, 0.3, dtype=np.float64), fastbn.LayerNorm((2, 2)),
              fastbn.InPlaceBatchNorm(3, dtype=np.float64),
              fastbn.BatchNorm(3, momentum=None, dtype=np.float64).freeze()]  # fmt: skip
    for layer in layers[0], layers[2]:
        layer(batch((4, 3, 2, 2), "float64", 9))
    layers[2].eval()
    return layers


def forward(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@pytest.mark.parametrize("method", ["pooled", "mean_of_batches"])
def test_update_statistics(method):
    layers = network()
    batches = [x.astype(float) for x in batches_of([3, 1, 7])]
    modes = [(layer.training, getattr(layer, "momentum", 0)) for layer in layers]
    number = fastbn.update_statistics(
        iter(layers), lambda x: forward(layers, x.copy()), iter(batches), method=method
    )
    assert number == 3
    assert modes == [(layer.training, getattr(layer, "momentum", 0)) for layer in layers]
    seen = batches
    for layer in layers[:3]:
        if isinstance(layer, fastbn.LayerNorm):
            seen = [fastbn.layer_norm(x, (2, 2)) for x in seen]
            continue
        assert layer.num_batches_tracked == 3
        assert (layer.track, layer.pooled) == ("average", None)
        parts = [fastbn.batch_stats(x) for x in seen]
        if method == "pooled":
            whole = fastbn.BatchStats.merge(parts)
            expected = whole.mean, whole.var(ddof=1)
        else:
            expected = np.mean([p.mean for p in parts], 0), np.mean([p.var(1) for p in parts], 0)
        np.testing.assert_allclose(layer.running_mean, expected[0], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(layer.running_var, expected[1], rtol=1e-12)
        seen = [fastbn.batch_norm(x, None, None, training=True, eps=1e-3) for x in seen]
    assert layers[3].num_batches_tracked == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_all_is_as_before_if_it_fails(error):
    layers = [*network(), fastbn.BatchNorm(3, track="pooled", on_nonfinite="skip")]
    layers[-1](X)
    layers[-1](BAD)
    before = [state(layer) for layer in layers]
    arrays = [layer.running_mean for layer in layers if hasattr(layer, "running_mean")]

    def fails(x):
        forward(layers, x.copy())
        if len(x) == 7:
            raise error

    for batches in ([], batches_of([3, 7])):
        with pytest.raises(error if batches else ValueError):
            fastbn.update_statistics(layers, fails, batches)
        assert before == [state(layer) for layer in layers]
    after = [layer.running_mean for layer in layers if hasattr(layer, "running_mean")]
    assert all(a is b for a, b in zip(arrays, after, strict=True))


def test_after_it_goes_on_as_before():
    pooled = fastbn.BatchNorm(3, track="pooled")
    average = fastbn.BatchNorm(3)
    average(X)
    unused = fastbn.BatchNorm(3)
    unused(X)
    before = state(unused)
    fastbn.update_statistics(
        [pooled, average, average, unused], lambda x: average(pooled(x)), [X, X + 1]
    )
    assert state(unused) == before
    assert pooled.pooled.count.tolist() == [2 * N] * 3
    pooled(X)
    assert pooled.pooled.count.tolist() == [3 * N] * 3
    assert average.backward(X).shape == X.shape  # of the call before
    fastbn.update_statistics([pooled], pooled, [X], method="mean_of_batches")
    assert pooled.track == "pooled"
    assert pooled.pooled.count.tolist() == [0] * 3


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"layers": 3}, TypeError),
        ({"forward": None}, TypeError),
        ({"batches": 3}, TypeError),
        ({"method": "median"}, ValueError),
        ({"progress": "yes"}, TypeError),
    ],
)
def test_wrong_arguments_of_update_statistics(changed, error):
    bn = fastbn.BatchNorm(3)
    arguments = {"layers": [bn], "forward": bn, "batches": [X]} | changed
    (name,) = changed
    with pytest.raises(error, match=f"^{name}: expected"):
        fastbn.update_statistics(**arguments)


def test_a_progress_bar(capsys):
    pytest.importorskip("tqdm")
    bn = fastbn.BatchNorm(3)
    assert fastbn.update_statistics([bn], bn, [X, X], progress=True) == 2
    assert "statistics" in capsys.readouterr().err
