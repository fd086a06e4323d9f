# SPDX-License-Identifier: BSD-3-Clause
"""From training to a network without normalisation: handwritten digits.

The convolutional network of digits.py learns the 8x8 digits of scikit-learn, with batch
norm and ReLU in one pass (``BatchNorm(activation="relu")``). Then each batch norm is
folded into the convolution before it, and the network runs without any. Both layouts;
what the two networks say of the test set, and how far their outputs are apart.

Run ``python examples/fused_digits.py``.
"""

import copy

import numpy as np
from digits import (
    BATCH,
    TASKS,
    Bias,
    Conv3x3,
    Dense,
    GlobalAverage,
    Normalisation,
    ReLU,
    forward,
    load,
    mini_batches,
    train_step,
)
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fastbn

STEPS = 300
RATE = 0.5


def fused_network(layout, rng):
    """Three convolutions, each with batch norm and ReLU in one layer."""
    layers = []
    for channels_in, channels_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        layers.append(Conv3x3(channels_in, channels_out, np.sqrt(2), rng, layout, stride))
        norm = fastbn.BatchNorm(channels_out, layout=layout, activation="relu")
        layers.append(Normalisation(norm))
    return [*layers, GlobalAverage(layout), Dense(64, 10, 1, rng), Bias(10, "NC")]


def folded_network(layers, layout):
    """Return a network that computes the same without normalisation."""
    folded = []
    for layer in layers:
        if not isinstance(layer, Normalisation):
            folded.append(copy.copy(layer))
            continue
        norm, convolution = layer.batch_norm, folded[-1]
        bias = Bias(norm.num_features, layout)
        # The kernel is a matrix: taps and input channels by output channels.
        convolution.weight, bias.bias = fastbn.fold_batch_norm(
            convolution.weight,
            None,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            norm.eps,
            kernel_layout="IO",
        )
        folded += [bias, ReLU()]
    return folded


def trained(layout, x, labels, bar):
    """Return the network after STEPS steps, ready for inference."""
    layers = fused_network(layout, np.random.default_rng(0))
    batches = mini_batches(len(x), np.random.default_rng(1))
    for _ in range(STEPS):
        rows = next(batches)
        train_step(layers, x[rows], labels[rows], RATE)
        bar.update()
    for layer in layers:
        if isinstance(layer, Normalisation):
            layer.batch_norm.eval()
    return layers


def outputs(layers, x):
    return np.concatenate([forward(layers, x[i : i + BATCH]) for i in range(0, len(x), BATCH)])


def main():
    train_x, train_y, test_x, test_y = load()
    row = "{:<20}  {:>10}  {:>10}  {:>18}  {:>14}".format
    lines = [row("network", "with norms", "folded", "largest difference", "largest output")]
    tasks = {name: task for name, task in TASKS.items() if name.startswith("convolutions")}
    with threadpool_limits(1), tqdm(total=STEPS * len(tasks), unit="step") as bar:
        for name, (_, layout, shape, _) in tasks.items():
            bar.set_description(name)
            layers = trained(layout, train_x.reshape(-1, *shape), train_y, bar)
            images = test_x.reshape(-1, *shape)
            ours = outputs(layers, images)
            folded = outputs(folded_network(layers, layout), images)
            accuracies = [np.mean(logits.argmax(axis=1) == test_y) for logits in (ours, folded)]
            lines.append(
                row(
                    name,
                    *(f"{accuracy:.1%}" for accuracy in accuracies),
                    f"{np.abs(ours - folded).max():.1e}",
                    f"{np.abs(ours).max():.1f}",
                )
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
