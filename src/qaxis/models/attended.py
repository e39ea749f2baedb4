"""What one attention call gave, what computed it, and why nothing faster did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Refusal:
    """Why something cannot, or is not to, compute attention."""

    text: str
    #: whether the user asked for it; else something stands in the way
    asked: bool = False
    #: whether canonical attention takes its place at once, whatever else could compute the call
    canonical: bool = False

    def __str__(self) -> str:
        return self.text


#: what keeps both the decode step and prefill away
DENSE = Refusal("the layer is dense", asked=True)
TOLERANCE = Refusal("a budget with a tolerance", asked=True)
REFERENCE = Refusal("backend='reference'", asked=True)
NO_GPU = Refusal("there is no GPU")
NO_RANGE = Refusal("the mask is no range of keys")


class Attended(NamedTuple):
    """What one call gave."""

    #: ``[B, H, M, Dv]``
    output: torch.Tensor
    #: how to get the mask of kept keys, bool ``[B, H, M, N]``; None where every key was kept, or nobody asked
    kept: Callable[[], torch.Tensor] | None
    #: ``"cuda"``, ``"triton"`` (the decode step), ``"prefill"``, ``"canonical"``, ``"masked"`` or ``"dense"``
    engine: str
    #: why nothing faster computed it, each once
    refusals: tuple[Refusal, ...] = ()

    @property
    def reason(self) -> str:
        """Why nothing faster computed it; empty where nothing is faster."""
        return "; ".join(map(str, self.refusals))

    @property
    def asked(self) -> bool:
        """Whether the user asked for what is slower."""
        return any(refusal.asked for refusal in self.refusals)
