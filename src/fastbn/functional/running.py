# SPDX-License-Identifier: BSD-3-Clause
"""How running statistics follow a batch, where the engine's own way is not wanted.

Vectors of channels, in float64. May not touch a tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastbn._types import Float64, Kept, OnNonfinite

#: The one list of what may be done about statistics that are not finite.
ON_NONFINITE = ("propagate", "skip", "raise")


class Batch(NamedTuple):
    """What forward has found of a batch, channel by channel."""

    mean: Float64
    invstd: Float64
    count: int  # type: ignore[assignment]  # values per channel; a tuple has a method so called
    m2: Float64 | None  # None: no running variance has asked for it

    def var(self, unbiased: bool) -> Float64:
        """Return the variance that is kept."""
        assert self.m2 is not None
        with np.errstate(all="ignore"):
            return self.m2 / (self.count - float(unbiased))


def check_on_nonfinite(value: OnNonfinite) -> OnNonfinite:
    """Return one of `ON_NONFINITE`, or raise."""
    check_name(value, "on_nonfinite", ON_NONFINITE)
    return value


def check_name(value: str, name: str, names: tuple[str, ...]) -> str:
    """Return one of `names`, or raise."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {names}, got {value!r}")
    if value not in names:
        raise ValueError(f"{name}: expected one of {names}, got {value!r}")
    return value


def is_finite(
    batch: Batch, running_mean: Kept | None, running_var: Kept | None, unbiased: bool
) -> NDArray[np.bool_]:
    """Whether mean and variance of each channel are finite in the dtypes that keep them."""
    with np.errstate(all="ignore"):
        mean = batch.mean if running_mean is None else batch.mean.astype(running_mean.dtype)
        if running_var is None or batch.m2 is None:
            # That of an infinite variance is 0.
            return np.isfinite(mean) & (batch.invstd > 0)
        return np.isfinite(mean) & np.isfinite(batch.var(unbiased).astype(running_var.dtype))


def moved_channels(
    batch: Batch,
    running_mean: Kept | None,
    running_var: Kept | None,
    unbiased: bool,
    on_nonfinite: OnNonfinite,
) -> NDArray[np.bool_] | None:
    """Return which channels follow the batch, None for all; raise what `on_nonfinite` asks for."""
    if on_nonfinite == "propagate":
        return None
    finite = is_finite(batch, running_mean, running_var, unbiased)
    if finite.all():
        return None
    if on_nonfinite == "raise":
        channels = np.flatnonzero(~finite).tolist()
        shown = f"{channels[:20]}".replace("]", ", ...]") if len(channels) > 20 else channels
        raise FloatingPointError(
            "x: expected a mean and a variance that are finite in the dtype of the running "
            f"statistics, got others in {len(channels)} of {finite.size} channels: {shown}; "
            "running statistics have not moved"
        )
    return finite


def move(
    running: Kept | None,
    new: Float64,
    momentum: float | Float64,
    where: NDArray[np.bool_] | None,
) -> None:
    """Move running statistics in place, as the engine does where this is its way, too."""
    if running is not None:
        with np.errstate(all="ignore"):
            moved = (1.0 - momentum) * running.astype(np.float64) + momentum * new
            np.copyto(running, moved, where=True if where is None else where)


def follow(
    batch: Batch,
    running_mean: Kept | None,
    running_var: Kept | None,
    momentum: float,
    unbiased: bool,
    on_nonfinite: OnNonfinite,
) -> None:
    """Move running statistics towards those of the batch; of an empty one, not."""
    if batch.count == 0:
        return
    where = moved_channels(batch, running_mean, running_var, unbiased, on_nonfinite)
    move(running_mean, batch.mean, momentum, where)
    if running_var is not None:
        move(running_var, batch.var(unbiased), momentum, where)
