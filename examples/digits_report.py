# SPDX-License-Identifier: BSD-3-Clause
"""What digits_mpi.py and digits_ddp.py share: arguments, curves, a picture. No training."""

import argparse

import digits
import numpy as np
from matplotlib.figure import Figure


def draw(curves, path):
    """Loss and test accuracy against step, of each of the two ways."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for (label, (losses, accuracies)), style in zip(curves.items(), ("-", "--"), strict=True):
        panels[0].plot(np.arange(1, len(losses) + 1), losses, style, label=label)
        steps = digits.EVALUATE_EVERY * np.arange(1, len(accuracies) + 1)
        panels[1].plot(steps, accuracies, style, label=label)
    for panel, title in zip(panels, ("training loss", "test accuracy"), strict=True):
        panel.set(title=title, xlabel="training step")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)


def report(curves, path):
    """Print how far the curves are apart, and draw them."""
    draw(curves, path)
    (losses, accuracies), (losses_of_one, accuracies_of_one) = curves.values()
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
    print(f"largest difference of the losses: {np.abs(losses - losses_of_one).max():.1e}")
    print(f"largest difference of the accuracies: {abs(accuracies - accuracies_of_one).max():.1e}")
    print(f"test accuracy: {accuracies[-1]:.1%}\nCurves: {path}")


def parse(description, path):
    """Return the arguments that both examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=100, help="training steps (default: 100)")
    parser.add_argument("--out", default=path, help=f"the picture (default: {path})")
    return parser.parse_args()
