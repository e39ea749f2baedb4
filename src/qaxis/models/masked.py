"""Attention by dense products: over every visible key, or under the mask of the selected ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ..arithmetic.fast_scores import product_scores
from ..attention import backend
from ..attention.always import NONE
from ..attention.completion import completed_weights, seen_of
from ..attention.logits import Logits
from ..attention.selection import indices_to_mask, select_mask
from .masks import Shown
from .settings import Settings

#: queries that the masked mode handles at once; bounds memory at M * N * H booleans
_QUERIES = 1024
#: scores that are completed at once; bounds memory at some 60 bytes each
_SCORES = 1 << 24


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown | None, allowed: Callable[[], torch.Tensor],
    logits: Logits, settings: Settings,
) -> torch.Tensor:  # fmt: skip
    """Attention ``[B, H, M, Dv]`` of a dense layer; arguments as in :func:`~qaxis.models.routing.attend`."""
    if _is_plain(q, k, shown, logits):
        return _all_before(q, k, v, logits.scale)
    return masked(q, k, v, allowed(), logits, settings)[0]


def _is_plain(q: torch.Tensor, k: torch.Tensor, shown: Shown | None, logits: Logits) -> bool:
    """Whether a GPU's dense kernels know these queries: all keys before them, in 16 bits, nothing done to a logit."""
    narrow = q.is_cuda and q.dtype != torch.float32
    everything = shown is not None and shown.pads is None and (shown.window is None or k.shape[2] <= shown.window)
    return narrow and logits.plain and everything


def _all_before(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Dense attention of queries that are the last of the keys: neither a mask nor copies of the keys are made."""
    m, n = q.shape[2], k.shape[2]
    sdpa = partial(scaled_dot_product_attention, q, k, v, scale=scale, enable_gqa=True)
    if m in (1, n):
        return sdpa(is_causal=m > 1)
    return sdpa(attn_mask=causal_lower_right(m, n))


def masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    logits: Logits,
    settings: Settings,
    watched: bool = False,
    offset: int = 0,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor] | None]:
    """Identical selection, output by a masked dense product: fast for prefill, not bitwise canonical.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. allowed: bool ``[B|1, H|1, M|1, N]``.
        settings: a budget's tolerance is kept to as well.
        watched: whether the mask of kept keys will be asked for.
        offset: tokens before the first key, which a window dropped; completion counts groups from the first token.

    Returns:
        output ``[B, H, M, Dv]``; how to get the mask, bool ``[B, H, M, N]``, None without a budget.

    Raises:
        ValueError: with a completion, if the keys that a query sees are no range.
    """
    m, n, group, budget = q.shape[2], k.shape[2], q.shape[1] // k.shape[1], settings.budget
    allowed = allowed.expand(-1, -1, m, -1)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    masks: list[torch.Tensor] = []
    completes = budget is not None and settings.completion != "none"
    for start in range(0, m, _QUERIES):
        rows = slice(start, start + _QUERIES)
        mask = visible = allowed[:, :, rows]
        scores = product_scores(q[:, :, rows].float(), k.float()) if completes else None
        if budget is not None and settings.always != NONE:
            k_eff = backend.keys_of(budget, q[:, :, rows], k, mask, logits)
            indices = backend.select(q[:, :, rows], k, mask, k_eff, backend="reference", always=settings.always)
            mask = indices_to_mask(indices, n)
        elif budget is not None:
            k_eff = backend.keys_of(budget, q[:, :, rows], k, mask, logits)
            mask = select_mask(q[:, :, rows], k, mask, k_eff, scores)
        if watched and budget is not None:
            masks.append(mask)
        if scores is None:
            out[:, :, rows] = _product(q[:, :, rows], keys, values, mask, logits)
        else:
            _complete(out[:, :, rows], scores, values, mask, visible, offset, logits, settings.completion)
    # A row that may see no key has no defined softmax; canonical attention gives 0.
    out = torch.where(allowed.any(-1)[..., None], out, 0.0)
    return out, None if budget is None else lambda: torch.cat(masks, 2)


def _complete(
    out: torch.Tensor, scores: torch.Tensor, values: torch.Tensor, selected: torch.Tensor, allowed: torch.Tensor,
    offset: int, logits: Logits, kind: str,
) -> None:  # fmt: skip
    """Fill ``out`` with completed attention, in float32; ``values`` are those of every query head."""
    wide, at_once = values.float(), max(1, _SCORES // scores[:, :, 0].numel())
    for start in range(0, scores.shape[2], at_once):
        rows = slice(start, start + at_once)
        visible = allowed[:, :, rows]
        seen = seen_of(visible, offset)
        weights = completed_weights(scores[:, :, rows], selected[:, :, rows], visible, seen, logits, kind)
        out[:, :, rows] = (weights @ wide).to(out.dtype)


def one_query(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Attention ``[B, H, 1, Dv]`` of a query of every head; a row that sees no key gets 0.

    Args:
        q: ``[B, H, 1, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. allowed: bool ``[B, N]``.
    """
    batch, heads, _, dim = q.shape
    mask, group = allowed[:, None, None], heads // k.shape[1]
    if logits.sink is None:
        # The queries that share a KV head as rows of one product: its keys are read once, and not copied.
        out = _product(q.reshape(batch, heads // group, group, dim), k, v, mask, logits).reshape(batch, heads, 1, -1)
    else:
        out = _product(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask, logits)
    return torch.where(mask.any(-1, keepdim=True), out, 0.0)


def _product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Dense attention under a bool mask, with the modifications that SDPA does not know."""
    if logits.plain:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=logits.scale)
    weights = logits.softmax(q.float() @ k.float().transpose(-1, -2), mask)
    return (weights @ v.float()).to(q.dtype)
