"""A tensor that grows along dimension 2: appending a token copies it alone, almost always."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: a full buffer grows by this share of its length, and at least by so many entries
SHARE, LEAST = 16, 8


class Growing:
    """``[B, H, n, ...]`` with room behind it. What is stored is moved once per growth, never computed again."""

    def __init__(self, like: torch.Tensor, room: int = 0) -> None:
        """An empty one for parts shaped as ``like [B, H, *, ...]``, with room for ``room`` entries."""
        shape = (*like.shape[:2], room, *like.shape[3:])
        self.buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length = 0

    def append(self, part: torch.Tensor) -> None:
        """Append ``[B, H, m, ...]``; an exact fit the first time, amortised constant time a token after that."""
        end = self.length + part.shape[2]
        room = self.buffer.shape[2]
        if end > room:
            larger = end if self.length == 0 else max(end, room + max(LEAST, room // SHARE))
            buffer = torch.zeros(
                (*self.buffer.shape[:2], larger, *self.buffer.shape[3:]), dtype=part.dtype, device=part.device
            )
            buffer[:, :, : self.length] = self.view()
            self.buffer = buffer
        self.buffer[:, :, self.length : end] = part
        self.length = end

    def view(self) -> torch.Tensor:
        """What is stored, ``[B, H, length, ...]``."""
        return self.buffer[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` entries; the room behind them is given back."""
        self.length = min(length, self.length)
        self.buffer = self.view().clone()

    def change(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the buffer, room included, by ``f`` of it."""
        self.buffer = f(self.buffer)
