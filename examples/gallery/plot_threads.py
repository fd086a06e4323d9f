# SPDX-License-Identifier: BSD-3-Clause
"""Threads, and the same bits
==========================

The number of threads changes the time, never a bit of the result.
"""

import hashlib

import matplotlib.pyplot as plt
import numpy as np

import fastbn

x = np.random.default_rng(0).normal(3.0, 2.0, (32, 64, 28, 28)).astype(np.float32)
digests = set()
for number in (1, 2, 3):
    with fastbn.threads(number):
        y, _, _ = fastbn.batch_norm_forward(x)
    digests.add(hashlib.sha256(y.tobytes()).hexdigest())
print("digests with 1, 2 and 3 threads:", len(digests))

# %%
# For the whole process.

fastbn.set_num_threads(1)
print("threads:", fastbn.get_num_threads())
fastbn.set_num_threads(None)  # the default: OpenMP's limit, CPU affinity, the quota

# %%
# How it was built and how it runs; ``python -m fastbn`` prints it.

config = fastbn.show_config()
print("threads_from" in config, fastbn.get_include().endswith("include"))

# %%
# The mean of a channel.


def ordinary(parts):
    """Add float32 values part by part, as many threads may do it."""
    return sum(np.sum(part) for part in np.array_split(x[:, 0].ravel(), parts)) / x[:, 0].size


def ours(number):
    with fastbn.threads(number):
        return fastbn.batch_norm_forward(x)[1][0]


numbers = range(1, 9)
figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
for mean, name in ((ordinary, "sums of parts, float32"), (ours, "fastbn")):
    of = np.array([mean(number) for number in numbers], np.float64)
    axis.plot(numbers, of - of[0], "o-", label=name)
axis.set(xlabel="threads, parts", ylabel="mean, less that of one")
axis.legend(fontsize=8)
figure.savefig("threads.png", dpi=72)

# %%
# It prints, and draws:
#
# .. literalinclude:: /recorded/plot_threads.txt
#    :language: none
#
# .. image:: /recorded/threads.png
#
# sphinx_gallery_thumbnail_path = 'recorded/threads.png'
