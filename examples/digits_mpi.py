# SPDX-License-Identifier: BSD-3-Clause
"""The digits network, trained by several processes as if they were one.

    python -m pip install ".[mpi,demo]"
    mpiexec -n 2 python examples/digits_mpi.py

Each process has its part of every mini-batch. `fastbn.SyncBatchNorm` normalises with the
statistics of all parts, and the gradients of all parts are added up. Rank 0 then trains the
same network alone, with `fastbn.BatchNorm`, and draws both curves: they are the same but for
rounding.
"""

import functools

import digits
import numpy as np
from digits_report import parse, report
from mpi4py import MPI
from threadpoolctl import threadpool_limits

import fastbn

LAYOUT, SHAPE, RATE = "NHWC", (8, 8, 1), 0.25


def train_step(layers, x, labels, comm):
    """One step of SGD on this rank's part of a mini-batch; return the loss of all of it."""
    logits = digits.forward(layers, x)
    logits -= logits.max(axis=1, keepdims=True, initial=-np.inf)
    exp = np.exp(logits)
    total = exp.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    loss = np.sum(np.log(total[:, 0]) - logits[rows, labels]) / digits.BATCH
    gradient = exp / total
    gradient[rows, labels] -= 1
    gradient /= digits.BATCH
    for layer in reversed(layers):
        gradient = layer.backward(gradient)
    for layer in layers:
        for parameter, share in layer.parameters():
            whole = np.empty_like(share)
            comm.Allreduce(np.ascontiguousarray(share), whole)
            parameter -= np.float32(RATE) * whole
    return comm.allreduce(loss)


def train(norm, comm, steps, data):
    """Return the loss of each step, and the test accuracy every few steps."""
    train_x, train_y, test_x, test_y = data
    train_x, test_x = train_x.reshape(-1, *SHAPE), test_x.reshape(-1, *SHAPE)
    layers = digits.convolutional_network(norm, LAYOUT, np.random.default_rng(0))
    norms = [layer for layer in layers if isinstance(layer, digits.Normalisation)]
    batches = digits.mini_batches(len(train_x), np.random.default_rng(1))
    losses, accuracies = [], []
    for step in range(1, steps + 1):
        own = next(batches)[comm.rank :: comm.size]
        losses.append(train_step(layers, train_x[own], train_y[own], comm))
        if step % digits.EVALUATE_EVERY == 0:
            accuracies.append(digits.evaluate(layers, norms, test_x, test_y))
    return np.array(losses), np.array(accuracies)


def main():
    args = parse(__doc__.splitlines()[0], "digits_mpi.png")
    comm, data = MPI.COMM_WORLD, digits.load()
    with threadpool_limits(1):
        norm = functools.partial(fastbn.SyncBatchNorm, group=comm)
        together = train(norm, comm, args.steps, data)
        if comm.rank == 0:
            alone = train(fastbn.BatchNorm, MPI.COMM_SELF, args.steps, data)
            curves = {f"{comm.size} processes": together, "one process": alone}
            report(curves, args.out)


if __name__ == "__main__":
    main()
