from typing import Literal, SupportsIndex, overload

from numpy.typing import NDArray

from fastbn._types import Float64, Floating, Vector

def use(float32_capsule: object, float64_capsule: object) -> None: ...
def check_layout(layout: str | None) -> None: ...
def check_eps(eps: float) -> float: ...
def check_momentum(momentum: float) -> float: ...
def check_flag(value: bool, name: str) -> bool: ...
def check_integer(value: SupportsIndex, name: str) -> int: ...
def check_vector(array: object, name: str, channels: int) -> Vector: ...
def check_channels(x: object, layout: str | None, channels: int) -> None: ...
def overlapping(a: NDArray, b: NDArray) -> bool: ...
def statistics(x: NDArray[Floating], layout: str | None, /) -> tuple[int, Float64, Float64]: ...
@overload
def forward(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Vector | None,
    running_var: Vector | None,
    training: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    out: NDArray[Floating] | None,
    only_y: Literal[True],
    /,
) -> NDArray[Floating]: ...
@overload
def forward(
    x: NDArray[Floating],
    weight: Vector | None,
    bias: Vector | None,
    running_mean: Vector | None,
    running_var: Vector | None,
    training: bool,
    momentum: float,
    eps: float,
    layout: str | None,
    out: NDArray[Floating] | None,
    only_y: Literal[False],
    /,
) -> tuple[NDArray[Floating], Float64, Float64]: ...
def backward(
    dy: NDArray[Floating],
    x: NDArray[Floating],
    mean: Vector,
    invstd: Vector,
    weight: Vector | None,
    training: bool,
    layout: str | None,
    out: NDArray[Floating] | None,
    /,
) -> tuple[NDArray[Floating], Vector, Vector]: ...
