# SPDX-License-Identifier: BSD-3-Clause
"""The data that has broken other implementations."""

import numpy as np


def datasets(n, channels, mean, seed=0):
    """Unit-sized data around a mean, as (name, array of shape (n, channels))."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, channels))

    def changed(*edits):
        x = z + mean
        for where, value in edits:
            x[where] = value
        return x

    yield "normal", z + mean
    yield "sorted", np.sort(z, axis=0) + mean
    yield "ramp", np.linspace(-1, 1, n)[:, None] + np.zeros(channels) + mean
    yield "sparse", np.where(rng.random((n, channels)) < 2 / n + 0.01, z, 0) + mean
    yield "bimodal", np.where(rng.random((n, channels)) < 0.5, 0.1, -0.3) + mean
    yield "after ReLU", np.maximum(z, 0) + mean
    yield "heavy tail", np.exp(2 * z) + mean
    for name, place in ("first", 0), ("middle", n // 2), ("last", -1):
        constant = np.full((n, channels), float(mean))
        constant[place] += 1
        yield f"constant plus one, {name}", constant
        yield f"padded with a zero, {name}", changed((place, 0.0))
        for sigmas in 10, 100, 1e4, 1e6:
            yield f"outlier of {sigmas:g} sigma, {name}", changed((place, mean + sigmas))
    yield "a tenth of padding", changed((slice(n // 10 + 1), 0.0))
    yield "half of padding", changed((slice(n // 2, None), 0.0))
    yield "three outliers", changed((0, 1e4), (n // 4, -1e3), (n // 2, 1e5))
    # Where a block that is the whole channel looks for its pivot.
    probes = [k * (n - 1) // 4 for k in range(5)]
    for sigmas in 30, 1e3, 1e5:
        yield f"outliers of {sigmas:g} sigma at the probes", changed((probes, mean + sigmas))
    yield "zeros at the probes", changed((probes, 0.0))


def layouts(rows):
    """The same channels as rows, as one long run each, and as short planes."""
    n, channels = rows.shape
    yield rows
    yield np.ascontiguousarray(rows.T)[None]
    if n % 32 == 0 and n > 32:
        yield np.ascontiguousarray(rows.reshape(32, n // 32, channels).transpose(0, 2, 1))
