# SPDX-License-Identifier: BSD-3-Clause
"""Photographs to a network, and back: statistics, normalisation, the picture restored.

The photographs are those that scikit-learn and scikit-image ship, of different sizes.
``batch_stats`` of each is merged to the exact statistics of all pixels. One ``normalize``
makes a batch of float32 NCHW out of bytes, which goes through a convolution and batch norm,
the first layer of a network; ``denormalize`` makes the picture of it again.

Many published deviations are the mean of the images' deviations. That is less than the
deviation of the pixels, since images differ in brightness; the example prints by how much.

Run ``python examples/images.py``. It shows the pictures in ``images.png``, or in the file
that is named.
"""

import sys

import numpy as np
from skimage import data
from sklearn.datasets import load_sample_images

import fastbn

# Those that are part of scikit-image itself; it would download others.
SKIMAGE = ("astronaut", "chelsea", "coffee")
SIZE = 224
FILTERS = 8
SIDE = 7
STRIDE = 4


def photographs():
    """Return a list of uint8 HWC images."""
    return [*load_sample_images().images, *(getattr(data, name)() for name in SKIMAGE)]


def statistics(images):
    """Return the statistics of all pixels, and those of each image."""
    parts = [fastbn.batch_stats(image, layout="HWC") for image in images]
    return fastbn.BatchStats.merge(parts), parts


def cropped(images):
    """Return the middles of the images as views: nothing is copied."""
    views = []
    for image in images:
        top, left = (image.shape[0] - SIZE) // 2, (image.shape[1] - SIZE) // 2
        views.append(image[top : top + SIZE, left : left + SIZE])
    return views


def normalized(crops, stats):
    """Return a float32 batch of NCHW; each image is written to its place in one pass."""
    batch = np.empty((len(crops), 3, SIZE, SIZE), np.float32)
    for crop, place in zip(crops, batch, strict=True):
        fastbn.normalize(
            crop, stats.mean, stats.std(), layout="HWC", out_layout="CHW", out=place
        )  # fmt: skip
    return batch


def first_layer(batch):
    """Return what a convolution, batch norm and ReLU make of the batch."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((FILTERS, 3, SIDE, SIDE), np.float32) / np.sqrt(3 * SIDE**2)
    windows = np.lib.stride_tricks.sliding_window_view(batch, (SIDE, SIDE), (2, 3))
    windows = windows[:, :, ::STRIDE, ::STRIDE]
    z = np.einsum("nchwij,fcij->nfhw", windows, kernel.astype(np.float32), optimize=True)
    norm = fastbn.BatchNorm(FILTERS, activation="relu")
    return norm(np.ascontiguousarray(z, np.float32))


def restored(batch, stats):
    """Return the images of a batch: uint8 NHWC."""
    return fastbn.denormalize(
        batch, stats.mean, stats.std(), layout="NCHW", out_layout="NHWC"
    )  # fmt: skip


def show(crops, batch, pictures, path):
    """Save each crop, what the network gets, and what is restored of it, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, len(crops), figsize=(2 * len(crops), 6.4))
    low, high = np.percentile(batch, [1, 99])
    inputs = ((batch.transpose(0, 2, 3, 1) - low) / (high - low)).clip(0, 1)
    rows = zip(axes, (crops, inputs, pictures), ("bytes", "normalised", "restored"), strict=True)
    for line, images, title in rows:
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image)
            axis.set_axis_off()
        line[0].set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(path="images.png"):
    images = photographs()
    stats, parts = statistics(images)
    deviation = stats.std() / 255
    averaged = np.mean([part.std() for part in parts], axis=0) / 255
    print(f"{len(images)} photographs, {stats.count[0]:.0f} pixels")
    print("mean of the pixels        ", (stats.mean / 255).round(4))
    print("deviation of the pixels   ", deviation.round(4))
    print("mean of images' deviations", averaged.round(4))
    print("    less than that of the pixels by", (100 * (1 - averaged / deviation)).round(1), "%")
    crops = cropped(images)
    batch = normalized(crops, stats)
    y = first_layer(batch)
    print(f"first layer: {batch.shape} to {y.shape}, {np.mean(y > 0):.0%} above 0")
    pictures = restored(batch, stats)
    differing = sum(int((a != b).sum()) for a, b in zip(crops, pictures, strict=True))
    print(f"restored: {differing} of {pictures.size} bytes differ")
    show(crops, batch, pictures, path)
    print("see", path)


if __name__ == "__main__":
    main(*sys.argv[1:2])
