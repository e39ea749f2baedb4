"""Seeded numbers that are the same bits on every machine.

torch.randn goes through vectorised logarithms and cosines, which differ between processors. Here the
numbers are sums of raw counter-based integers, scaled by powers of two: only exact operations and one
rounding.
"""

from __future__ import annotations

import math

import numpy as np
import torch

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
