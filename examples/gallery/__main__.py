# SPDX-License-Identifier: BSD-3-Clause
"""Run every program of the gallery, and write what it prints to docs/recorded."""

import contextlib
import io
import runpy
from pathlib import Path

HERE = Path(__file__).parent


def printed(program):
    """Return what a program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(program))
    return out.getvalue()


if __name__ == "__main__":
    for program in sorted(HERE.glob("plot_*.py")):
        output = HERE.parent.parent / "docs" / "recorded" / f"{program.stem}.txt"
        output.parent.mkdir(exist_ok=True)
        output.write_text(printed(program))
        print(output.name)
