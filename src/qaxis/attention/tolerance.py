"""How many keys a query needs so that those it leaves out hold no more than a share of its softmax mass.

Weights are canonical powers of two, relative to the best key's, as integers of 2^-30: their sums are exact in any
order, so every device finds the same number.
"""

from __future__ import annotations

import math

import torch

from ..arithmetic import reference as canonical
from ..budget import Budget
from .logits import Logits
from .reference import logits_of, to_base_two

#: weights are counted in units of 2^-30 of the best key's
UNITS = 1 << 30


def keys_of(budget: Budget, q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, logits: Logits) -> torch.Tensor:
    """How many keys a ``budget`` with a tolerance gives every query, int64 ``[B, H, M]``.

    Every key is scored canonically, which is slow. What a sink logit holds is no key's and does not count.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``. allowed: bool ``[B|1, H|1, M|1, N]``; keys a query may see.
    """
    least = budget.of(allowed)
    batch, heads, m, dim = q.shape
    group, n, factor = heads // k.shape[1], k.shape[2], to_base_two(logits)
    allowed, share = allowed.expand(batch, heads, m, n), budget.share_left_out()
    out = least.expand(batch, heads, m).clone()
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // group].float()
            for rows in torch.arange(m, device=q.device).split(max(1, canonical.CHUNK_ELEMENTS // (n * dim))):
                score = canonical.pair_scores(q[b, h, rows, None].float(), keys)
                canonical.check_scores(score)
                needed = _needed(logits_of(score, logits), allowed[b, h, rows], factor, share)
                out[b, h, rows] = torch.maximum(out[b, h, rows], needed)
    return out


def _needed(logit: torch.Tensor, allowed: torch.Tensor, factor: float, share: tuple[int, int]) -> torch.Tensor:
    """The fewest keys ``[R]`` of logits ``[R, N]`` whose rest holds at most ``share[0] / share[1]`` of all weight."""
    logit = torch.where(allowed, logit, -math.inf)
    best = logit.amax(-1, keepdim=True)
    power = torch.where(allowed, logit - best, 0.0) * factor
    weight = torch.where(allowed, (canonical.exp2(power) * UNITS).to(torch.int64), 0)
    kept = weight.sort(-1, descending=True).values.cumsum(-1)
    total = kept[:, -1:]
    # At most 2^31 keys of 2^30 units: the total is below 2^61, so it is divided before it is multiplied.
    most = total // share[1] * share[0] + total % share[1] * share[0] // share[1]
    return torch.where(total[:, 0] > 0, (total - kept > most).sum(-1) + 1, 0)
