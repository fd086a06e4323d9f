# SPDX-License-Identifier: BSD-3-Clause
"""The gallery prints what is recorded of it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted((ROOT / "examples" / "gallery").glob("plot_*.py"))

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="not the repository")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_what_is_recorded(program, monkeypatch, tmp_path):
    # After a change: python -m examples.gallery
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.gallery.__main__ import printed

    recorded = ROOT / "docs" / "recorded"
    assert printed(program, tmp_path) == (recorded / f"{program.stem}.txt").read_text()
    # The picture itself depends on the version of matplotlib.
    assert [path.name for path in tmp_path.iterdir()] == [f"{program.stem[5:]}.png"]
    assert (recorded / f"{program.stem[5:]}.png").exists()
