# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of a data set in pieces
==================================

Mean and variance of each channel, a piece at a time, in one order or another.
"""

import numpy as np

import fastbn

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (50, 32, 32, 3)).astype(np.float32)

# %%
# :class:`fastbn.BatchStats` has a count, means and sums of squares; they can be added.

pieces = [fastbn.batch_stats(piece, layout="NHWC") for piece in np.array_split(images, 7)]
whole = fastbn.BatchStats.merge(pieces)
print(whole)
print("mean:", whole.mean.round(3))
print("std: ", whole.std().round(3))

# %%
# An array carries them to another process.

sent = [stats.to_array() for stats in pieces]
received = fastbn.BatchStats.merge(fastbn.BatchStats.from_array(array) for array in sent)
print("the same bits:", received.mean.tobytes() == whole.mean.tobytes())

# %%
# It prints:
#
# .. literalinclude:: /recorded/plot_statistics.txt
#    :language: none
