from collections.abc import Collection, Sequence
from typing import Any

NAMES: tuple[str, ...]
CONSTANTS: tuple[str, ...]
TABLE: dict[str, int]

def look_up(
    addresses: Sequence[int],
    constants: Sequence[int],
    deleter: int,
    throwers: Sequence[tuple[int, int]],
    allocators: tuple[int, int, int],
) -> None: ...
def register(names: Collection[str]) -> None: ...
def switch(state: bool, /) -> None: ...

class OwnKernel:
    def __init__(
        self, kernel: Any, kinds: tuple[type[Exception], ...], blank: tuple[Any, ...]
    ) -> None: ...
    def __call__(self, keyset: Any, *arguments: Any) -> Any: ...
