"""Top-k attention: select exactly, then attend in canonical order."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import canonical
from .budget import Budget, as_budget
from .ranking import allowed_keys, check_scores, reference_indices, resolve_backend
from .validation import check_qkv, check_scale


class TopKAttention(NamedTuple):
    """Result of :func:`topk_attention`."""

    #: ``[B, H, M, Dv]`` in the dtype of the queries
    output: torch.Tensor
    #: int64 ``[B, H, M, k_eff]``, ascending positions, padded with -1
    indices: torch.Tensor


def topk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    budget: Budget | int,
    *,
    scale: float | None = None,
    causal: bool = True,
    backend: str = "auto",
) -> TopKAttention:
    """Softmax attention over the k_eff keys that score highest along each query's axis.

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16.
        k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. Same dtype and device; H a multiple of Hkv (GQA).
        budget: a :class:`~qaxis.Budget`, or an int in 1..N.
        scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``. It cannot change the selection.
        causal: if True the queries are the last M of the N positions and see no later key.
        backend: ``"reference"``, ``"triton"`` or ``"auto"``. All return the same bits.

    Raises:
        ValueError: naming the argument, on anything outside the above.
    """
    check_qkv(q, k, v, causal=causal)
    resolved = as_budget(budget, k.shape[2])
    factor = check_scale(scale, q.shape[-1])
    allowed = allowed_keys(q, k, causal)
    return attend_allowed(q, k, v, resolved, allowed, factor, resolve_backend(backend, q))


def attend_allowed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    budget: Budget,
    allowed: torch.Tensor,
    scale: float,
    backend: str,
) -> TopKAttention:
    """:func:`topk_attention` over the keys that ``allowed`` (bool ``[B|1, H|1, M|1, N]``) lets each query see."""
    if backend == "triton":
        from . import kernels

        indices = kernels.topk_indices(q, k, budget, allowed)
        return TopKAttention(kernels.attend(q, k, v, indices, scale), indices)
    indices = reference_indices(q, k, budget, allowed)
    return TopKAttention(reference_attend(q, k, v, indices, scale), indices)


def reference_attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float
) -> torch.Tensor:
    """Canonical attention over given ``indices``, ``[B, H, M, Dv]`` in q's dtype."""
    batch, heads, m, dim = q.shape
    group = heads // k.shape[1]
    width = indices.shape[-1]
    out = torch.empty(batch, heads, m, v.shape[-1], dtype=q.dtype, device=q.device)
    step = max(1, canonical.CHUNK_ELEMENTS // (max(dim, v.shape[-1]) * canonical.next_power_of_two(width)))
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group].float(), v[b, h // group].float()
            for start in range(0, m, step):
                rows = slice(start, start + step)
                chosen = indices[b, h, rows]
                live = chosen >= 0
                safe = chosen.clamp(min=0)
                score = canonical.pair_scores(q[b, h, rows, None, :].float(), keys[safe])
                check_scores(score)
                out[b, h, rows] = canonical.attend(score, values[safe], live, scale).to(q.dtype)
    return out
