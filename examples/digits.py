# SPDX-License-Identifier: BSD-3-Clause
"""What batch normalisation buys: handwritten digits, with it and without it.

Three networks in plain NumPy learn the 8x8 digits of scikit-learn, each with
`fastbn.BatchNorm` before its activations and without:

- the sigmoid network of Ioffe & Szegedy 2015, section 4.1: three hidden layers
  of 100 units, mini-batches of 60;
- a small convolutional network with ReLU, channels first (NCHW);
- the same network, channels last (NHWC).

Both arms get the same data, initial weights, plain SGD and learning rates, and
each is judged at its own best rate: the one that takes the fewest steps to 90 %
test accuracy, in the median over the seeds. A rate "trains" if that median is
within the budget of steps. A run whose loss is no longer finite counts as one
that never got there. Test accuracy is measured with the running statistics, not
with those of the test batch. Rates are chosen on the test set, in both arms:
fair for a comparison, but a little kind to both as an estimate of accuracy.

Run ``python examples/digits.py``, or add ``--full`` for all rates and five seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fastbn

matplotlib.use("Agg")  # a picture in a file: no display needed
import matplotlib.pyplot as plt  # noqa: E402

CLASSES = 10
BATCH = 60
GOAL = 0.9
EVALUATE_EVERY = 5  # steps

# ---- layers -------------------------------------------------------------------
#
# A layer has forward(x), and backward(dy), which returns dx and keeps the
# gradients of its parameters; parameters() gives pairs (value, gradient).


class Layer:
    """A layer without parameters."""

    def parameters(self):
        return []


class Linear(Layer):
    """What dense and convolutional layers share: weights, and maybe a bias.

    Batch norm subtracts the mean, and a bias with it: before batch norm there
    is none, and the norm's own bias takes its place (section 3.2).
    """

    def __init__(self, fan_in, fan_out, std, rng, bias):
        self.weight = rng.normal(0.0, std, (fan_in, fan_out)).astype(np.float32)
        self.bias = np.zeros(fan_out, np.float32) if bias else None

    def parameters(self):
        pairs = [(self.weight, self.weight_grad)]
        return pairs if self.bias is None else [*pairs, (self.bias, self.bias_grad)]


class Dense(Linear):
    """y = x W + b."""

    def forward(self, x):
        self.x = x
        y = x @ self.weight
        return y if self.bias is None else y + self.bias

    def backward(self, dy):
        self.weight_grad = self.x.T @ dy
        self.bias_grad = dy.sum(axis=0)
        return dy @ self.weight.T


class Conv3x3(Linear):
    """A convolution with 3x3 taps and zero padding, in either layout.

    Nine shifted copies of the image, joined along the channels, turn it into a
    1x1 convolution: a matrix product.
    """

    def __init__(self, layout, channels_in, channels_out, rng, stride=1, bias=True):
        std = np.sqrt(2 / (9 * channels_in))  # keeps the variance under ReLU (He et al. 2015)
        super().__init__(9 * channels_in, channels_out, std, rng, bias)
        self.layout, self.stride = layout, stride
        self.axis = layout.index("C")

    def shifts(self, padded):
        """Nine views of a padded image, one for each tap."""
        step = self.stride
        for i in range(3):
            for j in range(3):
                rows, columns = slice(i, i - 2 or None, step), slice(j, j - 2 or None, step)
                yield padded[(..., rows, columns) if self.axis == 1 else (..., rows, columns, slice(None))]

    def forward(self, x):
        padded = np.pad(x, [(1, 1) if letter in "HW" else (0, 0) for letter in self.layout])
        copies = np.concatenate(list(self.shifts(padded)), axis=self.axis)
        self.padded_shape, self.copies_shape = padded.shape, copies.shape
        if self.axis == 1:  # NCHW: pixels are columns, one product for each image
            self.copies = copies.reshape(*copies.shape[:2], -1)
            y = (self.weight.T @ self.copies).reshape(len(x), -1, *copies.shape[2:])
        else:  # NHWC: pixels are rows, one product for the whole batch
            self.copies = copies.reshape(-1, copies.shape[3])
            y = (self.copies @ self.weight).reshape(*copies.shape[:3], -1)
        return y if self.bias is None else y + per_channel(self.bias, self.layout)

    def backward(self, dy):
        self.bias_grad = dy.sum(axis=all_but_channels(self.layout))
        if self.axis == 1:
            dy = dy.reshape(*dy.shape[:2], -1)
            self.weight_grad = (self.copies @ dy.transpose(0, 2, 1)).sum(axis=0)
            dcopies = self.weight @ dy
        else:
            dy = dy.reshape(-1, dy.shape[3])
            self.weight_grad = self.copies.T @ dy
            dcopies = dy @ self.weight.T
        # The adjoint of "copy nine times and join" is "split and add up".
        dpadded = np.zeros(self.padded_shape, np.float32)
        parts = np.split(dcopies.reshape(self.copies_shape), 9, axis=self.axis)
        for view, part in zip(self.shifts(dpadded), parts, strict=True):
            view += part
        inside = slice(1, -1)
        return dpadded[..., inside, inside] if self.axis == 1 else dpadded[:, inside, inside]


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x))."""

    def forward(self, x):
        self.y = 1 / (1 + np.exp(-x))
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x):
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy):
        return dy * (self.y > 0)


class Flatten(Layer):
    """One row for each image."""

    def forward(self, x):
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy):
        return dy.reshape(self.shape)


class Normalisation(Layer):
    """A batch norm layer with a stop watch on its training."""

    def __init__(self, batch_norm):
        self.batch_norm = batch_norm
        self.seconds = 0.0

    def forward(self, x):
        start = time.perf_counter()
        y = self.batch_norm(x)
        self.seconds += (time.perf_counter() - start) * self.batch_norm.training
        return y

    def backward(self, dy):
        start = time.perf_counter()
        dx = self.batch_norm.backward(dy)
        self.seconds += time.perf_counter() - start
        return dx

    def parameters(self):
        norm = self.batch_norm
        return [(norm.weight, norm.weight_grad), (norm.bias, norm.bias_grad)]


class NumpyBatchNorm(fastbn.BatchNorm):
    """The same layer with its training formula in NumPy, to compare the time."""

    def __call__(self, x):
        if not self.training:
            return super().__call__(x)
        axes = all_but_channels(self.layout)
        self.count = x.size // self.num_features
        mean = x.mean(axis=axes)
        centred = x - per_channel(mean, self.layout)
        var = (centred * centred).mean(axis=axes)
        self.invstd = 1 / np.sqrt(var + self.eps)
        self.normalised = centred * per_channel(self.invstd, self.layout)
        unbiased = var * (self.count / (self.count - 1))
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (unbiased - self.running_var)
        weight, bias = (per_channel(v, self.layout) for v in (self.weight, self.bias))
        return self.normalised * weight + bias

    def backward(self, dy):
        axes = all_but_channels(self.layout)
        self.bias_grad = dy.sum(axis=axes)
        self.weight_grad = (dy * self.normalised).sum(axis=axes)
        dy_mean, projection, scale = (
            per_channel(v, self.layout)
            for v in (
                self.bias_grad / self.count,
                self.weight_grad / self.count,
                self.weight * self.invstd,
            )
        )
        return scale * (dy - dy_mean - self.normalised * projection)


def per_channel(vector, layout):
    """A view of a vector of shape (C,) that broadcasts along the channels."""
    return vector.reshape([-1 if letter == "C" else 1 for letter in layout])


def all_but_channels(layout):
    """The axes that batch norm averages over."""
    return tuple(axis for axis, letter in enumerate(layout) if letter != "C")


# ---- networks -----------------------------------------------------------------


def sigmoid_network(norm, rng, layout="NC"):
    """Section 4.1 of the paper. The weights are Gaussian, as there."""
    layers = []
    for fan_in, fan_out in ((64, 100), (100, 100), (100, 100)):
        # A sigmoid's slope is at most 1/4: four times the usual deviation keeps the
        # variance from layer to layer (Glorot & Bengio 2010), which the arm without
        # batch norm needs to train at all.
        std = SC / np.sqrt(fan_in)
        layers += [Dense(fan_in, fan_out, std, rng, bias=norm is None)]
        layers += [Normalisation(norm(fan_out, layout=layout))] if norm else []
        layers += [Sigmoid()]
    return [*layers, Dense(100, CLASSES, 1/np.sqrt(100), rng, bias=True)]

SC = 4
def convolutional_network(norm, rng, layout):
    """Two convolutions with ReLU and a dense layer: 8x8x16, 4x4x32, 10."""
    layers = []
    for channels_in, channels_out, stride in ((1, 16, 1), (16, 32, 2)):
        layers += [Conv3x3(layout, channels_in, channels_out, rng, stride, bias=norm is None)]
        layers += [Normalisation(norm(channels_out, layout=layout))] if norm else []
        layers += [ReLU()]
    return [*layers, Flatten(), Dense(512, CLASSES, np.sqrt(1 / 512), rng, bias=True)]


@dataclass
class Task:
    name: str
    build: Callable
    layout: str
    rates: np.ndarray
    steps: int


@dataclass
class Run:
    accuracy: np.ndarray  # at each evaluation
    steps_to_goal: float  # infinity: never
    seconds: float
    norm_seconds: float


def load(layout):
    """Images as float32 in the given layout, standardised, in training and test set."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images.astype(np.float32), digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    mean, std = train_x.mean(), train_x.std()
    shape = {"NC": (-1, 64), "NCHW": (-1, 1, 8, 8), "NHWC": (-1, 8, 8, 1)}[layout]
    train_x, test_x = (((x - mean) / std).reshape(shape) for x in (train_x, test_x))
    return train_x, train_y, test_x, test_y


def mini_batches(count, rng):
    while True:
        order = rng.permutation(count)
        for start in range(0, count - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def forward(layers, x):
    for layer in layers:
        x = layer.forward(x)
    return x


def train(task, norm, rate, seed, data):
    train_x, train_y, test_x, test_y = data
    layers = task.build(norm, np.random.default_rng([seed, 0]), task.layout)
    norms = [layer for layer in layers if isinstance(layer, Normalisation)]
    batches = mini_batches(len(train_x), np.random.default_rng([seed, 1]))
    accuracy = np.full(task.steps // EVALUATE_EVERY, 1 / CLASSES)
    seconds = 0.0
    finite = True
    with np.errstate(all="ignore"):
        for step in range(1, task.steps + 1):
            start = time.perf_counter()
            rows = next(batches)
            y = forward(layers, train_x[rows])
            y -= y.max(axis=1, keepdims=True)
            p = np.exp(y)
            p /= p.sum(axis=1, keepdims=True)
            idx = np.arange(BATCH), train_y[rows]
            loss = -np.log(p[idx]+1e-30).mean()
            if not np.isfinite(loss):
                finite = False
                break
            p[idx] -= 1
            dy = p / np.float32(BATCH)
            for layer in reversed(layers):
                dy = layer.backward(dy)
            for layer in layers:
                for value, grad in layer.parameters():
                    value -= rate * grad
            seconds += time.perf_counter() - start
            if step % EVALUATE_EVERY == 0:
                for n in norms: n.batch_norm.eval()
                accuracy[step // EVALUATE_EVERY - 1] = (forward(layers, test_x).argmax(axis=1) == test_y).mean()
                for n in norms: n.batch_norm.train()
    there = np.flatnonzero(accuracy >= GOAL)
    steps = (there[0] + 1) * EVALUATE_EVERY if len(there) and finite else np.inf
    return Run(accuracy, steps, seconds, sum(n.seconds for n in norms))
