"""The rules in PyTorch, for every device. They are numbered in ``qaxis.arithmetic``; sections cite them."""

from __future__ import annotations

import math

import numpy as np
import torch

VERSION = 1

#: Taylor coefficients ln(2)^j / j! of 2^f, rounded to float32, highest first. On |f| <= 1/2 the
#: truncation error is below 2^-27, well inside the 2 ulp that the rules allow.
EXP2_COEFFICIENTS = tuple(float(np.float32(math.log(2.0) ** j / math.factorial(j))) for j in range(7, -1, -1))
#: 1.5 * 2^23: adding and subtracting it rounds a float32 to the nearest integer with IEEE adds only.
ROUND_MAGIC = 12582912.0
LOG2_E = math.log2(math.e)
ROOT_HALF = float(np.float32(math.sqrt(0.5)))

#: elements of the products that are formed at once; bounds the memory of the tree on a laptop
CHUNK_ELEMENTS = 1 << 24


def rounded_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``, an integer of at least 1."""
    return 1 << (n - 1).bit_length()


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum float32 ``x`` over its last dimension by adjacent pairs, ``[..., n] -> [...]`` (rule 2).

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
    """Canonical <q, k> of matching rows (rules 1 and 2): float32 ``[..., D], [..., D] -> [...]`` (broadcasting)."""
    return tree_sum(q * k)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Canonical raw scores ``[B,H,M,D], [B,Hkv,N,D] -> float32 [B,H,M,N]``, no scale, no checks."""
    batch, heads, m, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    q, k = q.float(), k.float()
    out = torch.empty(batch, heads, m, n, dtype=torch.float32, device=q.device)
    at_once = max(1, CHUNK_ELEMENTS // (n * dim))
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h // (heads // kv_heads)]
            for start in range(0, m, at_once):
                rows = slice(start, start + at_once)
                out[b, h, rows] = pair_scores(q[b, h, rows, None, :], keys[None])
    return out


def sort_key(score: torch.Tensor) -> torch.Tensor:
    """Map float32 scores to int32 that compare in the same order, -0.0 being +0.0 (rule 4)."""
    bits = (score + 0.0).view(torch.int32)
    # Negative floats count downwards in their bit pattern: flip everything below the sign.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2^e in float32 for int32 ``e`` in -126..127, exactly: the exponent field is written, not computed."""
    return ((exponent + 127) << 23).view(torch.float32)


def roots_of(exponent: torch.Tensor) -> torch.Tensor:
    """2^(-e/2) for int32 ``e`` in -126..127, rounded once: what a number is multiplied by to be divided by a root."""
    root = power_of_two(-(exponent >> 1))
    return torch.where((exponent & 1).bool(), root * ROOT_HALF, root)


def exp2(t: torch.Tensor) -> torch.Tensor:
    """2^t for float32 ``t`` within 2 ulp, subnormal results included, bits equal on every device (rule 3)."""
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
    return float(np.float32(scale * LOG2_E))


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """``cap * tanh(x / cap)`` for float32 ``x``, absolute error below 4 ulp of ``cap``, bits equal on every device."""
    # A tensor, not a number: CUDA divides by a number as a product with its reciprocal, which rounds otherwise.
    y = x / torch.full((1,), cap, dtype=torch.float32, device=x.device)
    e = exp2(y.abs() * exponent_factor(-2.0))
    return torch.copysign((1.0 - e) / (1.0 + e), y) * cap


def check_scores(scores: torch.Tensor) -> None:
    """Refuse scores that left float32: their order is no longer that of the exact products."""
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        where = tuple((~finite).nonzero()[0].tolist())
        raise ValueError(
            f"score[{where}]={scores[where].item()!r}: allowed is products q*k whose sums stay inside float32; "
            "scale q or k by a power of two, which changes no order"
        )
