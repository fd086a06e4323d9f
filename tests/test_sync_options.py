# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm over several ranks with the options of one: running statistics, ghost batches."""

import inspect
from itertools import pairwise

import bounds
import numpy as np
import pytest
from arrays import batch, half_ulp
from ranks import SPLITS, parts_of, run, same_bits

import fastbn
from fastbn import sync
from fastbn.sync._groups import BLOCK, gathered

each_split = pytest.mark.parametrize("split", SPLITS, ids=str)
LAYOUTS = [((12, 5, 4, 3), None, 0), ((12, 3, 4, 5), "NHWC", 0), ((5, 12, 7), "CNH", 1)]
each_layout = pytest.mark.parametrize(("shape", "layout", "axis"), LAYOUTS)


def results_of(size, work):
    """What each rank returns; raises what one of them raises."""
    results = run(size, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def close(found, wanted, scale=1.0):
    room = bounds.WRITTEN * max(1.0, scale)
    wanted = wanted.astype(np.float64)
    error = np.abs(found.astype(np.float64) - wanted)
    return (error <= room + 2 * half_ulp(np.abs(wanted) + room, found.dtype.name)).all()


@pytest.mark.parametrize("name", ["batch_norm_forward", "batch_norm_backward"])
def test_the_arguments_are_those_of_one_process(name):
    ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (sync, fastbn))
    assert [n for n in ours if n != "group"] == list(theirs)
    for parameter in theirs:
        assert ours[parameter].default == theirs[parameter].default
        assert ours[parameter].kind == theirs[parameter].kind
    ours, theirs = (
        inspect.signature(c).parameters for c in (fastbn.SyncBatchNorm, fastbn.BatchNorm)
    )
    assert [n for n in ours if n != "group"] == list(theirs)


# ---- running statistics ----------------------------------------------------------------------


@each_split
@pytest.mark.parametrize(
    "options",
    [
        {"update_running": False},
        {"unbiased": False},
        {"on_nonfinite": "skip"},
        {"unbiased": False, "on_nonfinite": "skip", "momentum": 0.3},
    ],
    ids=str,
)
def test_running_statistics(split, options, kept):
    x = batch((12, 5, 4), "float32", 0, 0.5, 1.0)
    x[7, 2] = np.inf
    one = np.zeros(5, kept), np.ones(5, kept)
    fastbn.batch_norm_forward(x, running_mean=one[0], running_var=one[1], **options)

    def work(rank, group):
        running = np.zeros(5, kept), np.ones(5, kept)
        sync.batch_norm_forward(
            parts_of(x, split)[rank], running_mean=running[0], running_var=running[1],
            group=group, **options
        )  # fmt: skip
        return running

    ranks = results_of(len(split), work)
    for running in ranks:
        assert all(map(same_bits, running, ranks[0]))
        np.testing.assert_allclose(running, one, rtol=1e-6)
        if 12 in split:
            assert all(map(same_bits, running, one))
    if options.get("on_nonfinite") == "skip":
        assert ranks[0][0][2] == 0
        assert ranks[0][1][2] == 1
    assert ranks[0][0].any() == options.get("update_running", True)


def test_what_is_not_finite_on_one_rank_is_raised_by_all():
    x = batch((12, 5, 4), "float32")
    x[0, 3] = np.nan

    def work(rank, group):
        kept = np.zeros(5), np.ones(5)
        with pytest.raises(FloatingPointError, match=r"\[3\]"):
            sync.batch_norm_forward(
                parts_of(x, [5, 4, 3])[rank], running_mean=kept[0], running_var=kept[1],
                group=group, on_nonfinite="raise"
            )  # fmt: skip
        assert not kept[0].any()
        assert (kept[1] == 1).all()

    results_of(3, work)


# ---- ghost batches: slices of the whole batch ----------------------------------------------------


@each_split
@each_layout
@pytest.mark.parametrize("size", [1, 4, 5, 12, 20])
def test_ghost_batches(split, shape, layout, axis, size, any_dtype):
    x, dy, residual = (batch(shape, any_dtype, seed) for seed in range(3))
    weight, bias = batch((5,), "float32", 3), batch((5,), "float32", 4)
    options = {"layout": layout, "ghost_batch_size": size, "activation": "relu"}
    one = np.zeros(5), np.ones(5)
    y, mean, invstd = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=one[0], running_var=one[1], residual=residual, **options
    )
    dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(
        dy, x, mean, invstd, weight, bias=bias, residual=residual, **options
    )
    parts = [parts_of(tensor, split, axis) for tensor in (x, dy, residual)]

    def work(rank, group):
        own_x, own_dy, own_residual = (part[rank] for part in parts)
        running = np.zeros(5), np.ones(5)
        forward = sync.batch_norm_forward(
            own_x, weight, bias, group=group, running_mean=running[0], running_var=running[1],
            residual=own_residual, **options
        )  # fmt: skip
        # At the statistics of one process, so that relu has the same sign.
        gradients = sync.batch_norm_backward(
            own_dy, own_x, mean, invstd, weight, group=group, bias=bias, residual=own_residual,
            **options
        )  # fmt: skip
        slices = -(-12 // size)
        assert len(group.sent) == 2 * (1 + slices)
        return *forward, *gradients, *running

    ranks = results_of(len(split), work)
    for result in ranks:
        for place in 1, 2, 7, 8:
            assert same_bits(result[place], ranks[0][place])
        np.testing.assert_allclose(result[1], mean, atol=1e-6)
        np.testing.assert_allclose(result[2], invstd, rtol=bounds.of_invstd(any_dtype))
        np.testing.assert_allclose(result[7:], one, rtol=1e-6)
    scale = np.abs(weight).max() * invstd.max()
    for place, wanted in (0, y), (3, dx), (6, dresidual):
        found = np.concatenate([result[place] for result in ranks], axis)
        assert close(found, wanted, scale)
    for place, wanted in (4, dweight), (5, dbias):
        total = sum(result[place].astype(np.float64) for result in ranks)
        np.testing.assert_allclose(total, wanted, rtol=2e-5, atol=2e-4)
    if 12 in split:
        own = ranks[split.index(12)]
        for found, wanted in zip(own, (y, mean, invstd, dx, dweight, dbias, dresidual, *one),
                                 strict=True):  # fmt: skip
            assert same_bits(found, wanted)


@each_split
def test_ghost_batches_with_masks(split):
    x, dy = batch((12, 6, 5), "float32"), batch((12, 6, 5), "float32", 1)
    lengths = np.array([6, 0, 3, 1, 1, 2, 5, 6, 0, 0, 4, 2])
    options = {"layout": "NTC", "ghost_batch_size": 4}
    y, mean, invstd = fastbn.batch_norm_forward(x, lengths=lengths, **options)
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, lengths=lengths, **options)

    def work(rank, group):
        own, own_dy, counts = (parts_of(a, split)[rank] for a in (x, dy, lengths))
        forward = sync.batch_norm_forward(own, group=group, lengths=counts, **options)
        return *forward, sync.batch_norm_backward(
            own_dy, own, *forward[1:], group=group, lengths=counts, **options
        )[0]  # fmt: skip

    ranks = results_of(len(split), work)
    np.testing.assert_allclose(ranks[0][1], mean, atol=1e-6)
    assert close(np.concatenate([result[0] for result in ranks]), y)
    assert close(np.concatenate([result[3] for result in ranks]), dx, invstd.max())


def test_a_ghost_batch_of_one_value_is_one_of_all_ranks():
    # Two instances in a slice, of which one counts; on one rank alone they are one each.
    x = batch((4, 3), "float32")
    lonely = np.array([True, True, True, False])

    def work(rank, group):
        rows = slice(2 * rank, 2 * rank + 2)
        kept, out = np.zeros(3), np.full((2, 3), 7, np.float32)
        with pytest.raises(ValueError, match="one value in instances 2 to 3 of 4"):
            sync.batch_norm_forward(
                x[rows], group=group, running_mean=kept, running_var=np.ones(3), out=out,
                ghost_batch_size=2, mask=lonely[rows]
            )  # fmt: skip
        assert (out == 7).all()
        assert not kept.any()
        part = x[:1] if rank == 0 else x[1:]
        return sync.batch_norm_forward(part, group=group, ghost_batch_size=2)[1]

    results = results_of(2, work)
    np.testing.assert_allclose(results[0], [x[:2].mean(0), x[2:].mean(0)], rtol=1e-6)
    assert same_bits(*results)


def test_all_ranks_are_empty():
    x = np.zeros((0, 3), np.float32)

    def work(rank, group):
        y, mean, invstd = sync.batch_norm_forward(x, group=group, ghost_batch_size=2)
        dx, dweight, _ = sync.batch_norm_backward(
            x, x, mean, invstd, group=group, ghost_batch_size=2
        )
        with pytest.raises(ValueError, match=r"^mean: expected shape \(0, 3\)"):
            sync.batch_norm_backward(x, x, np.ones(3), invstd, group=group, ghost_batch_size=2)
        return y.shape == dx.shape == x.shape and mean.shape == (0, 3) and not dweight.any()

    assert results_of(2, work) == [True, True]


def test_errors_between_exchanges_reach_all():
    x = batch((6, 3), "float32")
    _, mean, invstd = fastbn.batch_norm_forward(np.concatenate([x, x]), ghost_batch_size=4)

    def work(rank, group):
        table = mean[:2] if rank == 1 else mean
        return sync.batch_norm_backward(x, x, table, invstd, group=group, ghost_batch_size=4)

    first, second = run(2, work)
    assert isinstance(first, RuntimeError)
    assert "rank 1" in str(first)
    assert isinstance(second, ValueError)
    assert "mean: expected shape (3, 3), got (2, 3)" in str(second)


def test_one_rank_has_no_ghost_batches():
    x = batch((6, 3), "float32")

    def work(rank, group):
        size = 2 if rank == 1 else None
        return sync.batch_norm_forward(x, group=group, ghost_batch_size=size)

    first, second = run(2, work)
    assert "rank 1 is in forward with ghost batches, this rank in forward" in str(first)
    assert "rank 0 is in forward, this rank in forward with ghost batches" in str(second)


# ---- the layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"track": "pooled"},
        {"track": "pooled", "ghost_batch_size": 5},
        {"unbiased": False, "momentum": None},
        {"on_nonfinite": "skip", "momentum": None, "ghost_batch_size": 4},
        {"ghost_batch_size": 3},
    ],
    ids=str,
)
def test_the_layer_beside_one_process(options):
    x, dy = batch((3, 12, 5, 4), "float32"), batch((3, 12, 5, 4), "float32", 1)
    if "on_nonfinite" in options:
        x[1, 3, 2] = np.nan
    split = [7, 0, 5]
    one = fastbn.BatchNorm(5, **options)

    def work(rank, group):
        layer = fastbn.SyncBatchNorm(5, group=group, **options)
        results = []
        for whole, gradient in zip(x, dy, strict=True):
            y = layer(parts_of(whole, split)[rank])
            dx = layer.backward(parts_of(gradient, split)[rank])
            results.append((y, dx, layer.weight_grad))
        before = layer.state_dict()
        layer(parts_of(x[0], split)[rank], update_running=False)
        assert all(same_bits(value, before[name]) for name, value in layer.state_dict().items())
        return results, layer

    ranks = results_of(3, work)
    for i in range(3):
        y, dx = one(x[i]), one.backward(dy[i])
        for place, wanted in (0, y), (1, dx):
            found = np.concatenate([results[i][place] for results, _ in ranks])
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        total = sum(results[i][2] for results, _ in ranks)
        np.testing.assert_allclose(total, one.weight_grad, atol=1e-4)
    for _, layer in ranks:
        assert layer.skipped == one.skipped
        for name, value in layer.state_dict().items():
            assert same_bits(value, ranks[0][1].state_dict()[name])
            np.testing.assert_allclose(value, one.state_dict()[name], rtol=1e-6)
    assert repr(ranks[0][1]) == "Sync" + repr(one)


def test_a_frozen_layer_meets_nobody():
    x = batch((4, 3), "float32")

    class Nobody:
        rank, size = 0, 2

        def allgather(self, array):
            raise AssertionError("a frozen layer sends nothing")

    layer, one = fastbn.SyncBatchNorm(3, group=Nobody()).freeze(), fastbn.BatchNorm(3).freeze()
    assert same_bits(layer(x), one(x))
    assert same_bits(layer.backward(x), one.backward(x))
    with pytest.raises(ValueError, match="3 channels"):
        layer(x[:, :2])
    with pytest.raises(RuntimeError, match=r"^backward: expected a call"):
        fastbn.SyncBatchNorm(3, group=Nobody()).freeze().backward(x)


def test_a_flag_that_is_none_is_told_to_all():
    x = batch((4, 3), "float32")

    def work(rank, group):
        layer = fastbn.SyncBatchNorm(3, group=group)
        with pytest.raises(TypeError if rank else RuntimeError, match="update_running: expected"):
            layer(x, update_running=1 if rank else True)
        return layer.num_batches_tracked

    assert results_of(2, work) == [0, 0]


def test_statistics_of_all_batches_of_all_ranks():
    batches = [batch((12, 3, 4), "float32", seed) for seed in range(3)]
    one = fastbn.BatchNorm(3)
    fastbn.update_statistics([one], one, batches)

    def work(rank, group):
        layer = fastbn.SyncBatchNorm(3, group=group)
        parts = [parts_of(x, [7, 0, 5])[rank] for x in batches]
        fastbn.update_statistics([layer], layer, parts)
        return layer.running_mean, layer.running_var

    for running in results_of(3, work):
        np.testing.assert_allclose(running, [one.running_mean, one.running_var], rtol=1e-6)


# ---- arrays of any length by gathers of one length ---------------------------------------------


@pytest.mark.parametrize(
    "lengths", [[3, 3], [0, BLOCK, 1], [BLOCK + 1, 3], [5, 4 * BLOCK, 2 * BLOCK], [0, 0]], ids=str
)
def test_blocks(lengths):
    arrays = [np.random.default_rng(i).normal(size=n) for i, n in enumerate(lengths)]

    def work(rank, group):
        found = gathered(arrays[rank], group.allgather)
        assert all(map(same_bits, found, arrays))
        return group.sent

    sent = results_of(len(lengths), work)
    assert all(len(sizes) == 1 + (max(lengths) > BLOCK) for sizes in sent)
    assert all(a == b for a, b in pairwise(sent))
