"""What a cache may store: the grids of keys and of values, and how many first tokens stay in full."""

from __future__ import annotations

from dataclasses import dataclass

from ..validation import is_integer, require
from .grid import Grid

EIGHT = Grid(8, "channel", 128)


@dataclass(frozen=True)
class Format:
    """How a cache stores: the grids of keys and values, and how many first tokens stay in full."""

    keys: Grid = EIGHT
    values: Grid = EIGHT
    sinks: int = 4

    def __post_init__(self) -> None:
        for name, grid in (("keys", self.keys), ("values", self.values)):
            require(isinstance(grid, Grid), name, grid, "a qaxis.storage.grid.Grid")
            most = grid.group_size - 1 if grid.per == "channel" else 64
            require(is_integer(self.sinks) and 0 <= self.sinks <= most, "sinks", self.sinks, f"0 to {most} tokens")


def _zeroed(bits: int) -> Grid:
    return Grid(bits, "channel", 128, zero=True)


#: by name; the comments give, about, the bytes of a long cache over those of bfloat16. The first tokens stay in full:
#: attention weighs them heavily, and their keys and values are unlike all others.
FORMATS = {
    "int8": Format(),  # 0.50
    "int6": Format(_zeroed(7), _zeroed(5), sinks=4),  # 0.38
    "int4": Format(_zeroed(5), _zeroed(4), sinks=4),  # 0.29
}
