"""Keys that are always kept, inside the budget: the first ones (sinks) and the most recent."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..validation import is_integer, require
from .selection import indices_to_mask, mask_to_indices, stacked

#: query rows whose masks are held at once
_ROWS = 1024


class Always(NamedTuple):
    """How many of the first and of the newest keys that a query sees it always keeps."""

    sinks: int = 0
    recent: int = 0


NONE = Always()


def check_always(always: Always, most: int, counted: str) -> None:
    """Check that ``always`` are two counts, of no more than ``most`` keys together.

    Args:
        counted: what gives that number, for the message.

    Raises:
        ValueError: naming ``always`` or a part of it, its value and what is allowed.
    """
    require(isinstance(always, Always), "always", always, "a qaxis.attention.always.Always")
    for name, size in always._asdict().items():
        require(is_integer(size) and size >= 0, f"always.{name}", size, "an integer of at least 0")
    require(sum(always) <= most, "always", always, f"at most {most} keys together: they count towards {counted}")


def always_kept(allowed: torch.Tensor, always: Always) -> torch.Tensor:
    """The keys that each query keeps in any case, as a bool mask like ``allowed``."""
    place = allowed.cumsum(-1)
    return allowed & ((place <= always.sinks) | (place > place[..., -1:] - always.recent))


def choose_beside(
    choose: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor, allowed: torch.Tensor, k_eff: torch.Tensor, always: Always,
) -> torch.Tensor:  # fmt: skip
    """Selected positions, int64 ``[B, H, M, width]`` padded with -1: what is always kept, then the best of the others.

    Args:
        choose: ``(queries, allowed, k_eff) -> indices``, of a backend.
        q: ``[B, H, M, D]``.
        allowed: bool, broadcastable to ``[B, H, M, N]``.
        k_eff: int64 ``[B|1, H|1, M]``, at least ``sinks + recent`` wherever as many keys are allowed.
        always: kept keys count towards k_eff.
    """
    m, n = q.shape[2], allowed.shape[-1]
    allowed = allowed.expand(-1, -1, m, -1)
    k_eff = k_eff.expand(-1, -1, m)
    parts = []
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        kept = always_kept(allowed[:, :, rows], always)
        left = k_eff[:, :, rows] - kept.sum(-1)
        chosen = choose(q[:, :, rows], allowed[:, :, rows] & ~kept, left)
        whole = indices_to_mask(chosen, n) | kept
        parts.append(mask_to_indices(whole, int(whole.sum(-1).max())))
    return stacked(parts)
