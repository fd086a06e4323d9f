# SPDX-License-Identifier: BSD-3-Clause
"""Claim 3: Santurkar et al. 2018: batch normalisation makes the loss smoother."""

import numpy as np

import fastbn
from examples.claims import layers, report, training
from examples.claims.report import Finding, apart, number, spread, together, verdict

TITLE = "3. A smoother loss; noise after batch norm; the norm of dx"
SOURCE = "Santurkar et al. 2018"
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
MULTIPLES = (0.5, 1.0, 2.0, 4.0)  # of the rate, along the gradient


def network(kind, rng):
    return layers.convolutional(kind, 10, rng)


def along_the_step(net, rate, x, labels):
    """Loss range, change of the gradient and beta-smoothness along the gradient."""
    layers.loss_and_gradients(net, x, labels)
    gradient = layers.gradient_of(net)
    losses, changes, slopes = [], [], []
    moved = 0.0
    for multiple in MULTIPLES:
        length = rate * multiple
        layers.move(net, gradient, -(length - moved))
        moved = length
        losses.append(layers.loss_and_gradients(net, x, labels))
        change = np.linalg.norm(layers.gradient_of(net) - gradient)
        changes.append(change)
        slopes.append(change / (length * np.linalg.norm(gradient)))
    layers.move(net, gradient, moved)
    return max(losses) - min(losses), max(changes), max(slopes), np.linalg.norm(gradient)


def landscape(kind, rate, data, steps, seed):
    """Train, and look along the gradient of every fifth step."""
    net = network(kind, np.random.default_rng([seed, 0]))
    batches = training.mini_batches(len(data.train_x), 60, np.random.default_rng([seed, 1]))
    optimiser, seen = layers.SGD(net, rate), []
    with np.errstate(all="ignore"):
        for step in range(steps):
            rows = next(batches)
            x, labels = data.train_x[rows], data.train_y[rows]
            if step % 5 == 0:
                seen.append(along_the_step(net, rate, x, labels))
            layers.loss_and_gradients(net, x, labels)
            optimiser.step()
    return np.array(seen, float)


def smoothness(best, data, steps, seeds, axes):
    measures = ("range of the loss", "largest change of the gradient",
                "largest change of the gradient over the length of the step (beta)")  # fmt: skip
    where = {"at the same rate": min(best.values()), "each at its best rate": None}
    for words, common in where.items():
        seen = {
            kind: np.array([
                landscape(kind, common or best[kind], data, steps, seed) for seed in range(seeds)
            ])
            for kind in ("batch", None)
        }  # fmt: skip
        for index, name in enumerate(measures):
            # The mean over training, and its spread: both are the paper's.
            means = {kind: of[:, :, index].mean(axis=1) for kind, of in seen.items()}
            widths = {kind: of[:, :, index].std(axis=1) for kind, of in seen.items()}
            rates = {kind: number(common or best[kind]) for kind in seen}
            yield Finding(
                f"{name} along the gradient, {words}", f"{SOURCE}, 3.1, figure 4",
                "smaller, and less spread, with batch norm",
                f"mean over training: with {spread(means['batch'])} at {rates['batch']}, "
                f"without {spread(means[None])} at {rates[None]}; standard deviation over "
                f"training: with {spread(widths['batch'])}, without {spread(widths[None])}",
                together(apart(means["batch"], means[None]),
                         apart(widths["batch"], widths[None])),
            )  # fmt: skip
        if common:
            for axis, index in zip(axes, (0, 2), strict=True):
                for kind, label in (("batch", "with"), (None, "without")):
                    curves = seen[kind][:, :, index]
                    report.band(axis, np.arange(curves.shape[1]) * 5, curves, label)
                axis.set_yscale("log")
                axis.legend(fontsize=8)
                title = ("range of the loss", "", "beta")[index]
                report.titled(axis, f"{title}, rate {common:g}", "step", title)


def noise(data, rates, steps, seeds, axis):
    plan = training.Plan(network, data, steps)
    arms = {kind: training.sweep(plan, kind, rates, seeds) for kind in ("batch", "noisy", None)}
    best = {kind: training.best_rate(arm, "steps") for kind, arm in arms.items()}
    labels = {"batch": "batch norm", "noisy": "batch norm and noise", None: "without"}
    reached = {}
    for kind, label in labels.items():
        runs = arms[kind][best[kind]]
        reached[kind] = [run.steps_to() for run in runs]
        curves = [run.valid for run in runs]
        report.band(axis, runs[0].steps, curves, f"{label}, {best[kind]:g}")
    axis.legend(fontsize=8)
    report.titled(axis, "noise after batch norm", "step", "validation accuracy")
    words = ", ".join(f"{labels[kind]} {spread(of)}" for kind, of in reached.items())
    medians = {kind: np.median(of) for kind, of in reached.items()}
    finding = Finding(
        "noise that changes with each step, after batch norm", f"{SOURCE}, 2.2, figure 2",
        "trains as fast as batch norm, faster than without, although its inputs shift more",
        f"steps to 90%, each at its best rate: {words}",
        together(verdict(medians["noisy"] <= 1.25 * medians["batch"]),
                 apart(reached["noisy"], reached[None])),
    )  # fmt: skip
    return finding, best


def norm_of_dx(rng, n, channels, eps=1e-5):
    """Return the squared norm of dx of each channel, computed and as the theorem has it.

    With a = mean(dy), b = mean(dy x_hat) and x_hat's mean square 1 - d, d = eps invstd²:
    |dx|² = (weight invstd)² (|dy|² - n a² - n b² (1 + d)). Theorem 4.1 has it for eps = 0.
    """
    x, dy = rng.standard_normal((2, n, channels)) * 3 + 1
    weight = rng.standard_normal(channels)
    _, mean, invstd = fastbn.batch_norm_forward(x, weight, eps=eps)
    dx, _, _ = fastbn.batch_norm_backward(dy, x, mean, invstd, weight)
    x_hat = (x - mean) * invstd
    a, b = dy.mean(axis=0), (dy * x_hat).mean(axis=0)
    terms = (dy**2).sum(axis=0) - n * a**2 - n * b**2 * (1 + eps * invstd**2)
    return (dx**2).sum(axis=0), (weight * invstd) ** 2 * terms


def identity():
    errors = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        computed, expected = norm_of_dx(rng, int(rng.integers(4, 500)), 8)
        errors.append(np.max(np.abs(computed - expected) / expected))
    return Finding(
        "the norm of dx", f"{SOURCE}, theorem 4.1",
        "smaller than that of weight dy / std by the shares of the mean of dy and of its "
        "correlation with x_hat",
        f"largest relative difference in 100 draws, float64: {number(max(errors))}",
        verdict(max(errors) < 1e-9),
    )  # fmt: skip


def measure(quick):
    """Return findings and a picture."""
    seeds, rates, steps = (2, RATES[::2], 60) if quick else (5, RATES, 100)
    data = training.digits()
    picture, axes = report.figure(3)
    noisy, best = noise(data, rates, steps, seeds, axes[2])
    findings = [*smoothness({k: best[k] for k in ("batch", None)}, data, steps, seeds, axes[:2])]
    return [*findings, noisy, identity()], picture


if __name__ == "__main__":
    report.main(__file__, __doc__)
