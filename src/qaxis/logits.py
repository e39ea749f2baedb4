"""Soft-capped logits and sink logits in canonical arithmetic.

Both keep the order of the scores (paper, section 2), so selection is as ever; only the weights change. They
are built from the exponential of canonical.py, in PyTorch on every device: same bits, no kernel of their own.
"""

from __future__ import annotations

import math

import torch

from . import canonical
from .ranking import check_scores


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(x / cap)`` for float32 ``x``, absolute error below 4 ulp of ``cap``, bits equal on every device."""
    # A tensor, not a number: CUDA divides by a number as a product with its reciprocal, which rounds otherwise.
    y = x / torch.full((1,), cap, dtype=torch.float32, device=x.device)
    e = canonical.exp2(y.abs() * canonical.exponent_factor(-2.0))
    return torch.copysign((1.0 - e) / (1.0 + e), y) * cap


def attend_modified(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
) -> torch.Tensor:
    """Canonical attention over given ``indices`` with a soft cap on the logits, a sink logit per head, or both.

    Args:
        q, k, v, indices, scale: as :func:`qaxis.attention.reference_attend`.
        softcap: logits become ``softcap * tanh(logit / softcap)`` (Gemma 2).
        sink: ``[H]``, a logit that takes part in the denominator and has no value (gpt-oss).

    Returns:
        ``[B, H, M, Dv]`` in q's dtype.
    """
    to_base_two = canonical.exponent_factor(1.0)
    batch, heads, m, dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty(batch, heads, m, v.shape[-1], dtype=q.dtype, device=q.device)
    per_row = max(dim, v.shape[-1]) * canonical.next_power_of_two(indices.shape[-1])
    step = max(1, canonical.CHUNK_ELEMENTS // per_row)
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group].float(), v[b, h // group].float()
            for start in range(0, m, step):
                rows = slice(start, start + step)
                live = indices[b, h, rows] >= 0
                safe = indices[b, h, rows].clamp(min=0)
                score = canonical.pair_scores(q[b, h, rows, None, :].float(), keys[safe])
                check_scores(score)
                logit = score * scale
                if softcap is not None:
                    logit = soft_cap(logit, softcap)
                top = torch.where(live, logit, -math.inf).amax(-1, keepdim=True)
                if sink is not None:
                    top = torch.maximum(top, sink[h].float())
                p = torch.where(live, canonical.exp2(torch.where(live, (logit - top) * to_base_two, 0.0)), 0.0)
                total = canonical.tree_sum(p)
                if sink is not None:
                    total = total + canonical.exp2((sink[h].float() - top[:, 0]) * to_base_two)
                weighted = canonical.tree_sum((p[..., None] * values[safe]).transpose(-1, -2))
                out[b, h, rows] = torch.where(total[:, None] > 0, weighted / total[:, None], 0.0).to(q.dtype)
    return out
