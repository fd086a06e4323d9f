# SPDX-License-Identifier: BSD-3-Clause
"""The layers of the claims have right gradients; the identity of the norm of dx; the records.

The experiments themselves are not run here, but for their shortest parts.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "claims"
STEP = 2.0**-17  # of finite differences: few kinks of ReLU lie within it

for needed in ("matplotlib", "sklearn", "threadpoolctl"):
    pytest.importorskip(needed)
if not RECORDS.exists():
    pytest.skip("not the repository", allow_module_level=True)


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def widened(network):
    """Make all parameters float64, so that finite differences say something."""
    for layer in network.walk():
        for name in ("weight", "bias", "of_x", "of_h"):
            if hasattr(layer, name):
                setattr(layer, name, getattr(layer, name).astype(np.float64))
        for norm in getattr(layer, "norms", ()):
            norm.weight = norm.weight.astype(np.float64)
        if hasattr(layer, "_clear"):
            layer._clear()
    return network


def network_of(name, rng):
    from examples.claims import layers, recurrent

    if name == "LSTM":
        return recurrent.network("batch", rng, hidden=4), rng.normal(size=(7, 16, 4))
    if name == "sigmoids":
        return layers.mlp("batch", (5, 6, 6, 3), rng, layers.Sigmoid), rng.normal(size=(9, 5))
    if name == "residual":
        block = layers.Residual(layers.Conv(2, 2, rng), layers.norm("group", 2), layers.ReLU())
        tail = (layers.GlobalAverage(), layers.Linear(2, 3, rng))
        return layers.Sequential(block, *tail), rng.normal(size=(4, 5, 5, 2))
    return layers.convolutional(name, 3, rng, (4, 8)), rng.normal(size=(4, 6, 6, 1))


@pytest.mark.parametrize("name", ["batch", "group", "layer", None, "sigmoids", "residual", "LSTM"])
def test_gradients(name):
    from examples.claims import layers

    rng = np.random.default_rng(0)
    network, x = network_of(name, rng)
    network, labels = widened(network), rng.integers(0, 3, len(x))
    _, dlogits = layers.cross_entropy(network(x), labels)
    network.backward(dlogits)
    pairs = [(parameter, gradient.copy()) for parameter, gradient in network.parameters()]
    for parameter, gradient in pairs:
        direction = rng.normal(size=parameter.shape).astype(parameter.dtype)
        losses = []
        # Parameters of fastbn's layers are float32: the step has to be one there, too.
        for sign in (1, -2):
            parameter += parameter.dtype.type(sign * STEP) * direction
            losses.append(layers.cross_entropy(network(x), labels)[0])
        parameter += parameter.dtype.type(STEP) * direction
        slope = (losses[0] - losses[1]) / (2 * STEP)
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-2, atol=2e-4)


def test_renorm_in_the_limit_is_its_evaluation():
    # Where r and d are not cut off, training gives what evaluation gives.
    from examples.claims import layers

    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 2.0, (64, 4)).astype(np.float32)
    norm = layers.BatchRenorm(4, r_max=1e3, d_max=1e3)
    norm.steps = 1000
    norm.running_mean[:], norm.running_var[:] = rng.normal(size=4), rng.uniform(1, 9, 4)
    norm.weight[:], norm.bias[:] = rng.normal(size=(2, 4))
    before = norm.running_mean.copy(), norm.running_var.copy()
    y = norm(x)
    norm.running_mean[:], norm.running_var[:] = before
    norm.train(False)
    np.testing.assert_allclose(norm(x), y, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(3, 300), eps=st.sampled_from([1e-5, 1.0]))
def test_the_norm_of_dx(seed, n, eps):
    # Santurkar et al. 2018, theorem 4.1, as an equation that holds for any eps.
    from examples.claims.santurkar import norm_of_dx

    computed, expected = norm_of_dx(np.random.default_rng(seed), n, 3, eps)
    np.testing.assert_allclose(computed, expected, rtol=1e-7, atol=1e-12)


def test_the_scale_of_weights_cancels():
    from examples.claims.ioffe_szegedy import normalised

    rng = np.random.default_rng(0)
    x, weight, dy = (rng.standard_normal(shape) for shape in ((64, 8), (8, 4), (64, 4)))
    y, dweight = normalised(x, weight, dy)
    y_scaled, dweight_scaled = normalised(x, 1e6 * weight, dy)
    np.testing.assert_allclose(y_scaled, y, rtol=1e-4)
    np.testing.assert_allclose(1e6 * dweight_scaled, dweight, rtol=1e-4)


# ---- the page, and the records it is made from ---------------------------------------------


def test_the_tables_are_those_of_the_records():
    # After a new measurement: python -m examples.claims --tables
    from examples.claims import report

    page = (ROOT / "docs" / "claims.md").read_text()
    assert report.with_tables(page, RECORDS) == page
    assert re.findall(r"<!-- table: (\w+) -->", page) == list(report.NAMES)


def test_every_claim_has_a_small_picture():
    from examples.claims import report

    for name in report.NAMES:
        assert 0 < (RECORDS / f"{name}.png").stat().st_size < 60_000
