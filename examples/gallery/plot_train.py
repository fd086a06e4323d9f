# SPDX-License-Identifier: BSD-3-Clause
"""Train a network with a layer
============================

Two linear layers learn which of two spirals a point is on, with :class:`fastbn.BatchNorm`
between them. The layer also does the ReLU, in the same pass.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastbn

rng = np.random.default_rng(0)
angle = rng.uniform(0.5, 3 * np.pi, 600)
label = rng.integers(0, 2, 600)
x = np.stack([angle * np.cos(angle + np.pi * label), angle * np.sin(angle + np.pi * label)], axis=1)

# %%
# The layer keeps what its backward needs; its gradients are set, not added to.

first, last = rng.normal(size=(2, 64)), rng.normal(size=(64, 1)) / 8
bn = fastbn.BatchNorm(64, activation="relu", dtype=np.float64)
for _ in range(600):
    hidden = bn(x @ first)
    score = hidden @ last
    chance = 1 / (1 + np.exp(-score))
    dscore = (chance - label[:, None]) / len(x)
    dfirst = x.T @ bn.backward(dscore @ last.T)
    first -= 3 * dfirst
    last -= 3 * hidden.T @ dscore
    bn.weight -= 3 * bn.weight_grad
    bn.bias -= 3 * bn.bias_grad

# %%
# In evaluation it uses running statistics, so that one point is enough.

bn.eval()
guess = (bn(x @ first) @ last)[:, 0] > 0
print("more than 85% correct:", bool(np.mean(guess == label) > 0.85))
print(bn)
print(sorted(bn.state_dict()))

# %%
# The points, and what the network takes each place for.

side = np.linspace(-10, 10, 81)
grid = np.stack(np.meshgrid(side, side), axis=-1)
area = (bn(grid.reshape(-1, 2) @ first) @ last).reshape(81, 81) > 0
figure, axis = plt.subplots(figsize=(4, 4), layout="constrained")
axis.contourf(side, side, area, levels=1, colors=("C0", "C1"), alpha=0.3)
axis.scatter(*x.T, c=np.where(label, "C1", "C0"), s=5)
figure.savefig("train.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_train.txt
#    :language: none
#
# .. image:: /recorded/train.png
#
# sphinx_gallery_thumbnail_path = 'recorded/train.png'
