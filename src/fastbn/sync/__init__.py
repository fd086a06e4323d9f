# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm over the batches of several processes together.

    functional.py   names, defaults, documentation
    _exchange.py    what is sent, and how it is merged
    _groups.py      MPI's communicators, PyTorch's process groups, others

The public names, nothing else. docs/distributed.md explains it.
"""

from fastbn.sync.functional import batch_norm_backward, batch_norm_forward

__all__ = ["batch_norm_backward", "batch_norm_forward"]
