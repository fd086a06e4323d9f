# SPDX-License-Identifier: BSD-3-Clause
"""Claim 5: networks of more than 100 layers train with batch norm and skip connections.

One arm more than the claim has: skip connections without batch norm whose blocks start at 0, so
that values do not grow with depth (Zhang, Dauphin & Ma 2019). It tells whether batch norm is
necessary, or one of several ways.
"""

import numpy as np

from examples.claims import layers, report, training
from examples.claims.report import Finding, highest, percent, spread, verdict

TITLE = "5. Networks of more than 100 layers"
SOURCE = "He et al. 2016; Ioffe & Szegedy 2015"
RATES = (1e-5, 1e-4, 0.001, 0.01, 0.1, 1.0)
BLOCKS, WIDTH = 52, 32


def network(kind, rng):
    """A linear layer, 52 blocks of two and one more: 106 layers with weights."""
    norm, skips, zero = kind
    block = layers.Residual if skips else layers.Sequential
    hidden = [
        block(layers.Linear(WIDTH, WIDTH, rng), layers.norm(norm, WIDTH), layers.ReLU(),
              layers.Linear(WIDTH, WIDTH, rng), layers.norm(norm, WIDTH))
        for _ in range(BLOCKS)
    ]  # fmt: skip
    for one in hidden if zero else ():
        one.children[-2].weight[:] = 0
    # Without skips the ReLU between blocks is needed; with them it is the same network.
    parts = [part for one in hidden for part in (one, layers.ReLU())]
    stem = (layers.Linear(64, WIDTH, rng), layers.norm(norm, WIDTH), layers.ReLU())
    return layers.Sequential(*stem, *parts, layers.Linear(WIDTH, 10, rng, 1), layers.Bias(10))


ARMS = {
    "batch norm and skips": ("batch", True, False), "skips": (None, True, False),
    "batch norm": ("batch", False, False), "neither": (None, False, False),
    "skips, blocks that start at 0": (None, True, True),
}  # fmt: skip


def measure(quick):
    """Return findings and a picture."""
    seeds, steps = (1, 40) if quick else (5, 80)
    plan = training.Plan(network, training.digits().flat(), steps, every=10)
    picture, (axis, other) = report.figure(2)
    tests, rates = {}, {}
    for label, kind in ARMS.items():
        arm = training.sweep(plan, kind, RATES, seeds)
        rates[label] = training.best_rate(arm)
        runs = arm[rates[label]]
        tests[label] = [run.test for run in runs]
        report.band(axis, runs[0].steps, [run.valid for run in runs],
                    f"{label}, rate {rates[label]:g}")  # fmt: skip
        over = [[run.test for run in arm[rate]] for rate in RATES]
        report.band(other, RATES, np.transpose(over), label)
    axis.legend(fontsize=8)
    other.set_xscale("log")
    report.titled(axis, "106 layers, digits", "step", "validation accuracy")
    report.titled(other, "all rates", "rate", "test accuracy")
    medians = {label: np.median(of) for label, of in tests.items()}
    words = "; ".join(
        f"{label} {spread(of, percent)} at rate {highest(rates[label], RATES)}"
        for label, of in tests.items()
        if label != "skips, blocks that start at 0"
    )
    others = max(medians[label] for label in ("skips", "batch norm", "neither"))
    zero = "skips, blocks that start at 0"
    return [
        Finding(
            "106 layers", SOURCE, "train with batch norm and skip connections, not without",
            f"test accuracy after {steps} steps: {words}",
            verdict(medians["batch norm and skips"] > 0.8 and others < 0.5),
        ),
        Finding(
            "106 layers, skips without batch norm, blocks that start at 0",
            "Zhang, Dauphin & Ma 2019", "train: the initial weights suffice, without batch norm",
            f"test accuracy after {steps} steps: {spread(tests[zero], percent)} at rate "
            f"{highest(rates[zero], RATES)}",
            verdict(medians[zero] > 0.8),
        ),
    ], picture  # fmt: skip


if __name__ == "__main__":
    report.main(__file__, __doc__)
