# SPDX-License-Identifier: BSD-3-Clause
"""Claim 6: Kohler et al. 2018: batch normalisation takes length and direction apart.

A linear unit with batch norm is g x'w / |w|_S, with the direction w and the length g. For least
squares and halfspaces: plain gradient descent on the weights against gradient descent on w with
the best g at each step (GDNP), and against gradient descent on both w and g.
"""

import numpy as np

import fastbn
from examples.claims import report
from examples.claims.report import Finding, number, spread, verdict

TITLE = "6. Length and direction apart: rates of convergence"
SOURCE = "Kohler et al. 2018"
EPS = 1e-20  # nearly none: the theory has none


def regression():
    """Return scikit-learn's diabetes data: centred x of ten columns, y of unit variance."""
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True)
    return (x - x.mean(axis=0)) * np.sqrt(len(x)), (y - y.mean()) / y.std()


def halfspace(components=20):
    """Return digits, as their first principal components, and whether each is odd (1, -1)."""
    from sklearn.datasets import load_digits

    x, digit = load_digits(return_X_y=True)
    x = x - x.mean(axis=0)
    _, singular, directions = np.linalg.svd(x, full_matrices=False)
    x = x @ directions[:components].T
    return x / (singular[0] / np.sqrt(len(x))), np.where(digit % 2 == 1, 1.0, -1.0)


class Objective:
    """A mean over the data of a function of the unit's output."""

    def __init__(self, x, y):
        self.x, self.y = x, y
        self.largest = np.linalg.eigvalsh(x.T @ x / len(x))[-1]

    def gradient(self, w):
        return self.x.T @ self.slope(self.x @ w)

    def normalised(self, w):
        """Return x w with zero mean and unit variance, and what its backward needs."""
        u = (self.x @ w)[:, None]
        z, mean, invstd = fastbn.batch_norm_forward(u, eps=EPS)
        return z[:, 0], (u, mean, invstd)

    def direction_gradient(self, g, z, saved):
        u, mean, invstd = saved
        dz = (g * self.slope(g * z))[:, None]
        du, _, _ = fastbn.batch_norm_backward(dz, u, mean, invstd)
        return self.x.T @ du[:, 0]

    def weights(self, w, g):
        """Return the weights of the plain unit with the same output."""
        return g * w / (self.x @ w).std()


class LeastSquares(Objective):
    """Half the mean of (output - y)²."""

    def value(self, u):
        return 0.5 * np.mean((u - self.y) ** 2)

    def slope(self, u):
        return (u - self.y) / len(u)

    def best_length(self, z):
        return float(np.mean(z * self.y))

    def best(self):
        w = np.linalg.lstsq(self.x, self.y, rcond=None)[0]
        return self.value(self.x @ w)


class Halfspace(Objective):
    """The mean of sigmoid(-y output): smooth, bounded, and not convex."""

    def value(self, u):
        return np.mean(1 / (1 + np.exp(self.y * u)))

    def slope(self, u):
        s = 1 / (1 + np.exp(self.y * u))
        return -self.y * s * (1 - s) / len(u)

    def best_length(self, z):
        low, high = -50.0, 50.0
        for _ in range(50):  # bisection, as in the paper
            g = (low + high) / 2
            low, high = (low, g) if np.dot(self.slope(g * z), z) > 0 else (g, high)
        return (low + high) / 2


def plain(objective, w, rate, steps):
    """Gradient descent; the rate is in units of 1 / (largest eigenvalue of S)."""
    for _ in range(steps):
        yield w
        w = w - rate / objective.largest * objective.gradient(w)


def gdnp(objective, w, rate, steps):
    """Gradient descent on the direction, with the best length before each step.

    The step has a factor |w|²_S: so it does not depend on the scale of w.
    """
    for _ in range(steps):
        z, saved = objective.normalised(w)
        g = objective.best_length(z)
        yield objective.weights(w, g)
        square = np.var(saved[0])
        step = rate / objective.largest * square / max(g * g, 1e-12)
        w = w - step * objective.direction_gradient(g, z, saved)


def both(objective, w, rate, steps):
    """Gradient descent on the direction and on the length, as a network has it."""
    g = 1.0
    for _ in range(steps):
        z, saved = objective.normalised(w)
        yield objective.weights(w, g)
        dg = float(np.dot(objective.slope(g * z), z))
        w = w - rate / objective.largest * np.var(saved[0]) * objective.direction_gradient(
            g, z, saved
        )
        g -= rate * dg


ARMS = {"plain": plain, "normalised (GDNP)": gdnp, "normalised, w and g": both}


def first_below(curve, limit):
    below = np.asarray(curve) <= limit
    return float(below.argmax()) if below.any() else np.inf


def compare(objective, measure, limit, rates, steps, seeds, axis):
    """Return the iterations to the limit of each arm, at its best rate; draw the curves."""
    found = {}
    for label, descend in ARMS.items():
        curves = {}
        for rate in rates:
            curves[rate] = []
            for seed in range(seeds):
                start = np.random.default_rng(seed).standard_normal(objective.x.shape[1])
                with np.errstate(all="ignore"):
                    curve = [measure(w) for w in descend(objective, start, rate, steps)]
                curves[rate].append(np.nan_to_num(curve, nan=1e30, posinf=1e30))
        best = min(
            rates,
            key=lambda rate: (
                np.median([first_below(curve, limit) for curve in curves[rate]]),
                np.median([curve[-1] for curve in curves[rate]]),
            ),
        )
        found[label] = best, [first_below(curve, limit) for curve in curves[best]], curves[best]
        report.band(axis, range(steps), np.maximum(curves[best], 1e-14), f"{label}, {best:g}")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    return found


def words(found):
    return ", ".join(f"{label} {spread(steps)} at {number(rate)}/L"
                     for label, (rate, steps, _) in found.items())  # fmt: skip


def per_step(curves):
    """Return the factor of a step, over the second half of what is above rounding."""
    factors = []
    for curve in curves:
        end = int(np.argmax(np.asarray(curve) < 1e-10)) or len(curve) - 1
        factors.append((curve[end] / curve[end // 2]) ** (1 / max(end - end // 2, 1)))
    return factors


def measure(quick):
    """Return findings and a picture."""
    seeds, steps = (2, 300) if quick else (5, 1500)
    picture, axes = report.figure(2)
    squares = LeastSquares(*regression())
    least = squares.best()
    rates = (0.25, 0.5, 1.0, 1.5, 1.9, 4.0)
    found = compare(squares, lambda w: squares.value(squares.x @ w) - least, 1e-6, rates, steps,
                    seeds, axes[0])  # fmt: skip
    report.titled(axes[0], "least squares, diabetes", "step", "loss above the least")
    four = "{:.4f}".format
    factors = {label: per_step(curves) for label, (_, _, curves) in found.items()}
    medians = {label: np.median(steps) for label, (_, steps, _) in found.items()}
    findings = [
        Finding(
            "least squares (diabetes)", f"{SOURCE}, section 3",
            "the normalised problem is not convex, but descent converges linearly, at the rate "
            "that plain descent has on the convex one",
            f"steps to 1e-6 above the least: {words(found)}; factor of a step: "
            + ", ".join(f"{label} {spread(of, four)}" for label, of in factors.items()),
            verdict(np.median(factors["normalised (GDNP)"]) < 0.9999
                    and medians["normalised (GDNP)"] <= 2 * medians["plain"]),
        )
    ]  # fmt: skip
    half = Halfspace(*halfspace())
    # Steps of 1024/L and more end where sigmoids are flat: small gradients, and a larger loss.
    rates = (0.0625, 0.25, 1.0, 4.0, 16.0, 64.0, 256.0)
    found = compare(half, lambda w: float(np.linalg.norm(half.gradient(w))), 1e-5, rates, steps,
                    seeds, axes[1])  # fmt: skip
    report.titled(axes[1], "halfspace, odd digits", "step", "norm of the gradient")
    medians = {label: np.median(steps) for label, (_, steps, _) in found.items()}
    findings.append(Finding(
        "halfspaces (is a digit odd?)", f"{SOURCE}, section 4",
        "descent on the direction with the best length converges linearly, plain descent "
        "sublinearly (for Gaussian x)",
        f"steps to a gradient of 1e-5: {words(found)}",
        verdict(medians["normalised (GDNP)"] < medians["plain"],
                seen=min(medians["normalised (GDNP)"], medians["plain"]) < np.inf),
    ))  # fmt: skip
    return findings, picture


if __name__ == "__main__":
    report.main(__file__, __doc__)
