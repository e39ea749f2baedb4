"""Canonical attention that is completed by what it left out (``completion.py``), in PyTorch on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..arithmetic import reference as canonical
from ..storage.moments import GROUP, Moments, add_groups, empty
from . import completion
from .completion import Seen
from .logits import Logits
from .reference import Sums, logits_of, weighted_sums


class Kept(NamedTuple):
    """Moments that a cache keeps, of one range of groups a batch row."""

    #: float32 ``[B, Hkv, Dv + D, D]`` and ``[B, Hkv, Dv + D]``
    moments: Moments
    #: the groups [first, last) of every batch row, counted from the first token
    groups: list[tuple[int, int]]

    def of(self, b: int, g: int) -> tuple[tuple[int, int], Moments]:
        """The range of a KV head, and its moments."""
        return self.groups[b], Moments(*(x[b, g] for x in self.moments))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, logits: Logits, kind: str, seen: Seen,
    kept: Kept | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of ``q [B,H,M,D]`` over the keys that ``indices [B,H,M,K]`` (padded with -1) name, completed.

    A query that keeps no key, or leaves out none of a complete group, gets what attention without completion gives.

    Args:
        k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``.
        kind: ``"mean"`` or ``"linear"``.
        seen: the keys that each query sees.
        kept: moments that need not be summed, for the queries that see the groups that they are of.

    Returns:
        ``[B, H, M, Dv]`` in q's dtype.
    """
    batch, heads, m, dim = q.shape
    group, n = heads // k.shape[1], k.shape[2]
    out = torch.empty(batch, heads, m, v.shape[-1], dtype=q.dtype, device=q.device)
    width = max(n + seen.offset, dim + v.shape[-1])
    at_once = max(1, canonical.CHUNK_ELEMENTS // (max(dim, v.shape[-1]) * canonical.next_power_of_two(width)))
    begins, ends = (x.expand(batch, heads, m) for x in (seen.begin, seen.end))
    place = torch.arange(n, device=q.device)
    firsts, lasts = (x.expand(batch, heads, m) for x in seen.groups())
    for b in range(batch):
        for g in range(k.shape[1]):
            keys, values = k[b, g].float(), v[b, g].float()
            sums = _Sums(k[b, g], v[b, g], seen.offset, kept and kept.of(b, g))
            own = slice(g * group, (g + 1) * group)
            ranges = torch.stack([firsts[b, own], lasts[b, own]], -1)
            for first, last in torch.unique(ranges.reshape(-1, 2), dim=0).tolist():
                moments = sums.of(first, last)
                for h in range(group):
                    rows = (ranges[h] == torch.tensor([first, last], device=q.device)).all(-1).nonzero()[:, 0]
                    for some in rows.split(at_once):
                        head = own.start + h
                        begin, end = begins[b, head, some, None], ends[b, head, some, None]
                        done = rows_of(
                            q[b, head, some].float(), keys, values, indices[b, head, some],
                            (place >= begin) & (place < end), moments, (first, last), logits, head, kind, seen.offset,
                        )  # fmt: skip
                        out[b, head, some] = done.to(q.dtype)
    return out


class _Sums:
    """Moments of ranges of groups of one KV head; ranges that grow go on where the last one ended."""

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, offset: int, kept: tuple[tuple[int, int], Moments] | None
    ) -> None:
        self.k, self.v, self.offset, self.kept = k, v, offset, kept
        self.first = self.last = -1
        self.moments = empty(k, v)

    def of(self, first: int, last: int) -> Moments:
        """Of the groups [first, last), counted from the first token."""
        if self.kept is not None and self.kept[0] == (first, last):
            return self.kept[1]
        if first != self.first or last < self.last:
            self.first, self.last, self.moments = first, first, empty(self.k, self.v)
        for group in range(self.last, last):
            start = group * GROUP - self.offset
            tokens = slice(start, start + GROUP)
            self.moments = add_groups(self.moments, self.k[tokens], self.v[tokens], 0, 1)
        self.last = max(last, self.first)
        return self.moments


def rows_of(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, chosen: torch.Tensor, visible: torch.Tensor,
    moments: Moments, groups: tuple[int, int], logits: Logits, head: int, kind: str, offset: int = 0,
    known: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Output float32 ``[R, Dv]`` of queries ``[R, D]`` of one head that see the same complete groups.

    Args:
        keys: ``[N, D]``. values: ``[N, Dv]``; float32. chosen: int64 ``[R, K]``, padded with -1.
        visible: bool ``[R, N]``.
        moments, groups: of the complete groups [first, last) of 128, counted from the first token.
        known: from canonical scores ``[R, N]`` to those by which the keys that are left are weighed.
    """
    count = max(0, groups[1] - groups[0]) * GROUP
    safe, live = chosen.clamp(min=0), chosen >= 0
    score = canonical.pair_scores(q[:, None, :], keys)
    canonical.check_scores(score)
    picked, own = score.gather(1, safe), values[safe]
    plain = weighted_sums(picked, own, live, logits, head)
    fitted = completion.along(q, moments, count)
    counted = live & (chosen + offset >= groups[0] * GROUP) & (chosen + offset < groups[1] * GROUP)
    weighed = score if known is None else known(score)
    selected = completion.Chosen(picked, weighed.gather(1, safe), live, counted)
    # Runs begin with the first token, also where a window dropped it.
    weighed, visible = (torch.nn.functional.pad(x, (offset, 0)) for x in (weighed, visible))
    rest = completion.tail(weighed, visible, selected, _top(picked, live, logits, head), fitted, logits)
    line = completion.without(fitted, rest)
    weights = completion.affine(rest, fitted, line, kind)
    instead = torch.where(counted, weights.alpha[:, None] + weights.beta[:, None] * picked, 0.0)
    done = weighted_sums(picked, own, live, logits, head, instead)
    numerator = done.numerator + completion.added(fitted, weights)
    output = Sums(numerator, plain.denominator + rest.mass, plain.top).output()
    return torch.where((weights.fits & (line.many > 0))[:, None] & live.any(-1, keepdim=True), output, plain.output())


def _top(picked: torch.Tensor, live: torch.Tensor, logits: Logits, head: int) -> torch.Tensor:
    """The logit of the highest selected score, or the sink's, float32 ``[R]``.

    Unlike the highest logit it is known before any logit: a rounded cap need not be monotone.
    """
    top = logits_of(torch.where(live, picked, -math.inf).amax(-1), logits)
    return top if logits.sink is None else torch.maximum(top, logits.sink[head].float())
