# SPDX-License-Identifier: BSD-3-Clause
"""The array types of the public signatures."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, SupportsIndex, TypeAlias, TypeVar

import numpy as np

#: The dtype of `x`, the same one wherever it stands in a signature. bfloat16 needs no name
#: here, and so no ml_dtypes: to a type checker its arrays are arrays of Any, which fit.
Floating = TypeVar("Floating", np.float16, np.float32, np.float64)

Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
#: What is kept over many calls: running statistics, the parameters of layers.
Kept: TypeAlias = np.ndarray[Any, np.dtype[np.float32]] | Float64
#: Parameters as functions take them, and their gradients: shape (C,) or `normalized_shape`.
Vector: TypeAlias = np.ndarray[Any, np.dtype[np.float16]] | Kept
#: A `normalized_shape`.
Shape: TypeAlias = SupportsIndex | Sequence[SupportsIndex]
#: What follows a normalisation.
Activation: TypeAlias = (
    Literal["relu"] | Literal["relu6"] | Literal["leaky_relu"] | Literal["silu"]
    | Literal["hardswish"] | Literal["hardsigmoid"]
)  # fmt: skip
#: The one list of names, with the numbers of fastbn.h.
ACTIVATIONS: dict[str | None, int] = {
    None: 0, "relu": 1, "relu6": 4, "leaky_relu": 2, "silu": 3, "hardswish": 5, "hardsigmoid": 6,
}  # fmt: skip
#: What running statistics do about a batch whose own are not finite.
OnNonfinite: TypeAlias = Literal["propagate"] | Literal["skip"] | Literal["raise"]
#: Of x, of the parameters, and, if there is one, of the residual.
Gradients: TypeAlias = tuple[np.ndarray[Any, np.dtype[Floating]], *tuple[Vector, ...]]
#: What counts: (mask, lengths, length_axis).
Counting: TypeAlias = tuple[np.ndarray[Any, Any] | None, Any, str | None]
#: What is known of a part of a batch -> the same of all of it: values of a channel, vectors (2, C).
Exchange: TypeAlias = Callable[[float, Float64], tuple[float, Float64]]
