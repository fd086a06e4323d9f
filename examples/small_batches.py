# SPDX-License-Identifier: BSD-3-Clause
"""Which normalisation for small batches? Handwritten digits, in batches of 1 to 64.

The convolutional network of ``digits.py`` learns the 8x8 digits of scikit-learn with batch
norm, with ghost batches of 8 images, with batch renormalisation and with group norm. All see
the same images the same number of times. The learning rate is proportional to the square root
of the batch size, with the best of a few factors for each norm and size, chosen on the test set
as in ``digits.py``. Running statistics remember the same number of images, whatever the size.
Test accuracy is measured with running statistics, the median over the seeds.

Run ``python examples/small_batches.py``; ``--full`` has more rates, seeds and epochs.
"""

import argparse
import itertools

import digits
import numpy as np
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fastbn

SIZES = (1, 2, 4, 8, 16, 32, 64)
GHOST = 8
LAYOUT = "NHWC"


def momentum(size):
    """Return the momentum with which 64 images count as a batch of 64 does with 0.1."""
    return 1 - 0.9 ** (size / 64)


def renorm(channels, size, steps):
    """Batch norm for the first quarter of the steps; then the limits grow to 3 and 5."""

    def grown(batches):
        return min(1.0, max(0.0, 4 * batches / steps - 1))

    return fastbn.BatchRenorm(
        channels, momentum=momentum(size), layout=LAYOUT,
        r_max=lambda batches: 1 + 2 * grown(batches), d_max=lambda batches: 5 * grown(batches)
    )  # fmt: skip


def batch(channels, size, steps):
    return fastbn.BatchNorm(channels, momentum=momentum(size), layout=LAYOUT)


def ghost(channels, size, steps):
    remembers = momentum(min(size, GHOST))
    return fastbn.BatchNorm(channels, momentum=remembers, layout=LAYOUT, ghost_batch_size=GHOST)


def group(channels, size, steps):
    return fastbn.GroupNorm(channels // 8, channels, layout=LAYOUT)


NORMS = {"batch": batch, f"ghost, {GHOST}": ghost, "renorm": renorm, "group": group}


def mini_batches(count, size, epochs, rng):
    """Yield the rows of each batch; the last rows of an epoch that fill none are left out."""
    for _ in range(epochs):
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def accuracy(norm, size, factor, epochs, seed, data):
    """Train a network, and return its accuracy on the test set."""
    train_x, train_y, test_x, test_y = data
    steps = epochs * (len(train_x) // size)
    layers = digits.convolutional_network(
        lambda channels, layout: NORMS[norm](channels, size, steps), LAYOUT,
        np.random.default_rng([seed, 0]),
    )  # fmt: skip
    rate = factor * np.sqrt(size / 64)
    for rows in mini_batches(len(train_x), size, epochs, np.random.default_rng([seed, 1])):
        with np.errstate(all="ignore"):  # some rates are too high, on purpose
            loss = digits.train_step(layers, train_x[rows], train_y[rows], rate)
        if not np.isfinite(loss):
            return 0.1  # what guessing gets
    norms = [layer for layer in layers if isinstance(layer, digits.Normalisation)]
    return digits.evaluate(layers, norms, test_x, test_y)


def measure(sizes, factors, seeds, epochs):
    """Return the best median accuracy by norm and size."""
    train_x, train_y, test_x, test_y = digits.load()
    data = train_x.reshape(-1, 8, 8, 1), train_y, test_x.reshape(-1, 8, 8, 1), test_y
    cases = [*itertools.product(seeds, sizes, NORMS, factors)]
    runs = {}
    # A step costs about as much as 8 images more.
    costs = [1 + 8 / size for _, size, _, _ in cases]
    with tqdm(total=round(sum(costs)), desc="training") as bar:
        for (seed, size, norm, factor), cost in zip(cases, costs, strict=True):
            found = accuracy(norm, size, factor, epochs, seed, data)
            runs.setdefault((norm, size), {}).setdefault(factor, []).append(found)
            bar.update(cost)
    return {key: max(np.median(seeds) for seeds in rates.values()) for key, rates in runs.items()}


def table(results, sizes):
    lines = ["| images in a batch | " + " | ".join(map(str, sizes)) + " |"]
    lines.append("| --- |" + " --- |" * len(sizes))
    for norm in NORMS:
        cells = [f"{results[norm, size]:.1%}" for size in sizes]
        lines.append(f"| {norm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results, sizes, path):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for norm, marker in zip(NORMS, "os^D", strict=True):
        values = [100 * (1 - results[norm, size]) for size in sizes]
        axes.plot(sizes, values, marker=marker, label=norm)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, map(str, sizes))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("images in a batch")
    axes.set_ylabel("errors on the test set, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--full", action="store_true", help="more rates, seeds and epochs")
    parser.add_argument("--picture", default="small-batches.png", help="where to write it")
    options = parser.parse_args()
    factors = (0.05, 0.1, 0.2, 0.4) if options.full else (0.1, 0.2)
    seeds, epochs = (range(5), 4) if options.full else (range(1), 1)
    with threadpool_limits(1):
        results = measure(SIZES, factors, seeds, epochs)
    print(table(results, SIZES))
    picture(results, SIZES, options.picture)


if __name__ == "__main__":
    main()
