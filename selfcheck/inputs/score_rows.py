"""Rows of scores that are hard to rank, where they may lie in memory, and what is right: a stable sort.

Kinds are made of seeded numbers by exact operations, so that they are the same bits on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from .seeded import bell

INF, NAN = math.inf, math.nan
#: of nearly normal x ``[rows, n]`` and positions i ``[n]``, scores ``[rows, n]``
Kind = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Change = Callable[[torch.Tensor], torch.Tensor]


def _bits(pattern: int, like: torch.Tensor) -> torch.Tensor:
    """The number of these bits."""
    return torch.tensor(pattern, dtype=torch.int32, device=like.device).view(torch.float32)


def _all(number: float) -> Kind:
    return lambda x, i: torch.full_like(x, number)


def _of_any_magnitude(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return x * ((i % 250 + 2) << 23).to(torch.int32).view(torch.float32)


def _signed_zeros(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    return torch.where(i % 3 == 0, -0.0, 0.0).expand_as(x)


#: NaN of both signs, none of them the usual one
_NAN, _MINUS_NAN = 0x7FC00001, -0x3FFFFF
KINDS: dict[str, Kind] = {
    "normal": lambda x, i: x,
    # ties: of all, of both zeros, of few values, of all but few
    "zeros": _all(0.0), "inf": _all(INF), "minus inf": _all(-INF), "NaN": _all(NAN),
    "largest": _all(torch.finfo(torch.float32).max),
    "signed zeros": _signed_zeros,
    "signed zeros below some": lambda x, i: torch.where(x > 1, x, _signed_zeros(x, i)),
    "few values": lambda x, i: (x * 2).round(),
    "half zeros": lambda x, i: torch.relu(x),
    "nearly all zeros": lambda x, i: torch.relu(x - 2.5),
    "one above": lambda x, i: (i == len(i) // 2).to(x.dtype).expand_as(x),
    # in order, in waves, the best in one place
    "ascending": lambda x, i: i.to(x.dtype).expand_as(x),
    "descending": lambda x, i: -i.to(x.dtype).expand_as(x),
    "waves": lambda x, i: (i % 64).to(x.dtype).expand_as(x),
    "best last": lambda x, i: x + 16.0 * (i > 0.97 * len(i)),
    "best first": lambda x, i: x + 16.0 * (i < 0.01 * len(i)),
    # masked; wide and narrow; below the normal numbers
    "masked": lambda x, i: torch.where(i < len(i) // 50, x, -INF),
    "of any magnitude": _of_any_magnitude,
    "next to one another": lambda x, i: 1 + (x * 4).round() * 2.0**-23,
    "subnormal": lambda x, i: x * 2.0**-140,
    # without numbers
    "NaN among numbers": lambda x, i: torch.where(i % 5 == 0, _bits(_NAN, x), x),
    "numbers among NaN": lambda x, i: torch.where(i % 5 > 0, _bits(_MINUS_NAN, x), x),
    "NaN and minus inf": lambda x, i: torch.where(i % 2 == 0, NAN, -INF).expand_as(x),
    "inf, NaN and below zero": lambda x, i: torch.where(
        i % 7 == 0, INF, torch.where(i % 7 == 1, _bits(_MINUS_NAN, x), -x.abs())
    ),
}  # fmt: skip


def hard_rows(n: int, device: torch.device | str = "cpu", each: int = 1, seed: int = 0) -> torch.Tensor:
    """``each`` rows of every kind, float32 ``[each * len(KINDS), n]``; kinds take turns."""
    x, i = bell((each, n), seed).to(device), torch.arange(n, device=device)
    return torch.stack([kind(x, i).to(torch.float32) for kind in KINDS.values()], 1).flatten(0, 1)


def tied_rows(rows: int, n: int, k: int, device: torch.device | str) -> torch.Tensor:
    """``[rows, n]`` of which about half of the k best are above zero, and all others are zero."""
    scores = torch.randn(rows, n, device=device, generator=torch.Generator(device).manual_seed(2))
    return torch.relu(scores + float(torch.special.ndtri(torch.tensor(k / (2 * n), dtype=torch.float64))))


def _inside(before: int, behind: int, rows: int = 0) -> Change:
    """Part of a larger tensor whose other scores would be the best."""

    def change(x: torch.Tensor) -> torch.Tensor:
        larger = x.new_full((len(x) + 2 * rows, before + x.shape[1] + behind), INF)
        return larger[rows : len(x) + rows, before : before + x.shape[1]].copy_(x)

    return change


def _every_second(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, torch.full_like(x, INF)], -1).flatten(1)[:, ::2]


def _permuted(x: torch.Tensor) -> torch.Tensor:
    """Three dimensions, of which neither the first two nor the last lie together."""
    return torch.stack([x, x.flip(0)]).permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _rows_overlap(x: torch.Tensor) -> torch.Tensor:
    """Each row begins inside the one before. These are other rows."""
    apart = max(1, x.shape[1] // 3)
    return x.contiguous().view(-1).as_strided(x.shape, (apart, 1))


def _far_apart(x: torch.Tensor) -> torch.Tensor:
    """The last row lies beyond 2^31 numbers; on a CPU little of what is between is ever touched."""
    step = max(x.shape[1], -(-(1 << 31) // max(1, len(x) - 1)) + 1)
    storage = torch.empty(step * (len(x) - 1) + x.shape[1], dtype=x.dtype, device=x.device)
    return storage.as_strided(x.shape, (step, 1)).copy_(x)


#: of scores ``[rows, n]`` others whose last dimension has n: the same rows, where nothing else is said
LAYOUTS: dict[str, Change] = {
    "contiguous": torch.Tensor.contiguous,
    "one score behind 16 bytes": _inside(1, 3),
    "two behind, rows of an odd length": _inside(2, 3 + 2),
    "three behind, inside a larger one": _inside(3, 14, 2),
    "every second score": _every_second,
    "transposed": lambda x: x.t().contiguous().t(),
    "every other row": lambda x: torch.stack([x, torch.full_like(x, INF)], 1).flatten(0, 1)[::2],
    "permuted": _permuted,
    "rows overlap": _rows_overlap,
    "one row for all": lambda x: x[:1].expand_as(x),
    "one score for a row": lambda x: x[:, :1].expand_as(x),
    "far apart": _far_apart,
}


def bits(scores: torch.Tensor) -> torch.Tensor:
    """What float32 ``scores`` are made of, int32: zeros of both signs differ, a NaN is itself."""
    return scores.view(torch.int32)


def stable(scores: torch.Tensor) -> torch.Tensor:
    """Positions of float32 ``scores [..., n]`` by torch's stable sort, the highest first, NaN put behind all."""
    missing = torch.isnan(scores)
    first = torch.sort(scores.masked_fill(missing, -INF), dim=-1, descending=True, stable=True).indices
    if not bool(missing.any()):
        return first
    # A stable sort of what is left to decide: whether there is a number.
    return first.gather(-1, torch.sort(missing.gather(-1, first).to(torch.int8), dim=-1, stable=True).indices)


def stable_by_numpy(scores: torch.Tensor) -> torch.Tensor:
    """The same by NumPy's stable sort, which has NaN last by itself."""
    return torch.from_numpy(np.argsort(-scores.cpu().numpy(), axis=-1, kind="stable")).to(scores.device)
