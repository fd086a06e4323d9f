# SPDX-License-Identifier: BSD-3-Clause
"""One batch on several ranks
===========================

:class:`fastbn.SyncBatchNorm` normalises with the statistics of the batches of all ranks. Ranks are
processes that MPI or gloo connects; anything with ``rank``, ``size`` and ``allgather`` does, and
here these are threads.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import numpy as np

import fastbn

SIZE = 3


class Threads:
    """A rank among threads; what they gather lies in one list."""

    size, sent, barrier = SIZE, [None] * SIZE, threading.Barrier(SIZE)

    def __init__(self, rank):
        self.rank = rank

    def allgather(self, array):
        """Return the arrays of all ranks."""
        self.barrier.wait()
        self.sent[self.rank] = array.copy()
        self.barrier.wait()
        return list(self.sent)


# %%
# The ranks have batches of different means and lengths.

rng = np.random.default_rng(0)
parts = [rng.normal(rank, 1.0, (40 * (rank + 1), 1)) for rank in range(SIZE)]


def normalised(rank):
    return fastbn.SyncBatchNorm(1, group=Threads(rank))(parts[rank])


with ThreadPoolExecutor(SIZE) as pool:
    together = list(pool.map(normalised, range(SIZE)))
alone = [fastbn.BatchNorm(1)(part) for part in parts]
whole = fastbn.BatchNorm(1)(np.concatenate(parts))
print("as one batch:", np.allclose(np.concatenate(together), whole, rtol=1e-6))

# %%
# Alone, each rank loses what tells it from the others.

figure, axes = plt.subplots(1, 2, figsize=(6, 3), sharey=True, layout="constrained")
for axis, found, name in zip(axes, (alone, together), ("BatchNorm", "SyncBatchNorm"), strict=True):
    axis.boxplot([values.ravel() for values in found])
    axis.set(title=name, xlabel="rank", xticks=[1, 2, 3], xticklabels=[0, 1, 2])
figure.savefig("sync.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_sync.txt
#    :language: none
#
# .. image:: /recorded/sync.png
#
# sphinx_gallery_thumbnail_path = 'recorded/sync.png'
