# SPDX-License-Identifier: BSD-3-Clause
"""Claim 7: where batch norm hurts, group, layer and renorm hold; a recurrent network."""

from dataclasses import replace

import numpy as np

from examples.claims import layers, recurrent, report, training
from examples.claims.report import (
    DIFFERS,
    HOLDS,
    Finding,
    apart,
    highest,
    percent,
    spread,
)  # fmt: skip

TITLE = "7. Small batches, and a recurrent network"
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
BATCHES = (2, 8, 32)
STEPS = 16  # of four pixels


def network(kind, rng):
    return layers.convolutional(kind, 10, rng)


def small(images, rates, seeds, axis):
    """Every size of batch sees the same number of images."""
    tests = {}
    for kind in layers.NORMS:
        for batch in BATCHES:
            steps = images // batch
            plan = training.Plan(network, training.digits(), steps, max(1, steps // 8), batch)
            arm = training.sweep(plan, kind, rates, seeds)
            tests[kind, batch] = [run.test for run in arm[training.best_rate(arm)]]
        report.band(axis, BATCHES, np.transpose([tests[kind, b] for b in BATCHES]), kind)
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8)
    report.titled(axis, f"digits, {images} images seen", "batch size", "test accuracy")
    medians = {key: np.median(of) for key, of in tests.items()}
    smallest, largest = BATCHES[0], BATCHES[-1]
    drop = {kind: medians[kind, largest] - medians[kind, smallest] for kind in layers.NORMS}
    for kind, source, paper in (
        ("group", "Wu & He 2018, 4.1, figure 1", "the same at any size of batch"),
        ("layer", "Ba et al. 2016, 5; 6.7", "does not depend on the batch; in convolutional "
         "networks behind batch norm"),
        ("renorm", "Ioffe 2017, 4.2", "better than batch norm for small batches, if not as good "
         "as with large ones"),
    ):  # fmt: skip
        found = apart(tests["batch", smallest], tests[kind, smallest])
        if found == HOLDS and drop[kind] >= drop["batch"]:
            found = DIFFERS  # better at every size of batch is another claim
        words = "; ".join(
            f"batch {b}: batch norm {spread(tests['batch', b], percent)}, {kind} "
            f"{spread(tests[kind, b], percent)}" for b in BATCHES
        )  # fmt: skip
        yield Finding(
            f"batch norm and {kind} norm at {smallest} images a batch"
            if kind != "renorm" else f"batch norm and renorm at {smallest} images a batch",
            source, paper, f"test accuracy at the best rate: {words}",
            found,
        )  # fmt: skip


def pixels(images):
    return images.reshape(len(images), STEPS, -1)


def sequential():
    data = training.digits()
    return replace(data, train_x=pixels(data.train_x), valid_x=pixels(data.valid_x),
                   test_x=pixels(data.test_x))  # fmt: skip


def both_statistics(data):
    """Return an observer: test accuracy with the statistics of each step, and with one average."""

    def observe(net, step):
        lstm, found = net.children[0], []
        for shared in (False, True):
            for norm in lstm.norms:
                norm.shared = shared
            found.append(training.accuracy(net, data.test_x, data.test_y))
        for norm in lstm.norms:
            norm.shared = False
        return found

    return observe


def recurrence(steps, rates, seeds, axis):
    data = sequential()
    plan = training.Plan(recurrent.network, data, steps, 20, momentum=0.9, limit=1.0,
                         observe=both_statistics(data))  # fmt: skip
    arms = {kind: training.sweep(plan, kind, rates, seeds) for kind in ("batch", None)}
    best = {kind: training.best_rate(arm) for kind, arm in arms.items()}
    for kind, label in (("batch", "with"), (None, "without")):
        runs = arms[kind][best[kind]]
        report.band(axis, runs[0].steps, [run.valid for run in runs],
                    f"{label}, rate {best[kind]:g}")  # fmt: skip
    axis.legend(fontsize=8)
    report.titled(axis, "LSTM, four pixels a step", "step", "validation accuracy")
    tests = {kind: [run.test for run in arm[best[kind]]] for kind, arm in arms.items()}
    halfway = {kind: [run.valid[len(run.valid) // 2 - 1]
                      for run in arm[best[kind]]] for kind, arm in arms.items()}  # fmt: skip
    yield Finding(
        f"LSTM with batch norm, digits in {STEPS} steps of four pixels",
        "Cooijmans et al. 2017, 5.1, figure 2",
        "trains faster, and generalises a little better, on digits read pixel by pixel",
        f"validation accuracy halfway: with {spread(halfway['batch'], percent)} at rate "
        f"{highest(best['batch'], rates)}; without {spread(halfway[None], percent)} at "
        f"{highest(best[None], rates)}; test accuracy at the end: with "
        f"{spread(tests['batch'], percent)}, without {spread(tests[None], percent)}",
        apart(halfway[None], halfway["batch"]),
    )  # fmt: skip
    last = np.array([run.observed[-1] for run in arms["batch"][best["batch"]]])
    yield Finding(
        "statistics for each time step", "Cooijmans et al. 2017, 3, 4, appendix A",
        "needed: at the first steps they differ from those of later ones",
        f"test accuracy with those of each step {spread(last[:, 0], percent)}, with their "
        f"average over the steps {spread(last[:, 1], percent)}",
        apart(last[:, 1], last[:, 0]),
    )  # fmt: skip


def measure(quick):
    """Return findings and a picture."""
    seeds, rates, images, steps = (2, RATES[1::2], 960, 80) if quick else (5, RATES, 1920, 200)
    picture, axes = report.figure(2)
    findings = list(small(images, rates, seeds, axes[0]))
    findings += recurrence(steps, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), seeds, axes[1])
    return findings, picture


if __name__ == "__main__":
    report.main(__file__, __doc__)
