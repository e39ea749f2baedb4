"""Perplexity as decoding token by token would give it, in one forward pass.

A query sees quantised what was quantised by then: whole groups up to itself, and the newest, incomplete group in
full. One pass over a whole window with a cache is something else: there a query also reads its own group quantised,
with scales that know later tokens. Both protocols are named where they are used; test_cache.py checks that this one
is what a real :class:`qaxis.Int8Cache` gives when it is fed one token at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .attending import attending, register
from .schemes import Scheme

NAME = "selfcheck_streaming"
#: queries handled at once; every group of a grid has to divide it
BLOCK = 128
_schemes: list[Scheme] = []
sdpa = torch.nn.functional.scaled_dot_product_attention


def _mixed(x: torch.Tensor, quantised: torch.Tensor, together: int, start: int, stop: int) -> torch.Tensor:
    """Tokens up to ``stop`` as queries from ``start`` on see them, ``start`` being the beginning of a group."""
    if together == 1:
        return quantised[:, :, :stop]
    return torch.cat([quantised[:, :, :start], x[:, :, start:stop]], dim=2)


def _forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    scale, scheme = kwargs.get("scaling"), _schemes[-1]
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"queries={query.shape[2]}: allowed is the whole window at once, {key.shape[2]}, without a cache"
        )
    n, group = query.shape[2], query.shape[1] // key.shape[1]
    # A head each, once: SDPA has no fast kernel for float32 that shares keys between heads.
    keys, values, key, value = (
        x.repeat_interleave(group, dim=1) for x in (scheme.keys(key), scheme.values(value), key, value)
    )
    out = torch.empty_like(query)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        causal = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
        k = _mixed(key, keys, scheme.key_tokens, start, stop)
        v = _mixed(value, values, scheme.value_tokens, start, stop)
        out[:, :, start:stop] = sdpa(query[:, :, start:stop], k, v, attn_mask=causal, scale=scale)
        if stop - start == BLOCK:
            # The last query of a group comes with the token that completes it.
            k, v = keys[:, :, :stop], values[:, :, :stop]
            out[:, :, stop - 1 : stop] = sdpa(query[:, :, stop - 1 : stop], k, v, scale=scale)
    return out.transpose(1, 2).contiguous(), None


register(NAME, _forward)


@contextmanager
def streaming(model: Any, scheme: Scheme) -> Iterator[None]:
    """Inside, whole-window forward passes without a cache read what decoding with this scheme would read."""
    for name in ("key_tokens", "value_tokens"):
        if getattr(scheme, name) not in (1, BLOCK):
            raise ValueError(f"{name}={getattr(scheme, name)}: allowed is 1 or {BLOCK}")
    _schemes.append(scheme)
    try:
        with attending(model, NAME):
            yield
    finally:
        _schemes.pop()
