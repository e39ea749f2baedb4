"""Random queries, keys and values of one decode step, of kinds that differ in what they ask of a certified one."""

from __future__ import annotations

import math

import torch

INDEPENDENT, CORRELATED, UNEVEN = "independent", "correlated", "uneven"
#: independent normal numbers; query heads of a KV head that look in much the same direction; keys whose channels differ
#: in size, as those of models do
KINDS = (INDEPENDENT, CORRELATED, UNEVEN)
#: between any two query heads of a KV head
COSINE = 0.7
#: sizes of channels are powers of ten between minus this and this
DECADES = 1.0


def drawn(
    kind: str, shape: tuple[int, int, int, int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q ``[B, H, 1, D]``, k and v ``[B, Hkv, N, D]``, bfloat16, where the generator is; shape = (B, H, Hkv, N, D).

    Raises:
        ValueError: for a kind that there is not.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: allowed is one of {KINDS}")
    batch, heads, kv, n, dim = shape
    device = generator.device

    def bell(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    q, k, v = bell(batch, heads, 1, dim), bell(batch, kv, n, dim), bell(batch, kv, n, dim)
    grouped = q.float().unflatten(1, (kv, -1))
    if kind == CORRELATED:
        shared = bell(batch, kv, 1, 1, dim).float()
        q = (math.sqrt(COSINE) * shared + math.sqrt(1 - COSINE) * grouped).flatten(1, 2).to(q.dtype)
    elif kind == UNEVEN:
        sizes = torch.logspace(-DECADES, DECADES, dim, device=device)
        order = torch.rand(kv, dim, device=device, generator=generator).argsort(-1)
        size = sizes[order][:, None]
        # Scores stay what they were, but for rounding: a query asks least of the channels that keys have most of.
        q, k = (grouped / size[:, None]).flatten(1, 2).to(q.dtype), k.mul_(size)
    return q, k, v
