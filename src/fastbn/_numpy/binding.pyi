# SPDX-License-Identifier: BSD-3-Clause
from typing import Any, SupportsIndex, final

from numpy.typing import NDArray

from fastbn._types import Activation, Counting, Exchange, Float64, Kept, Shape, Vector

# Whoever calls the operations has the types of their results.

def check_layout(layout: str | None) -> None: ...
def axis_of_instances(layout: str | None) -> int: ...
def axis_of_channels(layout: str | None, x: NDArray) -> int: ...
def check_eps(eps: float) -> float: ...
def check_momentum(momentum: float) -> float: ...
def check_number(value: float, name: str) -> float: ...
def check_activation(activation: str | None) -> Activation | None: ...
def check_slope(negative_slope: float) -> float: ...
def check_apart(out: object, other: object, other_name: str) -> None: ...
def check_flag(value: bool, name: str) -> bool: ...
def check_integer(value: SupportsIndex, name: str) -> int: ...
def check_shape(normalized_shape: Shape) -> tuple[int, ...]: ...
def check_array(array: object, name: str) -> NDArray: ...
def check_vector(array: object, name: str, channels: int) -> Vector: ...
def check_parameter(array: object, name: str, shape: tuple[int, ...]) -> Vector: ...
def count_channels(x: object, layout: str | None, name: str) -> int: ...
def check_like(array: object, name: str, x: NDArray, x_name: str) -> None: ...
def check_channels(x: object, layout: str | None, num_features: int, /) -> None: ...
def mask_for(
    x: NDArray, layout: str | None, mask: object, lengths: object, length_axis: object, /
) -> NDArray | None: ...
def overwritten(out: NDArray | None, x: NDArray, residual: NDArray | None, /) -> bool: ...

@final
class Prepared:
    def __init__(
        self,
        x: NDArray,
        channels: int,
        running_mean: Kept,
        running_var: Kept,
        weight: Vector | None,
        bias: Vector | None,
        eps: float,
        /,
    ) -> None: ...
    def fits(
        self,
        x: NDArray,
        running_mean: Kept,
        running_var: Kept,
        weight: Vector | None,
        bias: Vector | None,
        eps: float,
        /,
    ) -> bool: ...

# fmt: off
def check_image(x: object, layout: str | None, /) -> tuple[int, bool]: ...
def integer_statistics(
    x: NDArray, axis: int, mask: NDArray | None, nodata: NDArray | None, /
) -> tuple[NDArray, Float64, Float64, NDArray, NDArray, NDArray]: ...
def convert_image(
    x: NDArray, mean: object, std: object, layout: str | None, out_layout: str | None,
    max_value: float, dtype: object, out: NDArray | None, inverse: bool, /
) -> Any: ...
def batch_statistics(
    x: NDArray, layout: str | None, counted: Counting | None = None, /
) -> tuple[int, Float64, Float64, NDArray, NDArray]: ...
def batch_forward(
    x: NDArray, weight: Vector | None, bias: Vector | None, running_mean: Kept | None,
    running_var: Kept | None, residual: NDArray | None, out: NDArray | None, training: bool,
    momentum: float, eps: float, layout: str | None, activation: str | None,
    negative_slope: float, only_y: bool, counted: Counting | None = None,
    num_features: int | None = None, prepared: Prepared | None = None, mode: int = 0,
    exchange: Exchange | None = None, whole: int = 0, /
) -> Any: ...
def batch_backward(
    dy: NDArray, x: NDArray, mean: Kept | None, invstd: Kept, weight: Vector | None,
    bias: Vector | None, residual: NDArray | None, out: NDArray | None, training: bool,
    layout: str | None, activation: str | None, negative_slope: float, inverted: bool,
    counted: Counting | None = None, dresidual: NDArray | None = None, mode: int = 0,
    exchange: Exchange | None = None, whole: int = 0, /
) -> Any: ...
def group_forward(
    x: NDArray, weight: Vector | None, bias: Vector | None, residual: NDArray | None,
    out: NDArray | None, num_groups: SupportsIndex, eps: float, layout: str | None,
    activation: str | None, negative_slope: float, only_y: bool,
    counted: Counting | None = None, /
) -> Any: ...
def group_backward(
    dy: NDArray, x: NDArray, mean: Kept | None, invstd: Kept, weight: Vector | None,
    bias: Vector | None, residual: NDArray | None, out: NDArray | None, num_groups: SupportsIndex,
    layout: str | None, activation: str | None, negative_slope: float,
    counted: Counting | None = None, /
) -> Any: ...
def instance_forward(
    x: NDArray, weight: Vector | None, bias: Vector | None, running_mean: Kept | None,
    running_var: Kept | None, residual: NDArray | None, out: NDArray | None,
    use_input_stats: bool, momentum: float, eps: float, layout: str | None,
    activation: str | None, negative_slope: float, only_y: bool,
    counted: Counting | None = None, /
) -> Any: ...
def instance_backward(
    dy: NDArray, x: NDArray, mean: Kept | None, invstd: Kept, weight: Vector | None,
    bias: Vector | None, residual: NDArray | None, out: NDArray | None, layout: str | None,
    activation: str | None, negative_slope: float,
    counted: Counting | None = None, /
) -> Any: ...
def layer_forward(
    x: NDArray, weight: Vector | None, bias: Vector | None, residual: NDArray | None,
    out: NDArray | None, normalized_shape: Shape, eps: float | None, activation: str | None,
    negative_slope: float, centred: bool, only_y: bool, /
) -> Any: ...
def layer_backward(
    dy: NDArray, x: NDArray, mean: Kept | None, invstd: Kept, weight: Vector | None,
    bias: Vector | None, residual: NDArray | None, out: NDArray | None, normalized_shape: Shape,
    activation: str | None, negative_slope: float, centred: bool, /
) -> Any: ...
