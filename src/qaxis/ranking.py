"""Exact top-k selection along the query axis (paper, Theorem 1), reference implementation.

A fast matrix product scores every key; its rounding error is bounded, so it decides every key whose
distance from the threshold exceeds the bound. The few keys inside the band are scored canonically.
The selected set is the canonical one by construction, at the price of a matrix product.
"""

from __future__ import annotations

import torch

from . import canonical
from .budget import Budget, as_budget
from .rounding import product_error_bound
from .validation import check_qkv, check_tensor, require


def unit_query(q: torch.Tensor) -> torch.Tensor:
    """The query axis ``u_Q = q / |q|`` of Theorem 1, over the last dimension.

    Args:
        q: float32, float16 or bfloat16 ``[..., D]``.

    Returns:
        float32 ``[..., D]``, each row of unit length up to rounding.

    Raises:
        ValueError: if a row is zero (it has no axis), or on NaN, Inf or another dtype.
    """
    check_tensor("q", q)
    wide = q.float()
    # Dividing by the largest magnitude first keeps the squares from over- and underflowing.
    largest = wide.abs().amax(dim=-1, keepdim=True)
    zero = largest[..., 0] == 0
    if bool(zero.any()):
        where = tuple(zero.nonzero()[0].tolist())
        raise ValueError(f"q[{where}]=0: allowed is a non-zero query, a zero vector has no axis")
    wide = wide / largest
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)


def canonical_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Raw scores <q, k> in canonical arithmetic (rules 1 and 2 of canonical.py).

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16.
        k: ``[B, Hkv, N, D]``, same dtype and device; H a multiple of Hkv (GQA).

    Returns:
        float32 ``[B, H, M, N]``, no softmax scale applied.

    Raises:
        ValueError: on mismatched shapes, dtypes or devices, NaN or Inf, or scores that overflow.
    """
    check_qkv(q, k)
    out = canonical.scores(q, k)
    check_scores(out)
    return out


def check_scores(scores: torch.Tensor) -> None:
    """Refuse scores that left float32: their order is no longer that of the exact products."""
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        where = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"score[{where}]={scores[where].item()!r}: allowed is products q*k whose sums stay inside float32; "
            "scale q or k by a power of two, which changes no order"
        )


def fast_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scores by matrix product, float32 ``[B, H, M, N]``, within :func:`product_error_bound` of the canonical.

    Where partial sums could leave float32 the bound says nothing: there the canonical scores are
    computed, and refused if they overflow.
    """
    batch, heads, m, dim = q.shape
    largest = float(
        torch.linalg.vector_norm(q.double(), dim=-1).amax() * torch.linalg.vector_norm(k.double(), dim=-1).amax()
    )
    if largest > 1e38:
        out = canonical.scores(q, k)
        check_scores(out)
        return out
    # TF32 or bf16 products, if the caller enabled them globally, would break the bound.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        grouped = q.reshape(batch, k.shape[1], -1, dim)
        return torch.matmul(grouped, k.transpose(-1, -2)).reshape(batch, heads, m, k.shape[2])
    finally:
        torch.set_float32_matmul_precision(precision)


def select_mask(
    q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, k_eff: torch.Tensor, fast: torch.Tensor | None = None
) -> torch.Tensor:
    """The canonical top-k set of every row as a bool mask ``[B, H, M, N]``.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``.
        allowed: bool, broadcastable to ``[B, H, M, N]``; keys a query may see.
        k_eff: int64, broadcastable to ``[B, H, M]``; how many of them to keep (<= number allowed).
        fast: scores within :func:`product_error_bound` of the canonical ones; computed if None.
    """
    batch, heads, m, _ = q.shape
    n, group = k.shape[2], heads // k.shape[1]
    q, k = q.float(), k.float()
    if fast is None:
        fast = fast_scores(q, k)
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
        selected[b, h, i] = sure | _settle(q, k, part, contested, k_eff[b, h, i] - sure.sum(-1), group)
    return selected


def _settle(
    q: torch.Tensor,
    k: torch.Tensor,
    rows: torch.Tensor,
    contested: torch.Tensor,
    wanted: torch.Tensor,
    group: int,
) -> torch.Tensor:
    """Choose ``wanted`` keys of every row among the contested ones by canonical score, then position."""
    row, position = contested.nonzero(as_tuple=True)
    b, h, i = rows[row].unbind(-1)
    score = torch.empty(row.shape[0], dtype=torch.float32, device=q.device)
    step = max(1, canonical.CHUNK_ELEMENTS // q.shape[-1])
    for start in range(0, row.shape[0], step):
        s = slice(start, start + step)
        score[s] = canonical.pair_scores(q[b[s], h[s], i[s]], k[b[s], h[s] // group, position[s]])
    # Stable sorts, least significant key first: position is already ascending within a row.
    order = torch.argsort(canonical.sort_key(score), descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    first_of_row = torch.searchsorted(row[order], row[order])
    keep = order[torch.arange(order.shape[0], device=q.device) - first_of_row < wanted[row[order]]]
    chosen = torch.zeros_like(contested)
    chosen[row[keep], position[keep]] = True
    return chosen


def causal_mask(m: int, n: int, device: torch.device | str) -> torch.Tensor:
    """Bool ``[1, 1, M, N]``: query i of M stands at position N - M + i and sees no later key."""
    position = torch.arange(n - m, n, device=device)
    return (torch.arange(n, device=device)[None, :] <= position[:, None])[None, None]


def mask_to_indices(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Ascending positions of the True entries, int64 ``[B, H, M, width]``, padded at the end with -1."""
    rank = mask.cumsum(-1) - 1
    out = torch.full((*mask.shape[:-1], width), -1, dtype=torch.int64, device=mask.device)
    b, h, i, position = mask.nonzero(as_tuple=True)
    out[b, h, i, rank[b, h, i, position]] = position
    return out


def reference_indices(
    q: torch.Tensor, k: torch.Tensor, budget: Budget, allowed: torch.Tensor, *, chunk: int = 1024
) -> torch.Tensor:
    """Selected positions by the certified reference, int64 ``[B, H, M, k_eff]``, padded with -1."""
    table = budget.table(k.shape[2], q.device)
    m = q.shape[2]
    parts = []
    for start in range(0, m, chunk):
        part_allowed = allowed[:, :, start : start + chunk] if allowed.shape[2] > 1 else allowed
        k_eff = table[part_allowed.sum(-1)]
        mask = select_mask(q[:, :, start : start + chunk], k, part_allowed, k_eff)
        parts.append(mask_to_indices(mask, int(k_eff.max())))
    width = max(p.shape[-1] for p in parts)
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=-1) for p in parts], dim=2)


def topk_indices(
    q: torch.Tensor, k: torch.Tensor, budget: Budget | int, *, causal: bool = True, backend: str = "auto"
) -> torch.Tensor:
    """Positions of the k_eff keys that score highest along each query's axis (Theorem 1).

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16. A zero query ties all keys: lowest positions win.
        k: ``[B, Hkv, N, D]``, same dtype and device; H a multiple of Hkv (GQA).
        budget: a :class:`~qaxis.Budget`, or an int in 1..N.
        causal: if True the queries are the last M of the N positions and see no later key.
        backend: ``"reference"`` (PyTorch, any device), ``"triton"`` or ``"auto"``.

    Returns:
        int64 ``[B, H, M, k_eff]``, ascending; rows with a smaller budget end in -1. The set is that of
        the canonical scores, ties going to the lower position, whichever backend computed it.

    Raises:
        ValueError: naming the argument, on anything outside the above.
    """
    check_qkv(q, k, causal=causal)
    resolved = as_budget(budget, k.shape[2])
    allowed = allowed_keys(q, k, causal)
    if resolve_backend(backend, q) == "triton":
        from . import kernels

        return kernels.topk_indices(q, k, resolved, allowed)
    return reference_indices(q, k, resolved, allowed)


def allowed_keys(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """The keys each query may see, bool ``[1, 1, M or 1, N]``."""
    if causal and q.shape[2] > 1:
        return causal_mask(q.shape[2], k.shape[2], q.device)
    return torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool, device=q.device)


def resolve_backend(backend: str, q: torch.Tensor) -> str:
    """``"auto"`` is Triton for tensors on a GPU, the reference elsewhere; the bits are the same."""
    require(backend in ("auto", "reference", "triton"), "backend", backend, "'auto', 'reference' or 'triton'")
    if backend == "auto":
        return "triton" if q.is_cuda else "reference"
    return backend
