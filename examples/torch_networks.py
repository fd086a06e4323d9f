# SPDX-License-Identifier: BSD-3-Clause
"""What fastbn does to training in PyTorch: four networks on the CPU.

ResNet-18 and MobileNetV2 (batch norm), a small ConvNeXt (layer norm) and a small UNet (group
norm), written in PyTorch's plain modules. For each of them, each memory format and each
precision, batches of 32 images of 64x64 are trained on with SGD, several times over:

    plain       as it is
    enabled     under ``fastbn.torch.enabled()``
    fused       the same, with ``fastbn.torch.fuse(model)``
    inductor    ``torch.compile(model)``, without fastbn

Printed are

- the time of a step: forward, backward and update; the variants take turns, and the median of
  the ratios to the plain step of the same turn counts;
- the share that normalisation had of it, with the activations and additions that fusion can
  take into it, as `torch.profiler` counts them (inductor's graphs do not show it);
- the largest difference of the losses from the plain ones over the first steps.

Run ``python examples/torch_networks.py``; ``--quick`` takes few steps of two networks.
"""

import argparse
import copy
import statistics
import time
from contextlib import nullcontext

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastbn.torch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: How a model is prepared, and what its steps run under.
VARIANTS = {
    "plain": (lambda model: model, nullcontext),
    "enabled": (lambda model: model, fastbn.torch.enabled),
    "fused": (fastbn.torch.fuse, fastbn.torch.enabled),
    "inductor": (torch.compile, nullcontext),
}
NORMALISATION = {"Normalise", "NormaliseBackward"} | {
    f"aten::native_{norm}_norm{end}"
    for norm in ("batch", "layer", "group")
    for end in ("", "_backward")
}
AROUND = {
    "aten::relu", "aten::relu_", "aten::clamp_min", "aten::clamp_min_", "aten::hardtanh",
    "aten::hardtanh_", "aten::threshold_backward", "aten::hardtanh_backward", "aten::silu",
    "aten::silu_", "aten::silu_backward", "aten::add", "aten::add_",
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


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, then two products over channels: Liu et al. 2022."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(nn.functional.gelu(self.wide(y)))
        return x + y.permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convnext(classes=10):
    layers, before = [], 3
    for width, blocks, stride in [(48, 2, 4), (96, 2, 2), (192, 4, 2), (384, 2, 2)]:
        if before != 3:
            layers.append(ChannelNorm(before))
        layers.append(nn.Conv2d(before, width, stride, stride))
        layers += [ChannelNorm(width)] if before == 3 else []
        layers += [ConvNeXtBlock(width) for _ in range(blocks)]
        before = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(384), nn.Linear(384, classes)
    )


class DoubleConvolution(nn.Sequential):
    """Twice a convolution, group norm and SiLU."""

    def __init__(self, before, after):
        layers = []
        for given in (before, after):
            layers += [nn.Conv2d(given, after, 3, padding=1, bias=False), nn.GroupNorm(8, after),
                       nn.SiLU(inplace=True)]  # fmt: skip
        super().__init__(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015, with group norm; the mean of what it paints is a class."""

    def __init__(self, classes=10, widths=(32, 64, 128)):
        super().__init__()
        self.down = nn.ModuleList()
        before = 3
        for width in widths:
            self.down.append(DoubleConvolution(before, width))
            before = width
        self.up = nn.ModuleList(
            DoubleConvolution(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes, 1)

    def forward(self, x):
        kept = []
        for i, stage in enumerate(self.down):
            x = stage(x if i == 0 else nn.functional.max_pool2d(x, 2))
            kept.append(x)
        for stage, beside in zip(self.up, kept[-2::-1], strict=True):
            x = stage(torch.cat([nn.functional.interpolate(x, scale_factor=2), beside], 1))
        return self.head(x).mean((2, 3))


NETWORKS = {
    "ResNet-18": resnet18, "MobileNetV2": mobilenet_v2, "ConvNeXt": convnext, "UNet": UNet
}  # fmt: skip


# ---- training ---------------------------------------------------------------------


class Training:
    """A network, its optimiser, and one batch after the other."""

    def __init__(self, model, variant, memory_format, precision):
        prepare, self.state = VARIANTS[variant]
        self.model = prepare(model.to(memory_format=memory_format))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        self.generator = torch.Generator().manual_seed(1)
        self.memory_format, self.halves = memory_format, precision == "bfloat16"

    def batch(self):
        """Return images and labels."""
        labels = torch.randint(10, (32,), generator=self.generator)
        images = torch.randn(32, 3, 64, 64, generator=self.generator)
        # Something to learn: the class is in the brightness of a stripe.
        for i, label in enumerate(labels.tolist()):
            images[i, :, 6 * label : 6 * label + 6] += 1.0
        return images.to(memory_format=self.memory_format), labels

    def gradients(self, images, labels):
        """Compute them, and return the loss."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.halves):
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        return loss.item()

    def step(self):
        """Return the loss, and how long the step took, without making the batch."""
        batch = self.batch()
        with self.state():
            start = time.perf_counter()
            loss = self.gradients(*batch)
            self.optimizer.step()
            return loss, time.perf_counter() - start


def shares(training):
    """Return the time of normalisation alone, and with what is around it, in seconds."""
    batch = training.batch()
    # Without the update, whose additions are of the same operators.
    with training.state(), profile(activities=[ProfilerActivity.CPU]) as record:
        training.gradients(*batch)
    averages = record.key_averages()
    alone = sum(e.cpu_time_total for e in averages if e.key in NORMALISATION)
    # What an operator calls is in its own time, too: relu_ calls clamp_min_.
    around = sum(e.self_cpu_time_total for e in averages if e.key in AROUND)
    return alone * 1e-6, (alone + around) * 1e-6


def compare(name, format_name, precision, variants, steps):
    """Print a row for each variant."""
    torch.manual_seed(0)
    start = NETWORKS[name]()
    trainings = {
        variant: Training(copy.deepcopy(start), variant, FORMATS[format_name], precision)
        for variant in variants
    }
    losses, times = ({variant: [] for variant in variants} for _ in range(2))
    for _ in range(steps):
        for variant, training in trainings.items():
            loss, seconds = training.step()
            losses[variant].append(loss)
            times[variant].append(seconds)
    for variant, training in trainings.items():
        ratio = statistics.median(
            a / b for a, b in zip(times[variant][2:], times["plain"][2:], strict=True)
        )
        cells = [f"{1e3 * statistics.median(times[variant][2:]):.1f}", f"{ratio:.2f}", "", ""]
        if variant != "inductor":
            measured = [shares(training) for _ in range(5)]
            cells[2:] = (f"{1e3 * statistics.median(m):.1f}" for m in zip(*measured, strict=True))
        apart = max(abs(a - b) for a, b in zip(losses[variant][:10], losses["plain"], strict=False))
        row = [name, format_name, precision, variant, *cells, f"{apart:.1e}"]
        print("| " + " | ".join(row) + " |", flush=True)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="6 steps, and two of the networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    networks, steps = arguments.networks, arguments.steps
    if arguments.quick:
        networks, steps = ["ResNet-18", "UNet"], 6
    variants = ["plain", *(v for v in arguments.variants if v != "plain")]
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads; ms; norms+: with")
    print("activations and additions; apart: of losses, at most\n")
    print("| network | format | precision | variant | step | to plain | norms | norms+ | apart |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in networks:
        for precision in ("float32", "bfloat16"):
            for format_name in FORMATS:
                compare(name, format_name, precision, variants, steps)


if __name__ == "__main__":
    main()
