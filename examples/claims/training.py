# SPDX-License-Identifier: BSD-3-Clause
"""Data, training runs, and the choice of the best learning rate; the same for each arm.

Every arm of a comparison gets the same data, initial weights, mini-batches, budget of steps and
grid of rates, and is judged at its own best rate. Rates are chosen on the validation part,
accuracies reported are those of the test part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from examples.claims import layers

BATCH = 60
GOAL = 0.9


@dataclass(frozen=True)
class Data:
    """Images and labels: training, validation, test."""

    train_x: np.ndarray
    train_y: np.ndarray
    valid_x: np.ndarray
    valid_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray

    def flat(self):
        """Return the same with an image as one row."""
        parts = [a.reshape(len(a), -1) if a.ndim > 1 else a for a in vars(self).values()]
        return Data(*parts)

    def first(self, count):
        """Return the same with fewer training images."""
        return Data(self.train_x[:count], self.train_y[:count], *list(vars(self).values())[2:])


def _standardised(parts):
    mean, std = parts[0].mean(), parts[0].std()  # of all pixels of the training images together
    return [((x - mean) / std).astype(np.float32)[..., None] for x in parts]


@cache
def digits():
    """Return the 8x8 digits of scikit-learn: 1047 to train, 300 to validate, 450 to test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    parts = np.split(order, [1047, 1347])
    images = _standardised([found.images[part] for part in parts])
    labels = [found.target[part] for part in parts]
    return Data(*(array for pair in zip(images, labels, strict=True) for array in pair))


@cache
def patches(size=8, count=400):
    """Return patches of five photographs, grey; the class is the photograph.

    Brick, grass and gravel are scikit-image's, the temple and the flower scikit-learn's. The
    training patches are from the left half of each, the others from the right half.
    """
    from skimage import data as photographs
    from sklearn.datasets import load_sample_image

    grey = [photographs.brick(), photographs.grass(), photographs.gravel()]
    grey += [load_sample_image(name).mean(axis=2) for name in ("china.jpg", "flower.jpg")]
    rng = np.random.default_rng(0)
    images, labels = ([], [], []), ([], [], [])
    for label, photograph in enumerate(grey):
        photograph = np.asarray(photograph, float)[::2, ::2]
        height, width = photograph.shape
        for part, number in enumerate((count, count // 4, count // 2)):
            left = 0 if part == 0 else width // 2
            rows = rng.integers(0, height - size, number)
            columns = left + rng.integers(0, width // 2 - size, number)
            found = [
                photograph[r : r + size, c : c + size] for r, c in zip(rows, columns, strict=True)
            ]
            images[part].append(np.stack(found))
            labels[part].append(np.full(number, label))
    images = _standardised([np.concatenate(part) for part in images])
    labels = [np.concatenate(part) for part in labels]
    return Data(*(array for pair in zip(images, labels, strict=True) for array in pair))


# ---- one run ---------------------------------------------------------------------------------


@dataclass
class Run:
    """What one training gave."""

    steps: np.ndarray  # at which it was evaluated
    valid: np.ndarray  # accuracy on the validation part; what guessing gets, once diverged
    test: float  # accuracy on the test part, at the end
    loss: np.ndarray  # of each mini-batch; NaN once diverged
    observed: list = field(default_factory=list)

    @property
    def diverged(self):
        return not np.isfinite(self.loss[-1])

    def steps_to(self, goal=GOAL):
        """Return the first evaluated step with this accuracy; infinity: never."""
        there = self.valid >= goal
        return float(self.steps[there.argmax()]) if there.any() else np.inf


def mini_batches(count, batch, rng):
    """Yield indices for ever, each epoch in another order."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):
            yield order[start : start + batch]


def accuracy(network, x, labels):
    """Return the accuracy in evaluation: with running statistics."""
    network.train(False)
    guesses = network(x).argmax(axis=1)
    network.train(True)
    return float(np.mean(guesses == labels))


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison have in common.

    ``build(kind, rng)`` returns a network; ``observe(network, step)`` is called after
    each evaluation, and what it returns is kept.
    """

    build: Callable
    data: Data
    steps: int
    every: int = 5
    batch: int = BATCH
    momentum: float = 0.0
    limit: float | None = None
    observe: Callable | None = None
    optimiser: Callable = layers.SGD


def train(plan, kind, rate, seed):
    """Train one network at one rate."""
    network = plan.build(kind, np.random.default_rng([seed, 0]))
    batches = mini_batches(len(plan.data.train_x), plan.batch, np.random.default_rng([seed, 1]))
    optimiser = plan.optimiser(network, rate, plan.momentum, plan.limit)
    evaluated = np.arange(plan.every, plan.steps + 1, plan.every)
    classes = plan.data.train_y.max() + 1
    run = Run(evaluated, np.full(len(evaluated), 1 / classes), 1 / classes,
              np.full(plan.steps, np.nan))  # fmt: skip
    with np.errstate(all="ignore"):  # some rates are too high, on purpose
        for step, rows in enumerate(itertools.islice(batches, plan.steps), 1):
            loss = layers.loss_and_gradients(network, plan.data.train_x[rows],
                                             plan.data.train_y[rows])  # fmt: skip
            if not np.isfinite(loss):
                return run
            run.loss[step - 1] = loss
            optimiser.step()
            if step % plan.every == 0:
                at = step // plan.every - 1
                run.valid[at] = accuracy(network, plan.data.valid_x, plan.data.valid_y)
                if plan.observe:
                    run.observed.append(plan.observe(network, step))
        run.test = accuracy(network, plan.data.test_x, plan.data.test_y)
    return run


# ---- arms --------------------------------------------------------------------------------------

Arm = dict[float, list[Run]]  # the runs of one arm, by rate


def sweep(plan, kind, rates, seeds) -> Arm:
    """Train an arm at each rate, once for each seed."""
    return {rate: [train(plan, kind, rate, seed) for seed in range(seeds)] for rate in rates}


def final(run):
    """Return the validation accuracy at the end: the mean of the last three evaluations."""
    return float(np.mean(run.valid[-3:]))


def best_rate(arm, by="accuracy", goal=GOAL):
    """Return the rate with the best median: of the final accuracy, or of the steps to a goal."""

    def score(rate):
        accuracy = np.median([final(run) for run in arm[rate]])
        if by == "accuracy":
            return -accuracy
        return np.median([run.steps_to(goal) for run in arm[rate]]), -accuracy

    return min(arm, key=score)


def highest_rate(arm, goal=GOAL):
    """Return the highest rate at which the median run gets to the goal; None if there is none."""
    good = [rate for rate, runs in arm.items()
            if np.median([run.steps_to(goal) for run in runs]) < np.inf]  # fmt: skip
    return max(good, default=None)
