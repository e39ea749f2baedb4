"""Which keys a query may see: the mask that transformers makes for qaxis, and reading any mask that arrives."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from ..attention.selection import causal_mask
from ..validation import require
from .settings import NAME
from .switching import original_of


def make_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> Any:
    """transformers' boolean mask ``[B, 1, M, N]``; left out only where its absence cannot be misread.

    SDPA reads no mask as causal from the *first* key on, which is how transformers uses it with a static cache;
    here no mask means that the queries are the last positions. Both agree for one query, or as many as keys, in
    modules that are causal.

    A bidirectional mask is for modules that stay what they are (cross attention): it is made as they expect it.
    """
    before, causal = original_of(kwargs.get("config")) or (None, False)
    if "allow_is_bidirectional_skip" in kwargs and before not in (None, NAME):
        known = AttentionMaskInterface()[before]
        return known(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **kwargs)
    skip = kwargs.pop("allow_is_causal_skip", True) and (q_length == 1 or (causal and q_length == kv_length))
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=skip, **kwargs)


def visible_keys(
    module: nn.Module, mask: Any, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None
) -> torch.Tensor:
    """The keys that each query may see, bool ``[B or 1, H or 1, M or 1, N]``.

    Args:
        mask: as attention functions of transformers get it: bool or additive (0, or the dtype's lowest number or -inf)
            ``[B, 1, M, N]`` with N at least that of the keys; ``[B, N]``, of padding; or None.
        is_causal: of the call; None: the module decides.

    Raises:
        ValueError: for an additive mask with other numbers, which is a bias, or a mask that does not fit.
    """
    m, n = query.shape[2], key.shape[2]
    causal = m > 1 and (is_causal if is_causal is not None else bool(getattr(module, "is_causal", True)))
    if mask is None:
        require(not causal or m == n, "attention_mask", None, f"a mask for {m} queries that meet {n} keys")
        return _everything(m, n, causal, query.device)
    require(isinstance(mask, torch.Tensor), "attention_mask", type(mask).__name__, "a tensor or None")
    if mask.ndim == 2:
        return (mask[:, None, None, -n:] != 0) & _everything(m, n, causal, query.device)
    fits = mask.ndim == 4 and mask.shape[0] in (1, query.shape[0]) and mask.shape[1] in (1, query.shape[1])
    fits = fits and mask.shape[2] in (1, m) and mask.shape[3] >= n
    require(fits, "attention_mask.shape", tuple(mask.shape), f"broadcastable to {(*query.shape[:3], n)}")
    mask = mask[..., :n]
    return mask if mask.dtype == torch.bool else _without_bias(mask)


def _everything(m: int, n: int, causal: bool, device: torch.device) -> torch.Tensor:
    return causal_mask(m, n, device) if causal else torch.ones(1, 1, 1, n, dtype=torch.bool, device=device)


def _without_bias(mask: torch.Tensor) -> torch.Tensor:
    """The keys that an additive mask shows, which must add nothing to their scores."""
    require(mask.is_floating_point(), "attention_mask.dtype", mask.dtype, "bool, or an additive floating mask")
    shown = mask == 0
    # Masks are added to one another: the lowest number twice is -inf.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    clear = bool((shown | hidden).all())
    if not clear:
        value = mask[~(shown | hidden)][0].item()
        require(
            clear, "attention_mask", value,
            "0 for visible keys and the lowest number or -inf for others; a bias that differs between keys breaks "
            "Theorem 1",
        )  # fmt: skip
    return shown


AttentionMaskInterface.register(NAME, make_mask)
