"""The expensive part, done once: each text through the model dense, sparse, and on the INT8 cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import qaxis
from qaxis.storage.formats import Format
from qaxis.storage.grid import Grid

from ..harness.claim import Context

#: queries measured just below each context length
QUERIES = 8
CACHES = {"int8": Format(), "canary": Format(Grid(2), Grid(2, "token", 64))}


@dataclass
class Runs:
    lengths: list[int]
    #: [texts, lengths] mean over layers, heads and queries, nats
    entropy: np.ndarray
    dense: list[torch.Tensor]
    sparse: list[torch.Tensor]
    cached: dict[str, list[torch.Tensor]]
    cache_bytes: int
    cache_elements: int
    #: (layer, q, k, v) of the first text
    captured: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]


def lengths_upto(tokens: int) -> list[int]:
    """Powers of two from 64 to ``tokens``."""
    return [1 << e for e in range(6, tokens.bit_length()) if 1 << e <= tokens]


def measure(context: Context) -> Runs:
    """Run every text four times; progress is reported per pass."""
    subjects = context.subjects
    model, texts = subjects.model, subjects.texts
    lengths = lengths_upto(context.tokens)
    layers = model.config.num_hidden_layers
    keep = {0, layers // 2, layers - 1}
    captured: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    entropies = np.zeros((len(texts), len(lengths)))
    dense, sparse = [], []
    cached: dict[str, list[torch.Tensor]] = {name: [] for name in CACHES}
    cache_bytes = cache_elements = 0
    # The canary only has to come out far worse: two texts show that.
    plan = [(t, p) for t in range(len(texts)) for p in ("dense", "sparse", *CACHES) if p != "canary" or t < 2]
    for t, step in context.progress(plan, "forward passes"):
        ids = texts[t]
        if step == "dense":

            def observe(
                layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, t: int = t
            ) -> None:
                for j, n in enumerate(lengths):
                    h = qaxis.attention_entropy(q[:, :, n - QUERIES : n], k[:, :, :n], scale=scale)
                    entropies[t, j] += float(h.mean()) / layers
                if t == 0 and layer in keep:
                    captured.append((layer, q.clone(), k.clone(), v.clone()))

            with torch.inference_mode(), qaxis.observe_attention(model, observe):
                dense.append(qaxis.token_losses(model, ids))
        elif step == "sparse":
            with qaxis.sparse(model, qaxis.Budget(), exactness="selection"):
                sparse.append(qaxis.token_losses(model, ids))
        else:
            cache = qaxis.Int8Cache(model.config, format=CACHES[step])
            cached[step].append(qaxis.token_losses(model, ids, cache=cache))
            if step == "int8" and t == 0:
                cache_bytes = _bytes_in_bfloat16(model.config, cache)
                cache_elements = _elements(cache)
    return Runs(lengths, entropies, dense, sparse, cached, cache_bytes, cache_elements, captured)


def _bytes_in_bfloat16(config: Any, cache: qaxis.Int8Cache) -> int:
    """What the cache of a bfloat16 model holds: the tokens it keeps in full take two bytes a number, not four."""
    twin = qaxis.Int8Cache(config)
    for i, layer in enumerate(cache.layers):
        keys, values = layer.dequantized()  # type: ignore[union-attr]
        twin.update(keys.bfloat16(), values.bfloat16(), i)
    return twin.stored_bytes()


def _elements(cache: qaxis.Int8Cache) -> int:
    """Numbers a full-precision cache would hold: keys and values of every layer."""
    return sum(x.numel() for layer in cache.layers for x in layer.dequantized())  # type: ignore[union-attr]
