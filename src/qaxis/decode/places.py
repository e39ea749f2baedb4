"""What a completed step over 8-bit codes gives, from the places that it left behind: its meaning, in PyTorch.

Which keys are kept, and their weights, are canonical. Of those that are left only a 16-bit place is known, so the tail,
all keys less those that are kept, is that of ``attention/completion.py`` with the score ``(place - 32767.5) (1 /
units)`` in place of the canonical one, in single operations of float32. Keys without a place, as they have no code, and
all keys of a row without units (its query is too short, or the range too large) have their canonical score.
"""

from __future__ import annotations

from functools import partial

import torch

from ..attention.always import NONE, Always
from ..attention.completed import Kept, rows_of
from ..attention.logits import Logits
from ..storage.moments import GROUP, add_groups, empty
from .rows import BEGIN, END

#: the middle between the two places that are nearest to a score of 0
MIDDLE = 32767.5


def placed(place: torch.Tensor, begin: int, end: int, in_full: int, always: Always) -> torch.Tensor:
    """Which of the keys numbered ``place`` have a place, of a row that sees [begin, end), as ``seen.cuh`` has it."""
    first = min(begin + always.sinks, end)
    last = max(end - always.recent, first)
    start = max(first, min(in_full, end))
    return (place >= start) & (place < min(last, end // GROUP * GROUP))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor,
    places: torch.Tensor, units: torch.Tensor, logits: Logits, kind: str, in_full: int = 0, always: Always = NONE,
    kept: Kept | None = None,
) -> torch.Tensor:  # fmt: skip
    """The output ``[B, H, 1, Dv]`` of a completed step.

    Args:
        q: ``[B, H, 1, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``; of an 8-bit cache dequantised.
        indices: int64 ``[B, H, 1, K]``, the keys that the step kept, padded with -1.
        rows: int32 ``[B, 4]``, what each row sees (``rows.py``).
        places, units: uint16 ``[B * H, N or more]`` and float32 ``[B * H]``, the step's buffers ``fast`` and ``units``.
        kind: ``"mean"`` or ``"linear"``.
        in_full: first tokens of the cache that have no code.
        kept: moments of the complete groups that every row sees, which are summed here else.
    """
    batch, heads = q.shape[:2]
    group, n = heads // k.shape[1], k.shape[2]
    out = torch.zeros(batch, heads, 1, v.shape[-1], dtype=q.dtype, device=q.device)
    place = torch.arange(n, device=q.device)
    for b in range(batch):
        begin, end = int(rows[b, BEGIN]), int(rows[b, END])
        visible = ((place >= begin) & (place < end))[None]
        first, last = -(-begin // GROUP), end // GROUP
        has = placed(place, begin, end, in_full, always)
        for g in range(k.shape[1]):
            whole, moments = (None, empty(k[b, g], v[b, g])) if kept is None else kept.of(b, g)
            if whole != (first, last):
                moments = add_groups(empty(k[b, g], v[b, g]), k[b, g], v[b, g], first, last)
            keys, values = (torch.where(visible[0, :, None], x[b, g].float(), 0.0) for x in (k, v))
            for h in range(g * group, (g + 1) * group):
                out[b, h] = rows_of(
                    q[b, h].float(), keys, values, indices[b, h], visible, moments, (first, last), logits, h, kind,
                    known=partial(_known, places[b * heads + h, :n], units[b * heads + h], has),
                ).to(q.dtype)  # fmt: skip
    return out


def _known(place: torch.Tensor, units: torch.Tensor, has: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Scores of places ``[N]`` where a key has one, the canonical ones ``[1, N]`` elsewhere."""
    if float(units) <= 0:
        return score
    return torch.where(has, (place.to(torch.int32).float() - MIDDLE) * (torch.ones_like(units) / units), score)
