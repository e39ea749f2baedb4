"""A tensor that grows along dimension 2: appending a token copies it alone, almost always."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: a full buffer grows by this share of its length, and at least by so many entries
SHARE, LEAST = 16, 8


class Growing:
    """``[B, H, n, ...]`` with room behind it. What is stored is moved once per growth, never computed again.

    Buffers are ordinary tensors also where they are made in inference mode: one that torch marked as made there could
    not be written to outside. What is stored takes no part in gradients.
    """

    def __init__(self, like: torch.Tensor, room: int = 0) -> None:
        """An empty one for parts shaped as ``like [B, H, *, ...]``, with room for ``room`` entries."""
        self.buffer = zeros((*like.shape[:2], room, *like.shape[3:]), like)
        self.length = 0

    def append(self, part: torch.Tensor) -> None:
        """Append ``[B, H, m, ...]``; an exact fit the first time, amortised constant time a token after that."""
        end = self.length + part.shape[2]
        room = self.buffer.shape[2]
        if end > room:
            self.grow(end if self.length == 0 else max(end, room + max(LEAST, room // SHARE)))
        self.buffer[:, :, self.length : end] = part.detach()
        self.length = end

    def grow(self, room: int) -> None:
        """Move what is stored into a buffer of so many entries."""
        buffer = zeros((*self.buffer.shape[:2], room, *self.buffer.shape[3:]), self.buffer)
        buffer[:, :, : self.length] = self.view()
        self.buffer = buffer

    def view(self) -> torch.Tensor:
        """What is stored, ``[B, H, length, ...]``."""
        return self.buffer[:, :, : self.length]

    def crop(self, length: int) -> None:
        """Keep the first ``length`` entries, and the room behind them."""
        self.length = min(length, self.length)

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows that ``indices`` name; the buffer stays where it is if there are as many as before."""
        with torch.inference_mode(False), torch.no_grad():
            chosen = self.buffer[indices.to(self.buffer.device)]
            self.buffer = self.buffer.copy_(chosen) if chosen.shape == self.buffer.shape else chosen

    def change(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the buffer, room included, by ``f`` of it."""
        with torch.inference_mode(False), torch.no_grad():
            self.buffer = f(self.buffer)


def zeros(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Zeros in the dtype and on the device of ``like``; an ordinary tensor in inference mode too, to be written to."""
    with torch.inference_mode(False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


def joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """As ``torch.cat``, of parts of one dtype; autocast, which has rules of its own for ``cat``, changes nothing."""
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    out, start = torch.empty(shape, dtype=parts[0].dtype, device=parts[0].device), 0
    for part in parts:
        out.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
    return out
