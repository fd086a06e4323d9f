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
