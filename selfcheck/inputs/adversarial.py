"""Queries, keys and values that are hard to rank, to score or to bound: one generator for every check that attacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from qaxis.arithmetic.reference import power_of_two

from . import seeded


class Numbers(Protocol):
    """Where the numbers of a case come from; every call gives new ones."""

    def bell(self, *shape: int) -> torch.Tensor:
        """Normal numbers, float32."""

    def whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """Integers in [low, high), float32."""


class Seeded:
    """The same bits on every machine; made on the CPU, slowly. golden.json rests on the order of the calls."""

    def __init__(self, seed: int) -> None:
        self.seed, self.bells, self.wholes = seed, -1, -1

    def bell(self, *shape: int) -> torch.Tensor:
        self.bells += 1
        return seeded.bell(shape, self.seed, self.bells)

    def whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        self.wholes += 1
        return seeded.integers(low, high, shape, self.seed, self.wholes)


class Drawn:
    """torch's numbers, made where the generator is."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def bell(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def whole(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, device=self.generator.device).float()


@dataclass
class Case:
    """float32 q ``[B, H, M, D]``, k and v ``[B, Hkv, N, D]`` before a kind has changed them, and what it may use."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dtype: torch.dtype
    numbers: Numbers

    def per_key(self, low: int, high: int) -> torch.Tensor:
        """One integer a position, ``[1, 1, N, 1]``."""
        return self.numbers.whole(low, high, 1, 1, self.k.shape[2], 1)


def _normal(c: Case) -> None:
    pass


def _equal_keys(c: Case) -> None:
    c.k = c.k[:, :, :1].expand(-1, -1, c.k.shape[2], -1)


def _near_ties(c: Case) -> None:
    """Keys of one direction whose lengths differ in the last bits of float32: equal ones in shorter types."""
    c.k = c.k[:, :, :1] * (1 + c.per_key(-2, 3) * 2.0**-23)


def _near_ties_in_the_type(c: Case) -> None:
    """The same in the last bits of the type that the keys have."""
    kinds = c.numbers.whole(-3, 4, *c.k.shape[:3], 1)
    c.k = c.k[:, :, :1] * (1 + torch.finfo(c.dtype).eps * kinds)


def _ties_at_the_edge(c: Case) -> None:
    n = c.k.shape[2]
    c.k = c.k[:, :, : max(1, n // 16)].repeat(1, 1, 17, 1)[:, :, :n]


def _signed_zeros(c: Case) -> None:
    """Every product of a row has one sign: a sum of -0.0 only, which the arithmetic makes +0.0."""
    c.q, c.k = c.q.abs(), c.k.abs() * c.per_key(-1, 2) * 0.0


def _wide_range(c: Case) -> None:
    c.k = c.k * power_of_two(c.per_key(-12, 4).int())


def _subnormal(c: Case) -> None:
    c.k = c.k * 2.0 ** (-20 if c.dtype == torch.float16 else -130)


def _edge_of_overflow(c: Case) -> None:
    """Largest finite sums: |q||k| about 2^126 in float32 and bfloat16, 2^28 within float16's range."""
    factor = 2.0**11 if c.dtype == torch.float16 else 2.0**58
    c.q, c.k = c.q * factor, c.k * factor


def _one_dominates(c: Case) -> None:
    c.k[:, :, c.k.shape[2] // 2] *= 64


def _sink(c: Case) -> None:
    c.k[:, :, :1], c.v[:, :, :1] = c.q[:, : c.k.shape[1], :1] * 4, c.v[:, :, :1] * 2.0**-6


def _outlier_channel(c: Case) -> None:
    c.k[..., :1] *= 200


def _outlier_key(c: Case) -> None:
    c.k[:, :, c.k.shape[2] // 3] *= 500


def _coarse_scales(c: Case) -> None:
    """One token widens every channel's scale of its group: the codes of the others are nearly zero."""
    c.k[:, :, ::128] *= 100


def _half_way(c: Case) -> None:
    """Largest 127 scales, all others midway between two codes: the worst that rounding can do."""
    c.k = (c.numbers.whole(-20, 20, *c.k.shape) + 0.5) / 64
    c.k[:, :, ::128] = 127 / 64


def _one_direction(c: Case) -> None:
    """Everything that tells the keys apart is small beside what they share."""
    c.k = 30 * c.numbers.bell(*c.k.shape[:2], 1, c.k.shape[3]) + 0.02 * c.k


def _zero_query(c: Case) -> None:
    c.q = c.q * 0


def _tiny(c: Case) -> None:
    c.q, c.k = c.q * 2.0**-6, c.k * 2.0**-9


KINDS: dict[str, Callable[[Case], None]] = {
    "normal": _normal, "equal keys": _equal_keys, "near ties": _near_ties, "signed zeros": _signed_zeros,
    "wide range": _wide_range, "subnormal": _subnormal, "edge of overflow": _edge_of_overflow,
    "one dominates": _one_dominates, "sink": _sink,
    "near ties in the type": _near_ties_in_the_type, "ties at the edge": _ties_at_the_edge,
    "outlier channel": _outlier_channel, "outlier key": _outlier_key, "coarse scales": _coarse_scales,
    "half way": _half_way, "one direction": _one_direction, "zero query": _zero_query, "tiny": _tiny,
}  # fmt: skip
#: what arithmetic must survive; golden.json has these, in this order
ARITHMETIC = (
    "normal", "equal keys", "near ties", "signed zeros", "wide range",
    "subnormal", "edge of overflow", "one dominates", "sink",
)  # fmt: skip
#: what fast scores and their bounds must survive
FAST = (
    "normal", "equal keys", "near ties in the type", "ties at the edge", "wide range", "outlier channel",
    "outlier key", "coarse scales", "half way", "one direction", "zero query", "tiny",
)  # fmt: skip


def make(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, numbers: int | torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q ``[B, H, M, D]``, k and v ``[B, Hkv, N, D]`` of one kind; shape = (B, H, Hkv, M, N, D).

    Args:
        numbers: a seed for numbers that are the same bits everywhere, or torch's generator for fast ones.
    """
    batch, heads, kv_heads, m, n, dim = shape
    source: Numbers = Seeded(numbers) if isinstance(numbers, int) else Drawn(numbers)
    q, k, v = (
        source.bell(batch, heads, m, dim),
        source.bell(batch, kv_heads, n, dim),
        source.bell(batch, kv_heads, n, dim),
    )
    case = Case(q, k, v, dtype, source)
    KINDS[kind](case)
    return tuple(x.to(dtype).contiguous() for x in (case.q, case.k, case.v))  # type: ignore[return-value]
