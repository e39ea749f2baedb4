"""Exact top-k selection along the query axis (paper, Theorem 1), reference implementation.

A fast matrix product scores every key; its rounding error is bounded, so it decides every key whose
distance from the threshold exceeds the bound. The few keys inside the band are scored canonically.
The selected set is the canonical one by construction, at the price of a matrix product.
"""

from __future__ import annotations

import torch

from ..arithmetic import reference as canonical
from ..arithmetic.fast_scores import product_scores
from ..arithmetic.rounding import product_error_bound
from ..storage.side import Stored


def select_mask(
    q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, k_eff: torch.Tensor, fast: torch.Tensor | None = None
) -> torch.Tensor:
    """The canonical top-k set of every row as a bool mask ``[B, H, M, N]``.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``.
        allowed: bool, broadcastable to ``[B, H, M, N]``; keys a query may see.
        k_eff: int64, broadcastable to ``[B, H, M]``; how many of them to keep (<= number allowed).
        fast: scores within ``rounding.product_error_bound`` of the canonical ones; computed if None.
    """
    batch, heads, m, _ = q.shape
    n, group = k.shape[2], heads // k.shape[1]
    q, k = q.float(), k.float()
    if fast is None:
        fast = product_scores(q, k)
    allowed = allowed.expand(batch, heads, m, n)
    k_eff = k_eff.expand(batch, heads, m)
    fast = torch.where(allowed, fast, -torch.inf)

    # Value of the k-th and of the next best fast score of every row.
    k_max = int(k_eff.max())
    ranked = torch.topk(fast, min(k_max + 1, n), dim=-1, sorted=True).values
    kth = ranked.gather(-1, (k_eff[..., None] - 1).clamp(min=0))
    after = torch.full_like(kth, -torch.inf)
    has_next = k_eff[..., None] < ranked.shape[-1]
    after = torch.where(has_next, ranked.gather(-1, k_eff[..., None].clamp(max=ranked.shape[-1] - 1)), after)
    kth = torch.where(k_eff[..., None] > 0, kth, torch.inf)

    # Two keys can change places only if their fast scores differ by at most two error bounds.
    band = 2 * product_error_bound(q, k)
    selected = fast >= kth
    unsure = (kth - after <= band) & torch.isfinite(after)
    rows = unsure[..., 0].nonzero()
    for part in rows.split(max(1, canonical.CHUNK_ELEMENTS // n)):
        b, h, i = part.unbind(-1)
        row_fast = fast[b, h, i]
        row_band = band[b, h, i]
        sure = row_fast > after[b, h, i] + row_band
        contested = (row_fast >= kth[b, h, i] - row_band) & ~sure & torch.isfinite(row_fast)
        selected[b, h, i] = sure | _settled(q, k, part, contested, k_eff[b, h, i] - sure.sum(-1), group)
    return selected


def _settled(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    contested: torch.Tensor,
    missing: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """Choose ``missing`` keys of every row among the contested ones by canonical score, then position."""
    row, position = contested.nonzero(as_tuple=True)
    b, h, i = rows[row].unbind(-1)
    score = torch.empty(row.shape[0], dtype=torch.float32, device=q.device)
    at_once = max(1, canonical.CHUNK_ELEMENTS // q.shape[-1])
    for start in range(0, row.shape[0], at_once):
        s = slice(start, start + at_once)
        score[s] = canonical.pair_scores(q[b[s], h[s], i[s]], k[b[s], h[s] // group, position[s]])
    # Stable sorts, least significant key first: position is already ascending within a row.
    order = torch.argsort(canonical.sort_key(score), descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    first_of_row = torch.searchsorted(row[order], row[order])
    keep = order[torch.arange(order.shape[0], device=q.device) - first_of_row < missing[row[order]]]
    chosen = torch.zeros_like(contested)
    chosen[row[keep], position[keep]] = True
    return chosen


def causal_mask(m: int, n: int, device: torch.device | str) -> torch.Tensor:
    """Bool ``[1, 1, M, N]``: query i of M stands at position N - M + i and sees no later key."""
    position = torch.arange(n - m, n, device=device)
    return (torch.arange(n, device=device)[None, :] <= position[:, None])[None, None]


def allowed_keys(q: torch.Tensor, k: torch.Tensor | Stored, causal: bool) -> torch.Tensor:
    """The keys each query may see, bool ``[1, 1, M or 1, N]``."""
    if causal and q.shape[2] > 1:
        return causal_mask(q.shape[2], k.shape[2], q.device)
    return torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)


def mask_to_indices(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Ascending positions of the True entries, int64 ``[B, H, M, width]``, padded at the end with -1."""
    rank = mask.cumsum(-1) - 1
    out = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int64, device=mask.device)
    b, h, i, position = mask.nonzero(as_tuple=True)
    out[b, h, i, rank[b, h, i, position]] = position
    return out


def indices_to_mask(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Bool ``[B, H, M, N]`` of indices padded with -1."""
    mask = torch.zeros(*indices.shape[:3], n + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(indices < 0, n, indices), True)[..., :n]


def choose(
    q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, k_eff: torch.Tensor, *, chunk: int = 1024
) -> torch.Tensor:
    """The best ``k_eff`` of the ``allowed`` keys of every query, int64 ``[B, H, M, width]``, padded with -1.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``.
        allowed: bool ``[B|1, H|1, M|1, N]``; keys a query may see.
        k_eff: int64, broadcastable to ``[B, H, M]``; how many of them it keeps.
    """
    m = q.shape[2]
    parts = []
    for start in range(0, m, chunk):
        rows = slice(start, start + chunk)
        some = allowed[:, :, rows] if allowed.shape[2] > 1 else allowed
        wanted = k_eff[:, :, rows] if k_eff.shape[2] > 1 else k_eff
        parts.append(mask_to_indices(select_mask(q[:, :, rows], k, some, wanted), int(wanted.max())))
    return stacked(parts)


def stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """Indices of successive queries as one tensor, padded with -1 to the widest."""
    width = max(p.shape[-1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=-1) for p in parts], dim=2)
