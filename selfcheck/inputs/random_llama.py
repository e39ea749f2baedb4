"""Llama-shaped models with random weights: the sizes of models that no package here has."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV_HEADS = 32, 8


def build(
    device: str, *, layers: int, head_dim: int, hidden: int, intermediate: int, heads: int = HEADS,
    kv_heads: int = KV_HEADS, vocabulary: int = 32000,
) -> Any:  # fmt: skip
    """A bfloat16 model in eval mode, its weights drawn on ``device``."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        head_dim=head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=1 << 18,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
