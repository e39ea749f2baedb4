"""Decode steps that find the top keys approximately: page bounds, few channels, few directions.

Short implementations of the selection that Quest (Tang et al., 2024), SparQ (Ribar et al., 2024) and Loki (Singhania
et al., 2024) propose, each followed by the same attention over what it chose. Built of PyTorch operations; a fused
kernel would be faster, the recall would be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

PAGE = 16


@dataclass
class Approximate:
    """One way: ``choose(q)`` gives positions int64 ``[B, H, k]``; ``share`` of the keys' bytes are read for it."""

    name: str
    choose: Callable[[torch.Tensor], torch.Tensor]
    share: float


def _grouped(q: torch.Tensor, kv: int) -> torch.Tensor:
    return q.reshape(q.shape[0], kv, -1, q.shape[3])


def ways(k: torch.Tensor, k_eff: int) -> list[Approximate]:
    """The three ways for keys ``k [B, Hkv, N, D]``, prepared once, as their caches would be."""
    kv, n, dim = k.shape[1:]
    pages = k[:, :, : n // PAGE * PAGE].unflatten(2, (-1, PAGE))
    low, high = pages.amin(3), pages.amax(3)

    def quest(q: torch.Tensor) -> torch.Tensor:
        g = _grouped(q, kv)
        bound = g.clamp(min=0) @ high.transpose(-1, -2) + g.clamp(max=0) @ low.transpose(-1, -2)
        page = bound.flatten(1, 2).topk(max(1, k_eff // PAGE), dim=-1).indices
        return (page[..., None] * PAGE + torch.arange(PAGE, device=q.device)).flatten(-2)

    channels = dim // 4
    turned = k.transpose(-1, -2).contiguous()

    def sparq(q: torch.Tensor) -> torch.Tensor:
        g = _grouped(q, kv)
        # One choice of channels for a group of heads, as SparQ does for grouped queries.
        kept = g.abs().sum(2).topk(channels, dim=-1).indices
        rows = turned.gather(2, kept[..., None].expand(-1, -1, -1, n))
        score = g.gather(3, kept[:, :, None].expand(-1, -1, g.shape[2], -1)) @ rows
        return score.flatten(1, 2).topk(k_eff, dim=-1).indices

    sample = k[:, :, :: max(1, n // 4096)].float()
    basis = torch.linalg.eigh(sample.transpose(-1, -2) @ sample).eigenvectors[..., -channels:].to(k.dtype)
    short = (k @ basis).contiguous()

    def loki(q: torch.Tensor) -> torch.Tensor:
        score = (_grouped(q, kv) @ basis) @ short.transpose(-1, -2)
        return score.flatten(1, 2).topk(k_eff, dim=-1).indices

    return [
        Approximate(f"Quest-style, pages of {PAGE}", quest, 2 / PAGE),
        Approximate(f"SparQ-style, {channels} channels", sparq, channels / dim),
        Approximate(f"Loki-style, {channels} directions", loki, channels / dim),
    ]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Attention of ``q [B, H, 1, D]`` over the chosen keys and values."""
    batch, heads, count = positions.shape
    kv = k.shape[1]
    index = positions.reshape(batch, kv, -1)[..., None]
    keys, values = (
        x.gather(2, index.expand(-1, -1, -1, x.shape[3])).reshape(batch, heads, count, x.shape[3]) for x in (k, v)
    )
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values)


def recall(positions: torch.Tensor, exact: torch.Tensor) -> float:
    """Share of the exact top keys ``[B, H, 1, k]`` that are among the chosen ``[B, H, k']``."""
    chosen = torch.zeros(*exact.shape[:2], int(max(positions.max(), exact.max())) + 1, device=exact.device)
    chosen.scatter_(2, positions, 1.0)
    return float(chosen.gather(2, exact[:, :, 0]).mean())
