"""The attention function that transformers calls by the name ``"qaxis"``, and the mask it is given.

Registered through transformers' own attention and mask interfaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..attention import backend
from ..attention.always import NONE
from ..attention.logits import Logits
from ..attention.selection import causal_mask, indices_to_mask, select_mask
from ..storage.side import Stored
from ..validation import check_scale, require
from .lazy import LazyTensor
from .settings import NAME, Settings, count_call, settings_of

#: query rows that the masked mode handles at once; bounds memory at M * N * H booleans
_ROWS = 1024


@dataclass
class Call:
    """One attention call, as recorders see it."""

    module: nn.Module
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    allowed: torch.Tensor
    logits: Logits
    #: bool ``[B, H, M, N]``; None where every allowed key takes part
    kept: torch.Tensor | None


#: called with every attention call, in order
recorders: list[Callable[[Call], None]] = []


def _check_supported(kwargs: Mapping[str, Any], attention_mask: torch.Tensor | None) -> None:
    """Refuse score modifications under which ranking by the query axis is not ranking by logit."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("position_bias=<tensor>: allowed is None; a bias that differs between keys breaks Theorem 1")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask.dtype={attention_mask.dtype}: allowed is bool or None; an additive bias breaks Theorem 1"
        )


@torch.compiler.disable(reason="a compiler may contract or reorder canonical arithmetic; the kernels stay as they are")
def qaxis_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: ``[B,H,M,D], [B,Hkv,N,D] -> [B,M,H,D]``.

    Args:
        softcap: soft cap of the logits (Gemma 2); it keeps their order.
        s_aux: ``[H]`` sink logits that take part in the denominator (gpt-oss); they keep the order.

    Raises:
        ValueError: for training, dropout, or a bias that differs between keys.
    """
    settings = settings_of(module) or Settings()
    _check_supported(kwargs, attention_mask)
    require(dropout == 0.0, "dropout", dropout, "0: qaxis is for inference")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError("requires_grad=True: allowed is inference under torch.no_grad(); selection has no gradient")
    logits = Logits(check_scale(scaling, query.shape[-1]), softcap, s_aux)
    m, n = query.shape[2], key.shape[2]
    if attention_mask is not None:
        allowed = attention_mask[..., :n]
    elif m > 1 and (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        allowed = causal_mask(m, n, query.device)
    else:
        allowed = torch.ones(1, 1, 1, n, dtype=torch.bool, device=query.device)
    # As they were when the call began: another thread may begin or end a recording meanwhile.
    watching = tuple(recorders)
    out, kept = attend(query, key, value, allowed, logits, settings, bool(watching))
    if watching:
        layer = int(getattr(module, "layer_idx", -1))
        call = Call(module, layer, query, key, allowed, logits, None if kept is None else kept())
        for recorder in watching:
            recorder(call)
    if settings.strict or watching:
        count_call(module)
    return out.transpose(1, 2).contiguous(), None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    logits: Logits,
    settings: Settings,
    watched: bool = False,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor] | None]:
    """(output ``[B, H, M, Dv]``, how to get the mask of kept keys or None where every key was kept)."""
    keys, values = (x.stored if isinstance(x, LazyTensor) else x for x in (k, v))
    if settings.budget is None or settings.exactness != "bitwise":
        keys, values = (backend.dequantized(x) if isinstance(x, Stored) else x for x in (keys, values))
        return masked(q, keys, values, allowed, logits, settings, watched)
    k_eff, name = settings.budget.of(allowed), settings.backend
    indices = backend.select(q, keys, allowed, k_eff, backend=name, always=settings.always)
    out = backend.attend(q, keys, values, indices, logits, backend=name)
    return out, lambda: indices_to_mask(indices, k.shape[2])


def masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    logits: Logits,
    settings: Settings,
    watched: bool = False,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor] | None]:
    """Identical selection, output by a masked dense product: fast for prefill, not bitwise canonical."""
    m, n, group, budget = q.shape[2], k.shape[2], q.shape[1] // k.shape[1], settings.budget
    allowed = allowed.expand(-1, -1, m, -1)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    masks: list[torch.Tensor] = []
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        mask = allowed[:, :, rows]
        if budget is not None and settings.always != NONE:
            indices = backend.select(
                q[:, :, rows], k, mask, budget.of(mask), backend="reference", always=settings.always
            )
            mask = indices_to_mask(indices, n)
        elif budget is not None:
            mask = select_mask(q[:, :, rows], k, mask, budget.of(mask))
        if watched and budget is not None:
            masks.append(mask)
        out[:, :, rows] = _dense(q[:, :, rows], keys, values, mask, logits)
    # A row that may see no key has no defined softmax; canonical attention gives 0.
    out = torch.where(allowed.any(-1)[..., None], out, 0.0)
    return out, None if budget is None else lambda: torch.cat(masks, 2)


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Dense attention under a bool mask, with the modifications that SDPA does not know."""
    if logits.plain:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=logits.scale)
    weights = logits.softmax(q.float() @ k.float().transpose(-1, -2), mask)
    return (weights @ v.float()).to(q.dtype)


def _full_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """transformers' boolean mask; left out only where its absence cannot be misread.

    SDPA reads no mask as causal from the *first* key on, which is how transformers uses it with a static cache;
    here no mask means that the queries are the last positions. Both agree for one query, or as many as keys.
    """
    skip = kwargs.pop("allow_is_causal_skip", True) and q_length in (1, kv_length)
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=skip, **kwargs)


AttentionInterface.register(NAME, qaxis_attention_forward)
AttentionMaskInterface.register(NAME, _full_mask)
