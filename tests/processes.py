# SPDX-License-Identifier: BSD-3-Clause
"""Code in a process of its own, for tests of what a process sees only once."""

import os
import signal
import subprocess
import sys


def run(code, **environment):
    """Run code in a process of its own; return what it printed, or raise."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        # Its children, too: a forked one that hangs would stay for ever.
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(error)
    return out.strip()
