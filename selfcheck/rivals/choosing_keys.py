"""Which keys a query keeps: exactly the best, a share of the mass, or what other selectors choose.

Quest, SparQ, Loki and Double Sparsity choose by the scores that each has, SparQ once for the heads of a group, the
others for every query head. All of it is matrix products in float32 on chunks of queries, on any device, and nothing is
canonical: of keys whose scores are equal to the last kept one all are kept, which perplexity does not notice.

One sequence at a time. KV heads come first: q ``[Hkv, G, M, D]``, k ``[Hkv, N, D]``, v ``[Hkv, N, Dv]``, the M queries
being the last of N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch

import qaxis

#: the score of a key that a query does not see: finite, as it is multiplied by weights of 0
LOW = -1e30
PAGE = 16


class Layer(NamedTuple):
    """What one attention call computes with, positions already rotated in."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


class Rows(NamedTuple):
    """A chunk of m queries, and the n keys that the last of them sees."""

    #: ``[Hkv, G, m, D]``
    q: torch.Tensor
    #: raw, ``[Hkv, G, m, n]``, LOW where a key is not seen
    scores: torch.Tensor
    #: position of the first query, which sees one key more
    first: int

    @property
    def seen(self) -> torch.Tensor:
        """How many keys each query sees, int64 ``[m]``, on the CPU."""
        return torch.arange(self.first, self.first + self.q.shape[2]) + 1

    @property
    def visible(self) -> torch.Tensor:
        """bool ``[m, n]``"""
        n = self.scores.shape[-1]
        return torch.ones(self.q.shape[2], n, dtype=torch.bool, device=self.q.device).tril(self.first)


class Choice(NamedTuple):
    """What a selection made of a chunk."""

    #: bool ``[Hkv, G, m, n]``
    selected: torch.Tensor
    #: the scores by which it chose, LOW where a key is not seen; None if they are the exact ones
    near: torch.Tensor | None = None
    #: how many keys a row keeps, where no table says so
    kept: torch.Tensor | None = None


Select = Callable[[Rows], Choice]
#: how many keys a query keeps that sees so many: int64 to int64, on the CPU
Counts = Callable[[torch.Tensor], torch.Tensor]


def by_heads(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x [Hkv, G, m, A] @ y [Hkv, A, B]``, without a copy of y for every query head."""
    return (x.flatten(1, 2) @ y).unflatten(1, x.shape[1:3])


def runs(first: int, count: int, size: int) -> Iterator[tuple[slice, int]]:
    """Rows that see equally many complete blocks of ``size`` keys, and how many; row 0 sees ``first + 1`` keys."""
    start = 0
    while start < count:
        whole = (first + start + 1) // size
        stop = min(count, (whole + 1) * size - 1 - first)
        yield slice(start, stop), whole
        start = stop


def hidden(near: torch.Tensor, rows: Rows) -> torch.Tensor:
    """Scores with LOW where a key is not seen; changes ``near``."""
    return near.masked_fill_(~rows.visible, LOW)


def budgeted(budget: qaxis.Budget) -> Counts:
    """The counts of a budget."""
    return lambda seen: budget.table(int(seen.max()))[seen]


def together(near: torch.Tensor, scale: float) -> torch.Tensor:
    """Logarithms of the sums of a group's softmax weights, ``[Hkv, 1, m, n]``: in this order its heads keep keys.

    Weights themselves underflow, and keys of weight 0 would all be kept as equals, those that are not seen too.
    """
    return (near * scale).log_softmax(-1).logsumexp(1, keepdim=True)


def best(scores: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Where ``scores [..., m, n]`` are among the ``k [m]`` (on the CPU) highest of their row, bool."""
    ranked = scores.topk(int(k.max()), dim=-1).values
    last = (k - 1).to(scores.device)[:, None].expand(*scores.shape[:-1], 1)
    return scores >= ranked.gather(-1, last)


@dataclass(frozen=True)
class Exact:
    """The keys with the highest scores."""

    counts: Counts

    def prepare(self, layer: Layer) -> Select:
        return lambda rows: Choice(best(rows.scores, self.counts(rows.seen)))


@dataclass(frozen=True)
class Share:
    """The fewest keys whose rest has at most ``tolerance`` of the softmax mass, at least one."""

    tolerance: float

    def prepare(self, layer: Layer) -> Select:
        def select(rows: Rows) -> Choice:
            weights = ((rows.scores - rows.scores.amax(-1, keepdim=True)) * layer.scale).exp_()
            least = _least(weights, 1 - self.tolerance)
            chosen = weights >= least
            return Choice(chosen, kept=chosen.sum(-1))

        return select


def _least(weights: torch.Tensor, share: float) -> torch.Tensor:
    """The least of the fewest largest ``weights [..., n]``, in [0, 1], that sum to that share of all, ``[..., 1]``.

    Numbers that are not negative lie in the order of their bits, so bisecting those is exact, and faster than sorting.
    """
    order, asked = weights.view(torch.int32), share * weights.sum(-1, keepdim=True)
    low = torch.ones_like(asked, dtype=torch.int32)
    high = torch.full_like(low, int(torch.tensor(1.0).view(torch.int32)) + 1)
    for _ in range(30):
        middle = (low + high) // 2
        enough = torch.where(order >= middle, weights, 0.0).sum(-1, keepdim=True) >= asked
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low.view(torch.float32)


@dataclass(frozen=True)
class Quest:
    """Tang et al., 2024: whole pages of 16 keys by a bound from the page's least and largest channels.

    The query's own page is always kept. Every layer is treated alike (the authors leave two dense). Its
    estimate of a score is the one of the middle of the page's box, which costs no further byte.
    """

    counts: Counts
    share = 2 / PAGE
    by_groups = False

    def prepare(self, layer: Layer) -> Select:
        short = -layer.k.shape[1] % PAGE
        pages = torch.nn.functional.pad(layer.k, (0, 0, 0, short)).unflatten(1, (-1, PAGE))
        low, high = pages.amin(2).transpose(1, 2), pages.amax(2).transpose(1, 2)

        def select(rows: Rows) -> Choice:
            n, seen = rows.scores.shape[-1], rows.seen.to(rows.q.device)[:, None]
            count = -(-n // PAGE)
            bound = by_heads(rows.q.clamp(min=0), high[..., :count]) + by_heads(rows.q.clamp(max=0), low[..., :count])
            start = torch.arange(count, device=rows.q.device) * PAGE
            bound.masked_fill_(start >= seen, -torch.inf)
            bound.masked_fill_((start < seen) & (start + PAGE >= seen), torch.inf)
            chosen = best(bound, (self.counts(rows.seen) // PAGE).clamp(min=1))
            middle = by_heads(rows.q, ((low + high) / 2)[..., :count])
            spread, near = (x.repeat_interleave(PAGE, -1)[..., :n] for x in (chosen, middle))
            near = torch.where(start.repeat_interleave(PAGE)[:n] + PAGE > seen, rows.scores, near)
            return Choice(spread & rows.visible, hidden(near, rows))

        return select


@dataclass(frozen=True)
class SparQ:
    """Ribar et al., 2024: scores by the largest channels of the query, a quarter of the kept keys being the newest.

    Heads of a group share their channels, and by the sum of their weights the keys that are kept; scores are corrected
    for the share of the query that was left out.
    """

    counts: Counts
    share = 0.25
    by_groups = True

    def prepare(self, layer: Layer) -> Select:
        channels, keys = int(layer.q.shape[-1] * self.share), layer.k.transpose(1, 2)

        def select(rows: Rows) -> Choice:
            size = rows.q.abs()
            largest = size.sum(1, keepdim=True).topk(channels, dim=-1).indices
            some = torch.zeros_like(rows.q[:, :1]).scatter_(-1, largest, 1.0)
            left = (size * some).sum(-1, keepdim=True) / size.sum(-1, keepdim=True).clamp(min=1e-30)
            near = hidden(
                by_heads(rows.q * some / left.clamp(min=1e-30).sqrt(), keys[..., : rows.scores.shape[-1]]), rows
            )
            k = self.counts(rows.seen)
            newest = (rows.seen - k // 4).to(near.device)[:, None]
            place = torch.arange(near.shape[-1], device=near.device)
            ranked = torch.where((place >= newest) & rows.visible, torch.inf, together(near, layer.scale))
            return Choice(best(ranked, k).expand_as(near), near)

        return select


@dataclass(frozen=True)
class Loki:
    """Singhania et al., 2024: scores in the leading directions of the keys; here of this text's own keys."""

    counts: Counts
    share = 0.25
    by_groups = False

    def prepare(self, layer: Layer) -> Select:
        square = layer.k.transpose(1, 2) @ layer.k
        basis = torch.linalg.eigh(square).eigenvectors[..., -int(layer.k.shape[-1] * self.share) :]
        scale = layer.scale if self.by_groups else None
        return partial(_narrow, self.counts, scale, lambda q: by_heads(q, basis), (layer.k @ basis).transpose(1, 2))


@dataclass(frozen=True)
class DoubleSparsity:
    """Yang et al., 2024: scores by the channels that matter most, chosen once; here from this text's own queries."""

    counts: Counts
    share = 0.25
    by_groups = False

    def prepare(self, layer: Layer) -> Select:
        matters = layer.q.abs().mean((1, 2)) * layer.k.abs().mean(1)
        some = matters.topk(int(layer.k.shape[-1] * self.share), dim=-1).indices
        keys = layer.k.gather(2, some[:, None].expand(-1, layer.k.shape[1], -1)).transpose(1, 2)

        def narrowed(q: torch.Tensor) -> torch.Tensor:
            return q.gather(3, some[:, None, None].expand(-1, *q.shape[1:3], -1))

        return partial(_narrow, self.counts, layer.scale if self.by_groups else None, narrowed, keys)


def _narrow(
    counts: Counts, scale: float | None, of: Callable[[torch.Tensor], torch.Tensor], keys: torch.Tensor, rows: Rows
) -> Choice:
    """By scores of less than all channels; with ``scale``, one choice for the heads of a group."""
    near = hidden(by_heads(of(rows.q), keys[..., : rows.scores.shape[-1]]), rows)
    ranked = near if scale is None else together(near, scale)
    return Choice(best(ranked, counts(rows.seen)).expand_as(near), near)


class LokiByGroups(Loki):
    """As Loki, but that heads of a group keep the same keys, as SparQ's do."""

    by_groups = True


class DoubleSparsityByGroups(DoubleSparsity):
    """As Double Sparsity, but that heads of a group keep the same keys, as SparQ's do."""

    by_groups = True


Selection = Exact | Share | Quest | SparQ | Loki | DoubleSparsity
#: as their authors choose
AUTHORED: dict[str, Any] = {"Quest": Quest, "SparQ": SparQ, "Loki": Loki, "Double Sparsity": DoubleSparsity}
#: what reading a kept key once for all heads of a group would make of those that read it for each
BY_GROUPS: dict[str, Any] = {"Loki by groups": LokiByGroups, "Double Sparsity by groups": DoubleSparsityByGroups}
RIVALS = AUTHORED | BY_GROUPS
