# SPDX-License-Identifier: BSD-3-Clause
"""Statistics of a data set in pieces
==================================

Mean and variance of each channel, a piece at a time, in one order or another.
"""

import matplotlib.pyplot as plt
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
# The variance of values far from zero, beside the difference of two large numbers.

errors = {"fastbn": [], "E[x²] - E[x]², float32": []}
ratios = 10.0 ** np.arange(0, 5)
for ratio in ratios:
    values = rng.normal(ratio, 1.0, (100_000, 1)).astype(np.float32)
    true = np.var(values, dtype=np.float64)
    naive = np.mean(values * values) - np.mean(values) ** 2
    for name, found in zip(errors, (fastbn.batch_stats(values).var()[0], naive), strict=True):
        errors[name].append(max(abs(found / true - 1), 1e-17))
figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
for name, of in errors.items():
    axis.loglog(ratios, of, "o-", label=name)
axis.set(xlabel="mean over standard deviation", ylabel="relative error of the variance")
axis.legend(fontsize=8)
figure.savefig("statistics.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_statistics.txt
#    :language: none
#
# .. image:: /recorded/statistics.png
#
# sphinx_gallery_thumbnail_path = 'recorded/statistics.png'
