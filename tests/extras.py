# SPDX-License-Identifier: BSD-3-Clause
"""Optional libraries: without one, its tests skip; with FASTBN_REQUIRE_EXTRAS=1 they fail."""

import importlib
import os

import pytest


def need(name):
    """Return the module of a library, or skip the test."""
    if os.environ.get("FASTBN_REQUIRE_EXTRAS") == "1":
        return importlib.import_module(name)
    return pytest.importorskip(name)
