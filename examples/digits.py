# SPDX-License-Identifier: BSD-3-Clause
"""What batch normalisation buys: handwritten digits, with it and without it.

Three networks in plain NumPy learn the 8x8 digits of scikit-learn, each with
`fastbn.BatchNorm` before its activations and without:

- the sigmoid network of Ioffe & Szegedy 2015, section 4.1: three hidden layers
  of 100 units, mini-batches of 60;
- a small convolutional network with ReLU, channels first (NCHW);
- the same network, channels last (NHWC).

Both arms get the same data, initial weights, plain SGD and learning rates, and
each is judged at its own best rate: the one that takes the fewest steps to 90 %
test accuracy, in the median over the seeds. A rate trains if that median is
within the budget of steps. A run whose loss is no longer finite counts as one
that never got there. Test accuracy is measured with the running statistics, not
with those of the test batch. Rates are chosen on the test set, in both arms:
fair for a comparison, but a little kind to both as an estimate of accuracy.

Run ``python examples/digits.py``; ``--full`` has all the rates and five seeds.
"""

import argparse
import itertools
import time
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from tqdm import tqdm

import fastbn

BATCH = 60
GOAL = 0.9
EVALUATE_EVERY = 5  # steps

# ---- layers ----------------------------------------------------------------
#
# forward(x) returns y; backward(dy) returns dx and keeps the gradients of the
# layer's parameters; parameters() gives pairs (parameter, gradient).


class Layer:
    """A layer without parameters."""

    def parameters(self):
        return []


class Dense(Layer):
    """y = x W, with Gaussian weights of standard deviation gain / sqrt(fan_in)."""

    def __init__(self, fan_in, fan_out, gain, rng):
        weight = rng.normal(0.0, gain / np.sqrt(fan_in), (fan_in, fan_out))
        self.weight = weight.astype(np.float32)

    def forward(self, x):
        self.x = x
        return x @ self.weight

    def backward(self, dy):
        self.weight_grad = self.x.T @ dy
        return dy @ self.weight.T

    def parameters(self):
        return [(self.weight, self.weight_grad)]


class Conv3x3(Dense):
    """A convolution with 3x3 taps and zero padding, in either layout.

    Nine shifted copies of the image, joined along the channels, leave a matrix
    product over the channels of each pixel.
    """

    def __init__(self, channels_in, channels_out, gain, rng, layout, stride):
        super().__init__(9 * channels_in, channels_out, gain, rng)
        self.stride = stride
        self.first = layout == "NCHW"
        self.axis = 1 if self.first else 3
        self.pad = [(1, 1) if letter in "HW" else (0, 0) for letter in layout]

    def shifts(self, padded):
        """Nine views of a padded image, one for each tap."""
        taps = [slice(0, -2, self.stride), slice(1, -1, self.stride), slice(2, None, self.stride)]
        for rows, columns in itertools.product(taps, taps):
            yield padded[:, :, rows, columns] if self.first else padded[:, rows, columns]

    def forward(self, x):
        padded = np.pad(x, self.pad)
        copies = np.concatenate(list(self.shifts(padded)), axis=self.axis)
        self.padded_shape, self.copies_shape = padded.shape, copies.shape
        if self.first:  # pixels are columns: a product for each image
            self.x = copies.reshape(*copies.shape[:2], -1)
            return (self.weight.T @ self.x).reshape(len(x), -1, *copies.shape[2:])
        # Pixels are rows: one product for the whole batch.
        return super().forward(copies.reshape(-1, copies.shape[3])).reshape(*copies.shape[:3], -1)

    def backward(self, dy):
        if self.first:
            dy = dy.reshape(*dy.shape[:2], -1)
            self.weight_grad = (self.x @ dy.transpose(0, 2, 1)).sum(axis=0)
            dcopies = self.weight @ dy
        else:
            dcopies = super().backward(dy.reshape(-1, dy.shape[3]))
        # The gradient of "copy nine times and join" is "split and add up".
        dpadded = np.zeros(self.padded_shape, np.float32)
        parts = np.split(dcopies.reshape(self.copies_shape), 9, axis=self.axis)
        for view, part in zip(self.shifts(dpadded), parts, strict=True):
            view += part
        return dpadded[:, :, 1:-1, 1:-1] if self.first else dpadded[:, 1:-1, 1:-1]


class Bias(Layer):
    """y = x + b. Needless before batch norm, which has its own (section 3.2)."""

    def __init__(self, channels, layout):
        self.layout = layout
        self.bias = np.zeros(channels, np.float32)

    def forward(self, x):
        return x + broadcast(self.bias, self.layout)

    def backward(self, dy):
        self.bias_grad = dy.sum(axis=all_but_channels(self.layout))
        return dy

    def parameters(self):
        return [(self.bias, self.bias_grad)]


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x))."""

    def forward(self, x):
        self.y = 1 / (1 + np.exp(-x))
        return self.y

    def backward(self, dy):
        return dy * self.y * (1 - self.y)


class ReLU(Layer):
    """y = max(x, 0)."""

    def forward(self, x):
        self.y = np.maximum(x, 0)
        return self.y

    def backward(self, dy):
        return dy * (self.y > 0)


class GlobalAverage(Layer):
    """The mean over all pixels: one number for each channel."""

    def __init__(self, layout):
        self.axes = layout.index("H"), layout.index("W")

    def forward(self, x):
        self.like = x
        return x.mean(axis=self.axes)

    def backward(self, dy):
        pixels = self.like[0].size // dy.shape[1]
        return np.expand_dims(dy / pixels, self.axes) * np.ones_like(self.like)


class Normalisation(Layer):
    """A batch norm layer and a stop watch for its training."""

    def __init__(self, batch_norm):
        self.batch_norm = batch_norm
        self.seconds = 0.0

    def forward(self, x):
        start = time.perf_counter()
        y = self.batch_norm(x)
        if self.batch_norm.training:
            self.seconds += time.perf_counter() - start
        return y

    def backward(self, dy):
        start = time.perf_counter()
        dx = self.batch_norm.backward(dy)
        self.seconds += time.perf_counter() - start
        return dx

    def parameters(self):
        norm = self.batch_norm
        return [(norm.weight, norm.weight_grad), (norm.bias, norm.bias_grad)]


class NumpyBatchNorm(fastbn.BatchNorm):
    """The same layer, trained by the formula in NumPy: what would that cost?"""

    def __call__(self, x):
        if not self.training:
            return super().__call__(x)
        axes = all_but_channels(self.layout)
        self.count = x.size // self.num_features
        mean = x.mean(axis=axes)
        centred = x - broadcast(mean, self.layout)
        var = (centred * centred).mean(axis=axes)
        self.invstd = 1 / np.sqrt(var + self.eps)
        self.normalised = centred * broadcast(self.invstd, self.layout)
        unbiased = var * (self.count / (self.count - 1))
        self.running_mean += self.momentum * (mean - self.running_mean)
        self.running_var += self.momentum * (unbiased - self.running_var)
        weight, bias = broadcast(self.weight, self.layout), broadcast(self.bias, self.layout)
        return self.normalised * weight + bias

    def backward(self, dy):
        axes = all_but_channels(self.layout)
        self.bias_grad = dy.sum(axis=axes)
        self.weight_grad = (dy * self.normalised).sum(axis=axes)
        mean = broadcast(self.bias_grad / self.count, self.layout)
        slope = broadcast(self.weight_grad / self.count, self.layout)
        scale = broadcast(self.weight * self.invstd, self.layout)
        return scale * (dy - mean - self.normalised * slope)


def broadcast(vector, layout):
    """View one number for each channel so that it broadcasts in the layout."""
    return vector.reshape([-1 if letter == "C" else 1 for letter in layout])


def all_but_channels(layout):
    """Return the axes that batch norm averages over."""
    return tuple(axis for axis, letter in enumerate(layout) if letter != "C")


# ---- networks and data -----------------------------------------------------


def norm_or_bias(norm, channels, layout):
    return Normalisation(norm(channels, layout=layout)) if norm else Bias(channels, layout)


def sigmoid_network(norm, layout, rng):
    """Section 4.1 of the paper; small random Gaussian weights, as there."""
    layers = []
    for fan_in, fan_out in ((64, 100), (100, 100), (100, 100)):
        # A sigmoid's slope is at most 1/4. A gain of 4 makes up for it (Glorot & Bengio
        # 2010): without batch norm, the network learns four times as fast with it.
        layers += [Dense(fan_in, fan_out, 4, rng), norm_or_bias(norm, fan_out, layout), Sigmoid()]
    return [*layers, Dense(100, 10, 1, rng), Bias(10, "NC")]


def convolutional_network(norm, layout, rng):
    """Three convolutions with ReLU, to 8x8x16, 4x4x32 and 2x2x64."""
    layers = []
    for channels_in, channels_out, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        gain = np.sqrt(2)  # keeps the scale of the activations under ReLU (He et al. 2015)
        layers += [Conv3x3(channels_in, channels_out, gain, rng, layout, stride)]
        layers += [norm_or_bias(norm, channels_out, layout), ReLU()]
    # The average over the pixels keeps the output layer small, as in Inception. That
    # layer is not normalised: a large one limits the rate in both arms, and with one on
    # all 512 outputs of two convolutions batch norm gained little.
    return [*layers, GlobalAverage(layout), Dense(64, 10, 1, rng), Bias(10, "NC")]


# name: network, layout, shape of an image, budget of steps
TASKS = {
    "sigmoid 3x100": (sigmoid_network, "NC", (64,), 400),
    "convolutions, NCHW": (convolutional_network, "NCHW", (1, 8, 8), 100),
    "convolutions, NHWC": (convolutional_network, "NHWC", (8, 8, 1), 100),
}


def load():
    """Return training images and labels, test images and labels."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.data, digits.target, test_size=450, stratify=digits.target, random_state=0
    )
    mean, std = train_x.mean(), train_x.std()  # of all pixels together
    train_x, test_x = (((x - mean) / std).astype(np.float32) for x in (train_x, test_x))
    return train_x, train_y, test_x, test_y


# ---- training --------------------------------------------------------------


@dataclass
class Run:
    """What one training gave."""

    accuracy: np.ndarray  # on the test set, every EVALUATE_EVERY steps
    steps: float  # to the goal; infinity: never
    seconds: float  # of training, without the evaluations
    norm_seconds: float  # of these, in normalisation


def mini_batches(count, rng):
    while True:
        order = rng.permutation(count)
        for start in range(0, count - BATCH + 1, BATCH):
            yield order[start : start + BATCH]


def forward(layers, x):
    for layer in layers:
        x = layer.forward(x)
    return x


def train_step(layers, x, labels, rate):
    """One step of SGD on the cross entropy of the softmax; return the loss."""
    logits = forward(layers, x)
    logits -= logits.max(axis=1, keepdims=True)
    exp = np.exp(logits)
    total = exp.sum(axis=1, keepdims=True)
    rows = np.arange(len(x))
    loss = np.mean(np.log(total[:, 0]) - logits[rows, labels])
    gradient = exp / total
    gradient[rows, labels] -= 1
    gradient /= len(x)
    for layer in reversed(layers):
        gradient = layer.backward(gradient)
    for layer in layers:
        for parameter, parameter_grad in layer.parameters():
            parameter -= rate * parameter_grad
    return loss


def evaluate(layers, norms, x, labels):
    """Return the test accuracy, with the running statistics."""
    for norm in norms:
        norm.batch_norm.eval()
    starts = range(0, len(x), BATCH)  # in pieces that stay in the cache
    guesses = [forward(layers, x[start : start + BATCH]).argmax(axis=1) for start in starts]
    for norm in norms:
        norm.batch_norm.train()
    return np.mean(np.concatenate(guesses) == labels)


def train(task, norm, rate, seed, data):
    """Train a network with `norm`, a class or None, at one learning rate."""
    network, layout, shape, budget = TASKS[task]
    train_x, train_y, test_x, test_y = data
    train_x, test_x = train_x.reshape(-1, *shape), test_x.reshape(-1, *shape)
    layers = network(norm, layout, np.random.default_rng([seed, 0]))
    norms = [layer for layer in layers if isinstance(layer, Normalisation)]
    batches = mini_batches(len(train_x), np.random.default_rng([seed, 1]))
    accuracy = np.full(budget // EVALUATE_EVERY, 0.1)  # what guessing gets, once diverged
    seconds, loss = 0.0, 0.0
    for step in range(1, budget + 1):
        start = time.perf_counter()
        rows = next(batches)
        with np.errstate(all="ignore"):  # some rates are too high, on purpose
            loss = train_step(layers, train_x[rows], train_y[rows], rate)
        seconds += time.perf_counter() - start
        if not np.isfinite(loss):
            break
        if step % EVALUATE_EVERY == 0:
            with np.errstate(all="ignore"):
                accuracy[step // EVALUATE_EVERY - 1] = evaluate(layers, norms, test_x, test_y)
    trained = np.isfinite(loss) and accuracy.max() >= GOAL
    steps = EVALUATE_EVERY * (1 + np.argmax(accuracy >= GOAL)) if trained else np.inf
    return Run(accuracy, steps, seconds, sum(norm.seconds for norm in norms))


def train_all(rates, seeds):
    """Return lists of runs, one run for each seed, by task, norm and rate."""
    data = load()
    runs = defaultdict(lambda: defaultdict(list))
    total = (2 * len(rates) + 1) * len(seeds) * len(TASKS)
    with tqdm(total=total, desc="training", unit="run") as bar:
        # The networks take turns: so the time left is a fair guess from the start.
        for rate, seed, task in itertools.product(rates, seeds, TASKS):
            for norm in (fastbn.BatchNorm, None):
                runs[task, norm][rate].append(train(task, norm, rate, seed, data))
                bar.update()
        for seed, task in itertools.product(seeds, TASKS):
            rate = best_rate(runs[task, fastbn.BatchNorm])
            runs[task, NumpyBatchNorm][rate].append(train(task, NumpyBatchNorm, rate, seed, data))
            bar.update()
    return runs


# ---- results: `arm` is the runs of a network with one norm, by rate ---------


def median_steps(runs):
    return np.median([run.steps for run in runs])


def median_accuracy(runs):
    return np.median([run.accuracy.max() for run in runs])


def best_rate(arm):
    return min(arm, key=lambda rate: (median_steps(arm[rate]), -median_accuracy(arm[rate])))


def highest_rate(arm):
    """Return the highest rate that trains; 0 if none does."""
    return max((rate for rate in arm if np.isfinite(median_steps(arm[rate]))), default=0.0)


def share(runs):
    """Return the share of time in normalisation, as text."""
    return f"{sum(run.norm_seconds for run in runs) / sum(run.seconds for run in runs):.1%}"


def print_table(runs):
    row = "{:<18}  {:>7}  {:>8}  {:>5}  {:>7}  {:>7}  {:>7}  {:>8}".format
    print(row("network", "batch", "best", "at", "steps", "highest", "time in", "the same"))
    print(row("", "norm", "accuracy", "rate", "to 90 %", "rate", "norm", "in NumPy"))
    for task, norm in itertools.product(TASKS, (fastbn.BatchNorm, None)):
        arm = runs[task, norm]
        rate = best_rate(arm)
        steps = median_steps(arm[rate])
        print(
            row(
                task if norm else "",
                "with" if norm else "without",
                f"{median_accuracy(arm[rate]):.1%}",
                f"{rate:g}",
                f"{steps:g}" if np.isfinite(steps) else "never",
                f"{highest_rate(arm):g}" if highest_rate(arm) else "none",
                share(arm[rate]) if norm else "-",
                share(runs[task, NumpyBatchNorm][rate]) if norm else "-",
            )
        )


def print_verdicts(runs):
    """Say of the two claims of batch norm, for each network, whether the data bear them out."""
    for task in TASKS:
        arms = runs[task, fastbn.BatchNorm], runs[task, None]
        steps, plain_steps = (median_steps(arm[best_rate(arm)]) for arm in arms)
        rate, plain_rate = (highest_rate(arm) for arm in arms)
        for claim, holds in (
            ("at most half the steps", np.isfinite(steps) and steps <= plain_steps / 2),
            ("at least 4 times the highest rate", rate > 0 and rate >= 4 * plain_rate),
        ):
            print(f"{task}: {claim}: {'holds' if holds else 'does not hold'}")


def draw(runs, path):
    """Test accuracy against step, each arm at its best rate: median and range."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")  # draws without a display
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for panel, task in zip(panels, TASKS, strict=True):
        for norm, colour in ((fastbn.BatchNorm, "tab:blue"), (None, "tab:orange")):
            rate = best_rate(runs[task, norm])
            curves = np.array([run.accuracy for run in runs[task, norm][rate]])
            steps = EVALUATE_EVERY * (1 + np.arange(curves.shape[1]))
            label = f"{'with' if norm else 'without'} batch norm, rate {rate:g}"
            panel.plot(steps, np.median(curves, axis=0), color=colour, label=label)
            panel.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.25, lw=0)
        panel.axhline(GOAL, color="grey", linestyle=":")
        panel.set(title=task, xlabel="training step", xlim=(steps[0], steps[-1]), ylim=(0, 1))
        panel.set_xscale("log")  # most happens in the first tens of steps
        ticks = [tick for tick in (5, 10, 20, 50, 100, 200, 400) if tick <= steps[-1]]
        panel.set_xticks(ticks, labels=map(str, ticks))
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    panels[0].set_ylabel("test accuracy")
    figure.suptitle(
        f"Digits: each network at its best rate, median and range of {len(curves)} seeds"
    )
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all the rates, and five seeds")
    parser.add_argument("--out", default="digits.png", help="the picture (default: digits.png)")
    args = parser.parse_args()

    start = time.perf_counter()
    rates = [2.0**k for k in range(-4, 7)] if args.full else [4.0**k for k in range(-1, 4)]
    seeds = range(5 if args.full else 3)
    # The arrays are small. And the threads of the matrix product keep a core busy for a
    # while after it, which the threads of fastbn then wait for. So one thread for both.
    with threadpool_limits(1):
        runs = train_all(rates, seeds)

    print(f"\n{len(seeds)} seeds; learning rates {', '.join(f'{rate:g}' for rate in rates)}\n")
    print_table(runs)
    print()
    print_verdicts(runs)
    draw(runs, args.out)
    print(f"\nCurves: {args.out}\nTime: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
