# SPDX-License-Identifier: BSD-3-Clause
"""Batch norm as functions
=======================

Forward, backward and inference without a layer: the arrays are the caller's.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastbn

rng = np.random.default_rng(0)
x = rng.normal(3.0, 2.0, (16, 8, 8, 4)).astype(np.float32)
residual = rng.normal(size=x.shape).astype(np.float32)
running_mean, running_var = np.zeros(4, np.float32), np.ones(4, np.float32)

# %%
# Training: the running arrays are moved in place. Addition and ReLU are in the same pass.

y, mean, invstd = fastbn.batch_norm_forward(
    x, running_mean=running_mean, running_var=running_var, layout="NHWC", activation="relu",
    residual=residual,
)  # fmt: skip
print("mean of the batch:", mean.round(2))
print("running mean:     ", running_mean.round(2))

# %%
# Backward takes the same arguments, and computes again what the ReLU saw.

dy = np.ones_like(y)
dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(
    dy, x, mean, invstd, layout="NHWC", activation="relu", residual=residual
)
print("dbias:", dbias)
print("share of positive outputs:", f"{np.mean(dresidual):.3f}")

# %%
# Inference, into memory that is there already.

z = np.empty_like(x)
fastbn.batch_norm(x, running_mean, running_var, layout="NHWC", out=z)

# %%
# The picture.

figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
normalised = fastbn.batch_norm_forward(x, layout="NHWC")[0]
for values, name in ((x, "x"), (normalised, "normalised"), (y, "and with addition and ReLU")):
    axis.hist(values[..., 0].ravel(), bins=40, alpha=0.5, label=name)
axis.set_title("values of a channel")
axis.legend(fontsize=8)
figure.savefig("functions.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_functions.txt
#    :language: none
#
# .. image:: /recorded/functions.png
#
# sphinx_gallery_thumbnail_path = 'recorded/functions.png'
