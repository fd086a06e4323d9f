# SPDX-License-Identifier: BSD-3-Clause
"""Batch normalisation for NumPy arrays, on the CPU, at the speed of memory.

The public names, nothing else.
"""

from fastbn import _forks  # noqa: F401  It has to look before OpenMP is loaded.
from fastbn._build import VERSION as __version__
from fastbn._dispatch import show_config
from fastbn._threads import get_num_threads, set_num_threads, threads
from fastbn.functional import batch_norm, batch_norm_backward, batch_norm_forward, batch_stats
from fastbn.layers import BatchNorm
from fastbn.stats import BatchStats

__all__ = [
    "BatchNorm",
    "BatchStats",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_stats",
    "get_num_threads",
    "set_num_threads",
    "show_config",
    "threads",
]
