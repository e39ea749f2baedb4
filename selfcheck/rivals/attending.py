"""Another attention for a model: given to transformers by a name, used for a while, taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask


def register(name: str, forward: Callable[..., Any]) -> None:
    """Let models find ``forward`` by ``name``; its masks are SDPA's."""
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Inside, the model's attention is the one of this name; afterwards the one from before, whatever happened."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
