from collections.abc import Collection, Sequence

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
def keep(kind: int, text: str) -> None: ...
def register(names: Collection[str]) -> None: ...
def switch(state: bool, /) -> None: ...
