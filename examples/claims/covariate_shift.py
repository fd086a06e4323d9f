# SPDX-License-Identifier: BSD-3-Clause
"""Claim 10: internal covariate shift, as the two papers that disagree about it measure it."""

from functools import partial

import numpy as np

from examples.claims import layers, report, training
from examples.claims.report import Finding, apart, number, spread

TITLE = "10. Internal covariate shift"
RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NETWORKS = {"sigmoids": (layers.Sigmoid, 4.0), "ReLU": (layers.ReLU, np.sqrt(2))}


def network(kind, rng, activation, gain):
    return layers.mlp(kind, (64, 100, 100, 100, 10), rng, activation, gain)


def inputs(net, x):
    """Return the values that go into each activation, after the norm or the bias."""
    found = []
    for layer in net.children[:-2]:
        x = layer(x)
        if isinstance(layer, layers.Norm | layers.Bias):
            found.append(x)
    return found


def moments(net, x):
    """Return mean and standard deviation of each unit of each hidden layer."""
    net.train(False)
    found = inputs(net, x)
    net.train(True)
    return np.array([[u.mean(axis=0), u.std(axis=0)] for u in found])


def gradient_change(net, rate, x, labels):
    """How the gradient by a layer's weights changes when the layers before it are updated.

    |G - G'| / |G| and the cosine of G and G', the mean over hidden layers (Santurkar et al.
    2018, definition 2.1).
    """
    linear = [layer for layer in net.walk() if isinstance(layer, layers.Linear)]
    layers.loss_and_gradients(net, x, labels)
    # Copies: the next backward overwrites them.
    pairs = [(p, g.copy()) for p, g in net.parameters()]
    kept = [p.copy() for p, _ in pairs]
    changes, cosines = [], []
    for layer in linear[1:]:
        index = next(i for i, (p, _) in enumerate(pairs) if p is layer.weight)
        for parameter, gradient in pairs[:index]:
            parameter -= np.float32(rate) * gradient
        layers.loss_and_gradients(net, x, labels)
        before, after = pairs[index][1].ravel(), layer.weight_grad.ravel()
        for parameter, value in zip((p for p, _ in pairs), kept, strict=True):
            parameter[:] = value
        lengths = np.linalg.norm(before), np.linalg.norm(after)
        changes.append(np.linalg.norm(after - before) / max(lengths[0], 1e-30))
        cosines.append(np.dot(before, after) / max(lengths[0] * lengths[1], 1e-30))
    return float(np.mean(changes)), float(np.mean(cosines))


def observer(data, rate):
    x, labels = data.train_x[:240], data.train_y[:240]

    def observe(net, step):
        # The running statistics are part of the network, too, and not to be moved by a look.
        norms = [layer.norm for layer in net.walk() if isinstance(layer, layers.Norm)]
        states = [{k: v.copy() for k, v in norm.state_dict().items()} for norm in norms]
        change = gradient_change(net, rate, x, labels)
        for norm, state in zip(norms, states, strict=True):
            norm.load_state_dict(state)
        return moments(net, data.valid_x), change

    return observe


def shift(run):
    """Mean change of a unit's mean from one look to the next, in its standard deviations."""
    seen = np.array([moments for moments, _ in run.observed])  # look, layer, moment, unit
    return np.mean(np.abs(np.diff(seen[:, :, 0], axis=0)) / seen[1:, :, 1], axis=(1, 2))


def change_of_std(run):
    seen = np.array([moments for moments, _ in run.observed])
    return np.mean(np.abs(np.diff(np.log(seen[:, :, 1] + 1e-6), axis=0)), axis=(1, 2))


def measure(quick):
    """Return findings and a picture."""
    seeds, rates, steps = (2, RATES[1::2], 60) if quick else (5, RATES, 150)
    data = training.digits().flat()
    picture, axes = report.figure(2, 2)
    findings = []
    for row, (name, (activation, gain)) in enumerate(NETWORKS.items()):
        build = partial(network, activation=activation, gain=gain)
        best, runs = {}, {}
        for kind in ("batch", None):
            plan = training.Plan(build, data, steps)
            best[kind] = training.best_rate(training.sweep(plan, kind, rates, seeds), "steps")
            seeing = training.Plan(build, data, steps, observe=observer(data, best[kind]))
            runs[kind] = [training.train(seeing, kind, best[kind], seed) for seed in range(seeds)]
        findings += of_network(name, best, runs, axes[2 * row : 2 * row + 2])
    return findings, picture


def of_network(name, best, runs, axes):
    shifts, widths, changes, cosines = {}, {}, {}, {}
    for kind, label in (("batch", "with"), (None, "without")):
        of_mean = [shift(run) for run in runs[kind]]
        seen = np.array([[change for _, change in run.observed] for run in runs[kind]])
        shifts[kind] = np.mean(of_mean, axis=1)
        widths[kind] = np.mean([change_of_std(run) for run in runs[kind]], axis=1)
        changes[kind], cosines[kind] = seen.mean(axis=1).T
        label = f"{label}, rate {best[kind]:g}"
        report.band(axes[0], runs[kind][0].steps[1:], of_mean, label)
        report.band(axes[1], runs[kind][0].steps, seen[:, :, 0], label)
    for axis in axes:
        axis.set_yscale("log")
        axis.legend(fontsize=8)
    report.titled(axes[0], f"{name}: means of inner inputs", "step", "change, in deviations")
    report.titled(axes[1], f"{name}: gradient", "step", "|G - G'| / |G|")
    yield Finding(
        f"means of inner inputs over training, {name}",
        "Ioffe & Szegedy 2015, 1, figure 1", "batch norm reduces their change",
        f"mean change in five steps, in deviations: with {spread(shifts['batch'])} at rate "
        f"{number(best['batch'])}, without {spread(shifts[None])} at {number(best[None])}",
        apart(shifts["batch"], shifts[None]),
    )  # fmt: skip
    yield Finding(
        f"deviations of inner inputs over training, {name}",
        "Ioffe & Szegedy 2015, 1, figure 1", "batch norm reduces their change",
        "mean change in five steps of the logarithm of the deviation: "
        f"with {spread(widths['batch'])}, without {spread(widths[None])}",
        apart(widths["batch"], widths[None]),
    )  # fmt: skip
    yield Finding(
        f"change of the gradient when the layers before are updated, {name}",
        "Santurkar et al. 2018, 2.3, figure 3",
        "batch norm does not reduce it, and often makes it larger",
        f"|G - G'| / |G|: with {spread(changes['batch'])}, without {spread(changes[None])}; "
        f"cosine: {spread(cosines['batch'])}, {spread(cosines[None])}",
        apart(changes[None], changes["batch"]),
    )  # fmt: skip


if __name__ == "__main__":
    report.main(__file__, __doc__)
