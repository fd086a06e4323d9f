# SPDX-License-Identifier: BSD-3-Clause
"""Claim 4: Yang et al. 2019: with batch norm and without skip connections, gradients explode."""

import numpy as np

from examples.claims import layers, report, training
from examples.claims.report import Finding, spread, verdict

TITLE = "4. Gradients explode with depth, by pi / (pi - 1) in the square per ReLU layer"
SOURCE = "Yang et al. 2019"
THEORY = np.pi / (np.pi - 1)


def stack(kind, skips, depth, width, rng):
    """Blocks of linear layer, norm and ReLU."""
    block = layers.Residual if skips else layers.Sequential
    return [block(layers.Linear(width, width, rng), layers.norm(kind, width), layers.ReLU())
            for _ in range(depth)]  # fmt: skip


def gradients(kind, skips, depth, width, batch, seed):
    """Return the squared norm of the gradient by the input of each block, at initialisation."""
    rng = np.random.default_rng([seed, 0])
    images = training.digits().flat().train_x
    lift = layers.Linear(64, width, rng)
    x = lift(images[rng.permutation(len(images))[:batch]])
    blocks = stack(kind, skips, depth, width, rng)
    for block in blocks:
        x = block(x)
    dy, norms = rng.standard_normal(x.shape).astype(np.float32), []
    for block in reversed(blocks):
        dy = block.backward(dy)
        norms.append(float((dy.astype(float) ** 2).sum()))
    return norms  # from the last block to the first


def factor(norms):
    """Return the growth per block, of the middle blocks: away from the data and the loss."""
    logs = np.log(norms)
    part = slice(len(logs) // 4, len(logs) * 3 // 4)
    return float(np.exp(np.polyfit(np.arange(len(logs))[part], logs[part], 1)[0]))


def measure(quick):
    """Return findings and a picture."""
    seeds, depth, width, batch = (2, 24, 256, 256) if quick else (5, 40, 512, 512)
    picture, axes = report.figure(2)
    arms = {
        "batch norm": ("batch", False), "batch norm and skips": ("batch", True),
        "no norm": (None, False),
    }  # fmt: skip
    found = {}
    for label, (kind, skips) in arms.items():
        curves = [gradients(kind, skips, depth, width, batch, seed) for seed in range(seeds)]
        found[label] = [factor(curve) for curve in curves]
        curves = [np.array(curve) / curve[0] for curve in curves]
        report.band(axes[0], range(1, depth + 1), curves, label)
    axes[0].plot(range(1, depth + 1), THEORY ** np.arange(depth), "k:", label="1.467 per layer")
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    report.titled(axes[0], f"width {width}, batch {batch}", "layers below the loss",
                  "squared gradient norm")  # fmt: skip
    batches = [b for b in (4, 8, 16, 32, 64, 128, 256, 512) if b <= batch]
    over = [[factor(gradients("batch", False, 24, 256, b, seed)) for b in batches]
            for seed in range(seeds)]  # fmt: skip
    report.band(axes[1], batches, over, "measured")
    axes[1].axhline(THEORY, color="k", linestyle=":", label="pi / (pi - 1)")
    axes[1].set_xscale("log")
    axes[1].legend(fontsize=8)
    report.titled(axes[1], "width 256, 24 layers", "batch size", "growth per layer")
    slope = np.median(found["batch norm"])
    by_batch = ", ".join(
        f"{b}: {np.median(of):.3f}" for b, of in zip(batches, np.transpose(over), strict=True)
    )
    three = "{:.3f}".format
    findings = [
        Finding(
            f"growth of the squared gradient per layer, {depth} layers of {width}, batch {batch}",
            f"{SOURCE}, theorem on ReLU", f"{THEORY:.3f} for wide layers and large batches",
            f"{spread(found['batch norm'], three)}; by batch size (width 256): {by_batch}",
            verdict(abs(slope / THEORY - 1) < 0.05),
        ),
        Finding(
            "the same without normalisation", "He et al. 2015",
            "1 for He's initialisation", spread(found["no norm"], three),
            verdict(abs(np.median(found["no norm"]) - 1) < 0.05),
        ),
        Finding(
            "skip connections", f"{SOURCE}, introduction and section on residual networks",
            "tame the explosion: polynomial in depth instead of exponential",
            f"{spread(found['batch norm and skips'], three)} per block",
            verdict(np.median(found["batch norm and skips"]) < 1 + (slope - 1) / 2),
        ),
    ]  # fmt: skip
    return findings, picture


if __name__ == "__main__":
    report.main(__file__, __doc__)
