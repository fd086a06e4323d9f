# SPDX-License-Identifier: BSD-3-Clause
"""Claim 9: batch normalisation makes the scale and the kind of initial weights matter less."""

from functools import partial

import numpy as np

from examples.claims import layers, report, training
from examples.claims.report import Finding, apart, percent, spread

TITLE = "9. Initial weights: scale over four decades, and kind"
SOURCE = "Ioffe & Szegedy 2015, 3.3, 5"
RATES = tuple(10.0**power for power in range(-3, 5))
SCALES = (0.01, 0.1, 1.0, 10.0, 100.0)
COMMON = 0.1


def orthogonal(shape, rng):
    rows, columns = max(shape), min(shape)
    q, _ = np.linalg.qr(rng.standard_normal((rows, columns)))
    return (q if shape == q.shape else q.T) * np.sqrt(2)


def sparse(shape, rng, entries=8):
    """Eight weights for each unit, the others 0."""
    weight = np.zeros(shape)
    for column in weight.T:
        chosen = rng.permutation(shape[0])[:entries]
        column[chosen] = rng.standard_normal(entries) * np.sqrt(2 / entries)
    return weight


KINDS = {
    "Gaussian": lambda shape, rng: rng.standard_normal(shape) * np.sqrt(2 / shape[0]),
    "uniform": lambda shape, rng: rng.uniform(-1, 1, shape) * np.sqrt(6 / shape[0]),
    "orthogonal": orthogonal,
    "sparse": sparse,
    "positive": lambda shape, rng: np.abs(rng.standard_normal(shape)) * np.sqrt(2 / shape[0]),
}


def network(kind, rng, scale=1.0, of="Gaussian"):
    """Four hidden layers of 64; the weights of all hidden layers are replaced."""
    net = layers.mlp(kind, (64, 64, 64, 64, 64, 10), rng)
    for layer in net.children[:-2]:
        if isinstance(layer, layers.Linear):
            layer.weight[:] = scale * KINDS[of](layer.weight.shape, rng)
    return net


def tests_of(data, steps, rates, seeds, **how):
    """Return the test accuracies of both arms: each at its best rate, and at a common one."""
    best, common = {}, {}
    for kind in ("batch", None):
        plan = training.Plan(partial(network, **how), data, steps, 10)
        arm = training.sweep(plan, kind, rates, seeds)
        best[kind] = [run.test for run in arm[training.best_rate(arm)]]
        common[kind] = [run.test for run in arm[COMMON]]
    return best, common


def points(shares):
    """Return percentage points, over the seeds."""
    return spread(100 * np.asarray(shares))


def measure(quick):
    """Return findings and a picture."""
    seeds, rates, steps = (1, (*RATES[::2], COMMON), 80) if quick else (5, RATES, 150)
    data = training.digits().flat()
    picture, axes = report.figure(3)
    found = [tests_of(data, steps, rates, seeds, scale=scale) for scale in SCALES]
    findings = []
    labels = (("batch", "with"), (None, "without"))
    for index, where in enumerate(("each at its best rate", f"at the rate {COMMON:g}")):
        medians, ranges = {}, {}
        for kind, label in labels:
            tests = [pair[index][kind] for pair in found]
            report.band(axes[index], SCALES, np.transpose(tests), label)
            medians[kind] = np.median(tests, axis=1)
            ranges[kind] = np.ptp(tests, axis=0)  # over the scales, of each seed
        axes[index].set_xscale("log")
        axes[index].legend(fontsize=8)
        report.titled(axes[index], where, "scale of the weights", "test accuracy")
        words = "; ".join(
            f"{label} "
            + ", ".join(f"{s:g}: {percent(m)}" for s, m in zip(SCALES, medians[kind], strict=True))
            for kind, label in labels
        )
        findings.append(Finding(
            f"scale of the initial weights, {where}", SOURCE,
            "batch norm makes training resilient to the scale of the weights",
            f"median test accuracy by scale: {words}; range over the scales, in points: "
            f"with {points(ranges['batch'])}, without {points(ranges[None])}",
            apart(ranges["batch"], ranges[None]),
        ))  # fmt: skip
    kinds = {of: tests_of(data, steps, rates, seeds, of=of)[0] for of in KINDS}
    for offset, (kind, label) in zip((-0.1, 0.1), labels, strict=True):
        tests = np.array([kinds[of][kind] for of in KINDS])
        middle = np.median(tests, axis=1)
        axes[2].errorbar(np.arange(len(KINDS)) + offset, middle,
                         [middle - tests.min(axis=1), tests.max(axis=1) - middle], fmt="o",
                         label=label)  # fmt: skip
    axes[2].set_xticks(range(len(KINDS)), KINDS, rotation=20)
    axes[2].legend(fontsize=8)
    report.titled(axes[2], "each at its best rate", "", "test accuracy")
    words = "; ".join(f"{of}: with {spread(tests['batch'], percent)}, without "
                      f"{spread(tests[None], percent)}" for of, tests in kinds.items())  # fmt: skip
    # A kind with which no arm trains says nothing about their difference.
    useless = [of for of, tests in kinds.items()
               if max(np.median(accuracy) for accuracy in tests.values()) < 0.3]  # fmt: skip
    useful = [tests for of, tests in kinds.items() if of not in useless]
    ranges = {kind: np.ptp([tests[kind] for tests in useful], axis=0) for kind in ("batch", None)}
    but = f" but {', '.join(useless)}, with which neither trains" if useless else ""
    findings.append(Finding(
        "kind of the initial weights, each at its best rate", SOURCE,
        "batch norm makes the choice matter less",
        f"{words}; range over the kinds{but}, in points: "
        f"with {points(ranges['batch'])}, without {points(ranges[None])}",
        apart(ranges["batch"], ranges[None]),
    ))  # fmt: skip
    return findings, picture


if __name__ == "__main__":
    report.main(__file__, __doc__)
