"""Canonical arithmetic, version 1: one order of operations, so that bits can be compared.

Floating-point addition is not associative; "equal to the reference" means nothing until the order
is fixed. Here every sum is a balanced tree over adjacent pairs, every operation is one IEEE
round-to-nearest float32 operation, and the exponential is our own, because ``exp`` differs between
devices. ``kernels.py`` states the same rules in Triton; nothing else may compute a canonical bit.
"""

from __future__ import annotations

import math

import torch

VERSION = 1

#: Taylor coefficients ln(2)^j / j! of 2^f, rounded to float32, highest first. On |f| <= 1/2 the
#: truncation error is below 2^-27, well inside the 2 ulp that the rules allow.
EXP2_COEFFICIENTS = tuple(
    float(torch.tensor(math.log(2.0) ** j / math.factorial(j), dtype=torch.float32)) for j in range(7, -1, -1)
)
#: 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest integer with IEEE adds only.
ROUND_MAGIC = 12582912.0
LOG2_E = math.log2(math.e)

#: elements of the products that are formed at once; bounds the memory of the tree on a laptop
CHUNK_ELEMENTS = 1 << 24


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n`` (``n >= 1``)."""
    return 1 << (n - 1).bit_length()


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum float32 ``x`` over its last dimension by adjacent pairs, ``[..., n] -> [...]``.

    Padding with +0.0 to a power of two and adding +0.0 at the end makes the result independent of
    how much padding was used: further zeros could only turn -0.0 into +0.0.
    """
    n = x.shape[-1]
    padded = next_power_of_two(max(n, 1))
    if padded != n:
        x = torch.nn.functional.pad(x, (0, padded - n))
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0] + 0.0


def pair_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Canonical <q, k> of matching rows: float32 ``[..., D], [..., D] -> [...]`` (broadcasting)."""
    return tree_sum(q * k)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Canonical raw scores ``[B,H,M,D], [B,Hkv,N,D] -> float32 [B,H,M,N]``, no scale, no checks."""
    batch, heads, m, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    q, k = q.float(), k.float()
    out = torch.empty(batch, heads, m, n, dtype=torch.float32, device=q.device)
    step = max(1, CHUNK_ELEMENTS // (n * dim))
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // kv_heads)]
            for start in range(0, m, step):
                out[b, h, start : start + step] = pair_scores(q[b, h, start : start + step, None, :], keys[None])
    return out


def sort_key(score: torch.Tensor) -> torch.Tensor:
    """Map float32 scores to int32 that compare in the same order, -0.0 being +0.0 (rule 4)."""
    bits = (score + 0.0).view(torch.int32)
    # Negative floats count downwards in their bit pattern: flip everything below the sign.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^e in float32 for int32 ``e`` in -126..127, exactly: the exponent field is written, not computed."""
    return ((exponent + 127) << 23).view(torch.float32)


def exp2(t: torch.Tensor) -> torch.Tensor:
    """2^t for float32 ``t`` within 2 ulp, subnormal results included, bits equal on every device."""
    t = torch.clamp(t, -200.0, 200.0)
    rounded = (t + ROUND_MAGIC) - ROUND_MAGIC
    f = t - rounded
    p = torch.full_like(t, EXP2_COEFFICIENTS[0])
    for c in EXP2_COEFFICIENTS[1:]:
        p = p * f
        p = p + c
    # Two exact steps by powers of two; only the second can round, into the subnormals.
    n = rounded.to(torch.int32)
    half = n >> 1
    p = p * power_of_two(half)
    return p * power_of_two(n - half)


def exponent_factor(scale: float) -> float:
    """``scale * log2(e)`` rounded to float32: turns the natural softmax into powers of two."""
    return float(torch.tensor(scale * LOG2_E, dtype=torch.float32))


def attend(selected: torch.Tensor, values: torch.Tensor, live: torch.Tensor, scale: float) -> torch.Tensor:
    """Canonical softmax-weighted sum over selected keys.

    Args:
        selected: float32 raw scores ``[..., K]`` of the selected keys, ascending positions.
        values: float32 ``[..., K, Dv]``.
        live: bool ``[..., K]``; False marks the padding of rows with a smaller budget.
        scale: softmax scale.

    Returns:
        float32 ``[..., Dv]``; a row without a live key is 0.
    """
    top = torch.where(live, selected, -math.inf).amax(dim=-1, keepdim=True)
    t = (selected - top) * exponent_factor(scale)
    p = torch.where(live, exp2(torch.where(live, t, 0.0)), 0.0)
    denominator = tree_sum(p)
    numerator = tree_sum((p[..., None] * values).transpose(-1, -2))
    return torch.where(denominator[..., None] > 0, numerator / denominator[..., None], 0.0)
