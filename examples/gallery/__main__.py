# SPDX-License-Identifier: BSD-3-Clause
"""Run every program of the gallery; keep what it prints and draws in docs/recorded."""

import contextlib
import io
import runpy
import tempfile
from pathlib import Path

import matplotlib

HERE = Path(__file__).parent
RECORDED = HERE.parent.parent / "docs" / "recorded"


def printed(program, folder):
    """Return what a program prints; its picture is left in the folder."""
    matplotlib.use("agg")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(program))
    from matplotlib import pyplot

    pyplot.close("all")
    return out.getvalue()


if __name__ == "__main__":
    RECORDED.mkdir(exist_ok=True)
    for program in sorted(HERE.glob("plot_*.py")):
        with tempfile.TemporaryDirectory() as folder:
            text = printed(program, folder)
            (picture,) = Path(folder).glob("*.png")
            (RECORDED / picture.name).write_bytes(picture.read_bytes())
        (RECORDED / f"{program.stem}.txt").write_text(text)
        print(program.stem)
