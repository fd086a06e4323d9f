# SPDX-License-Identifier: BSD-3-Clause
"""The gallery prints what is recorded of it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted((ROOT / "examples" / "gallery").glob("plot_*.py"))

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="not the repository")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_what_is_recorded(program, monkeypatch):
    # After a change: python -m examples.gallery
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.gallery.__main__ import printed

    recorded = ROOT / "docs" / "recorded" / f"{program.stem}.txt"
    assert printed(program) == recorded.read_text()
