# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the C that the benchmark needs, and finds oneDNN. No part of the package."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def _compiled(source: str, *flags: str) -> ctypes.CDLL:
    command = [os.environ.get("CC", "cc"), "-O3", "-march=native", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, f"{source}.so")
        subprocess.run([*command, str(HERE / source), "-o", str(library), *flags], check=True)
        return ctypes.CDLL(str(library))


@functools.cache
def copies() -> ctypes.CDLL:
    """Return copies.c, compiled."""
    library = _compiled("copies.c", "-fopenmp")
    library.copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3]
    library.copy.restype = None
    return library


def _onednn_library() -> str | None:
    # onednn-cpu-gomp puts it into the environment's lib folder.
    inside = Path(sys.prefix, "lib", "libdnnl.so.3")
    if inside.exists():
        return str(inside)
    found = ctypes.util.find_library("dnnl")
    return found if found and found.endswith(".so.3") else None


@functools.cache
def onednn() -> ctypes.CDLL:
    """Return onednn.c, compiled; ImportError where there is no oneDNN 3."""
    path = _onednn_library()
    if path is None:
        raise ImportError("no libdnnl.so.3")
    flags = [path, f"-Wl,-rpath,{Path(path).parent}"] if "/" in path else [f"-l:{path}"]
    library = _compiled("onednn.c", *flags)
    library.norm_prepare.argtypes = [
        *[ctypes.c_int] * 6, ctypes.c_void_p, ctypes.c_float, *[ctypes.c_void_p] * 9,
    ]  # fmt: skip
    library.norm_prepare.restype = ctypes.c_void_p
    library.norm_run.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.norm_free.argtypes = [ctypes.c_void_p]
    library.norm_implementation.argtypes = [ctypes.c_void_p]
    library.norm_implementation.restype = ctypes.c_char_p
    return library
