# SPDX-License-Identifier: BSD-3-Clause
"""Ranks in one process: a group of threads, and how a batch is shared out."""

import threading

import numpy as np
import oracle

#: Of 12 instances, how many each rank has.
SPLITS = [[12], [6, 6], [1, 11], [5, 4, 3], [0, 12, 0], [7, 0, 1, 4]]


class ThreadGroup:
    """What fastbn asks of a group, in ten lines."""

    def __init__(self, rank, slots, barrier):
        self.rank, self.size, self.slots, self.barrier = rank, len(slots), slots, barrier
        self.sent = []

    def allgather(self, array):
        self.sent.append(array.nbytes)
        self.slots[self.rank] = array.copy()
        self.barrier.wait(timeout=20)
        arrays = list(self.slots)
        self.barrier.wait(timeout=20)
        return arrays


def run(size, work):
    """What `work(rank, group)` returns or raises, of each rank."""
    slots, barrier, results = [None] * size, threading.Barrier(size), [None] * size
    groups = [ThreadGroup(rank, slots, barrier) for rank in range(size)]

    def target(rank):
        try:
            results[rank] = work(rank, groups[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return results


def same_bits(a, b):
    """Whether two arrays are the same in type, shape and every byte."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def parts_of(x, split, axis=0):
    """The parts of a batch, by how many instances each rank has."""
    return np.split(x, np.cumsum(split)[:-1], axis)


def expected(x, dy, weight, bias, layout=None, eps=1e-5):
    """(y, mean, invstd, dx) in float64, of the whole batch."""
    axis = oracle.channel_axis(x.ndim, layout)
    axes = tuple(i for i in range(x.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    mean, var = x.mean(axes), x.var(axes)
    invstd = 1 / np.sqrt(var + eps)
    xhat = (x - mean.reshape(shape)) * invstd.reshape(shape)
    scale = weight.astype(np.float64).reshape(shape)
    dx = scale * invstd.reshape(shape) * (
        dy - dy.mean(axes, keepdims=True) - xhat * (dy * xhat).mean(axes, keepdims=True)
    )  # fmt: skip
    return xhat * scale + bias.astype(np.float64).reshape(shape), mean, invstd, dx
