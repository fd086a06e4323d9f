# SPDX-License-Identifier: BSD-3-Clause
"""Layer, RMS, group and instance norm
===================================

What each of them normalises: over which values of the output is the mean square 1?
"""

import matplotlib.pyplot as plt
import numpy as np

import fastbn

rng = np.random.default_rng(0)
x = rng.normal(0.0, 2.0, (8, 4, 6, 6)) + rng.normal(0.0, 3.0, (8, 4, 1, 1))
dy = rng.normal(size=x.shape)


def show(name, y):
    by = {"instance and channel": (2, 3), "instance": (1, 2, 3), "row": 3, "batch": (0, 2, 3)}
    means = {key: np.mean(y * y, axis=axes) for key, axes in by.items()}
    print(f"{name:8}", ", ".join(key for key, of in means.items() if np.allclose(of, 1, atol=1e-4)))


# %%
# Functions, forward and backward.

y, mean, invstd = fastbn.layer_norm_forward(x, 6)
dx, dweight, dbias = fastbn.layer_norm_backward(dy, x, mean, invstd, 6)
show("layer", fastbn.layer_norm(x, 6))

y, invrms = fastbn.rms_norm_forward(x, 6)
dx, dweight = fastbn.rms_norm_backward(dy, x, invrms, 6)
show("RMS", fastbn.rms_norm(x, 6))

y, mean, invstd = fastbn.group_norm_forward(x, 1)
dx, dweight, dbias = fastbn.group_norm_backward(dy, x, mean, invstd, 1)
show("group", fastbn.group_norm(x, 1))

y, mean, invstd = fastbn.instance_norm_forward(x)
dx, dweight, dbias = fastbn.instance_norm_backward(dy, x, mean, invstd)
show("instance", fastbn.instance_norm(x))

# %%
# Layers.

for layer in (
    fastbn.LayerNorm(6), fastbn.RMSNorm(6), fastbn.GroupNorm(2, 4),
    fastbn.InstanceNorm(4, affine=True),
):  # fmt: skip
    y = layer(x)
    dx = layer.backward(dy)
    print(layer, "has a weight:", layer.weight_grad is not None)

# %%
# The mean of each plane: layer norm makes a row's mean 0, group norm that of two neighbours.

norms = {
    "x": x, "layer": fastbn.layer_norm(x, (4, 6, 6)), "group": fastbn.group_norm(x, 2),
    "instance": fastbn.instance_norm(x),
}  # fmt: skip
figure, axes = plt.subplots(1, 4, figsize=(8, 3), sharey=True, layout="constrained")
for axis, (name, values) in zip(axes, norms.items(), strict=True):
    picture = axis.imshow(values.mean(axis=(2, 3)), vmin=-3, vmax=3, cmap="coolwarm")
    axis.set(title=name, xlabel="channel", xticks=range(4))
axes[0].set_ylabel("instance")
figure.colorbar(picture, label="mean over the plane")
figure.savefig("other_norms.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_other_norms.txt
#    :language: none
#
# .. image:: /recorded/other_norms.png
#
# sphinx_gallery_thumbnail_path = 'recorded/other_norms.png'
