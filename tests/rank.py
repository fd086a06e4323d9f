# SPDX-License-Identifier: BSD-3-Clause
"""One process of test_distributed.py: `rank.py engine work [rank size file]`.

`engine` is mpi or gloo. All cases run in the same few processes, in groups of 1 to all of
them, since a process costs more than the cases. It prints one line for each case.
"""

import copy
import datetime
import importlib
import itertools
import os
import signal
import sys
import time

import numpy as np
from arrays import half_ulp
from bounds import WRITTEN, of_invstd
from ranks import expected, parts_of

import fastbn
from fastbn import sync

SPLITS = {
    1: [[12]],
    2: [[7, 5], [0, 12]],
    3: [[5, 4, 3], [0, 0, 12]],
    4: [[1, 6, 2, 3], [7, 0, 5, 0], [0, 12, 0, 0]],
}
DTYPES = ["float32", "float64", "bfloat16"]
LAYOUTS = [((12, 3, 4, 5), None), ((12, 4, 5, 3), "NHWC")]
TIMEOUT = datetime.timedelta(seconds=15)


class MPI:
    def __init__(self):
        from mpi4py import MPI

        self.world = MPI.COMM_WORLD
        self.rank, self.size = self.world.rank, self.world.size

    def subgroup(self, ranks):
        """The first of them; None in the others."""
        from mpi4py import MPI

        comm = self.world.Split(0 if self.rank in ranks else MPI.UNDEFINED, self.rank)
        return comm if self.rank in ranks else None

    def done(self):
        pass


class Gloo:
    def __init__(self, rank, size, file):
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=f"file://{file}", rank=int(rank), world_size=int(size),
            timeout=TIMEOUT
        )  # fmt: skip
        self.dist, self.world = dist, dist.group.WORLD
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def subgroup(self, ranks):
        group = self.dist.new_group(ranks, timeout=TIMEOUT)
        return group if self.rank in ranks else None

    def done(self):
        self.dist.destroy_process_group()


def batch_of(shape, dtype):
    if dtype == "bfloat16":
        import ml_dtypes  # noqa: F401  NumPy knows the name then.
    rng = np.random.default_rng(7)
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    return x, dy, rng.standard_normal(3).astype(np.float32), rng.standard_normal(3)


def close(found, whole, weight):
    room = WRITTEN * max(1.0, np.abs(weight).max())
    error = np.abs(found.astype(np.float64) - whole)
    return (error <= room + half_ulp(np.abs(whole) + room, found.dtype.name)).all()


def equality(group, rank, split, shape, layout, dtype):
    x, dy, weight, bias = batch_of(shape, dtype)
    part, dpart = parts_of(x, split)[rank], parts_of(dy, split)[rank]
    running = np.zeros(3), np.ones(3)
    y, mean, invstd = sync.batch_norm_forward(
        part, weight, bias, group=group, running_mean=running[0], running_var=running[1],
        layout=layout
    )  # fmt: skip
    dx, dweight, dbias = sync.batch_norm_backward(
        dpart, part, mean, invstd, weight, group=group, layout=layout
    )
    whole_y, whole_mean, whole_invstd, whole_dx = expected(x, dy, weight, bias, layout)
    assert close(y, parts_of(whole_y, split)[rank], weight)
    assert close(dx, parts_of(whole_dx, split)[rank], weight)
    assert np.abs(mean - whole_mean).max() < 1e-6
    assert np.abs(invstd / whole_invstd - 1).max() < of_invstd(dtype)
    own = np.zeros(3), np.ones(3)
    results = fastbn.batch_norm_forward(
        x, weight, bias, running_mean=own[0], running_var=own[1], layout=layout
    )
    np.testing.assert_allclose(running, own, rtol=1e-6)
    if 12 in split:
        assert mean.tobytes() == results[1].tobytes()
        assert invstd.tobytes() == results[2].tobytes()
        assert np.array_equal(running, own)
    if split[rank] == 12:
        gradients = fastbn.batch_norm_backward(dy, x, mean, invstd, weight, layout=layout)
        found = y, dx, dweight, dbias
        for a, b in zip(found, (results[0], *gradients), strict=True):
            assert a.tobytes() == b.tobytes()


def raised(work):
    """What `work()` raises: (type, text)."""
    try:
        work()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("no error")


def errors(group, rank, size):
    # Each rank is at fault once; then all have other numbers of channels, or one value.
    x = np.arange(24.0).reshape(4, 6)
    for guilty in range(size):
        kept, own = np.zeros(6), "x" if rank == guilty else x
        kind, text = raised(lambda: sync.batch_norm_forward(own, running_mean=kept, group=group))  # noqa: B023
        assert kind is (TypeError if rank == guilty else RuntimeError)
        assert rank == guilty or f"rank {guilty}" in text
        assert not kept.any()
    if size > 1:
        own = x[:, : 4 + (rank == 0)]
        kind, text = raised(lambda: sync.batch_norm_forward(own, group=group))
        assert kind is RuntimeError
        assert f"rank {0 if rank else 1}" in text
        # Few, and more than there are in one block.
        own = np.ones((4, 600 if rank == size - 1 else 6))
        kind, text = raised(lambda: sync.batch_norm_forward(own, group=group))
        assert kind is RuntimeError
        assert "has 600 channels" in text or "this rank 600" in text
    kind, text = raised(lambda: sync.batch_norm_forward(x[: rank == 0], group=group))
    assert kind is ValueError
    assert "more than one value" in text


def options(group, rank, split):
    """Many channels, ghost batches, lengths, and the switches of running statistics."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 12, 6, 700))
    lengths = np.array([6, 0, 3, 1, 1, 2, 5, 6, 0, 0, 4, 2])
    chosen = {"layout": "NTC", "ghost_batch_size": 4}
    one, running = ((np.zeros(700), np.ones(700)) for _ in range(2))
    y, mean, invstd = fastbn.batch_norm_forward(
        x, running_mean=one[0], running_var=one[1], unbiased=False, lengths=lengths, **chosen
    )
    dx, *_ = fastbn.batch_norm_backward(dy, x, mean, invstd, lengths=lengths, **chosen)
    own, own_dy, own_y, own_dx, counts = (parts_of(a, split)[rank] for a in (x, dy, y, dx, lengths))
    found, *statistics = sync.batch_norm_forward(
        own, group=group, running_mean=running[0], running_var=running[1], unbiased=False,
        lengths=counts, **chosen
    )  # fmt: skip
    gradient, *_ = sync.batch_norm_backward(
        own_dy, own, *statistics, group=group, lengths=counts, **chosen
    )
    np.testing.assert_allclose(statistics, [mean, invstd], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(running, one, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(found, own_y, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(gradient, own_dx, rtol=1e-9, atol=1e-9)
    # Of the first instances nothing counts: with some splits, of a whole rank.
    mask = rng.random((12, 6)) < 0.5
    mask[:7] = False
    y, *_ = fastbn.batch_norm_forward(x, layout="NTC", mask=mask)
    found, *_ = sync.batch_norm_forward(
        own, group=group, running_mean=running[0], running_var=running[1], layout="NTC",
        mask=parts_of(mask, split)[rank], update_running=False
    )  # fmt: skip
    np.testing.assert_allclose(found, parts_of(y, split)[rank], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(running, one, rtol=1e-10, atol=1e-10)


def modules(group, rank, split, dtype, format):
    """PyTorch's BatchNorm2d over the whole batch beside the synchronised one."""
    import torch

    torch.manual_seed(0)
    whole = torch.randn(12, 3, 4, 5, dtype=torch.float64).to(dtype)
    dy = torch.randn(12, 3, 4, 5, dtype=torch.float64).to(dtype)
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3, dtype=torch.promote_types(
        dtype, torch.float32)))  # fmt: skip
    torch.nn.init.normal_(model[0].weight)
    mine = fastbn.torch.SyncBatchNorm.convert_sync_batchnorm(
        torch.nn.Sequential(torch.nn.BatchNorm2d(3, dtype=model[0].weight.dtype)), group
    )
    mine.load_state_dict(model.state_dict())
    start = sum(split[:rank])
    rows = slice(start, start + split[rank])
    part = whole[rows].clone(memory_format=format).requires_grad_()
    whole.requires_grad_()
    y, own = model(whole), mine(part)
    assert own.dtype == dtype
    y.backward(dy)
    own.backward(dy[rows])
    room = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(own, y[rows], **room)
    torch.testing.assert_close(part.grad, whole.grad[rows], **room)
    assert part.grad.is_contiguous(memory_format=format)
    gradients = torch.stack([mine[0].weight.grad, mine[0].bias.grad])
    if group is not None or torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradients, group=group)
    wanted = torch.stack([model[0].weight.grad, model[0].bias.grad])
    torch.testing.assert_close(gradients, wanted, atol=2e-3, rtol=2e-3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, atol=1e-5, rtol=1e-5)
    assert int(mine[0].num_batches_tracked) == 1
    # Inference sends nothing: one rank alone can do it.
    if rank == 0:
        torch.testing.assert_close(mine.eval()(part), model.eval()(whole)[rows], **room)


def module_errors(rank):
    import torch

    layer = fastbn.torch.SyncBatchNorm(3)
    for wrong, kind in (
        (torch.ones(4), ValueError),
        (torch.ones(4, 2), ValueError),
        (torch.ones(4, 3, dtype=torch.int64), TypeError),
    ):
        own = wrong if rank == 0 else torch.randn(4, 3)
        found, text = raised(lambda: layer(own))  # noqa: B023
        assert found is (kind if rank == 0 else RuntimeError)
        assert rank == 0 or "rank 0" in text
    assert not layer.running_mean.any()
    assert int(layer.num_batches_tracked) == 0


def data_parallel(rank, size):
    """DDP's gradients beside those of one process."""
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(12, 2)
    )  # fmt: skip

    alone = copy.deepcopy(model)
    together = torch.nn.parallel.DistributedDataParallel(
        fastbn.torch.SyncBatchNorm.convert_sync_batchnorm(model)
    )
    x, labels = torch.randn(4 * size, 2, 4, 4), torch.arange(4 * size) % 2
    loss = torch.nn.functional.cross_entropy
    loss(alone(x), labels).backward()
    rows = slice(4 * rank, 4 * rank + 4)
    loss(together(x[rows]), labels[rows]).backward()
    for a, b in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def check_all(engine, gloo):
    for size in range(1, engine.size + 1):
        # From the end, so that a rank of the group is another one of the world.
        ranks = list(range(engine.size))[-size:]
        group = engine.world if size == engine.size else engine.subgroup(ranks)
        if group is None:
            continue
        rank = ranks.index(engine.rank)
        for split, (shape, layout), dtype in itertools.product(SPLITS[size], LAYOUTS, DTYPES):
            equality(group, rank, split, shape, layout, dtype)
            print("equality", size, split, layout, dtype, flush=True)
        for split in SPLITS[size]:
            options(group, rank, split)
        errors(group, rank, size)
        print("errors", size, flush=True)
        if gloo:
            import torch

            formats = torch.contiguous_format, torch.channels_last
            dtypes = torch.float32, torch.float64, torch.bfloat16
            for split, dtype, format in itertools.product(SPLITS[size], dtypes, formats):
                modules(group, rank, split, dtype, format)
                print("modules", size, split, dtype, format, flush=True)
    if gloo:
        module_errors(engine.rank)
        data_parallel(engine.rank, engine.size)
        print("data parallel", flush=True)


def lose_a_rank(engine, gloo):
    """The last rank dies between two steps; the others must not wait for it."""
    x = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    layer = fastbn.SyncBatchNorm(3, group=engine.world)
    layer.backward(layer(x))
    state = layer.state_dict()
    if engine.rank == engine.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        layer(x)
    except Exception as error:
        name = type(error).__name__
    else:
        raise AssertionError("a dead rank answered")
    for key, value in layer.state_dict().items():
        assert np.array_equal(value, state[key]), key
    if gloo:
        import torch

        module = fastbn.torch.SyncBatchNorm(3)
        with np.testing.assert_raises(Exception):
            module(torch.from_numpy(x))
        assert int(module.num_batches_tracked) == 0
        assert not module.running_mean.any()
    print(f"survived {name} after {time.monotonic() - start:.1f} s", flush=True)
    os._exit(0)


def main():
    kind, work, *place = sys.argv[1:]
    gloo = kind == "gloo"
    if gloo:
        importlib.import_module("fastbn.torch")
    engine = Gloo(*place) if gloo else MPI()
    {"all": check_all, "lose": lose_a_rank}[work](engine, gloo)
    engine.done()
    print("done", flush=True)


if __name__ == "__main__":
    main()
