"""Which claims' evidence has to be made again, in which order, and how many of them fit into some minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from .records import family
from .states import State, mixed_tables

Claim = dict[str, Any]
#: seconds that a claim without a record is expected to take
UNKNOWN = 120.0


def expected(state: State) -> float:
    """Seconds that a claim took last time."""
    return float(state.record["seconds"]) if state.record else UNKNOWN


def due(found: list[State], device: str, only: tuple[str, ...] = ()) -> list[State]:
    """What can be renewed on this device and is not fresh, the shortest first.

    The shortest first, so that a session of a few minutes renews as many claims as it can. Timing claims of one table
    come from one card: if one of them has to be measured here, so have those that were measured on another.
    """
    here = [s for s in found if not s.card or s.card == family(device, s.claim)]
    wanted = [s for s in here if s.word != "fresh" and (not only or s.claim["id"] in only)]
    tables = {s.claim["table"] for s in wanted if "table" in s.claim} | (
        mixed_tables(found).keys() if not only else set()
    )
    apart = [s for s in here if s.claim.get("table") in tables and s not in wanted and s.device != device]
    return sorted([*wanted, *apart], key=expected)


@dataclass
class Time:
    """Minutes that a session has; asked before every claim."""

    minutes: float | None
    seconds: dict[str, float]
    began: float = field(default_factory=time.monotonic)
    left_out: list[str] = field(default_factory=list)

    def fits(self, claim: Claim) -> bool:
        """Whether the claim, taking as long as last time, ends before the session."""
        used = time.monotonic() - self.began
        if self.minutes is None or used + self.seconds[claim["id"]] <= 60 * self.minutes:
            return True
        self.left_out.append(claim["id"])
        return False
