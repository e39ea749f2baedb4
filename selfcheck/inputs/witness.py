"""The canonical arithmetic a third time, in NumPy, sharing no code with the library.

When a platform's bits differ from a committed digest, a digest cannot say where. This can: it is written
from the rules alone (src/qaxis/arithmetic/__init__.py states them) and yields every intermediate result.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

F32 = np.float32
COEFFICIENTS = [F32(math.log(2.0) ** j / math.factorial(j)) for j in range(7, -1, -1)]
MAGIC = F32(1.5 * 2**23)


def tree(x: np.ndarray) -> np.ndarray:
    """Sum over the last axis by adjacent pairs, padded with +0.0 to a power of two."""
    size = 1
    while size < x.shape[-1]:
        size *= 2
    x = np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]), F32)], -1)
    while x.shape[-1] > 1:
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0] + F32(0)


def exp2(t: np.ndarray) -> np.ndarray:
    t = np.clip(t, F32(-200), F32(200))
    n = (t + MAGIC) - MAGIC
    f = t - n
    p = np.full_like(t, COEFFICIENTS[0])
    for c in COEFFICIENTS[1:]:
        p = p * f + c
    half = np.floor(n / 2).astype(np.int32)
    rest = n.astype(np.int32) - half
    return np.ldexp(np.ldexp(p, half).astype(F32), rest).astype(F32)


def k_eff(coverage: float, minimum: int, n: int) -> int:
    return min(n, max(minimum, math.ceil(Fraction(str(coverage)) * n)))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, coverage: float, minimum: int
) -> dict[str, torch.Tensor]:
    """scores (of the last query's selected keys), indices and output of causal attention, scale 1/sqrt(D)."""
    dtype = q.dtype
    (batch, heads, m, dim), (_, kv_heads, n, _) = q.shape, k.shape
    qn, kn, vn = (x.float().numpy() for x in (q, k, v))
    factor = F32(dim**-0.5 * math.log2(math.e))
    width = k_eff(coverage, minimum, n)
    indices = np.full((batch, heads, m, width), -1, np.int64)
    output = np.zeros((batch, heads, m, v.shape[-1]), F32)
    last = np.zeros((batch, heads, 1, width), F32)
    # Products may underflow or meet the edge of the range on purpose.
    with np.errstate(under="ignore", over="ignore"):
        for b in range(batch):
            for h in range(heads):
                keys, values = kn[b, h * kv_heads // heads], vn[b, h * kv_heads // heads]
                for i in range(m):
                    visible = n - m + i + 1
                    score = tree(qn[b, h, i] * keys[:visible])
                    chosen = np.sort(np.argsort(-score, kind="stable")[: k_eff(coverage, minimum, visible)])
                    s = score[chosen]
                    weight = exp2((s - s.max()) * factor)
                    output[b, h, i] = tree(weight * values[chosen].T) / tree(weight)
                    indices[b, h, i, : len(chosen)] = chosen
                last[b, h, 0] = score[chosen]
    return {
        "scores": torch.from_numpy(last), "indices": torch.from_numpy(indices),
        "output": torch.from_numpy(output).to(dtype),
    }  # fmt: skip
