# SPDX-License-Identifier: BSD-3-Clause
"""The NumPy binding: arrays -> a call of fastbn.h. fastbn.kernels has the map.

Here are the names of what an operation of `binding` is asked for.
"""

#: What forward returns.
ONLY_Y, WITH_STATISTICS = True, False
#: Whether rows are centred (layer norm) or not (RMS norm).
CENTRED, UNCENTRED = True, False
#: What backward is given as x.
INPUT, OUTPUT = False, True
#: What becomes of running statistics in training: they follow the batch; the caller moves
#: them; they stay. CHECKED: nothing is done but to check; outputs are not written.
MOVED, HELD, UNMOVED, CHECKED = range(4)
