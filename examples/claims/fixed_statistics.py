# SPDX-License-Identifier: BSD-3-Clause
"""Claim 8: a gradient that ignores the normalisation lets biases grow without bound."""

import numpy as np

import fastbn
from examples.claims import layers, report, training
from examples.claims.report import Finding, apart, number, percent, spread, together, verdict

TITLE = "8. A gradient that ignores the normalisation"
SOURCE = "Ioffe & Szegedy 2015, 2"
RATES = (0.01, 0.1, 1.0)


class IgnoringNorm(layers.Norm):
    """Batch norm whose backward takes mean and variance for constants."""

    def __call__(self, x):
        if self.norm.training:
            self.x = x
            _, self.mean, self.invstd = fastbn.batch_norm_forward(x)
        return super().__call__(x)

    def backward(self, dy):
        norm = self.norm
        dx, norm.weight_grad, norm.bias_grad = fastbn.batch_norm_backward(
            dy, self.x, self.mean, self.invstd, norm.weight, training=False
        )
        return dx


def network(kind, rng):
    """Two hidden layers, each with a bias before its norm, which subtracts it again."""
    hidden = []
    for fan_in, fan_out in ((64, 100), (100, 100)):
        norm = IgnoringNorm if kind == "ignoring" else layers.Norm
        hidden += [layers.Linear(fan_in, fan_out, rng), layers.Bias(fan_out),
                   norm(fastbn.BatchNorm(fan_out)), layers.ReLU()]  # fmt: skip
    return layers.Sequential(*hidden, layers.Linear(100, 10, rng, 1), layers.Bias(10))


def biases(net, step):
    """Return the norm of the biases before batch norm, and of the weights."""
    before = [layer.bias for layer in net.walk() if isinstance(layer, layers.Bias)][:-1]
    weights = [layer.weight for layer in net.walk() if isinstance(layer, layers.Linear)][:-1]
    return [float(np.linalg.norm(layers.flat(found).astype(float))) for found in (before, weights)]


def measure(quick):
    """Return findings and a picture."""
    seeds, steps = (2, 200) if quick else (5, 800)
    plan = training.Plan(network, training.digits().flat(), steps, 20, observe=biases)
    arms = {kind: training.sweep(plan, kind, RATES, seeds) for kind in ("batch", "ignoring")}
    picture, axes = report.figure(2)
    labels = {"batch": "the gradient of batch norm", "ignoring": "statistics as constants"}
    norms = {}
    for kind, label in labels.items():
        runs = arms[kind][0.1]
        length = min(len(run.observed) for run in runs)
        seen = np.array([run.observed[:length] for run in runs])[:, :, 0]
        norms[kind] = seen[:, length // 2 - 1], seen[:, -1], (seen[:, -1] - seen[:, -2]) / 20
        report.band(axes[0], runs[0].steps[:length], np.maximum(seen, 1e-9), label)
        report.band(axes[1], np.arange(1, steps + 1), [run.loss for run in runs], label)
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[0].legend(fontsize=8)
    report.titled(axes[0], "biases before batch norm, rate 0.1", "step", "norm")
    report.titled(axes[1], "rate 0.1", "step", "training loss")
    tests = {
        kind: {rate: [run.test for run in runs] for rate, runs in arm.items()}
        for kind, arm in arms.items()
    }
    words = "; ".join(
        f"rate {rate:g}: {spread(tests['batch'][rate], percent)} against "
        f"{spread(tests['ignoring'][rate], percent)}" for rate in RATES
    )  # fmt: skip
    best = {kind: max(np.median(of) for of in by.values()) for kind, by in tests.items()}
    half, end, _ = norms["ignoring"]
    return [
        Finding(
            "biases before batch norm, rate 0.1", SOURCE,
            "grow while the output and the loss do not change with them (the paper: without bound, "
            "which no number of steps shows)",
            f"norm halfway and at the end of {steps} steps: {spread(half)}, {spread(end)}; with "
            f"the gradient of batch norm {number(np.median(norms['batch'][1]))}",
            together(apart(half, end), apart(100 * norms["batch"][1], half)),
        ),
        Finding(
            "training with such a gradient", SOURCE, "the model blows up",
            f"test accuracy, gradient of batch norm against constants: {words}",
            verdict(best["batch"] > best["ignoring"] + 0.01),
        ),
    ], picture  # fmt: skip


if __name__ == "__main__":
    report.main(__file__, __doc__)
