"""What top-k leaves out, put back: weights of the unselected keys that are affine in the score, of the exact mass.

An exact selector has scored every key, so the softmax weights of those that it leaves out are known; only their
values are unread. Their weights are replaced by the least-squares approximation ``alpha + beta score`` over the
unselected keys of complete groups, whose weighted values are then sums that a cache can keep (``storage/moments.py``).
That is the same as a line fitted to the values along the query (paper, "What top-k leaves out"). ``"mean"`` has no
slope. With W the mass of the unselected keys, E the sum of their weights times their scores' distance from the mean::

    beta = E / (sum of squares of that distance), alpha = W / (number of keys) - beta mean_score
    output = (sum of weighted values, selected + affine) / (sum of the selected weights + W)

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
from .reference import logits_of, to_base_two

KINDS = ("none", "mean", "linear")
#: neighbouring keys whose weights are summed relative to the best of them
RUN = 16
#: sums over keys count parts of 2^-40, of numbers up to that
PARTS, MOST = 2.0**40, 2.0**20
#: the highest exponent of a weight: what is known of a score may be above the highest selected one
HIGHEST = 12.0
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


class Fitted(NamedTuple):
    """Sums over the keys of complete groups along R queries."""

    #: how many keys; sum of their raw scores, and of the squares, float32 ``[R]``
    many: int
    total: torch.Tensor
    second: torch.Tensor
    #: sum of their values, float32 ``[Dv]``, and of values times scores ``[R, Dv]``
    values: torch.Tensor
    cross: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """The mean of their raw scores, float32 ``[R]``."""
        return self.total / torch.full_like(self.total, max(self.many, 1))


def along(q: torch.Tensor, moments: Moments, count: int) -> Fitted:
    """What ``moments`` say along queries ``[R, D]``, float32, of one KV head.

    Args:
        moments: ``products [Dv + D, D]``, ``sums [Dv + D]`` of ``count`` keys.
    """
    dim = q.shape[-1]
    products, sums = moments
    cross = canonical.tree_sum(q[:, None, :] * products)
    total, second = canonical.tree_sum(q * sums[-dim:]), canonical.tree_sum(q * cross[:, -dim:])
    return Fitted(count, total, second, sums[:-dim], cross[:, :-dim])


class Chosen(NamedTuple):
    """The selected keys of R queries, ``[R, K]``."""

    #: raw scores, float32, and those by which they were weighed among all: the same, or what is known of them
    score: torch.Tensor
    known: torch.Tensor
    #: bool: those that are no padding, and of these those of complete groups
    live: torch.Tensor
    counted: torch.Tensor


class Tail(NamedTuple):
    """Sums of R queries, float32 ``[R]``, how many as int64; weights are relative to the highest selected score's."""

    #: sum of the weights of what is not selected, W
    mass: torch.Tensor
    #: sum of weights times the scores' distance from the mean score of all keys of complete groups; no number if one of
    #: them is too large to be counted, so that there is no slope
    excess: torch.Tensor
    #: of the selected keys of complete groups: how many, the sum of their scores, and of the squares
    many: torch.Tensor
    total: torch.Tensor
    second: torch.Tensor


def unit_of(second: torch.Tensor) -> torch.Tensor:
    """A power of two near the root of a sum of squares, float32: what sums of scores are multiples of parts of."""
    exponent = ((second.view(torch.int32) >> 23) & 255) - 127
    return ((exponent.clamp(min=-100) >> 1) + 127 << 23).view(torch.float32)


def to_parts(x: torch.Tensor) -> torch.Tensor:
    """How many parts are nearest to ``x``, float32, as int64, whose sum has no order; no number counts as the least."""
    x = torch.where(x > -MOST, x, -MOST)
    return (torch.where(x < MOST, x, MOST) * PARTS).round().long()


def _from_parts(x: torch.Tensor) -> torch.Tensor:
    """Of sums ``[R, ...]`` of parts, over all but the first dimension, float32 ``[R]``."""
    return x.flatten(1).sum(1).float() * (1 / PARTS)


def tail(
    known: torch.Tensor, visible: torch.Tensor, chosen: Chosen, top: torch.Tensor, fitted: Fitted, logits: Logits
) -> Tail:  # fmt: skip
    """Sums over all keys, by runs of 16, less those over the selected ones, in parts of 2^-40.

    Args:
        known: float32 scores ``[R, N]`` as they are known; runs begin with the first. visible: bool, alike.
        top: the logit of the highest selected score, or the sink's, float32 ``[R]``.
    """
    short, factor = -known.shape[-1] % RUN, to_base_two(logits)
    known, visible = (torch.nn.functional.pad(x, (0, short)).unflatten(-1, (-1, RUN)) for x in (known, visible))
    unit = unit_of(fitted.second)[:, None]
    # Single products, as powers of two are exact: no unit is smaller than 2^-50.
    per_unit, mean, some = 1 / unit, fitted.mean[:, None], visible.any(-1)
    best = torch.where(some, torch.where(visible, known, -math.inf).amax(-1), 0.0)
    highest = logits_of(best, logits)
    power = (logits_of(known, logits) - highest[..., None]) * factor
    p = torch.where(visible, canonical.exp2(torch.where(visible, power, 0.0)), 0.0)
    mass, excess = canonical.tree_sum(p), canonical.tree_sum(p * torch.where(visible, known - best[..., None], 0.0))

    def weight(logit: torch.Tensor) -> torch.Tensor:
        return canonical.exp2(((logit - top[:, None]) * factor).clamp(max=HIGHEST))

    in_all = weight(highest)
    mass, excess = in_all * mass, in_all * (excess + mass * (best - mean))
    picked = weight(logits_of(chosen.known, logits))
    # Of all that is seen, and of what is selected.
    mass, less_mass = torch.where(some, mass, 0.0), torch.where(chosen.live, picked, 0.0)
    excess = torch.where(some, excess * per_unit, 0.0)
    less = torch.where(chosen.live, picked * (chosen.known - mean) * per_unit, 0.0)
    counts = (torch.cat([excess, less], -1).abs() < MOST).all(-1)
    excess = _from_parts(torch.cat([to_parts(excess), -to_parts(less)], -1)) * unit[:, 0]
    apart = chosen.score * per_unit
    total, second = (to_parts(torch.where(chosen.counted, x, 0.0)) for x in (apart, apart * apart))
    return Tail(
        _from_parts(torch.cat([to_parts(mass), -to_parts(less_mass)], -1)).clamp(min=0),
        torch.where(counts, excess, math.nan),
        chosen.counted.sum(-1), _from_parts(total) * unit[:, 0], _from_parts(second) * unit[:, 0] * unit[:, 0],
    )  # fmt: skip


class Line(NamedTuple):
    """Scores of the unselected keys of complete groups, of R queries."""

    #: how many, int64 ``[R]``
    many: torch.Tensor
    #: mean of their raw scores, float32 ``[R]``
    mean: torch.Tensor
    #: sum of squares of the distance from it, float32 ``[R]``; 0 where that is rounding
    spread: torch.Tensor


def without(fitted: Fitted, selected: Tail) -> Line:
    """Of ``fitted`` what is left without the selected keys."""
    many = fitted.many - selected.many
    total, second = fitted.total - selected.total, fitted.second - selected.second
    mean = total / many.clamp(min=1).float()
    spread = second - total * mean
    return Line(many, mean, torch.where(spread > fitted.second * LEAST_SPREAD, spread, 0.0))


class Affine(NamedTuple):
    """The weight ``alpha + beta score`` of every unselected key of complete groups, float32 ``[R]`` each."""

    alpha: torch.Tensor
    beta: torch.Tensor
    #: bool; False where values weighted so leave float32's range, so that nothing is put back
    fits: torch.Tensor


def affine(rest: Tail, fitted: Fitted, line: Line, kind: str) -> Affine:
    """Least squares of the tail's weights, with its mass.

    There is no slope where scores hardly differ, where it leaves float32's range, or for ``"mean"``.
    """
    level = rest.mass / line.many.clamp(min=1).float()
    sloped = line.spread > 0 if kind == "linear" else torch.zeros_like(line.spread, dtype=torch.bool)
    excess = rest.excess + rest.mass * (fitted.mean - line.mean)
    beta = torch.where(sloped, excess / torch.where(sloped, line.spread, 1.0), 0.0)
    alpha = level - beta * line.mean
    most, most_cross = (_largest(x) for x in (fitted.values, fitted.cross))
    fine = (alpha.abs() * most + beta.abs() * most_cross).isfinite()
    return Affine(torch.where(fine, alpha, level), torch.where(fine, beta, 0.0), fine | (level * most).isfinite())


def _largest(x: torch.Tensor) -> torch.Tensor:
    """The largest size along the last dimension, infinite where one is no number."""
    return x.abs().nan_to_num(nan=math.inf, posinf=math.inf).amax(-1)


def added(fitted: Fitted, weights: Affine) -> torch.Tensor:
    """Values of all keys of complete groups by their affine weights, float32 ``[R, Dv]``."""
    alpha, beta = weights.alpha[:, None], weights.beta[:, None]
    # Where a weight is 0 what it would be multiplied with need not be a number.
    by_values, by_cross = (torch.where(x == 0, 0.0, x * y) for x, y in ((alpha, fitted.values), (beta, fitted.cross)))
    return by_values + by_cross


def completed_weights(
    scores: torch.Tensor, selected: torch.Tensor, visible: torch.Tensor, seen: Seen, logits: Logits, kind: str
) -> torch.Tensor:
    """What every value is multiplied by, float32 ``[B, H, M, N]``, by PyTorch: not canonical.

    Args:
        scores: float32 raw scores ``[B, H, M, N]``. selected, visible: bool, alike.
    """
    logit = logits.of(scores)
    top = torch.where(selected, logit, -math.inf).amax(-1, keepdim=True)
    if logits.sink is not None:
        top = torch.maximum(top, logits.sink.float().reshape(1, -1, 1, 1))
    none = ~selected.any(-1, keepdim=True)
    p = torch.where(visible, torch.exp(torch.minimum(logit, top) - torch.where(none, 0.0, top)), 0.0)
    groups = _fitted(seen, scores.shape[-1])
    fitted = groups & ~selected & ~none
    count = fitted.sum(-1, keepdim=True)
    rest = torch.where(selected | (count == 0), 0.0, p)
    n = count.clamp(min=1).float()
    mean = torch.where(fitted, scores, 0.0).sum(-1, keepdim=True) / n
    away = torch.where(fitted, scores - mean, 0.0)
    weights = torch.where(selected, p, 0.0) + torch.where(fitted, rest.sum(-1, keepdim=True) / n, 0.0)
    if kind == "linear":
        spread = away.square().sum(-1, keepdim=True)
        # As canonical, next to the scores of all keys of complete groups: a few that are left may lie close together.
        sloped = spread > LEAST_SPREAD * torch.where(groups, scores, 0.0).square().sum(-1, keepdim=True)
        excess = (rest * (scores - mean)).sum(-1, keepdim=True)
        weights = weights + torch.where(sloped, excess / torch.where(sloped, spread, 1.0), 0.0) * away
    total = torch.where(selected, p, rest).sum(-1, keepdim=True)
    if logits.sink is not None:
        total = total + torch.exp(logits.sink.float().reshape(1, -1, 1, 1) - top)
    return torch.where(none, 0.0, weights / torch.where(none, 1.0, total))


def _fitted(seen: Seen, n: int) -> torch.Tensor:
    """Keys of complete groups, bool ``[..., N]``."""
    first, last = (x[..., None] * GROUP - seen.offset for x in seen.groups())
    place = torch.arange(n, device=first.device)
    return (place >= first) & (place < last)
