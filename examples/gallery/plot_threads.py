# SPDX-License-Identifier: BSD-3-Clause
"""Threads, and the same bits
==========================

The number of threads changes the time, never a bit of the result.
"""

import hashlib

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
# It prints:
#
# .. literalinclude:: /recorded/plot_threads.txt
#    :language: none
