"""Keys that are always kept, inside the budget: the first ones (sinks) and the most recent."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .budget import Budget
from .ranking import mask_to_indices, reference_indices

#: query rows whose masks are held at once
_ROWS = 1024


def kept_keys(allowed: torch.Tensor, sinks: int, recent: int) -> torch.Tensor:
    """The first ``sinks`` and the last ``recent`` keys that each query may see, as a bool mask like ``allowed``."""
    place = allowed.cumsum(-1)
    return allowed & ((place <= sinks) | (place > place[..., -1:] - recent))


@dataclass(frozen=True)
class _Remaining:
    """What is left of a budget for keys that are not kept anyway, by their number."""

    budget: Budget
    kept: int

    def table(self, n_max: int, device: torch.device | str = "cpu") -> torch.Tensor:
        left = self.budget.table(n_max + self.kept, device)[self.kept :] - self.kept
        left[0] = 0
        return left


def indices_with_kept(
    q: torch.Tensor, k: torch.Tensor, budget: Budget, allowed: torch.Tensor, sinks: int, recent: int, backend: str
) -> torch.Tensor:
    """Selected positions, int64 ``[B, H, M, k_eff]`` padded with -1: the kept keys, then the best of the others.

    Args:
        q, k: ``[B, H, M, D]``, ``[B, Hkv, N, D]``.
        budget: at least ``sinks + recent`` keys, which the caller has checked.
        allowed: bool, broadcastable to ``[B, H, M, N]``.
        sinks, recent: numbers of keys; they count towards k_eff.
        backend: ``"reference"`` or ``"triton"``.
    """
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    rest = _Remaining(budget, sinks + recent)
    allowed = allowed.expand(-1, -1, m, -1)
    parts = []
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        kept = kept_keys(allowed[:, :, rows], sinks, recent)
        others = allowed[:, :, rows] & ~kept
        if backend == "triton":
            from . import kernels

            chosen = kernels.topk_indices(q[:, :, rows], k, rest, others)  # type: ignore[arg-type]
        else:
            chosen = reference_indices(q[:, :, rows], k, rest, others)  # type: ignore[arg-type]
        mask = torch.zeros(batch, heads, chosen.shape[2], n + 1, dtype=torch.bool, device=q.device)
        mask.scatter_(-1, torch.where(chosen < 0, n, chosen), True)
        whole = mask[..., :n] | kept
        parts.append(mask_to_indices(whole, int(whole.sum(-1).max())))
    width = max(p.shape[-1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=-1) for p in parts], dim=2)
