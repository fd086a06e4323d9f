# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm over several ranks, which are threads here: values, bits, errors, messages."""

import pickle

import bounds
import numpy as np
import pytest
from arrays import batch, half_ulp
from ranks import SPLITS, expected, parts_of, run, same_bits

import fastbn
from fastbn import sync

CASES = [((12, 5, 4, 3), None), ((12, 3, 5, 17), "NHWC"), ((12, 40), None), ((12, 2, 300), None)]
IDS = ["NCHW", "NHWC", "NC", "long runs"]
each_case = pytest.mark.parametrize(("shape", "layout"), CASES, ids=IDS)


def data(shape, layout, dtype, seed=0):
    channels = shape[-1] if layout == "NHWC" else shape[1]
    x, dy = batch(shape, dtype, seed, 0.5, 1.0), batch(shape, dtype, seed + 1, 0.0, 1.0)
    return x, dy, batch((channels,), "float32", 2), batch((channels,), "float32", 3)


def step(x, dy, weight, bias, group, **options):
    """Forward and backward of one rank."""
    y, mean, invstd = sync.batch_norm_forward(x, weight, bias, group=group, **options)
    options.pop("running_mean", None), options.pop("running_var", None)
    gradients = sync.batch_norm_backward(
        dy, x, mean, invstd, weight, bias=bias, group=group, **options
    )
    return y, mean, invstd, *gradients


def steps(split, x, dy, weight, bias, **options):
    xs, dys = parts_of(x, split), parts_of(dy, split)
    residuals = [None] * len(split)
    if "residual" in options:
        residuals = parts_of(options.pop("residual"), split)

    def work(rank, group):
        own = {} if residuals[rank] is None else {"residual": residuals[rank]}
        return step(xs[rank], dys[rank], weight, bias, group, **options, **own)

    results = run(len(split), work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# ---- values --------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_the_whole_batch(shape, layout, split, any_dtype):
    x, dy, weight, bias = data(shape, layout, any_dtype)
    results = steps(split, x, dy, weight, bias, layout=layout)
    y, mean, invstd, dx = expected(x, dy, weight, bias, layout)
    room = bounds.WRITTEN * max(1.0, np.abs(weight).max())
    for result in results:
        assert np.abs(result[1] - mean).max() <= 1e-6
        assert np.abs(result[2] / invstd - 1).max() <= bounds.of_invstd(any_dtype)
    for whole, place in (y, 0), (dx, 3):
        joined = np.concatenate([result[place] for result in results])
        assert joined.dtype == x.dtype
        error = np.abs(joined.astype(np.float64) - whole)
        assert (error <= room + half_ulp(np.abs(whole) + room, any_dtype)).all()
    # The shares of the parameters' gradients.
    _, dweight, dbias = fastbn.batch_norm_backward(dy, x, *results[0][1:3], weight, layout=layout)
    for place, gradient in (4, dweight), (5, dbias):
        total = sum(result[place].astype(np.float64) for result in results)
        np.testing.assert_allclose(total, gradient, rtol=2e-5, atol=2e-4)


@each_case
@pytest.mark.parametrize("place", [0, 1, 2])
def test_bits_where_one_rank_has_all(shape, layout, place, any_dtype):
    x, dy, weight, bias = data(shape, layout, any_dtype)
    split = [12 if rank == place else 0 for rank in range(3)]
    for options in {}, {"activation": "silu"}, {"activation": "relu", "residual": dy}:
        options = {"layout": layout, **options}
        results = steps(split, x, dy, weight, bias, **options)
        y, mean, invstd = fastbn.batch_norm_forward(x, weight, bias, **options)
        gradients = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, bias=bias, **options)
        for found, wanted in zip(results[place], (y, mean, invstd, *gradients), strict=True):
            assert same_bits(found, wanted)
        for result in results:
            assert same_bits(result[1], mean)
            assert same_bits(result[2], invstd)


def test_running_statistics_where_one_rank_has_all(kept):
    x, *_ = data((12, 5, 4), None, "float32")
    own = np.zeros(5, kept), np.ones(5, kept)
    fastbn.batch_norm_forward(x, running_mean=own[0], running_var=own[1])

    def work(rank, group):
        running = np.zeros(5, kept), np.ones(5, kept)
        part = x if rank == 1 else x[:0]
        sync.batch_norm_forward(part, running_mean=running[0], running_var=running[1], group=group)
        return running

    for running in run(3, work):
        assert same_bits(running[0], own[0])
        assert same_bits(running[1], own[1])


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_bits_of_all_ranks_and_runs(split):
    x, dy, weight, bias = data((12, 7, 6), None, "float32")
    first, again = (steps(split, x, dy, weight, bias) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert all(map(same_bits, a, b))
        assert same_bits(a[1], first[0][1])
        assert same_bits(a[2], first[0][2])


def test_the_merge_is_that_of_batch_stats_in_rank_order():
    x, dy, weight, bias = data((12, 7, 6), None, "float64")
    parts = [fastbn.batch_stats(part) for part in parts_of(x, [5, 4, 3])]
    whole = fastbn.BatchStats.merge(parts)
    assert not same_bits(whole.m2, fastbn.BatchStats.merge(parts[::-1]).m2)
    _, mean, invstd, *_ = steps([5, 4, 3], x, dy, weight, bias)[0]
    assert same_bits(mean, whole.mean)
    assert same_bits(invstd, 1 / np.sqrt(whole.var() + 1e-5))


def test_a_large_mean_does_not_cancel():
    x = batch((12, 3, 50), "float64", 5, 1e6, 1.0)
    _, mean, invstd, *_ = steps([5, 4, 3], x, x, np.ones(3), np.zeros(3))[0]
    np.testing.assert_allclose(mean, x.mean((0, 2)), rtol=1e-14)
    np.testing.assert_allclose(invstd, 1 / np.sqrt(x.var((0, 2)) + 1e-5), rtol=1e-9)


def test_all_ranks_are_empty():
    x = np.zeros((0, 3, 2), np.float32)

    def work(rank, group):
        running = np.zeros(3), np.ones(3)
        result = sync.batch_norm_forward(
            x, running_mean=running[0], running_var=running[1], group=group
        )
        return *result, *sync.batch_norm_backward(x, x, *result[1:], group=group), *running

    for y, mean, invstd, dx, dweight, dbias, running_mean, running_var in run(2, work):
        assert y.shape == dx.shape == x.shape
        assert (mean == 0).all()
        assert np.isnan(invstd).all()
        assert not dweight.any()
        assert not dbias.any()
        assert not running_mean.any()
        assert (running_var == 1).all()


def test_in_place():
    x, dy, weight, bias = data((12, 3, 5), None, "float32")
    wanted = steps([7, 5], x, dy, weight, bias)
    xs, dys = parts_of(x.copy(), [7, 5]), parts_of(dy.copy(), [7, 5])

    def work(rank, group):
        before = xs[rank].copy()
        y, mean, invstd = sync.batch_norm_forward(xs[rank], weight, bias, group=group, out=xs[rank])
        dx, *_ = sync.batch_norm_backward(
            dys[rank], before, mean, invstd, weight, group=group, out=dys[rank]
        )
        return y, dx

    for rank, (y, dx) in enumerate(run(2, work)):
        assert y is xs[rank]
        assert dx is dys[rank]
        assert same_bits(y, wanted[rank][0])
        assert same_bits(dx, wanted[rank][3])


def test_one_value_each_is_enough():
    x = np.array([[1.0, 5.0], [3.0, 9.0]])
    results = run(2, lambda rank, group: sync.batch_norm_forward(x[rank : rank + 1], group=group))
    np.testing.assert_allclose(results[0][1], [2.0, 7.0])


# ---- messages --------------------------------------------------------------------------------


def test_messages():
    x, dy, weight, bias = data((12, 7, 6), None, "float32")

    def work(rank, group):
        step(x, dy, weight, bias, group)
        sent = list(group.sent)
        running = {"running_mean": np.zeros(7), "running_var": np.ones(7), "training": False}
        step(x, dy, weight, bias, group, **running)
        layer = fastbn.SyncBatchNorm(7, group=group).eval()
        layer(x)
        assert group.sent == sent
        return sent

    for sent in run(3, work):
        assert sent == [8 * (3 + 2 * 7)] * 2


# ---- errors ----------------------------------------------------------------------------------


def raised_at(rank, bad, error):
    """Forward of three ranks, of which one is given something wrong."""
    x = np.arange(24.0).reshape(4, 6)
    kept = [(np.zeros(6), np.ones(6)) for _ in range(3)]

    def work(r, group):
        arguments = {"x": x, "running_mean": kept[r][0], "running_var": kept[r][1]}
        return sync.batch_norm_forward(**arguments | (bad if r == rank else {}), group=group)

    results = run(3, work)
    for r, result in enumerate(results):
        assert isinstance(result, error if r == rank else RuntimeError), result
        if r != rank:
            assert f"rank {rank}" in str(result)
            assert error.__name__ in str(result)
        assert not kept[r][0].any()
        assert (kept[r][1] == 1).all()


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"x": "text"}, TypeError),
        ({"x": np.arange(12).reshape(2, 6)}, TypeError),
        ({"x": np.zeros(6)}, ValueError),
        ({"weight": np.ones(5)}, ValueError),
        ({"eps": 0.0}, ValueError),
        ({"momentum": "0.1"}, TypeError),
        ({"training": 1}, TypeError),
        ({"layout": "NQ"}, ValueError),
        ({"activation": "gelu"}, ValueError),
        ({"out": np.zeros((4, 5))}, ValueError),
    ],
    ids=lambda value: str(value).replace("\n", "")[:20],
)
def test_an_error_of_one_rank_is_one_of_all(rank, bad, error):
    raised_at(rank, bad, error)


def test_an_overlap_is_seen_before_the_exchange():
    x = np.arange(24.0).reshape(4, 6)
    raised_at(1, {"x": x, "running_mean": x[0]}, ValueError)


def test_errors_of_backward():
    x = np.arange(24.0).reshape(4, 6)
    mean, invstd = x.mean(0), 1 / x.std(0)

    def work(rank, group):
        dy = x[:3] if rank == 0 else x
        return sync.batch_norm_backward(dy, x, mean, invstd, group=group)

    first, second = run(2, work)
    assert isinstance(first, ValueError)
    assert isinstance(second, RuntimeError)
    assert "rank 0" in str(second)


def test_channels_differ():
    def work(rank, group):
        return sync.batch_norm_forward(np.ones((4, 3 + (rank == 1))), group=group)

    for rank, result in enumerate(run(3, work)):
        assert isinstance(result, RuntimeError)
        assert f"rank {0 if rank == 1 else 1} has {3 if rank == 1 else 4} channels" in str(result)


def test_one_rank_is_in_backward():
    x = np.arange(24.0).reshape(4, 6)

    def work(rank, group):
        if rank == 0:
            return sync.batch_norm_forward(x, group=group)
        return sync.batch_norm_backward(x, x, x[0], np.ones(6), group=group)

    for rank, result in enumerate(run(2, work)):
        assert isinstance(result, RuntimeError)
        assert f"rank {1 - rank}" in str(result)


def test_one_value_of_all_ranks():
    def work(rank, group):
        x = np.ones((1 - rank, 2))
        kept = np.zeros(2)
        with pytest.raises(ValueError, match="more than one value per channel"):
            sync.batch_norm_forward(x, running_mean=kept, group=group)
        with pytest.raises(ValueError, match="more than one value per channel"):
            sync.batch_norm_backward(x, x, kept, np.ones(2), group=group)
        return kept.any()

    assert run(2, work) == [False, False]


def test_what_allgather_raises_passes():
    class Dead:
        rank, size = 0, 2

        def allgather(self, array):
            raise ConnectionError("gone")

    kept = np.zeros(6), np.ones(6)
    x = np.arange(24.0).reshape(4, 6)
    with pytest.raises(ConnectionError, match=r"^gone$"):
        sync.batch_norm_forward(x, running_mean=kept[0], running_var=kept[1], group=Dead())
    with pytest.raises(ConnectionError, match=r"^gone$"):
        sync.batch_norm_backward(x, x, x[0], np.ones(6), group=Dead())
    layer = fastbn.SyncBatchNorm(6, group=Dead())
    with pytest.raises(ConnectionError, match=r"^gone$"):
        layer(x)
    for running in kept, (layer.running_mean, layer.running_var):
        assert not running[0].any()
        assert (running[1] == 1).all()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("group", "error"),
    [
        (3, TypeError),
        (type("NoSize", (), {"rank": 0, "allgather": print})(), TypeError),
        (type("NoMethod", (), {"rank": 0, "size": 1})(), TypeError),
        (type("Text", (), {"rank": "0", "size": 1, "allgather": print})(), TypeError),
        (type("Outside", (), {"rank": 2, "size": 2, "allgather": print})(), ValueError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_groups_that_are_none(group, error):
    x = np.ones((2, 3))
    for call in (
        lambda: sync.batch_norm_forward(x, group=group),
        lambda: sync.batch_norm_backward(x, x, x[0], x[0], group=group),
        lambda: fastbn.SyncBatchNorm(3, group=group),
    ):
        with pytest.raises(error, match=r"^group: expected"):
            call()


def test_too_few_arrays():
    group = type("Few", (), {"rank": 0, "size": 2, "allgather": lambda self, a: [a]})()
    with pytest.raises(RuntimeError, match=r"^group: expected 2 arrays"):
        sync.batch_norm_forward(np.ones((2, 3)), group=group)


# ---- the layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_layer_beside_one_process(momentum):
    x, dy, *_ = data((3, 12, 5, 4, 4), None, "float32")
    one = fastbn.BatchNorm(5, momentum=momentum, activation="relu")
    split = [7, 0, 5]

    def work(rank, group):
        layer = fastbn.SyncBatchNorm(5, momentum=momentum, activation="relu", group=group)
        results = []
        for batch_x, batch_dy in zip(x, dy, strict=True):
            part, dpart = parts_of(batch_x, split)[rank], parts_of(batch_dy, split)[rank]
            results.append((layer(part), layer.backward(dpart), layer.weight_grad))
        return results, layer.state_dict()

    ranks = run(3, work)
    for i in range(3):
        y, dx = one(x[i]), one.backward(dy[i])
        joined = [np.concatenate([results[i][k] for results, _ in ranks]) for k in range(2)]
        np.testing.assert_allclose(joined[0], y, atol=1e-5)
        np.testing.assert_allclose(joined[1], dx, atol=1e-5)
        total = sum(results[i][2] for results, _ in ranks)
        np.testing.assert_allclose(total, one.weight_grad, atol=1e-4)
    for _, state in ranks:
        assert all(same_bits(state[name], ranks[0][1][name]) for name in state)
        for name, value in one.state_dict().items():
            np.testing.assert_allclose(state[name], value, rtol=1e-6)
    assert ranks[1][1]["num_batches_tracked"] == 3


def test_layer_without_a_group_has_the_bits_of_batch_norm():
    x, dy, *_ = data((12, 5, 4), None, "float32")
    layers = fastbn.SyncBatchNorm(5), fastbn.BatchNorm(5)
    for layer in layers:
        layer.y, layer.dx = layer(x), layer.backward(dy)
        layer.inferred = layer.eval()(x)
    for name in "y", "dx", "inferred", "weight_grad", "bias_grad", "running_mean", "running_var":
        assert same_bits(*[getattr(layer, name) for layer in layers]), name
    assert repr(layers[0]) == "Sync" + repr(layers[1])
    assert same_bits(pickle.loads(pickle.dumps(layers[0]))(x), layers[1](x))
    found, wanted = (f(x) for f in (sync.batch_norm_forward, fastbn.batch_norm_forward))
    assert all(map(same_bits, found, wanted))


def test_layer_without_running_statistics():
    x, *_ = data((12, 5, 4), None, "float32")
    layers = (
        fastbn.SyncBatchNorm(5, track_running_stats=False, affine=False),
        fastbn.BatchNorm(5, track_running_stats=False, affine=False),
    )
    assert same_bits(*[layer.eval()(x) for layer in layers])
    assert same_bits(*[layer.train()(x) for layer in layers])


def test_errors_of_one_layer():
    x = np.arange(24.0).reshape(4, 6)

    def work(rank, group):
        layer = fastbn.SyncBatchNorm(6, group=group)
        wrong = RuntimeError if rank == 0 else ValueError
        with pytest.raises(wrong):
            layer(x if rank == 0 else x[:, :5])
        assert layer.num_batches_tracked == 0
        assert not layer.running_mean.any()
        if rank == 0:
            with pytest.raises(RuntimeError, match=r"^backward: expected a call"):
                layer.backward(x)
        else:
            with pytest.raises(RuntimeError, match="rank 0"):
                sync.batch_norm_backward(x, x, x[0], np.ones(6), group=group)
        return True

    assert run(2, work) == [True, True]
