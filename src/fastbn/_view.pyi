# SPDX-License-Identifier: BSD-3-Clause
from typing import Any, Literal, SupportsIndex, final, overload

from numpy.typing import NDArray

from fastbn._types import Activation, Float64, Floating, Gradients, Kept, Shape, Vector

def use(*capsules: object) -> None: ...
def check_layout(layout: str | None) -> None: ...
def check_eps(eps: float) -> float: ...
def check_momentum(momentum: float) -> float: ...
def check_activation(activation: str | None) -> Activation | None: ...
def check_slope(negative_slope: float) -> float: ...
def check_apart(out: object, other: object, other_name: str) -> None: ...
def check_flag(value: bool, name: str) -> bool: ...
def check_integer(value: SupportsIndex, name: str) -> int: ...
def check_shape(normalized_shape: Shape) -> tuple[int, ...]: ...
def check_kernel_layout(layout: str, kernel: NDArray) -> None: ...
def check_array(array: object, name: str) -> NDArray: ...
def check_vector(array: object, name: str, channels: int) -> Vector: ...
def check_parameter(array: object, name: str, shape: tuple[int, ...]) -> Vector: ...
def count_channels(x: object, layout: str | None, name: str) -> int: ...
def check_like(array: object, name: str, x: NDArray, x_name: str) -> None: ...
def check_channels(x: object, layout: str | None, num_features: int, /) -> None: ...
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

def statistics(x: NDArray[Floating], layout: str | None, /) -> tuple[int, Float64, Float64]: ...
@overload
def forward(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Kept | None,
    running_var: Kept | None,
    training: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    only_y: Literal[True],
    num_features: int | None = None,
    prepared: Prepared | None = None,
    /,
) -> NDArray[Floating]: ...
@overload
def forward(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Kept | None,
    running_var: Kept | None,
    training: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    only_y: Literal[False],
    num_features: int | None = None,
    prepared: Prepared | None = None,
    /,
) -> tuple[NDArray[Floating], Float64, Float64]: ...
@overload
def forward(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Kept | None,
    running_var: Kept | None,
    training: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    only_y: bool,
    num_features: int | None = None,
    prepared: Prepared | None = None,
    /,
) -> Any: ...
def backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None,
    bias: Vector | None,
    training: bool,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    inverted: bool,
    /,
) -> Gradients[Floating]: ...
@overload
def layer_forward(
    x: NDArray[Floating],
    normalized_shape: Shape,
    weight: Vector | None,
    bias: Vector | None,
    eps: float | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    centred: bool,
    only_y: Literal[True],
    /,
) -> NDArray[Floating]: ...
@overload
def layer_forward(
    x: NDArray[Floating],
    normalized_shape: Shape,
    weight: Vector | None,
    bias: Vector | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    centred: Literal[True],
    only_y: Literal[False],
    /,
) -> tuple[NDArray[Floating], Float64, Float64]: ...
@overload
def layer_forward(
    x: NDArray[Floating],
    normalized_shape: Shape,
    weight: Vector | None,
    bias: None,
    eps: float | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    centred: Literal[False],
    only_y: Literal[False],
    /,
) -> tuple[NDArray[Floating], Float64]: ...
@overload
def layer_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    normalized_shape: Shape,
    weight: Vector | None,
    bias: Vector | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    centred: Literal[True],
    /,
) -> Gradients[Floating]: ...
@overload
def layer_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: None,
    invstd: Kept,
    normalized_shape: Shape,
    weight: Vector | None,
    bias: Vector | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    centred: Literal[False],
    /,
) -> Gradients[Floating]: ...
@overload
def group_forward(
    x: NDArray[Floating],
    num_groups: SupportsIndex,
    weight: Vector | None,
    bias: Vector | None,
    eps: float,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    only_y: Literal[True],
    /,
) -> NDArray[Floating]: ...
@overload
def group_forward(
    x: NDArray[Floating],
    num_groups: SupportsIndex,
    weight: Vector | None,
    bias: Vector | None,
    eps: float,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    only_y: Literal[False],
    /,
) -> tuple[NDArray[Floating], Float64, Float64]: ...
def group_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    num_groups: SupportsIndex,
    weight: Vector | None,
    bias: Vector | None,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    /,
) -> Gradients[Floating]: ...
@overload
def instance_forward(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Kept | None,
    running_var: Kept | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    only_y: Literal[True],
    /,
) -> NDArray[Floating]: ...
@overload
def instance_forward(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Kept | None,
    running_var: Kept | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    only_y: Literal[False],
    /,
) -> tuple[NDArray[Floating], Float64, Float64]: ...
def instance_backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Kept,
    invstd: Kept,
    weight: Vector | None,
    bias: Vector | None,
    layout: str | None,
    activation: str | None,
    negative_slope: float,
    residual: NDArray[Floating] | None,
    out: NDArray[Floating] | None,
    /,
) -> Gradients[Floating]: ...
