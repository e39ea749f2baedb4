"""What is kept beside the keys so that a fast score has a proven error: codes, and one bound a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..arithmetic.fast_scores import UPWARD, largest_norm
from ..arithmetic.reference import power_of_two
from ..storage.grid import Grid
from ..storage.side import Side, Stored


@dataclass(frozen=True)
class KeyIndex:
    """Bounds on the keys ``[B, Hkv, N, D]`` of one layer and, if asked for, their 8-bit codes.

    Attributes:
        norm: float32 ``[B, Hkv]``, at least the length of every key, and of what its codes stand for.
        residual: float32 ``[B, Hkv]``, at least the length of what the codes leave out of any key.
        steps: float32 ``[B, Hkv, D]``, the largest step of every channel.
        codes: the codes as the 8-bit cache stores them, or None.
    """

    norm: torch.Tensor
    residual: torch.Tensor
    steps: torch.Tensor
    codes: Stored | None = None


def _steps(stored: Stored) -> torch.Tensor:
    if stored.scales.shape[2] == 0:
        return torch.zeros(*stored.scales.shape[:2], stored.dim, device=stored.scales.device)
    return power_of_two(stored.scales.int()).amax(2)


def index_keys(k: torch.Tensor, *, codes: bool = False) -> KeyIndex:
    """Index of keys ``k [B, Hkv, N, D]``; with ``codes`` it holds half of a bfloat16 key more, and scores faster."""
    norm = largest_norm(k)
    zero = torch.zeros_like(norm)
    if not codes:
        return KeyIndex(norm, zero, torch.zeros(*norm.shape, k.shape[3], device=k.device))
    side = Side(k, Grid(), room=k.shape[2])
    for part in k.split(1 << 14, dim=2):
        side.prepare(part)()
    stored = side.stored()
    whole = stored.codes.shape[2]
    residual = zero
    for start in range(0, whole, 1 << 14):
        part = slice(start, min(start + (1 << 14), whole))
        left_out = k[:, :, part].float() - _whole(stored, part)
        residual = torch.maximum(residual, largest_norm(left_out))
    return KeyIndex((norm + residual) * UPWARD, residual, _steps(stored), stored)


def index_cache(stored: Stored) -> KeyIndex:
    """Index of keys that are an 8-bit cache themselves: the codes are the keys, nothing is left out."""
    n = stored.codes.shape[2]
    norm = torch.maximum(largest_norm(stored.first), largest_norm(stored.newest if stored.newest is not None
                                                                   else stored.first))  # fmt: skip
    for start in range(0, n, 1 << 14):
        norm = torch.maximum(norm, largest_norm(_whole(stored, slice(start, min(start + (1 << 14), n)))))
    return KeyIndex(norm, torch.zeros_like(norm), _steps(stored), stored)


def _whole(stored: Stored, part: slice) -> torch.Tensor:
    """Codes of the tokens ``part``, whole groups, as float32 numbers; exact, as steps are powers of two."""
    group = stored.grid.group_size
    scales = power_of_two(stored.scales[:, :, part.start // group : part.stop // group].int())
    return (stored.codes[:, :, part].unflatten(2, (-1, group)) * scales[:, :, :, None]).flatten(2, 3)
