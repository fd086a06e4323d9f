# SPDX-License-Identifier: BSD-3-Clause
"""The oracle against finite differences: it shares no line with what it checks."""

import numpy as np
import oracle
import pytest


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [None, "NHWC"])
def test_backward_is_the_derivative_of_forward(training, layout):
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, 3, 3, 2, 3))
    channels = 3
    weight, bias = rng.standard_normal((2, channels))
    fixed = rng.standard_normal(channels), rng.random(channels) + 0.5

    def loss(x, weight, bias):
        mean, var = oracle.stats(x, layout) if training else fixed
        return (oracle.normalise(x, mean, var, weight, bias, layout=layout) * dy).sum()

    mean, var = oracle.stats(x, layout) if training else fixed
    gradients = oracle.backward(dy, x, mean, 1 / np.sqrt(var + 1e-5), weight, training, layout)
    arguments = [x, weight, bias]
    for k, gradient in enumerate(gradients):
        for index in np.ndindex(gradient.shape):
            step = np.zeros_like(arguments[k])
            step[index] = 1e-6
            up, down = list(arguments), list(arguments)
            up[k], down[k] = arguments[k] + step, arguments[k] - step
            slope = (loss(*up) - loss(*down)) / 2e-6
            assert gradient[index] == pytest.approx(slope, rel=1e-6, abs=1e-8)
