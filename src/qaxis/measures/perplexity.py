"""Perplexity, and the paired difference between two ways of running one model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from ..validation import require


@torch.inference_mode()
def token_losses(model: Any, input_ids: torch.Tensor, *, cache: Any = None) -> torch.Tensor:
    """Negative log-likelihood of every token but the first, one forward pass over the whole window.

    Args:
        model: a causal language model of transformers, in eval mode.
        input_ids: int64 ``[1, N]``, N at least 2.
        cache: a transformers ``Cache`` that attention reads from and writes to; None for no cache.

    Returns:
        float64 ``[N - 1]`` in nats, on the CPU; entry i belongs to the token at position i + 1.

    Raises:
        ValueError: for another shape.
    """
    shape = tuple(input_ids.shape)
    require(input_ids.ndim == 2 and shape[0] == 1 and shape[1] >= 2, "input_ids.shape", shape, "[1, N] with N >= 2")
    hidden = model.get_decoder()(
        input_ids=input_ids, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    losses = []
    # The logits of a long window at a 49k vocabulary are gigabytes: a slice at a time is enough.
    for start in range(0, input_ids.shape[1] - 1, 512):
        stop = min(start + 512, input_ids.shape[1] - 1)
        logits = model.get_output_embeddings()(hidden[:, start:stop])
        target = input_ids[:, start + 1 : stop + 1].to(logits.device)
        loss = torch.nn.functional.cross_entropy(logits[0].float(), target[0], reduction="none")
        losses.append(loss.double().cpu())
    return torch.cat(losses)


def perplexity(model: Any, input_ids: torch.Tensor, *, cache: Any = None) -> float:
    """exp of the mean loss over the whole window ``input_ids [1, N]``; arguments as :func:`token_losses`."""
    return math.exp(float(token_losses(model, input_ids, cache=cache).mean()))


@dataclass(frozen=True)
class PerplexityChange:
    """Relative change of perplexity, in per cent, with a 95 % bootstrap interval over texts."""

    percent: float
    low: float
    high: float
    base: float
    changed: float
    texts: int
    tokens: int


def paired_change(
    base: list[torch.Tensor], changed: list[torch.Tensor], *, seed: int = 0, resamples: int = 2000
) -> PerplexityChange:
    """Relative perplexity change, paired per token; texts are the resampled unit.

    Args:
        base, changed: one tensor of token losses a text, same tokens in both.
        seed: of the bootstrap. resamples: how many.

    Raises:
        ValueError: for fewer than two texts or lists that do not match.
    """
    require(len(base) >= 2, "base", f"{len(base)} texts", "at least 2 texts")
    same = len(base) == len(changed) and all(a.shape == b.shape for a, b in zip(base, changed, strict=False))
    require(same, "changed", f"{len(changed)} texts", "the texts and tokens of base")
    total = np.array([float(a.sum()) for a in base])
    delta = np.array([float((b - a).sum()) for a, b in zip(base, changed, strict=True)])
    count = np.array([a.numel() for a in base], dtype=np.float64)

    def percent(delta: np.ndarray, count: np.ndarray, axis: int = -1) -> np.ndarray:
        return 100.0 * np.expm1(delta.sum(axis=axis) / count.sum(axis=axis))

    interval = stats.bootstrap(
        (delta, count), percent, paired=True, n_resamples=resamples, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    mean = total.sum() / count.sum()
    return PerplexityChange(
        float(percent(delta, count)), float(interval.low), float(interval.high),
        math.exp(mean), math.exp(mean + delta.sum() / count.sum()), len(base), int(count.sum()),
    )  # fmt: skip
