"""The expensive part, done once: each text through the model dense, sparse, and on the INT8 cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import qaxis
from qaxis.storage.formats import Format
from qaxis.storage.grid import Grid

from .capture import Capture, Captured, first_middle_last

#: queries measured just below each context length
QUERIES = 8
CACHES = {"int8": Format(), "canary": Format(Grid(2), Grid(2, "token", 64))}


@dataclass
class Runs:
    lengths: list[int]
    #: [texts, lengths] mean over layers, heads and queries, nats
    entropy: np.ndarray
    dense: list[torch.Tensor] = field(default_factory=list)
    sparse: list[torch.Tensor] = field(default_factory=list)
    cached: dict[str, list[torch.Tensor]] = field(default_factory=lambda: {name: [] for name in CACHES})
    cache_bytes: int = 0
    cache_elements: int = 0
    #: of the first text
    captured: list[Captured] = field(default_factory=list)


def lengths_upto(tokens: int) -> list[int]:
    """Powers of two from 64 to ``tokens``."""
    return [1 << e for e in range(6, tokens.bit_length()) if 1 << e <= tokens]


class _Entropies:
    """Observer: mean entropy of the queries just below each length, over layers, heads and queries, in nats."""

    def __init__(self, lengths: list[int], layers: int) -> None:
        self.lengths, self.layers = lengths, layers
        self.found = np.zeros(len(lengths))

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        for j, n in enumerate(self.lengths):
            h = qaxis.attention_entropy(q[:, :, n - QUERIES : n], k[:, :, :n], scale=scale)
            self.found[j] += float(h.mean()) / self.layers


def entropies(model: Any, ids: torch.Tensor, lengths: list[int]) -> np.ndarray:
    """Mean attention entropy of one text at each context length, dense, in nats."""
    seen = _Entropies(lengths, model.config.num_hidden_layers)
    with torch.inference_mode(), qaxis.observe_attention(model, seen):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return seen.found


def measure(
    model: Any, texts: list[torch.Tensor], tokens: int, progress: Callable[[Iterable[Any], str], Iterable[Any]]
) -> Runs:
    """Run every text four times; progress is reported per pass."""
    lengths = lengths_upto(tokens)
    runs = Runs(lengths, np.zeros((len(texts), len(lengths))))
    # The canary only has to come out far worse: two texts show that.
    plan = [(t, p) for t in range(len(texts)) for p in ("dense", "sparse", *CACHES) if p != "canary" or t < 2]
    for t, way in progress(plan, "forward passes"):
        if way == "dense":
            runs.dense.append(_dense(runs, model, texts[t], t))
        elif way == "sparse":
            with qaxis.sparse(model, qaxis.Budget(), exactness="selection"):
                runs.sparse.append(qaxis.token_losses(model, texts[t]))
        else:
            cache = qaxis.Int8Cache(model.config, format=CACHES[way])
            runs.cached[way].append(qaxis.token_losses(model, texts[t], cache=cache))
            if way == "int8" and t == 0:
                runs.cache_bytes, runs.cache_elements = bytes_in_bfloat16(model.config, cache)
    return runs


def _dense(runs: Runs, model: Any, ids: torch.Tensor, t: int) -> torch.Tensor:
    """Losses of one text; its entropies go to row ``t``, queries and keys of the first text to ``captured``."""
    entropy = _Entropies(runs.lengths, model.config.num_hidden_layers)
    seen = Capture(first_middle_last(model))
    with torch.inference_mode(), ExitStack() as looking:
        for observer in (entropy, seen) if t == 0 else (entropy,):
            looking.enter_context(qaxis.observe_attention(model, observer))
        losses = qaxis.token_losses(model, ids)
    runs.entropy[t] = entropy.found
    runs.captured += seen.found
    return losses


def bytes_in_bfloat16(config: Any, cache: qaxis.Int8Cache) -> tuple[int, int]:
    """(bytes that the cache of a bfloat16 model would hold, numbers in it).

    Whatever type this model runs in: tokens that are kept in full take two bytes a number.
    """
    twin, numbers = qaxis.Int8Cache(config, format=cache.format), 0
    for i, layer in enumerate(cache.layers):
        keys, values = layer.dequantized()  # type: ignore[union-attr]
        twin.update(keys.bfloat16(), values.bfloat16(), i)
        numbers += keys.numel() + values.numel()
    return twin.stored_bytes(), numbers
