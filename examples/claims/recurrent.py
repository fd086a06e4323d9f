# SPDX-License-Identifier: BSD-3-Clause
"""The LSTM of Cooijmans et al. 2017, with batch norm that has statistics for each time step."""

import numpy as np

import fastbn
from examples.claims.layers import Bias, Layer, Linear, Sequential


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


class StepNorm:
    """Batch norm whose scale is shared by all time steps, and whose statistics are not.

    ``shared`` says what evaluation uses: the statistics of each step, or their average.
    """

    def __init__(self, channels, steps):
        self.weight = np.full(channels, 0.1, np.float32)  # small: tanh stays far from its ends
        self.mean = np.zeros((steps, channels), np.float32)
        self.var = np.ones((steps, channels), np.float32)
        self.shared = False

    def forward(self, x, step, training):
        if training:
            y, mean, invstd = fastbn.batch_norm_forward(
                x, self.weight, running_mean=self.mean[step], running_var=self.var[step]
            )
            return y, (x, mean, invstd)
        mean, var = self.mean[step], self.var[step]
        if self.shared:
            mean, var = self.mean.mean(axis=0), self.var.mean(axis=0)
        return fastbn.batch_norm(x, mean, var, self.weight), None

    def backward(self, dy, saved):
        dx, dweight, _ = fastbn.batch_norm_backward(dy, *saved, self.weight)
        self.weight_grad += dweight
        return dx


class LSTM(Layer):
    """x of shape (N, steps, inputs) -> the last hidden state; with or without batch norm."""

    def __init__(self, inputs, hidden, steps, rng, normalised):
        self.hidden, self.on = hidden, True
        self.of_x = Linear(inputs, 4 * hidden, rng, 1).weight
        # Orthogonal, as in the paper.
        blocks = [np.linalg.qr(rng.standard_normal((hidden, hidden)))[0] for _ in range(4)]
        self.of_h = np.concatenate(blocks, axis=1).astype(np.float32)
        self.bias = np.zeros(4 * hidden, np.float32)
        self.bias[:hidden] = 1  # the forget gate
        sizes = (4 * hidden, 4 * hidden, hidden) if normalised else ()
        self.norms = [StepNorm(size, steps) for size in sizes]
        self._clear()

    def _clear(self):
        self.gradients = [np.zeros_like(p) for p in (self.of_x, self.of_h, self.bias)]
        for norm in self.norms:
            norm.weight_grad = np.zeros_like(norm.weight)

    def _normalise(self, index, x, step):
        if not self.norms:
            return x, None
        return self.norms[index].forward(x, step, self.on)

    def __call__(self, x):
        h = c = np.zeros((len(x), self.hidden), np.float32)
        self.x, self.saved = x, []
        for step in range(x.shape[1]):
            from_x, saved_x = self._normalise(0, x[:, step] @ self.of_x, step)
            from_h, saved_h = self._normalise(1, h @ self.of_h, step)
            f, i, o, g = np.split(from_x + from_h + self.bias, 4, axis=1)
            f, i, o, g = _sigmoid(f), _sigmoid(i), _sigmoid(o), np.tanh(g)
            before, c = c, f * c + i * g
            normalised, saved_c = self._normalise(2, c, step)
            t = np.tanh(normalised)
            self.saved.append((f, i, o, g, before, t, h, saved_x, saved_h, saved_c))
            h = o * t
        return h

    def _back(self, index, dy, saved):
        return self.norms[index].backward(dy, saved) if self.norms else dy

    def backward(self, dy):
        self._clear()
        dof_x, dof_h, dbias = self.gradients
        dh, dc = dy, np.zeros_like(dy)
        for step in reversed(range(len(self.saved))):
            f, i, o, g, before, t, h, saved_x, saved_h, saved_c = self.saved[step]
            dc = dc + self._back(2, dh * o * (1 - t * t), saved_c)
            dgates = np.concatenate(
                [dc * before * f * (1 - f), dc * g * i * (1 - i), dh * t * o * (1 - o),
                 dc * i * (1 - g * g)], axis=1
            )  # fmt: skip
            dbias += dgates.sum(axis=0)
            dof_x += self.x[:, step].T @ self._back(0, dgates, saved_x)
            drecurrent = self._back(1, dgates, saved_h)
            dof_h += h.T @ drecurrent
            dh, dc = drecurrent @ self.of_h.T, dc * f
        return  # nobody asks for the gradient of the pixels

    def parameters(self):
        pairs = list(zip((self.of_x, self.of_h, self.bias), self.gradients, strict=True))
        return pairs + [(norm.weight, norm.weight_grad) for norm in self.norms]

    def train(self, on):
        self.on = on


def network(kind, rng, hidden=32, steps=16):
    """Return an LSTM that reads a digit in pieces, and a linear layer."""
    lstm = LSTM(64 // steps, hidden, steps, rng, kind == "batch")
    return Sequential(lstm, Linear(hidden, 10, rng, 1), Bias(10))
