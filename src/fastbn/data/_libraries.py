# SPDX-License-Identifier: BSD-3-Clause
"""Imports of optional libraries, whose absence is told with the extra that brings them."""

import importlib
from typing import Any


def library(name: str, extra: str = "data") -> Any:
    """Return the module, or raise an ImportError that names the extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'{name} cannot be imported ({error}); pip install "fastbn[{extra}]"'
        ) from error
