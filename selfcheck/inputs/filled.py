"""Caches filled with random keys and values directly, as long as a prompt that nobody has to wait for."""

from __future__ import annotations

from typing import Any

import torch


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def key_values(model: Any, tokens: int, layer: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[1, Hkv, tokens, D]`` of one layer: the same for every cache that they are written to."""
    config, generator = model.config, torch.Generator(model.device).manual_seed(seed + layer)
    shape = (1, config.num_key_value_heads, tokens, head_dim(config))
    k, v = (torch.randn(shape, device=model.device, dtype=model.dtype, generator=generator) for _ in range(2))
    return k, v


@torch.no_grad()
def fill(cache: Any, model: Any, tokens: int, seed: int) -> Any:
    """The empty ``cache`` with ``tokens`` random tokens in every layer."""
    for layer in range(model.config.num_hidden_layers):
        cache.update(*key_values(model, tokens, layer, seed), layer)
    return cache
