# SPDX-License-Identifier: BSD-3-Clause
"""Images: exact statistics, and one pass to floats
=================================================

Bytes go in as they are. Their statistics are sums of integers, and normalisation writes floats in
another layout in the same pass.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastbn

rng = np.random.default_rng(0)
row = np.linspace(40, 200, 48)
scene = np.stack(np.broadcast_arrays(row, row[:, None], 128.0), axis=-1)
images = (scene + rng.integers(-30, 30, (20, 48, 48, 3))).astype(np.uint8)

# %%
# Batch after batch, as a loader gives them. The order changes no bit.

total = fastbn.StatsAccumulator(layout="NHWC")
backwards = fastbn.StatsAccumulator(layout="NHWC")
for batch in np.array_split(images, 4):
    total.update(batch)
for batch in np.array_split(images, 3)[::-1]:
    backwards.update(batch)
stats = total.result()
print(stats)
print("the same bits:", stats.var().tobytes() == backwards.result().var().tobytes())

# %%
# Bytes in NHWC become float32 in NCHW, and come back.

x = fastbn.normalize(images, stats.mean, stats.std(), layout="NHWC", out_layout="NCHW")
print(x.dtype, x.shape)
back = fastbn.denormalize(x, stats.mean, stats.std(), layout="NCHW", out_layout="NHWC")
print("every byte is back:", np.array_equal(back, images))

# %%
# The first image, and its first channel normalised.

figure, axes = plt.subplots(1, 2, figsize=(6, 3), layout="constrained")
axes[0].imshow(images[0])
drawn = axes[1].imshow(x[0, 0], cmap="coolwarm", vmin=-2.5, vmax=2.5)
figure.colorbar(drawn)
figure.savefig("images.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_images.txt
#    :language: none
#
# .. image:: /recorded/images.png
#
# sphinx_gallery_thumbnail_path = 'recorded/images.png'
