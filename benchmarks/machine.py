# SPDX-License-Identifier: BSD-3-Clause
"""Where and by which command a run was made: what its results begin with."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path

import fastbn

PACKAGES = (
    "numpy",
    "torch",
    "onnxruntime",
    "jax",
    "onednn-cpu-gomp",
    "opencv-python-headless",
    "torchvision",
)


def machine() -> dict[str, object]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    config = fastbn.show_config()
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "processors": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "fastbn": config["version"],
        "compiler": config["compiler"],
        "versions": versions,
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if "model name" in line:
            return line.split(": ")[1]
    return platform.processor() or platform.machine()


def command(module: str) -> str:
    """Return the command that runs, without where its output goes."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--output")
    _, kept = parser.parse_known_args(sys.argv[1:])
    return shlex.join(["python", "-m", module, *kept])
