"""Look at what a model's attention computes with, while it stays what it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..validation import check_scale

NAME = "qaxis_capture"

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
_observers: list[Observer] = []


def _forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    scale = check_scale(kwargs.get("scaling"), query.shape[-1])
    for observer in _observers:
        observer(int(module.layer_idx), query, key, value, scale)  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def observe_attention(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call ``observer(layer, q, k, v, scale)`` with every layer's attention inputs; attention itself is SDPA.

    q is ``[B, H, M, D]``, k and v are ``[B, Hkv, N, D]``, positions already rotated in.
    """
    before = model.config._attn_implementation
    _observers.append(observer)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        _observers.remove(observer)
        model.set_attn_implementation(before)
