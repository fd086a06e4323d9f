# SPDX-License-Identifier: BSD-3-Clause
"""Fold batch norm into its neighbours
===================================

In inference batch norm is a multiplication and an addition for each channel, which the linear
layer or convolution beside it can do.
"""

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

folded, bias = fastbn.fold_batch_norm(kernel, np.full(16, 3.0), *state, kernel_layout="OI")
difference = np.abs(x @ folded.T + bias - bn(x @ kernel.T + 3)).max()
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
# It prints:
#
# .. literalinclude:: /recorded/plot_fold.txt
#    :language: none
