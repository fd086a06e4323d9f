# SPDX-License-Identifier: BSD-3-Clause
"""Claim 2: Bjorck et al. 2018: batch normalisation helps because it permits a high rate."""

import copy

import numpy as np

from examples.claims import layers, report, training
from examples.claims.report import (
    HOLDS,
    Finding,
    apart,
    highest,
    percent,
    spread,
    together,
    verdict,
)

TITLE = "2. The rate is the cause; what happens inside without batch norm"
SOURCE = "Bjorck et al. 2018"
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
BLOCKS = 6
STEPS = 10.0 ** np.arange(-4, 2.01, 0.1)  # lengths of one update, times the gradient


def network(kind, rng):
    """A residual network on photographs: a convolution of stride 2, then six blocks."""
    blocks = [
        layers.Residual(layers.Conv(8, 8, rng), layers.norm(kind, 8), layers.ReLU())
        for _ in range(BLOCKS)
    ]
    stem = (layers.Conv(1, 8, rng, 2), layers.norm(kind, 8), layers.ReLU())
    return layers.Sequential(*stem, *blocks, layers.GlobalAverage(),
                             layers.Linear(8, 5, rng, 1), layers.Bias(5))  # fmt: skip


def plain(kind, rng, depth=10):
    """The same without skip connections, deeper: for the means of channels."""
    hidden = []
    for _ in range(depth):
        hidden += [layers.Conv(8, 8, rng), layers.norm(kind, 8), layers.ReLU()]
    stem = (layers.Conv(1, 8, rng, 2), layers.norm(kind, 8), layers.ReLU())
    return layers.Sequential(*stem, *hidden, layers.GlobalAverage(),
                             layers.Linear(8, 5, rng, 1), layers.Bias(5))  # fmt: skip


def accuracy_over_rates(data, steps, rates, seeds, axis):
    plan = training.Plan(network, data, steps, every=10)
    arms = {kind: training.sweep(plan, kind, rates, seeds) for kind in ("batch", None)}
    for kind, label in (("batch", "with"), (None, "without")):
        runs = np.array([[run.test for run in arms[kind][rate]] for rate in rates])
        report.band(axis, rates, runs.T, label)
    axis.set_xscale("log")
    axis.legend(fontsize=8)
    report.titled(axis, f"photographs, {steps} steps", "rate", "test accuracy")
    best = {kind: training.best_rate(arm) for kind, arm in arms.items()}
    tests = {kind: [run.test for run in arm[best[kind]]] for kind, arm in arms.items()}
    better = apart(tests[None], tests["batch"])
    yield Finding(
        "accuracy at each arm's own best rate", f"{SOURCE}, 2, figure 1",
        "batch norm trains at higher rates, and generalises better there",
        f"with {spread(tests['batch'], percent)} at {highest(best['batch'], rates)}; "
        f"without {spread(tests[None], percent)} at {highest(best[None], rates)}",
        together(verdict(best["batch"] > best[None], best["batch"] != best[None]), better),
    )  # fmt: skip
    same = {kind: [run.test for run in arm[best[None]]] for kind, arm in arms.items()}
    gain = np.median(tests["batch"]) - np.median(tests[None])
    left = np.median(same["batch"]) - np.median(same[None])
    yield Finding(
        f"accuracy at the same rate, the best one without ({best[None]:g})",
        f"{SOURCE}, figure 1", "comparable: at a small rate batch norm gains little",
        f"with {spread(same['batch'], percent)}, without {spread(same[None], percent)}; "
        f"at its own best rate the gain is {100 * gain:.1f} points, at this one {100 * left:.1f}",
        # Without a gain, or at the same best rate, there is nothing to lay to the rate.
        verdict(left < gain / 2, better == HOLDS and best["batch"] != best[None]),
    )  # fmt: skip


def activations(data, seeds, axis):
    """Variance of the values after each block, at initialisation."""
    growth = {}
    for kind, label in (("batch", "with"), (None, "without")):
        curves = []
        for seed in range(seeds):
            net = network(kind, np.random.default_rng([seed, 0]))
            x, variances = data.train_x[:256], []
            for child in net.children[: 3 + BLOCKS]:
                x = child(x)
                if child is net.children[2] or isinstance(child, layers.Residual):
                    variances.append(float(x.var()))
            curves.append(variances)
        growth[kind] = [curve[-1] / curve[0] for curve in curves]
        report.band(axis, range(BLOCKS + 1), curves, label)
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    report.titled(axis, "at initialisation", "residual block", "variance of the values")
    return Finding(
        f"activations over {BLOCKS} residual blocks, at initialisation", f"{SOURCE}, 3.1, figure 2",
        "grow with depth without batch norm: exponentially; with it slowly",
        f"variance after the last block over the first: with {spread(growth['batch'])}, "
        f"without {spread(growth[None])}",
        apart(2 * np.array(growth["batch"]), growth[None]),
    )  # fmt: skip


def update(data, seeds, axis):
    """Loss after one update of many lengths, over the loss before it."""
    limits = {}
    for kind, label in (("batch", "with"), (None, "without")):
        curves = []
        for seed in range(seeds):
            rng = np.random.default_rng([seed, 0])
            net = network(kind, rng)
            rows = rng.permutation(len(data.train_x))[:240]
            x, labels = data.train_x[rows], data.train_y[rows]
            before = layers.loss_and_gradients(net, x, labels)
            gradient = layers.gradient_of(net)
            curves.append([loss_after(net, gradient, length, x, labels) / before
                           for length in STEPS])  # fmt: skip
        limits[kind] = [STEPS[np.argmax(np.array(curve) > 1)] if max(curve) > 1 else np.inf
                        for curve in curves]  # fmt: skip
        report.band(axis, STEPS, np.minimum(curves, 1e6), label)
    axis.set(xscale="log", yscale="log", ylim=(0.2, 1e6))
    axis.legend(fontsize=8)
    report.titled(axis, "one update at initialisation", "rate", "loss after over before")
    return Finding(
        "divergence when an update is large", f"{SOURCE}, 3.1, figures 2 and 3",
        "without batch norm activations and the loss explode after a large update, in the "
        "deep layers first",
        "lowest rate at which one update raises the loss: "
        f"with {spread(limits['batch'])}, without {spread(limits[None])}",
        apart(limits[None], limits["batch"]),
    )  # fmt: skip


def loss_after(net, gradient, length, x, labels):
    moved = copy.deepcopy(net)
    layers.move(moved, gradient, -length)
    with np.errstate(all="ignore"):
        loss, _ = layers.cross_entropy(moved(x), labels)
    return loss if np.isfinite(loss) else 1e30


def sums_of_gradients(data, seeds):
    """Sum |g| over |sum g|: g is what one image and pixel adds to the gradient of a weight."""
    ratios = {}
    for kind in ("batch", None):
        ratios[kind] = []
        for seed in range(seeds):
            net = plain(kind, np.random.default_rng([seed, 0]))
            layers.loss_and_gradients(net, data.train_x[:256], data.train_y[:256])
            conv = net.children[-6]  # the last convolution
            absolute = np.abs(conv.x).T.astype(float) @ np.abs(conv.dy)
            ratios[kind].append(absolute.sum() / np.abs(conv.weight_grad).sum())
    return Finding(
        "sum of |gradients| over |sum of gradients|, last convolution of 11, at initialisation",
        f"{SOURCE}, 3.2, table 1",
        "without batch norm the terms have one sign and do not cancel; with it they do",
        f"with {spread(ratios['batch'])}, without {spread(ratios[None])}",
        apart(2 * np.array(ratios[None]), ratios["batch"]),
    )  # fmt: skip


def channel_means(data, seeds):
    """Mean over spread of the inputs of the last norm, and the share of one class."""
    means, shares = {}, {}
    for kind in ("batch", None):
        means[kind], shares[kind] = [], []
        for seed in range(seeds):
            net = plain(kind, np.random.default_rng([seed, 0]))
            logits = net(data.train_x[::8])
            conv = net.children[-6]
            u = conv.x @ conv.weight  # what is normalised, if anything is
            means[kind].append(float(np.median(np.abs(u.mean(axis=0)) / u.std(axis=0))))
            shares[kind].append(np.bincount(logits.argmax(axis=1)).max() / len(logits))
    yield Finding(
        "means of channels before the last norm, at initialisation", f"{SOURCE}, 3.2, 4",
        "without batch norm, means grow beside the spread with depth",
        f"|mean| over standard deviation, median channel: with {spread(means['batch'])}, "
        f"without {spread(means[None])}",
        apart(means["batch"], means[None]),
    )  # fmt: skip
    yield Finding(
        "share of images that the network gives the same class, at initialisation",
        f"{SOURCE}, 3.2, figure 4", "without batch norm nearly all; with it fewer",
        f"with {spread(shares['batch'], percent)}, without {spread(shares[None], percent)}",
        apart(shares["batch"], shares[None]),
    )  # fmt: skip


def measure(quick):
    """Return findings and a picture."""
    seeds, rates, steps = (2, RATES[1::2], 80) if quick else (5, RATES, 400)
    data = training.patches()
    picture, axes = report.figure(3)
    findings = list(accuracy_over_rates(data, steps, rates, seeds, axes[0]))
    findings.append(activations(data, seeds, axes[1]))
    findings.append(update(data, seeds, axes[2]))
    findings.append(sums_of_gradients(data, seeds))
    findings += channel_means(data, seeds)
    return findings, picture


if __name__ == "__main__":
    report.main(__file__, __doc__)
