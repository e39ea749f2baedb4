"""Ways to quantise keys and values that the cache does not store, for comparison: numbers in, numbers out.

Their bytes are counted by formula (codes, scales, zero points; the newest tokens of an open group apart), those of
the package's own formats from storage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qaxis.storage.formats import Format
from qaxis.storage.grid import Grid
from qaxis.storage.side import Side

Change = Callable[[torch.Tensor], torch.Tensor]
GROUP = 128


@dataclass(frozen=True)
class Scheme:
    """One way: what becomes of keys and of values ``[B, Hkv, N, D]``, and how many tokens each quantises together."""

    keys: Change
    values: Change
    key_tokens: int
    value_tokens: int
    #: bits a number takes, keys and values, scales included
    key_bits: float
    value_bits: float

    @property
    def ratio(self) -> float:
        """Bytes over those of bfloat16."""
        return (self.key_bits + self.value_bits) / 32


def _through(grid: Grid, sinks: int) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        side = Side(x, grid, sinks)
        side.prepare(x)()
        return side.dequantized()

    return change


def _bits(grid: Grid, dim: int) -> float:
    shared = grid.group_size if grid.per == "channel" or dim % grid.group_size == 0 else dim
    return grid.bits + 8 * (1 + grid.zero) / shared


def of_format(format: Format, dim: int) -> Scheme:
    """A format of the package as a scheme."""
    keys, values = format.keys, format.values
    return Scheme(
        _through(keys, format.sinks), _through(values, format.sinks), keys.tokens, values.tokens,
        _bits(keys, dim), _bits(values, dim),
    )  # fmt: skip


def _levels(x: torch.Tensor, dim: int, bits: int, zero: bool) -> torch.Tensor:
    """Quantised along ``dim`` with float16 scales (and zero points), the usual way."""
    if zero:
        low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7).half().float()
        low = low.half().float()
        return torch.round((x - low) / scale).clamp(0, 2**bits - 1) * scale + low
    limit = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(dim, keepdim=True) / limit).clamp(min=1e-7).half().float()
    return torch.round(x / scale).clamp(-limit, limit) * scale


def per_token(bits: int, group: int, zero: bool = False) -> Change:
    """float16 scale for ``group`` channels of a token."""
    return lambda x: _levels(x.float().unflatten(-1, (-1, group)), -1, bits, zero).flatten(-2).to(x.dtype)


def per_channel(bits: int, group: int, zero: bool = False) -> Change:
    """float16 scale for a channel over ``group`` tokens; an open group of 128 stays in full."""

    def change(x: torch.Tensor) -> torch.Tensor:
        n = x.shape[2] // GROUP * GROUP
        whole = _levels(x[:, :, :n].float().unflatten(2, (-1, group)), 3, bits, zero).flatten(2, 3)
        return torch.cat([whole.to(x.dtype), x[:, :, n:]], dim=2)

    return change


def hadamard(change: Change) -> Change:
    """Rotated by a Hadamard matrix before, and back after."""

    def rotated(x: torch.Tensor) -> torch.Tensor:
        h = torch.ones(1, 1)
        while h.shape[0] < x.shape[-1]:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
        h = (h / math.sqrt(x.shape[-1])).to(x.device)
        return (change(x.float() @ h) @ h).to(x.dtype)

    return rotated


def before_rope(change: Change, cos: torch.Tensor, sin: torch.Tensor) -> Change:
    """Keys turned back to position 0 before, and forth after; cos and sin are the model's ``[1, N, D]``."""

    def half(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([-b, a], -1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        c, s = cos[:, None, : x.shape[2]], sin[:, None, : x.shape[2]]
        y = change(x * c - half(x) * s)
        return y * c + half(y) * s

    return turned
