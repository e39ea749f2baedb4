"""Canonical attention over chosen keys in PyTorch, on any device: the meaning of every other implementation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..arithmetic import reference as canonical
from .logits import Logits


class Sums(NamedTuple):
    """Sums over the chosen keys of R queries, relative to the highest logit."""

    #: float32 ``[R, Dv]``
    numerator: torch.Tensor
    #: float32 ``[R]``
    denominator: torch.Tensor
    #: the highest chosen logit, or the sink's, float32 ``[R]``
    top: torch.Tensor

    def output(self) -> torch.Tensor:
        """The quotient, float32 ``[R, Dv]``; a row without a live key is 0."""
        below = self.denominator[..., None]
        return torch.where(below > 0, self.numerator / below, 0.0)


def logits_of(score: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Canonical logits of raw scores, up to :func:`to_base_two`.

    Of plain logits the scale is folded into the change of base: one product less, and the order of the published one.
    """
    if logits.plain:
        return score
    logit = score * logits.scale
    return logit if logits.soft_cap is None else canonical.soft_cap(logit, logits.soft_cap)


def to_base_two(logits: Logits) -> float:
    """What turns a difference of :func:`logits_of` into a power of two."""
    return canonical.exponent_factor(logits.scale if logits.plain else 1.0)


def weighted_sums(
    score: torch.Tensor, values: torch.Tensor, live: torch.Tensor, logits: Logits, head: int = 0,
    less: torch.Tensor | None = None,
) -> Sums:  # fmt: skip
    """Canonical softmax-weighted sums over chosen keys of one head (rules 2, 3 and 5).

    Args:
        score: float32 raw scores ``[..., K]`` of the chosen keys, ascending positions.
        values: float32 ``[..., K, Dv]``.
        live: bool ``[..., K]``; False marks the padding of rows with a smaller budget.
        logits: what becomes of a score.
        head: whose sink logit counts.
        less: float32 ``[..., K]``, taken from the weights of the values, not from the denominator.
    """
    logit, factor = logits_of(score, logits), to_base_two(logits)
    top = torch.where(live, logit, -math.inf).amax(dim=-1, keepdim=True)
    sink = None if logits.sink is None else logits.sink[head].float()
    if sink is not None:
        top = torch.maximum(top, sink)
    p = torch.where(live, canonical.exp2(torch.where(live, (logit - top) * factor, 0.0)), 0.0)
    denominator = canonical.tree_sum(p)
    if sink is not None:
        denominator = denominator + canonical.exp2((sink - top[..., 0]) * factor)
    p = p if less is None else p - less
    numerator = canonical.tree_sum((p[..., None] * values).transpose(-1, -2))
    return Sums(numerator, denominator, top[..., 0])


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Canonical attention of ``q [B,H,M,D]`` over the keys that ``indices [B,H,M,K]`` (padded with -1) name.

    Returns:
        ``[B, H, M, Dv]`` in q's dtype.
    """
    batch, heads, m, dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty(batch, heads, m, v.shape[-1], dtype=q.dtype, device=q.device)
    per_row = max(dim, v.shape[-1]) * canonical.next_power_of_two(indices.shape[-1])
    at_once = max(1, canonical.CHUNK_ELEMENTS // per_row)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group].float(), v[b, h // group].float()
            for start in range(0, m, at_once):
                rows = slice(start, start + at_once)
                chosen = indices[b, h, rows]
                safe = chosen.clamp(min=0)
                score = canonical.pair_scores(q[b, h, rows, None, :].float(), keys[safe])
                canonical.check_scores(score)
                out[b, h, rows] = weighted_sums(score, values[safe], chosen >= 0, logits, h).output().to(q.dtype)
    return out
