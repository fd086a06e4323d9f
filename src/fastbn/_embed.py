# SPDX-License-Identifier: BSD-3-Clause
"""For those who call fastbn from C, C++ or Cython: where the header is."""

from pathlib import Path


def get_include() -> str:
    """Return the directory of ``fastbn.h``, the interface for C, C++ and Cython.

    Returns
    -------
    str
        For the ``include_dirs`` of an extension module. ``cimport fastbn`` declares
        the same in Cython.

    Examples
    --------
    >>> import os
    >>> import fastbn
    >>> sorted(os.listdir(fastbn.get_include()))
    ['fastbn.h']
    """
    return str(Path(__file__).parent / "include")
