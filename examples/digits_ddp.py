# SPDX-License-Identifier: BSD-3-Clause
"""The digits network in PyTorch, trained by several processes as if they were one.

    python -m pip install ".[torch,demo]"
    torchrun --nproc-per-node 2 examples/digits_ddp.py

`DistributedDataParallel` averages the gradients, over gloo;
`fastbn.torch.SyncBatchNorm` normalises with the statistics of all parts of a mini-batch.
Rank 0 then trains the same network alone, with PyTorch's own batch norm, and draws both
curves: they are the same but for rounding.
"""

import copy
import datetime

import digits
import numpy as np
import torch
import torch.distributed as dist
from digits_report import parse, report
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import fastbn.torch

RATE = 0.25


def network():
    """The convolutional network of digits.py."""
    layers = []
    for channels_in, channels_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers += [
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


@torch.no_grad()
def evaluate(model, x, labels):
    """Return the test accuracy, with the running statistics."""
    model.eval()
    accuracy = (model(x).argmax(1) == labels).double().mean()
    model.train()
    return float(accuracy)


def train(model, rank, size, steps, data):
    """Return the loss of each step, and the test accuracy every few steps."""
    train_x, train_y, test_x, test_y = data
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    batches = digits.mini_batches(len(train_x), np.random.default_rng(1))
    losses, accuracies = [], []
    for step in range(1, steps + 1):
        own = torch.from_numpy(next(batches)[rank::size])
        # The gradients of all ranks are averaged: so each has `size` times its share.
        loss = functional.cross_entropy(model(train_x[own]), train_y[own], reduction="sum")
        loss = loss * (size / digits.BATCH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss = loss.detach() / size
        if size > 1:
            dist.all_reduce(loss)
        losses.append(float(loss))
        if step % digits.EVALUATE_EVERY == 0:
            accuracies.append(evaluate(model, test_x, test_y))
    return np.array(losses), np.array(accuracies)


def main():
    args = parse(__doc__.splitlines()[0], "digits_ddp.png")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    rank, size = dist.get_rank(), dist.get_world_size()
    images = [torch.from_numpy(a) for a in digits.load()]
    data = [a.view(-1, 1, 8, 8) if a.ndim > 1 else a.long() for a in images]
    torch.manual_seed(0)
    model = network()
    one = copy.deepcopy(model)
    model = fastbn.torch.SyncBatchNorm.convert_sync_batchnorm(model)
    together = train(DistributedDataParallel(model), rank, size, args.steps, data)
    dist.destroy_process_group()
    if rank == 0:
        curves = {
            f"{size} processes": together,
            "one process": train(one, 0, 1, args.steps, data),
        }
        report(curves, args.out)


if __name__ == "__main__":
    main()
