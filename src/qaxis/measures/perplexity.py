"""Perplexity, and the paired difference between two ways of running one model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from ..validation import require
from .own_logits import own_logits


@torch.inference_mode()
def token_losses(model: Any, input_ids: torch.Tensor, *, cache: Any = None) -> torch.Tensor:
    """Negative log-likelihood of every token but the first: cross entropy of the model's own logits.

    The decoder runs once over the whole window, the rest of the model's forward pass on 512 positions at a time. A
    model that takes no ``logits_to_keep``, or carries hooks or ``torch.compile``, gives all logits at once, which takes
    the memory that they need.

    Args:
        model: a causal language model of transformers, in eval mode.
        input_ids: int64 ``[1, N]``, N at least 2, on the model's device.
        cache: a transformers ``Cache`` that attention reads from and writes to; None for no cache.

    Returns:
        float64 ``[N - 1]`` in nats, on the CPU; entry i belongs to the token at position i + 1. Computed in float32,
        for float64 logits in float64.

    Raises:
        ValueError: for another shape, dtype or device, an id outside the vocabulary, a model in training mode, an
            encoder-decoder, a cache that the model does not take, or logits that are not ``[1, N, V]``.
    """
    _check(model, input_ids)
    losses = []
    for start, logits in own_logits(model, input_ids, cache):
        target = input_ids[0, start + 1 : start + 1 + logits.shape[0]].to(logits.device)
        _check_ids(input_ids, logits.shape[-1])
        exact = logits if logits.dtype == torch.float64 else logits.float()
        losses.append(torch.nn.functional.cross_entropy(exact, target, reduction="none").double().cpu())
    return torch.cat(losses)


def _check(model: Any, input_ids: torch.Tensor) -> None:
    require(isinstance(input_ids, torch.Tensor), "input_ids", type(input_ids).__name__, "a torch.Tensor")
    shape, dtype = tuple(input_ids.shape), input_ids.dtype
    require(len(shape) == 2 and shape[0] == 1 and shape[1] >= 2, "input_ids.shape", shape, "[1, N] with N >= 2")
    require(dtype == torch.int64, "input_ids.dtype", dtype, "torch.int64")
    config = getattr(model, "config", None)
    decoder_only = not getattr(config, "is_encoder_decoder", False)
    require(decoder_only, "model", type(model).__name__, "a causal language model: an encoder-decoder has two inputs")
    training = any(module.training for module in model.modules())
    require(not training, "model.training", training, "False (call model.eval()): dropout would change the losses")
    weight = _embeddings(model)
    if weight is not None:
        # Weights that are dispatched or offloaded have no one device: their hooks move the input.
        fixed = weight.device.type != "meta" and getattr(model, "hf_device_map", None) is None
        same = not fixed or input_ids.device == weight.device
        require(same, "input_ids.device", str(input_ids.device), f"the model's device {weight.device}")
        _check_ids(input_ids, weight.shape[0])


def _check_ids(input_ids: torch.Tensor, vocabulary: int) -> None:
    low, high = (int(x) for x in input_ids.aminmax())
    require(low >= 0, "input_ids", low, f"0 to {vocabulary - 1}, the model's vocabulary")
    require(high < vocabulary, "input_ids", high, f"0 to {vocabulary - 1}, the model's vocabulary")


def _embeddings(model: Any) -> torch.Tensor | None:
    """The table ``[vocabulary, width]`` of input embeddings, None for a model that has something else."""
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except (AttributeError, NotImplementedError):
        return None
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


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
