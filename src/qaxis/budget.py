"""How many keys a query may attend to."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from .validation import is_integer, require

MILLION = 10**6


@dataclass(frozen=True)
class Budget:
    """Coverage budget ``k_eff(N) = min(N, max(minimum, ceil(coverage * N)))`` (paper, section 3).

    Args:
        coverage: share of the visible keys, in [0, 1].
        minimum: smallest number of keys kept, at least 1; ``Budget(0, k)`` is a fixed budget of
            ``k`` that shrinks to N where fewer keys exist.
        tolerance: a share of the softmax mass, in (0, 1). Each head and token keeps as many more keys as it needs so
            that those left out hold no more of it; ``Budget(0, 1, tolerance)`` keeps no others. None: no such keys.
            Every key is scored canonically then, on any device; no decode step and no prefill on matrix products.
            The number is that of the best keys. Keys that are always kept (``sinks``, ``recent``) count towards it in
            their place, and those left out may hold more than the tolerance then.

    Raises:
        ValueError: for values outside those ranges.
    """

    coverage: float = 0.1
    minimum: int = 64
    tolerance: float | None = None

    def __post_init__(self) -> None:
        ok = isinstance(self.coverage, (int, float)) and not isinstance(self.coverage, bool)
        require(ok and 0 <= self.coverage <= 1, "coverage", self.coverage, "a number in [0, 1]")
        require(is_integer(self.minimum) and self.minimum >= 1, "minimum", self.minimum, "an integer of at least 1")
        share = self.tolerance
        real = isinstance(share, (int, float)) and not isinstance(share, bool)
        # Units of a millionth: shares and sums of weights are multiplied as 64-bit integers.
        allowed = share is None or (real and 0 < share < 1 and self.share_left_out()[0] > 0)
        require(allowed, "tolerance", share, "None, or a number in [0.000001, 1)")

    def share_left_out(self) -> tuple[int, int]:
        """``tolerance`` in millionths, as two integers: so many of so many; rounded down.

        Raises:
            ValueError: where there is no tolerance.
        """
        if self.tolerance is None:
            raise ValueError("tolerance=None: allowed is a number where keys are kept by it")
        return int(Fraction(str(self.tolerance)) * MILLION), MILLION

    def k_eff(self, n: int) -> int:
        """Number of keys kept out of ``n``, at least: a tolerance may need more."""
        require(is_integer(n) and n >= 1, "n", n, "an integer of at least 1")
        return int(self.table(n)[n])

    def of(self, allowed: torch.Tensor) -> torch.Tensor:
        """``k_eff`` of every query of a mask ``allowed [..., N]`` of the keys it sees, int64 ``[...]``."""
        return self.table(allowed.shape[-1], allowed.device)[allowed.sum(-1)]

    def table(self, n_max: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """``k_eff`` of every n from 0 to ``n_max`` as int64 ``[n_max + 1]`` on ``device``; ``k_eff(0)`` is 0."""
        # Tables grow by powers of two: a cache that gains a token each step must not build one each step.
        return _table(self.coverage, self.minimum, 1 << n_max.bit_length(), str(device))[: n_max + 1]


@lru_cache(maxsize=64)
def _table(coverage: float, minimum: int, n_max: int, device: str) -> torch.Tensor:
    # The decimal the user wrote, in integers: 0.1 * 640 must be 64, not ceil(64.00000000000001).
    share = Fraction(str(coverage))
    over, under = share.numerator, share.denominator
    return torch.tensor([min(n, max(minimum, -(-over * n // under))) for n in range(n_max + 1)], device=device)


def as_budget(budget: Budget | int, n: int | None = None) -> Budget:
    """Turn the ``budget`` argument of the public functions into a :class:`Budget`.

    Args:
        budget: a :class:`Budget`, or an int for a fixed budget.
        n: number of keys; if given, an int budget may not exceed it.

    Raises:
        ValueError: if an int budget is below 1 or larger than ``n``.
    """
    if isinstance(budget, Budget):
        return budget
    allowed = "a qaxis.Budget or an integer of at least 1" if n is None else f"a qaxis.Budget or an integer in 1..{n}"
    require(is_integer(budget) and budget >= 1 and (n is None or budget <= n), "budget", budget, allowed)
    return Budget(coverage=0.0, minimum=int(budget))
