# SPDX-License-Identifier: BSD-3-Clause
"""Claim 1: what Ioffe & Szegedy 2015 promise of batch normalisation."""

from functools import partial

import numpy as np

import fastbn
from examples.claims import layers, report, training
from examples.claims.report import HOLDS, Finding, apart, highest, number, percent, spread, verdict

TITLE = "1. Steps, rates, sigmoids, percentiles, dropout, scale of the weights"
SOURCE = "Ioffe & Szegedy 2015"
GOAL = training.GOAL
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
PERCENTILES = (15, 50, 85)


def sigmoid_network(kind, rng, gain=4.0):
    """Section 4.1: three hidden layers of 100 sigmoids. Gain 4 suits the slope of a sigmoid."""
    return layers.mlp(kind, (64, 100, 100, 100, 10), rng, layers.Sigmoid, gain)


def relu_network(kind, rng):
    return layers.convolutional(kind, 10, rng)


def saturated_network(kind, rng):
    """Weights 16 times as large: without batch norm nearly all sigmoids are flat at first."""
    return sigmoid_network(kind, rng, 64.0)


def arms_of(build, data, steps, rates, seeds, observe=None):
    plan = training.Plan(build, data, steps, observe=observe)
    return {kind: training.sweep(plan, kind, rates, seeds) for kind in ("batch", None)}


def steps_and_rates(name, arms):
    """Two findings: steps to the goal at the best rate, and the highest rate that gets there."""
    best = {kind: training.best_rate(arm, "steps") for kind, arm in arms.items()}
    steps = {kind: [run.steps_to() for run in arm[best[kind]]] for kind, arm in arms.items()}
    rates = {kind: training.highest_rate(arm) for kind, arm in arms.items()}
    yield Finding(
        f"steps to 90%, {name}", f"{SOURCE}, 4.1, 4.2", "fewer; on ImageNet 14 times fewer",
        f"with {spread(steps['batch'])} at rate {number(best['batch'])}, "
        f"without {spread(steps[None])} at rate {number(best[None])}",
        apart(steps["batch"], steps[None]),
    )  # fmt: skip
    yield Finding(
        f"highest rate that reaches 90%, {name}", f"{SOURCE}, 3.3, 4.2",
        "rates 5 to 30 times as high train",
        f"with {highest(rates['batch'], RATES)}; without {highest(rates[None], RATES)}",
        # Equal ones differ by less than the grid shows.
        verdict((rates["batch"] or 0) > (rates[None] or 0), rates["batch"] != rates[None]),
    )  # fmt: skip


def saturated(data, steps, seeds):
    arms = arms_of(saturated_network, data, steps, RATES, seeds)
    best = {kind: training.best_rate(arm) for kind, arm in arms.items()}
    accuracy = {kind: [run.test for run in arm[best[kind]]] for kind, arm in arms.items()}
    words = {
        kind: f"test accuracy after {steps} steps: {spread(of, percent)} "
        f"at rate {highest(best[kind], RATES)}" for kind, of in accuracy.items()
    }  # fmt: skip
    claim, source = "saturated sigmoids (weights 16 times as large)", f"{SOURCE}, 3.3, 4.2.2"
    yield Finding(f"{claim}, with batch norm", source, "train (69.8% on ImageNet)",
                  words["batch"], verdict(np.median(accuracy["batch"]) >= GOAL))  # fmt: skip
    # Guessing gets 10%.
    yield Finding(f"{claim}, without", source, "do not train at all",
                  words[None], verdict(np.median(accuracy[None]) < 0.2))  # fmt: skip
    yield Finding(f"{claim}: with and without", source, "batch norm trains them better",
                  "the two rows above", apart(accuracy[None], accuracy["batch"]))  # fmt: skip


def inner_percentiles(data):
    """Return an observer: percentiles, over images, of each input of the last sigmoids."""

    def observe(network, step):
        network.train(False)
        network(data.valid_x)
        network.train(True)
        # The input of the last hidden layer's sigmoid, from its output.
        y = np.clip(network.children[-3].y, 1e-7, 1 - 1e-7).astype(float)
        return np.percentile(np.log(y / (1 - y)), PERCENTILES, axis=0)

    return observe


def drift(run):
    """How far the median of a unit wanders, over the width of what it sees at the end."""
    seen = np.array(run.observed)  # evaluation, percentile, unit
    width = seen[-1, 2] - seen[-1, 0]
    return float(np.median(np.ptp(seen[:, 1], axis=0) / width))


def percentiles(data, seeds, steps, axes):
    found = {}
    for axis, (kind, label) in zip(axes, (("batch", "with"), (None, "without")), strict=True):
        plan = training.Plan(sigmoid_network, data, steps, observe=inner_percentiles(data))
        # The same small rate for both, as in the paper; a rate of 1 trains both arms.
        runs = [training.train(plan, kind, 1.0, seed) for seed in range(seeds)]
        found[kind] = [drift(run) for run in runs]
        seen = np.array(runs[0].observed)[:, :, 0]
        for index, percentile in enumerate(PERCENTILES):
            axis.plot(runs[0].steps, seen[:, index], label=f"{percentile}th percentile")
        report.titled(axis, f"an input of the last sigmoids, {label}", "step", "input")
        axis.set_ylim(-6, 6)
    axes[0].legend(fontsize=8)
    return Finding(
        "percentiles of an inner input over training", f"{SOURCE}, figure 1(b, c)",
        "stable with batch norm; without it mean and variance move",
        "range of a unit's median over its final 15-85 width: "
        f"with {spread(found['batch'])}, without {spread(found[None])}",
        apart(found["batch"], found[None]),
    )  # fmt: skip


def dropout_network(kind, rng, share):
    hidden = []
    for fan_in, fan_out in ((64, 128), (128, 128)):
        hidden += [layers.Linear(fan_in, fan_out, rng), layers.norm(kind, fan_out), layers.ReLU()]
        if share:
            hidden.append(layers.Dropout(share, rng))
    return layers.Sequential(*hidden, layers.Linear(128, 10, rng, 1), layers.Bias(10))


def dropout(data, steps, seeds):
    few = data.first(300)
    accuracy = {}
    for kind in ("batch", None):
        for share in (0.0, 0.5):
            build = partial(dropout_network, share=share)
            plan = training.Plan(build, few, steps, every=10)
            arm = training.sweep(plan, kind, (0.01, 0.03, 0.1, 0.3, 1.0), seeds)
            accuracy[kind, share] = [run.test for run in arm[training.best_rate(arm)]]
    helps = {kind: apart(accuracy[kind, 0.0], accuracy[kind, 0.5]) == HOLDS
             for kind in ("batch", None)}  # fmt: skip
    words = ", ".join(
        f"{'with' if kind else 'without'}{' and dropout' if share else ''} {spread(of, percent)}"
        for (kind, share), of in accuracy.items()
    )
    return Finding(
        "dropout can go (300 training images)", f"{SOURCE}, 3.4, 4.2.1",
        "with batch norm, dropout is not needed for held-out accuracy",
        # Where dropout does not help without batch norm, nothing says that batch norm replaces it.
        f"test accuracy: {words}", verdict(not helps["batch"], seen=helps[None]),
    )  # fmt: skip


def scale_of_weights(seeds):
    """BN((aW)x) = BN(Wx), and the gradient of aW is 1/a of that of W."""
    for eps, words in ((1e-20, "nearly no eps (1e-20)"), (1e-5, "eps 1e-5")):
        worst = {}
        for a in (1e-3, 1e-1, 1e1, 1e3):
            of_y, of_gradient = [], []
            for seed in range(seeds):
                rng = np.random.default_rng(seed)
                x, w, dy = (rng.standard_normal(s) for s in ((256, 64), (64, 32), (256, 32)))
                (y, dw), (y_a, dw_a) = (normalised(x, weight, dy, eps) for weight in (w, a * w))
                of_y.append(np.abs(y_a - y).max() / np.abs(y).max())
                of_gradient.append(np.abs(a * dw_a - dw).max() / np.abs(dw).max())
            worst[a] = max(of_y), max(of_gradient)
        found = "; ".join(f"a = {a:g}: {number(y)}, {number(dw)}" for a, (y, dw) in worst.items())
        yield Finding(
            f"BN((aW)x) = BN(Wx); the gradient by aW is 1/a of that by W; {words}",
            f"{SOURCE}, 3.3", "exact, since the scale cancels",
            f"largest relative difference of y and of the gradient, float64: {found}",
            verdict(max(map(max, worst.values())) < 1e-9),
        )  # fmt: skip


def normalised(x, weight, dy, eps=1e-5):
    """Return BN(x W), and the gradient by W."""
    u = x @ weight
    y, mean, invstd = fastbn.batch_norm_forward(u, eps=eps)
    du, _, _ = fastbn.batch_norm_backward(dy, u, mean, invstd)
    return y, x.T @ du


def measure(quick):
    """Return findings and a picture."""
    seeds, rates = (2, RATES[1::2]) if quick else (5, RATES)
    images, rows = training.digits(), training.digits().flat()
    picture, axes = report.figure(3)
    findings = []
    tasks = (("sigmoids", sigmoid_network, rows, 400), ("convolutions", relu_network, images, 100))
    for name, build, data, steps in tasks:
        arms = arms_of(build, data, steps, rates, seeds)
        findings += steps_and_rates(name, arms)
        if name == "sigmoids":
            for kind, label in (("batch", "with"), (None, "without")):
                rate = training.best_rate(arms[kind], "steps")
                runs = arms[kind][rate]
                report.band(axes[0], runs[0].steps, [run.valid for run in runs],
                            f"{label}, rate {rate:g}")  # fmt: skip
            report.titled(axes[0], "sigmoid network", "step", "validation accuracy")
            axes[0].legend(fontsize=8)
    findings += saturated(rows, 200 if quick else 400, seeds)
    findings.append(percentiles(rows, seeds, 200 if quick else 400, axes[1:]))
    findings.append(dropout(rows, 100 if quick else 300, seeds))
    findings += scale_of_weights(seeds)
    return findings, picture


if __name__ == "__main__":
    report.main(__file__, __doc__)
