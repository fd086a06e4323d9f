# SPDX-License-Identifier: BSD-3-Clause
"""What `fastbn.torch.convert` does to training: ResNet-18 and MobileNetV2 on the CPU.

Both networks are written in PyTorch's plain modules. For each of them and each memory
format, batches of 32 images of 64x64 are trained on with SGD, three times over: as it is,
converted, and converted with ``fuse=True``. Printed are

- the time of a step: forward, backward and update; the three variants take turns, and
  the median counts;
- the share that normalisation had of it, with the activations and additions that fusion
  can take into it, as `torch.profiler` counts them;
- the largest difference of the losses from PyTorch's own over some steps from the same
  start, and, for comparison, that between PyTorch's own two memory formats.

Run ``python examples/torch_networks.py``; ``--quick`` takes fewer steps.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastbn.torch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
VARIANTS = {
    "PyTorch": lambda model: model,
    "convert": fastbn.torch.convert,
    "fuse": lambda model: fastbn.torch.convert(model, fuse=True),
}
NORMALISATION = {
    "aten::native_batch_norm", "aten::native_batch_norm_backward", "Normalise",
    "NormaliseBackward",
}  # fmt: skip
AROUND = {
    "aten::relu", "aten::relu_", "aten::clamp_min", "aten::clamp_min_", "aten::hardtanh",
    "aten::hardtanh_", "aten::threshold_backward", "aten::hardtanh_backward",
    "aten::add", "aten::add_",
}  # fmt: skip

# ---- the networks ----------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two convolutions beside an identity: He et al. 2016."""

    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.beside = nn.Sequential()
        if stride != 1 or before != after:
            self.beside = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.beside(x)
        return self.relu(y)


def resnet18(classes=10):
    blocks, width = [], 64
    for after, stride in [(64, 1), (128, 2), (256, 2), (512, 2)]:
        blocks += [BasicBlock(width, after, stride), BasicBlock(after, after, 1)]
        width = after
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes),
    )  # fmt: skip


def convolution(before, after, kernel, stride=1, groups=1):
    return [
        nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
    ]


class InvertedResidual(nn.Module):
    """Wide inside, narrow between: Sandler et al. 2018."""

    def __init__(self, before, after, stride, factor):
        super().__init__()
        wide = before * factor
        layers = []
        if factor != 1:
            layers += [*convolution(before, wide, 1), nn.ReLU6(inplace=True)]
        layers += [*convolution(wide, wide, 3, stride, wide), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(*layers, *convolution(wide, after, 1))
        self.adds = stride == 1 and before == after

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


def mobilenet_v2(classes=10):
    blocks, width = [], 32
    for factor, after, count, stride in [
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
        (6, 160, 3, 2), (6, 320, 1, 1),
    ]:  # fmt: skip
        for i in range(count):
            blocks.append(InvertedResidual(width, after, stride if i == 0 else 1, factor))
            width = after
    return nn.Sequential(
        *convolution(3, 32, 3, 2), nn.ReLU6(inplace=True), *blocks,
        *convolution(width, 1280, 1), nn.ReLU6(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes),
    )  # fmt: skip


# ---- training ---------------------------------------------------------------------


class Training:
    """A network, its optimiser, and one batch after the other."""

    def __init__(self, model, memory_format):
        self.model = model.to(memory_format=memory_format)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.generator = torch.Generator().manual_seed(1)
        self.memory_format = memory_format

    def step(self):
        """Return the loss, and how long the step took, without making the batch."""
        labels = torch.randint(10, (32,), generator=self.generator)
        images = torch.randn(32, 3, 64, 64, generator=self.generator)
        # Something to learn: the class is in the brightness of a stripe.
        for i, label in enumerate(labels.tolist()):
            images[i, :, 6 * label : 6 * label + 6] += 1.0
        images = images.to(memory_format=self.memory_format)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item(), time.perf_counter() - start


def shares(training):
    """Return the shares of a step of normalisation alone, and with what is around it."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        _, seconds = training.step()
    spent = {event.key: event.cpu_time_total for event in record.key_averages()}
    alone = sum(spent.get(key, 0.0) for key in NORMALISATION)
    # What an operator calls is in its own time, too: relu_ calls clamp_min_.
    around = {event.key: event.self_cpu_time_total for event in record.key_averages()}
    together = alone + sum(around.get(key, 0.0) for key in AROUND)
    return alone * 1e-6, together * 1e-6, seconds


def compare(name, network, steps):
    torch.manual_seed(0)
    start = network()
    curves = {}
    for format_name, memory_format in FORMATS.items():
        trainings = {}
        for variant, prepare in VARIANTS.items():
            model = copy.deepcopy(start).to(memory_format=memory_format)
            trainings[variant] = Training(prepare(model), memory_format)
        losses, times = ({variant: [] for variant in VARIANTS} for _ in range(2))
        for _ in range(steps):
            for variant, training in trainings.items():
                loss, seconds = training.step()
                losses[variant].append(loss)
                times[variant].append(seconds)
        curves[format_name] = losses["PyTorch"]
        print(f"\n{name}, {format_name}, {torch.get_num_threads()} threads")
        for variant, training in trainings.items():
            median = statistics.median(times[variant][2:])
            measured = [shares(training) for _ in range(3)]
            alone, together, seconds = (statistics.median(m) for m in zip(*measured, strict=True))
            apart = max(abs(a - b) for a, b in zip(
                losses[variant], losses["PyTorch"], strict=True))  # fmt: skip
            print(
                f"  {variant:8}  step {1e3 * median:7.1f} ms   normalisation {1e3 * alone:6.1f} ms"
                f" ({100 * alone / seconds:4.1f} %), with activations and additions"
                f" {1e3 * together:6.1f} ms   losses apart {apart:.1e}",
                flush=True,
            )
    a, b = curves.values()
    noise = max(abs(x - y) for x, y in zip(a, b, strict=True))
    print(
        f"  PyTorch's two memory formats: losses apart {noise:.1e}, from {a[0]:.3f} to {a[-1]:.3f}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="6 steps instead of 50")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = 6 if arguments.quick else 50
    for name, network in {"ResNet-18": resnet18, "MobileNetV2": mobilenet_v2}.items():
        compare(name, network, steps)


if __name__ == "__main__":
    main()
