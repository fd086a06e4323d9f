# SPDX-License-Identifier: BSD-3-Clause
"""Running statistics under control
================================

Statistics of the whole data in place of an average over the last batches; batch renormalisation;
layers that stand still.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastbn

rng = np.random.default_rng(0)
batches = rng.normal(3.0, 2.0, (60, 8, 1))

# %%
# The moving average follows each batch of eight; :func:`fastbn.update_statistics` takes all of
# them.

bn = fastbn.BatchNorm(1)
moving = []
for batch in batches:
    bn(batch)
    moving.append(float(bn.running_mean[0]))
number = fastbn.update_statistics([bn], bn, batches)
print(number, "batches; the mean of all:", bool(np.isclose(bn.running_mean[0], batches.mean())))

# %%
# A frozen layer normalises with its running statistics, and leaves them alone.

fastbn.freeze([bn])
before = bn.running_mean.copy()
bn.train()(batches[0] + 100)
print("frozen:", bn.frozen, np.array_equal(before, bn.running_mean))
fastbn.unfreeze([bn])

# %%
# Batch renormalisation trains with what it will use in evaluation, within limits.

renorm = fastbn.BatchRenorm(1, r_max=3.0, d_max=5.0)
for batch in batches:
    renorm(batch)
in_training = renorm(batches[0])
in_evaluation = renorm.eval()(batches[0])
plain = fastbn.BatchNorm(1)(batches[0])
print("renorm is nearer to evaluation:", bool(
    np.abs(in_training - in_evaluation).max() < np.abs(plain - in_evaluation).max()
))  # fmt: skip

# %%
# The picture.

figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
axis.plot(batches.mean(axis=(1, 2)), ".", label="mean of a batch")
axis.plot(moving, label="running mean")
axis.axhline(bn.running_mean[0], color="k", linestyle=":", label="update_statistics")
axis.set_xlabel("batch")
axis.legend(fontsize=8)
figure.savefig("running.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_running.txt
#    :language: none
#
# .. image:: /recorded/running.png
#
# sphinx_gallery_thumbnail_path = 'recorded/running.png'
