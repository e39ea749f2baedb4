"""Attention entropy and its scaling with context length (paper, Theorem 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats

from ..attention.selection import causal_mask
from ..storage.lazy import tensor_of
from ..validation import check_qkv, check_scale, require


def attention_entropy(
    q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, causal: bool = True
) -> torch.Tensor:
    """Entropy of the dense softmax attention of every query, in nats.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``; H a multiple of Hkv.
        scale: softmax scale, ``None`` for ``1/sqrt(D)``.
        causal: if True the queries are the last M of the N positions.

    Returns:
        float64 ``[B, H, M]``, between 0 and log N; its exponential is the effective support K_eff.

    Raises:
        ValueError: as :func:`qaxis.topk_indices`.
    """
    q, k = tensor_of("q", q), tensor_of("k", k)
    check_qkv(q, k, causal=causal)
    factor = check_scale(scale, q.shape[-1])
    batch, heads, m, dim = q.shape
    grouped = q.double().reshape(batch, k.shape[1], -1, dim)
    logits = (grouped @ k.double().transpose(-1, -2)).reshape(batch, heads, m, -1) * factor
    if causal:
        logits = logits.masked_fill(~causal_mask(m, k.shape[2], q.device), -torch.inf)
    log_p = torch.log_softmax(logits, dim=-1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


@dataclass(frozen=True)
class EntropyScaling:
    """Least-squares fit H_N = alpha log N + beta with a 95 % bootstrap interval over samples."""

    alpha: float
    beta: float
    r_squared: float
    alpha_low: float
    alpha_high: float
    samples: int

    def support(self, n: float) -> float:
        """Effective support e^{H_N} = e^beta N^alpha at context length ``n``."""
        return math.exp(self.beta) * n**self.alpha


def fit_entropy_scaling(
    lengths: list[int], entropy: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> EntropyScaling:
    """Fit Theorem 2's law to mean entropies.

    Args:
        lengths: the context lengths N, at least three different ones.
        entropy: ``[samples, len(lengths)]`` in nats, one row a text (the unit that is resampled).
        seed: of the bootstrap. resamples: how many.

    Raises:
        ValueError: for fewer than three lengths, mismatched shapes, or non-finite entropies.
    """
    entropy = np.atleast_2d(np.asarray(entropy, dtype=np.float64))
    require(
        len(set(lengths)) >= 3 and min(lengths) >= 1, "lengths", lengths, "at least 3 different lengths of 1 or more"
    )
    require(entropy.shape[1] == len(lengths), "entropy.shape", entropy.shape, f"[samples, {len(lengths)}]")
    require(bool(np.isfinite(entropy).all()), "entropy", "NaN or Inf", "finite values")
    x = np.log(np.asarray(lengths, dtype=np.float64))
    fit = stats.linregress(x, entropy.mean(axis=0))
    low = high = float(fit.slope)
    if entropy.shape[0] > 1:
        # The slope is linear in the entropies: the slope of a mean is the mean of the slopes.
        slopes = ((x - x.mean()) @ (entropy - entropy.mean(axis=1, keepdims=True)).T) / ((x - x.mean()) ** 2).sum()
        result = stats.bootstrap(
            (slopes,), np.mean, n_resamples=resamples, method="percentile", rng=np.random.default_rng(seed)
        )
        low, high = map(float, result.confidence_interval)
    return EntropyScaling(float(fit.slope), float(fit.intercept), float(fit.rvalue**2), low, high, entropy.shape[0])
