"""The attention function that transformers calls by the name ``"qaxis"``, registered through its own interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from ..attention import backend
from ..attention.always import NONE
from ..attention.logits import Logits
from ..attention.selection import indices_to_mask, select_mask
from ..storage.lazy import dequantized, stored_or_tensor
from ..storage.side import Stored
from ..validation import DTYPES, check_scale, require
from .layers import HARMLESS
from .masks import visible_keys
from .settings import NAME, Settings, count_call, settings_of

#: queries that the masked mode handles at once; bounds memory at M * N * H booleans
_QUERIES = 1024


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


def _check_supported(kwargs: Mapping[str, Any], dropout: float, *tensors: torch.Tensor) -> None:
    """Refuse what qaxis would have to ignore: arguments that may select keys or change scores, and training."""
    for name, value in kwargs.items():
        require(
            value is None or name in HARMLESS, name, type(value).__name__,
            "None; qaxis does not know this argument, which may select keys or change scores (a bias that differs "
            "between keys breaks Theorem 1)",
        )  # fmt: skip
    require(dropout == 0.0, "dropout", dropout, "0: qaxis is for inference")
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("requires_grad=True: allowed is inference under torch.no_grad(); selection has no gradient")


def _in_one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value, in the dtype that autocast would multiply them in if theirs differ.

    Raises:
        ValueError: for a dtype that the kernels do not know, or different ones without autocast.
    """
    device, first = tensors[0].device.type, tensors[0].dtype
    if any(x.dtype != first for x in tensors) and torch.is_autocast_enabled(device):
        tensors = tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        require(x.dtype in DTYPES, f"{name}.dtype", x.dtype, "float32, float16 or bfloat16")
        require(x.dtype == tensors[0].dtype, f"{name}.dtype", x.dtype, f"the query's {tensors[0].dtype}")
    return tensors


def _settings(module: nn.Module) -> Settings:
    """What was set; in a model loaded with this implementation the default, and for modules of another kind dense."""
    decoder = getattr(module, "is_causal", True) and isinstance(getattr(module, "layer_idx", None), int)
    return settings_of(module) or (Settings() if decoder else Settings(budget=None))


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
        ValueError: for training, dropout, float64, a bias that differs between keys, or an argument that qaxis does
            not know.
    """
    settings = _settings(module)
    _check_supported(kwargs, dropout, query, key, value)
    query, key, value = _in_one_dtype(query, key, value)
    logits = Logits(check_scale(scaling, query.shape[-1]), softcap, s_aux)
    allowed = visible_keys(module, attention_mask, query, key, is_causal)
    # As they were when the call began: another thread may begin or end a recording meanwhile.
    watching = tuple(recorders)
    # Inside autocast a product of float32 tensors would be one of 16 bits.
    with torch.autocast(query.device.type, enabled=False):
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
    keys, values = stored_or_tensor(k), stored_or_tensor(v)
    if settings.budget is None or settings.exactness != "bitwise":
        keys, values = (dequantized(x) if isinstance(x, Stored) else x for x in (keys, values))
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
    for start in range(0, m, _QUERIES):
        rows = slice(start, start + _QUERIES)
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


AttentionInterface.register(NAME, qaxis_attention_forward)
