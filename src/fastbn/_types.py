# SPDX-License-Identifier: BSD-3-Clause
"""The array types of the public signatures."""

from typing import Any, TypeAlias, TypeVar

import numpy as np

#: float32 or float64, the same one wherever it stands in a signature.
Floating = TypeVar("Floating", np.float32, np.float64)

Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
#: One number for each channel, shape (C,).
Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float32]] | Float64
