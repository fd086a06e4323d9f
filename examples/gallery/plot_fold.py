# SPDX-License-Identifier: BSD-3-Clause
"""Fold batch norm into its neighbours
===================================

In inference batch norm is a multiplication and an addition for each channel, which the linear
layer or convolution beside it can do.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastbn

rng = np.random.default_rng(0)
x = rng.normal(size=(100, 32))
kernel = rng.normal(size=(16, 32))  # "OI": a linear layer, as PyTorch keeps it
bn = fastbn.BatchNorm(16, dtype=np.float64)
bn(x @ kernel.T + 3)
bn.eval()
state = (bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)

# %%
# Into the layer before it.

fold_before = fastbn.fold_batch_norm(kernel, np.full(16, 3.0), *state, kernel_layout="OI")
difference = np.abs(x @ fold_before[0].T + fold_before[1] - bn(x @ kernel.T + 3)).max()
print("before: largest difference below 1e-12:", bool(difference < 1e-12))

# %%
# Into the layer behind it.

behind = rng.normal(size=(10, 16))
folded, bias = fastbn.fold_batch_norm_into_next(behind, None, *state, kernel_layout="OI")
h = rng.normal(size=(100, 16))
difference = np.abs(h @ folded.T + bias - bn(h) @ behind.T).max()
print("behind: largest difference below 1e-12:", bool(difference < 1e-12))

# %%
# By hand.

scale, shift = fastbn.scale_shift(*state)
difference = np.abs(h * scale + shift - bn(h)).max()
print("by hand: largest difference below 1e-12:", bool(difference < 1e-12))

# %%
# The picture.

figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
before = x @ kernel.T + 3
axes[0].scatter(bn(before), x @ fold_before[0].T + fold_before[1], s=2)
axes[0].set(xlabel="layer, then batch norm", ylabel="the folded layer")
axes[1].bar(range(16), scale, label="scale")
axes[1].bar(range(16), shift, alpha=0.6, label="shift")
axes[1].set(xlabel="channel")
axes[1].legend(fontsize=8)
figure.savefig("fold.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_fold.txt
#    :language: none
#
# .. image:: /recorded/fold.png
#
# sphinx_gallery_thumbnail_path = 'recorded/fold.png'
