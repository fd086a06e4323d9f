# SPDX-License-Identifier: BSD-3-Clause
"""Layers, losses and SGD in plain NumPy; all normalisation is fastbn's.

Images are NHWC. A layer is called with x and returns y; ``backward(dy)`` returns dx and keeps
the gradients of the parameters; ``parameters()`` gives pairs (parameter, gradient). Knows
nothing of data, of training runs or of claims.
"""

from __future__ import annotations

import itertools

import numpy as np

import fastbn

NORMS = ("batch", "group", "layer", "renorm")

HE_GAIN = np.sqrt(2)  # before ReLU: He et al. 2015


class Layer:
    """A layer of layers; without any, a layer without parameters."""

    children: tuple[Layer, ...] = ()

    def parameters(self):
        return [pair for child in self.children for pair in child.parameters()]

    def train(self, on):
        for child in self.children:
            child.train(on)

    def walk(self):
        """Yield the layer and all layers in it, in the order of forward."""
        yield self
        for child in self.children:
            yield from child.walk()


class Linear(Layer):
    """y = x W, with Gaussian weights of standard deviation gain / sqrt(fan_in)."""

    def __init__(self, fan_in, fan_out, rng, gain=HE_GAIN):
        self.weight = (rng.standard_normal((fan_in, fan_out)) * (gain / np.sqrt(fan_in))).astype(
            np.float32
        )
        self.weight_grad = np.zeros_like(self.weight)

    def __call__(self, x):
        self.x = x
        return x @ self.weight

    def backward(self, dy):
        self.dy = dy
        self.weight_grad = self.x.T @ dy
        return dy @ self.weight.T

    def parameters(self):
        return [(self.weight, self.weight_grad)]


class Conv(Linear):
    """A 3x3 convolution with zero padding: the patches as rows, then a matrix product."""

    def __init__(self, channels_in, channels_out, rng, stride=1, gain=HE_GAIN):
        super().__init__(9 * channels_in, channels_out, rng, gain)
        self.stride = stride

    def __call__(self, x):
        self.shape = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
        windows = windows[:, :: self.stride, :: self.stride].transpose(0, 1, 2, 4, 5, 3)
        self.pixels = windows.shape[:3]
        y = super().__call__(windows.reshape(-1, self.weight.shape[0]))
        return y.reshape(*self.pixels, -1)

    def backward(self, dy):
        dx = super().backward(dy.reshape(-1, dy.shape[3])).reshape(*self.pixels, 3, 3, -1)
        images, height, width, channels = self.shape
        padded = np.zeros((images, height + 2, width + 2, channels), dx.dtype)
        for row in range(3):
            for column in range(3):
                rows = slice(row, row + height, self.stride)
                columns = slice(column, column + width, self.stride)
                padded[:, rows, columns] += dx[:, :, :, row, column]
        return padded[:, 1:-1, 1:-1]


class Bias(Layer):
    """y = x + b; what stands in the place of a norm where there is none."""

    def __init__(self, channels):
        self.bias = np.zeros(channels, np.float32)
        self.bias_grad = np.zeros_like(self.bias)

    def __call__(self, x):
        return x + self.bias

    def backward(self, dy):
        self.bias_grad = dy.sum(axis=tuple(range(dy.ndim - 1)))
        return dy

    def parameters(self):
        return [(self.bias, self.bias_grad)]


class Norm(Layer):
    """A layer of fastbn."""

    def __init__(self, norm):
        self.norm = norm

    def __call__(self, x):
        self.y = self.norm(x)
        return self.y

    def backward(self, dy):
        return self.norm.backward(dy)

    def parameters(self):
        # Before the first backward there are no gradients.
        zero = np.zeros_like(self.norm.weight)
        gradients = (self.norm.weight_grad, self.norm.bias_grad)
        found = [zero if gradient is None else gradient for gradient in gradients]
        return list(zip((self.norm.weight, self.norm.bias), found, strict=True))

    def train(self, on):
        self.norm.train(on)


class NoisyBatchNorm(Norm):
    """Batch norm, then noise whose mean and scale change at each step (Santurkar et al. 2018).

    Each channel and step has a shift in (-0.5, 0.5) and a scale in (1, 1.25); each value has
    its own around them. So the distribution of what the next layer sees is never the same.
    """

    def __init__(self, channels, rng):
        super().__init__(fastbn.BatchNorm(channels, layout="N...C"))
        self.rng = rng
        self.noisy = True

    def __call__(self, x):
        y = super().__call__(x)
        if not self.noisy:
            return y
        channels = y.shape[-1:]
        shift = self.rng.uniform(-0.5, 0.5, channels) + self.rng.uniform(-0.1, 0.1, y.shape)
        self.scale = self.rng.uniform(1, 1.25, channels) + 0.1 * self.rng.standard_normal(y.shape)
        self.scale = self.scale.astype(np.float32)
        return y * self.scale + shift.astype(np.float32)

    def backward(self, dy):
        return super().backward(dy * self.scale)

    def train(self, on):
        super().train(on)
        self.noisy = on


class BatchRenorm(Layer):
    """Batch renormalisation (Ioffe 2017): batch norm whose y is that of the running statistics.

    r and d, constants to the gradient, lead from the statistics of the batch to the running
    ones. y = r weight x_hat + (d weight + bias), so that fastbn's kernels have it as a batch
    norm with another weight and bias.
    """

    def __init__(self, channels, r_max=3.0, d_max=5.0, warmup=20, momentum=0.1):
        self.weight = np.ones(channels, np.float32)
        self.bias = np.zeros(channels, np.float32)
        self.weight_grad, self.bias_grad = np.zeros_like(self.bias), np.zeros_like(self.bias)
        self.running_mean = np.zeros(channels, np.float32)
        self.running_var = np.ones(channels, np.float32)
        self.limits, self.warmup, self.momentum = (r_max, d_max), warmup, momentum
        self.steps, self.on = 0, True

    def __call__(self, x):
        if not self.on:
            return fastbn.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, layout="N...C"
            )
        stats = fastbn.batch_stats(x, layout="N...C")
        mean, std = stats.mean, np.sqrt(stats.var() + 1e-5)
        # Plain batch norm at first, then the limits open, as in section 4 of the paper.
        opened = np.clip(self.steps / self.warmup - 1, 0, 1)
        r_max, d_max = 1 + (self.limits[0] - 1) * opened, self.limits[1] * opened
        running = np.sqrt(self.running_var + 1e-5)
        self.r = np.clip(std / running, 1 / r_max, r_max).astype(np.float32)
        self.d = np.clip((mean - self.running_mean) / running, -d_max, d_max).astype(np.float32)
        self.x = x
        y, self.mean, self.invstd = fastbn.batch_norm_forward(
            x,
            self.r * self.weight,
            self.d * self.weight + self.bias,
            running_mean=self.running_mean,
            running_var=self.running_var,
            momentum=self.momentum,
            layout="N...C",
        )
        self.steps += 1
        return y

    def backward(self, dy):
        dx, dscale, self.bias_grad = fastbn.batch_norm_backward(
            dy, self.x, self.mean, self.invstd, self.r * self.weight, layout="N...C"
        )
        self.weight_grad = self.r * dscale + self.d * self.bias_grad
        return dx

    def parameters(self):
        return [(self.weight, self.weight_grad), (self.bias, self.bias_grad)]

    def train(self, on):
        self.on = on


def norm(kind, channels, rng=None):
    """Return the norm of a name, or a bias for None."""
    if kind is None:
        return Bias(channels)
    if kind == "noisy":
        return NoisyBatchNorm(channels, rng)
    if kind == "renorm":
        return BatchRenorm(channels)
    if kind == "batch":
        return Norm(fastbn.BatchNorm(channels, layout="N...C"))
    # Layer norm of convolutional features is over channels and pixels: one group.
    groups = {"group": max(1, channels // 4), "layer": 1}[kind]
    return Norm(fastbn.GroupNorm(groups, channels, layout="N...C"))


class ReLU(Layer):
    """y = max(x, 0)."""

    def __call__(self, x):
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy):
        return dy * (self.y > 0)


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x))."""

    def __call__(self, x):
        self.y = 1 / (1 + np.exp(-x))
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


class Dropout(Layer):
    """Zero a share of the values in training, and scale the others up."""

    def __init__(self, share, rng):
        self.share, self.rng, self.on = share, rng, True

    def __call__(self, x):
        if not self.on:
            return x
        self.kept = (self.rng.random(x.shape) >= self.share) / np.float32(1 - self.share)
        self.kept = self.kept.astype(np.float32)
        return x * self.kept

    def backward(self, dy):
        return dy * self.kept

    def train(self, on):
        self.on = on


class GlobalAverage(Layer):
    """The mean over all pixels: one number for each channel."""

    def __call__(self, x):
        self.shape = x.shape
        return x.mean(axis=(1, 2))

    def backward(self, dy):
        pixels = self.shape[1] * self.shape[2]
        return np.broadcast_to(dy[:, None, None] / np.float32(pixels), self.shape).copy()


class Sequential(Layer):
    """One layer after another."""

    def __init__(self, *children):
        self.children = children

    def __call__(self, x):
        for child in self.children:
            x = child(x)
        return x

    def backward(self, dy):
        for child in reversed(self.children):
            dy = child.backward(dy)
        return dy


class Residual(Sequential):
    """y = x + branch(x)."""

    def __call__(self, x):
        return x + super().__call__(x)

    def backward(self, dy):
        return dy + super().backward(dy)


def mlp(kind, widths, rng, activation=ReLU, gain=HE_GAIN):
    """Return a network of linear layers, each hidden one with a norm and an activation."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths[:-1]):
        layers += [Linear(fan_in, fan_out, rng, gain), norm(kind, fan_out, rng), activation()]
    return Sequential(*layers, Linear(widths[-2], widths[-1], rng, 1), Bias(widths[-1]))


def convolutional(kind, classes, rng, widths=(8, 16, 32)):
    """Return three convolutions, all but the first of stride 2, and a linear layer."""
    layers, channels = [], 1
    for index, width in enumerate(widths):
        layers += [Conv(channels, width, rng, 1 + (index > 0)), norm(kind, width, rng), ReLU()]
        channels = width
    return Sequential(*layers, GlobalAverage(), Linear(channels, classes, rng, 1), Bias(classes))


# ---- losses and SGD ------------------------------------------------------------------------


def cross_entropy(logits, labels):
    """Return the mean loss of the softmax, and its gradient."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    exp = np.exp(shifted)
    total = exp.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, labels]))
    gradient = exp / total
    gradient[rows, labels] -= 1
    return loss, gradient / np.float32(len(labels))


def squared_error(y, target):
    """Return half the mean of squares, and its gradient."""
    difference = y - target
    return 0.5 * float(np.mean(difference**2)), difference / np.float32(difference.size)


def loss_and_gradients(network, x, labels, loss=cross_entropy):
    """One forward and one backward pass; the gradients stay in the layers."""
    value, gradient = loss(network(x), labels)
    network.backward(gradient)
    return value


class SGD:
    """Plain stochastic gradient descent, with momentum and a limit to the gradient if asked."""

    def __init__(self, network, rate, momentum=0.0, limit=None):
        self.network, self.rate, self.momentum, self.limit = network, rate, momentum, limit
        self.velocities = [np.zeros_like(p) for p, _ in network.parameters()] if momentum else []

    def step(self):
        pairs = self.network.parameters()
        factor = np.float32(1)
        if self.limit is not None:
            length = np.sqrt(sum(float((g * g).sum()) for _, g in pairs))
            factor = np.float32(min(1.0, self.limit / max(length, 1e-30)))
        rate = np.float32(self.rate)
        if not self.momentum:
            for parameter, gradient in pairs:
                parameter -= rate * factor * gradient
            return
        for (parameter, gradient), velocity in zip(pairs, self.velocities, strict=True):
            velocity *= np.float32(self.momentum)
            velocity += factor * gradient
            parameter -= rate * velocity


def flat(arrays):
    """Return arrays as one vector."""
    return np.concatenate([np.ravel(array) for array in arrays])


def gradient_of(network):
    """Return the gradients of a network as one vector."""
    return flat([gradient for _, gradient in network.parameters()])


def move(network, direction, length):
    """Add a multiple of a vector to the parameters."""
    start = 0
    for parameter, _ in network.parameters():
        part = direction[start : start + parameter.size]
        parameter += np.float32(length) * part.reshape(parameter.shape)
        start += parameter.size
