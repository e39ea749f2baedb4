"""What top-k leaves out, put back: the exact softmax mass of the unselected keys times a line fitted to the values.

An exact selector has scored every key, so the mass of those that it leaves out is known; only their values are unread.
They are replaced by a function of the score, fitted by least squares to all keys of complete groups (paper, "What top-k
leaves out"): ``"mean"`` is a constant, ``"linear"`` a line. With W the mass of the unselected keys, E the sum of their
weights times their scores' distance from the mean score::

    output = (sum of the selected, weighted values + W mean_value + E slope) / (sum of the selected weights + W)

Canonical (arithmetic, rules 1 to 5), in PyTorch on any device: the meaning of every other implementation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..arithmetic import reference as canonical
from ..storage.moments import GROUP, Moments
from ..validation import require
from .logits import Logits
from .reference import Sums, logits_of, to_base_two

KINDS = ("none", "mean", "linear")
#: neighbouring keys whose weights are summed relative to the best of them
RUN = 16
#: a spread of scores below that share of their mean square is rounding: there is no slope then
LEAST_SPREAD = 2.0**-12


def kind_of(completion: str) -> str:
    """``completion`` as one of :data:`KINDS`; ``"block"`` is ``"linear"``, its block being all complete groups.

    Raises:
        ValueError: for anything else.
    """
    allowed = "'none', 'mean' or 'linear' ('block' is the same)"
    require(isinstance(completion, str) and completion in (*KINDS, "block"), "completion", completion, allowed)
    return "linear" if completion == "block" else completion


class Seen(NamedTuple):
    """The range of keys that every query sees.

    Attributes:
        begin, end: int64, broadcastable to ``[B, H, M]``: keys [begin, end).
        offset: tokens before the first key, which a window dropped; groups and runs count from the first token.
    """

    begin: torch.Tensor
    end: torch.Tensor
    offset: int = 0

    def groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The complete groups [first, last) that lie in the range, counted from the first token."""
        return (self.begin + self.offset + GROUP - 1) // GROUP, (self.end + self.offset) // GROUP


def seen_of(allowed: torch.Tensor, offset: int = 0) -> Seen:
    """The ranges that a mask ``allowed [B|1, H|1, M|1, N]`` shows.

    Raises:
        ValueError: if a row's keys are no range.
    """
    n = allowed.shape[-1]
    place = torch.arange(n, device=allowed.device)
    end = torch.where(allowed, place + 1, 0).amax(-1)
    begin = torch.where(allowed, place, n).amin(-1).minimum(end)
    whole = bool((allowed.sum(-1) == end - begin).all())
    require(whole, "attention_mask", "with keys hidden between visible ones", "a range of keys a query for completion")
    return Seen(begin, end, offset)


class Fit(NamedTuple):
    """Least squares of values on raw scores: ``mean_value + slope (score - mean_score)``, of R queries."""

    #: float32 ``[R]``
    mean_score: torch.Tensor
    #: float32 ``[R, Dv]``
    mean_value: torch.Tensor
    #: float32 ``[R, Dv]``, 0 where the scores hardly differ
    slope: torch.Tensor


def fit(q: torch.Tensor, moments: Moments, count: int, kind: str) -> Fit:
    """The line through the values of ``count`` keys along queries ``[R, D]``, float32, of one KV head.

    Args:
        moments: ``products [Dv + D, D]``, ``sums [Dv + D]`` of these keys, ``count`` at least 1.
    """
    dim = q.shape[-1]
    products, sums = moments
    n = torch.full((1,), float(count), dtype=torch.float32, device=q.device)
    cross = canonical.tree_sum(q[:, None, :] * products)
    total = canonical.tree_sum(q * sums[-dim:])
    mean_score, mean_value = total / n, (sums[:-dim] / n).expand(q.shape[0], -1)
    if kind == "mean":
        return Fit(mean_score, mean_value, torch.zeros_like(mean_value))
    second = canonical.tree_sum(q * cross[:, -dim:])
    spread = second - total * mean_score
    together = cross[:, :-dim] - mean_score[:, None] * sums[:-dim]
    sloped = spread > second * LEAST_SPREAD
    slope = torch.where(sloped[:, None], together / torch.where(sloped, spread, 1.0)[:, None], 0.0)
    return Fit(mean_score, mean_value, slope)


class Tail(NamedTuple):
    """Of what is not selected, relative to the highest selected logit, of R queries: float32 ``[R]`` each."""

    #: sum of weights, W
    mass: torch.Tensor
    #: sum of weights times the scores' distance from the mean score, E
    excess: torch.Tensor


def tail(
    score: torch.Tensor, left: torch.Tensor, visible: torch.Tensor, top: torch.Tensor, mean_score: torch.Tensor,
    logits: Logits,
) -> Tail:  # fmt: skip
    """Mass and excess of the keys that are ``left``, by runs of 16 and a tree over all runs.

    Args:
        score: float32 raw scores ``[R, N]``; runs and the tree begin at the first.
        left, visible: bool ``[R, N]``.
        top: the highest selected logit, float32 ``[R]``. Where a key that is left has a higher one it counts as that.
    """
    short = -score.shape[-1] % RUN
    score = torch.nn.functional.pad(score, (0, short)).unflatten(-1, (-1, RUN))
    left, visible = (torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, RUN)) for x in (left, visible))
    some, factor = visible.any(-1), to_base_two(logits)
    best = torch.where(some, torch.where(visible, score, -math.inf).amax(-1), 0.0)
    highest = logits_of(best, logits)
    power = (logits_of(score, logits) - highest[..., None]) * factor
    p = torch.where(left, canonical.exp2(torch.where(left, power, 0.0)), 0.0)
    mass, excess = canonical.tree_sum(p), canonical.tree_sum(p * torch.where(left, score - best[..., None], 0.0))
    weight = canonical.exp2((torch.minimum(highest, top[:, None]) - top[:, None]) * factor)
    weight = torch.where(some & left.any(-1), weight, 0.0)
    excess = weight * (excess + mass * (best - mean_score[:, None]))
    return Tail(canonical.tree_sum(weight * mass), canonical.tree_sum(excess))


def completed(sums: Sums, rest: Tail, line: Fit) -> Sums:
    """The sums over the selected keys, and over the line in place of the others."""
    mean, rise = rest.mass[:, None] * line.mean_value, rest.excess[:, None] * line.slope
    added = torch.where(mean.isfinite(), mean, 0.0) + torch.where(rise.isfinite(), rise, 0.0)
    return Sums(sums.numerator + added, sums.denominator + rest.mass, sums.top)


def completed_weights(
    scores: torch.Tensor, selected: torch.Tensor, visible: torch.Tensor, seen: Seen, logits: Logits, kind: str
) -> torch.Tensor:
    """What every value is multiplied by, float32 ``[B, H, M, N]``, by PyTorch: not canonical.

    The line's coefficients are sums over values, so the output is one product of weights and values.

    Args:
        scores: float32 raw scores ``[B, H, M, N]``. selected, visible: bool, alike.
    """
    logit = logits.of(scores)
    top = torch.where(selected, logit, -math.inf).amax(-1, keepdim=True)
    if logits.sink is not None:
        top = torch.maximum(top, logits.sink.float().reshape(1, -1, 1, 1))
    none = ~selected.any(-1, keepdim=True)
    p = torch.where(visible, torch.exp(torch.minimum(logit, top) - torch.where(none, 0.0, top)), 0.0)
    fitted, count = _fitted(seen, scores.shape[-1])
    count = torch.where(none, 0, count)
    rest = torch.where(selected | (count == 0), 0.0, p)
    n = count.clamp(min=1).float()
    mean = torch.where(fitted, scores, 0.0).sum(-1, keepdim=True) / n
    away = torch.where(fitted, scores - mean, 0.0)
    weights = torch.where(selected, p, 0.0) + torch.where(fitted, rest.sum(-1, keepdim=True) / n, 0.0)
    if kind == "linear":
        spread = away.square().sum(-1, keepdim=True)
        sloped = spread > LEAST_SPREAD * (spread + n * mean.square())
        excess = (rest * (scores - mean)).sum(-1, keepdim=True)
        weights = weights + torch.where(sloped, excess / torch.where(sloped, spread, 1.0), 0.0) * away
    total = torch.where(selected, p, rest).sum(-1, keepdim=True)
    if logits.sink is not None:
        total = total + torch.exp(logits.sink.float().reshape(1, -1, 1, 1) - top)
    return torch.where(none, 0.0, weights / torch.where(none, 1.0, total))


def _fitted(seen: Seen, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys that the line is fitted to, bool ``[..., N]``, and how many, int64 ``[..., 1]``."""
    first, last = (x[..., None] * GROUP - seen.offset for x in seen.groups())
    place = torch.arange(n, device=first.device)
    return (place >= first) & (place < last), (last - first).clamp(min=0)
