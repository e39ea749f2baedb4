"""Seeded test tensors that are the same bits on every machine.

torch.randn goes through vectorised logarithms and cosines, which differ between processors. Here the
numbers are sums of raw counter-based integers, scaled by powers of two: only exact operations and one
rounding.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from qaxis.arithmetic.reference import power_of_two

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def bell(shape: tuple[int, ...], seed: int, stream: int = 0) -> torch.Tensor:
    """Nearly normal float32 numbers of standard deviation about 1.15 (a sum of four uniforms)."""
    count = math.prod(shape)
    raw = np.random.Philox(key=seed, counter=[0, 0, 0, stream]).random_raw(2 * count).astype(np.uint64)
    main, low = raw[:count], raw[count:]
    parts = [(main >> np.uint64(16 * i)) & np.uint64(0xFFFF) for i in range(4)]
    total = sum(p.astype(np.float64) for p in parts) - 2 * 65535.0
    # A low-order part fills all 24 bits, so that products round and orders of summation matter.
    total = total + (low >> np.uint64(48)).astype(np.float64) * 2.0**-16
    return torch.from_numpy((total * 2.0**-15).astype(np.float32).reshape(shape))


def integers(low: int, high: int, shape: tuple[int, ...], seed: int, stream: int = 0) -> torch.Tensor:
    """Integers in [low, high) as float32, exact."""
    raw = np.random.Philox(key=seed, counter=[0, 0, 0, 1000 + stream]).random_raw(math.prod(shape))
    return torch.from_numpy((raw % np.uint64(high - low)).astype(np.float32).reshape(shape)) + low


#: what kinds of data a comparison must survive
KINDS = (
    "normal", "equal keys", "near ties", "signed zeros", "wide range",
    "subnormal", "edge of overflow", "one dominates", "sink",
)  # fmt: skip


def make(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, ...]:
    """q ``[B,H,M,D]``, k and v ``[B,Hkv,N,D]`` of one kind, shape = (B, H, Hkv, M, N, D)."""
    batch, heads, kv_heads, m, n, dim = shape
    q = bell((batch, heads, m, dim), seed)
    k = bell((batch, kv_heads, n, dim), seed, 1)
    v = bell((batch, kv_heads, n, dim), seed, 2)

    def per_key(low: int, high: int) -> torch.Tensor:
        return integers(low, high, (1, 1, n, 1), seed)

    if kind == "equal keys":
        k = k[:, :, :1].expand(-1, -1, n, -1)
    elif kind == "near ties":
        k = k[:, :, :1] * (1 + per_key(-2, 3) * 2.0**-23)
    elif kind == "signed zeros":
        # Every product of a row has one sign: a sum of -0.0 only, which the arithmetic makes +0.0.
        q, k = q.abs(), k.abs() * per_key(-1, 2) * 0.0
    elif kind == "wide range":
        k = k * power_of_two(per_key(-12, 4).int())
    elif kind == "subnormal":
        k = k * 2.0 ** (-20 if dtype == torch.float16 else -130)
    elif kind == "edge of overflow":
        # Largest finite sums: |q||k| about 2^126 in float32 and bfloat16, 2^28 within float16's range.
        q, k = (q * 2.0**11, k * 2.0**11) if dtype == torch.float16 else (q * 2.0**58, k * 2.0**58)
    elif kind == "one dominates":
        k = k.clone()
        k[:, :, n // 2] = k[:, :, n // 2] * 64
    elif kind == "sink":
        k = k.clone()
        k[:, :, :1], v[:, :, :1] = q[:, :kv_heads, :1] * 4, v[:, :, :1] * 2.0**-6
    return q.to(dtype), k.to(dtype).contiguous(), v.to(dtype)
