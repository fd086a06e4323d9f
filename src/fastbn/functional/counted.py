# SPDX-License-Identifier: BSD-3-Clause
"""What counts of a batch: the arguments `mask`, `lengths` and `length_axis` together.

May cut a mask along the instances, and count. May not check: the binding does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastbn._numpy import binding

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Counted(NamedTuple):
    """The three arguments, in the order of the binding; None: all counts."""

    mask: NDArray[np.bool_] | None = None
    lengths: ArrayLike | None = None
    length_axis: str | None = None

    def anything(self) -> bool:
        """Return whether anything counts, of arguments that the binding has accepted."""
        if self.mask is not None:
            return bool(self.mask.any())
        return self.lengths is None or bool(np.any(self.lengths))

    def as_mask(self, x: NDArray, layout: str | None) -> Counted:
        """Return the same with a mask in the place of lengths, or raise."""
        return Counted(binding.mask_for(x, layout, *self))

    def of_instances(self, part: slice, axis: int) -> Counted:
        """Return the part of a mask, along this axis of it."""
        if self.mask is None or self.mask.shape[axis] == 1:
            return self
        return Counted(self.mask[(slice(None),) * axis + (part,)])


ALL = Counted()


def counted_of(
    mask: NDArray[np.bool_] | None, lengths: ArrayLike | None, length_axis: str | None
) -> Counted:
    """Return the three together; most often there are none, and a new tuple takes its time."""
    if mask is None and lengths is None and length_axis is None:
        return ALL
    return Counted(mask, lengths, length_axis)
