"""Where the tokens of a sliding window lie: in order, in a buffer of fixed size, moved to its front when it is full.

A query sees the newest W tokens, itself among them. The buffer has R places. Until it is full a token lies at the
place of its number; a token that would go beyond the last place sends the newest W - 1 to the front first. So which
token lies where follows from the number of tokens alone. R leaves at least W places between what is moved and where
it goes: a move, and the token appended with it, overwrite nothing that is still to be read, and may be repeated.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from ..arithmetic.reference import rounded_up

#: places beyond the window, at least: a move is rare
LEAST = 256

Count = TypeVar("Count", int, torch.Tensor)


def places_for(window: int) -> int:
    """Places R of the buffer of a window of W tokens."""
    return rounded_up(window - 1 + max(window, LEAST), 128)


def first_held(end: Count, window: int, places: int) -> Count:
    """The token at place 0 when the buffer holds the tokens up to ``end``: a number, or int32 tensor."""
    step = places - (window - 1)
    if isinstance(end, torch.Tensor):
        moved = step + torch.div(end - 1 - places, step, rounding_mode="floor") * step
        return torch.where(end <= places, 0, moved).to(end.dtype)
    return 0 if end <= places else step + (end - 1 - places) // step * step
