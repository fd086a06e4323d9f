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
    n, first, second = len(pixels), pixels.sum(0, np.int64), (pixels.astype(int) ** 2).sum(0)
    exact = [(n * int(b) - int(a) ** 2) / n**2 for a, b in zip(first, second, strict=True)]
    np.testing.assert_allclose(stats.mean, first / n, rtol=1e-15)
    np.testing.assert_allclose(stats.var(), exact, rtol=1e-15)
    assert (np.mean([part.std() for part in parts], axis=0) < stats.std()).all()
    images.main(tmp_path / "images.png")
    assert (tmp_path / "images.png").stat().st_size > 10_000
    assert "restored: 0 of" in capsys.readouterr().out
