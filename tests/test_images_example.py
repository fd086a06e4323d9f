# SPDX-License-Identifier: BSD-3-Clause
"""The example of images: what it restores is what it read, and averages fall short."""

from pathlib import Path

import numpy as np
import pytest

for needed in ("matplotlib", "skimage", "sklearn"):
    pytest.importorskip(needed)


def test_images(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    import images

    photographs = images.photographs()
    stats, parts = images.statistics(photographs)
    pixels = np.concatenate([image.reshape(-1, 3) for image in photographs])
    np.testing.assert_allclose(stats.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.var(), pixels.var(0), rtol=1e-12)
    assert (np.mean([part.std() for part in parts], axis=0) < stats.std()).all()
    images.main(tmp_path / "images.png")
    assert (tmp_path / "images.png").stat().st_size > 10_000
    assert "restored: 0 of" in capsys.readouterr().out
