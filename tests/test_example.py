# SPDX-License-Identifier: BSD-3-Clause
"""The example of folding: the network learns, and says the same without normalisation."""

from pathlib import Path

import numpy as np
import pytest

for needed in ("matplotlib", "sklearn", "threadpoolctl", "tqdm"):
    pytest.importorskip(needed)


def test_the_folded_network_agrees(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    import fused_digits

    monkeypatch.setattr(fused_digits, "STEPS", 60)
    train_x, train_y, test_x, test_y = fused_digits.load()
    layers = fused_digits.trained(
        "NHWC", train_x.reshape(-1, 8, 8, 1), train_y, fused_digits.tqdm(disable=True)
    )
    folded = fused_digits.folded_network(layers, "NHWC")
    assert not any(isinstance(layer, fused_digits.Normalisation) for layer in folded)
    images = test_x.reshape(-1, 8, 8, 1)
    ours, theirs = (fused_digits.outputs(network, images) for network in (layers, folded))
    assert np.mean(ours.argmax(axis=1) == test_y) > 0.9
    # Sums of up to 288 products, in another order.
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())
