# SPDX-License-Identifier: BSD-3-Clause
"""Train in the memory of the input
================================

:class:`fastbn.InPlaceBatchNorm` overwrites its input. Backward computes from the output, since
leaky ReLU can be undone: a network keeps one tensor for each layer instead of two.
"""

import matplotlib.pyplot as plt
import numpy as np

import fastbn

rng = np.random.default_rng(0)
x = rng.normal(3.0, 2.0, (64, 16, 8, 8)).astype(np.float32)
dy = rng.normal(size=x.shape).astype(np.float32)

usual = fastbn.BatchNorm(16, activation="leaky_relu")
usual(x)
expected = usual.backward(dy)

in_place = fastbn.InPlaceBatchNorm(16)
y = in_place(x)
print("y is x:", y is x)
dx = in_place.backward(dy)
print("largest difference of dx below 1e-5:", bool(np.abs(dx - expected).max() < 1e-5))

# %%
# The function below the layer needs ``y`` and ``invstd`` alone.

weight, bias = np.ones(4), np.zeros(4)
z, _, invstd = fastbn.batch_norm_forward(rng.normal(size=(100, 4)), weight, bias)
dz, dweight, dbias = fastbn.batch_norm_backward_inplace(np.ones_like(z), z, invstd, weight, bias)
print("dbias:", dbias)

# %%
# What the activation does to a value, and how backward gets the value back.

figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
line = np.linspace(-4, 4, 200)[:, None]
after = fastbn.batch_norm(line, np.zeros(1), np.ones(1), activation="leaky_relu")
axis.plot(line, after, label="leaky ReLU: y of the normalised x")
axis.plot(after, line, "--", label="undone: the normalised x of y")
axis.set_aspect("equal")
axis.set(xlim=(-4, 4), ylim=(-4, 4))
axis.legend(fontsize=8, loc="upper left")
figure.savefig("in_place.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_in_place.txt
#    :language: none
#
# .. image:: /recorded/in_place.png
#
# sphinx_gallery_thumbnail_path = 'recorded/in_place.png'
