# SPDX-License-Identifier: BSD-3-Clause
"""Vectors and kernels of float64 to another dtype, rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Float64


def rounded(wide: Float64, dtype: np.dtype) -> NDArray:
    """Return the nearest numbers of a float dtype."""
    if dtype.name != "bfloat16":
        return wide.astype(dtype)
    # ml_dtypes rounds to float32 first. With that rounded to odd, the second rounding is the
    # only one: it finds a tie only where `wide` is one.
    odd = wide.astype(np.float32)
    error = wide - odd
    towards = np.where(error > 0, np.float32(np.inf), np.float32(-np.inf))
    even = odd.view(np.uint32) % 2 == 0
    np.copyto(odd, np.nextafter(odd, towards), where=even & (np.abs(error) > 0))
    return odd.astype(dtype)
