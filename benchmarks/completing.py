"""Attention of a model by other ways: which keys a query keeps, and what stands in place of the values it leaves out.

A way is a selection (exact top k, a share of the mass, or what Quest, SparQ, Loki and Double Sparsity choose) and a
completion. ``"none"``, ``"mean"`` and ``"linear"`` are the package's (``qaxis.attention.completion``); the others are
here alone, for comparison. All of it is matrix products in float32 on chunks of queries, on any device, and nothing is
canonical: of keys whose scores are equal to the last kept one all are kept, which perplexity does not notice.

One sequence at a time. KV heads come first: q ``[Hkv, G, M, D]``, k ``[Hkv, N, D]``, v ``[Hkv, N, Dv]``, the M queries
being the last of N positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AttentionMaskInterface

import qaxis
from qaxis.attention.completion import LEAST_SPREAD, Seen, completed_weights
from qaxis.attention.logits import Logits
from qaxis.storage.formats import FORMATS
from qaxis.storage.moments import GROUP
from selfcheck.rivals.attending import attending, register
from selfcheck.rivals.schemes import of_format

NAME = "completion_benchmark"
#: the score of a key that a query does not see: finite, as it is multiplied by weights of 0
LOW = -1e30
PAGE, CLUSTER, ROUNDS, RECENT = 16, 64, 5, 256
#: scores of a chunk of queries, all heads together
ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}


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


# Which keys a query keeps.


def budgeted(budget: qaxis.Budget) -> Counts:
    """The counts of a budget."""
    return lambda seen: budget.table(int(seen.max()))[seen]


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
            ranked = rows.scores.sort(dim=-1, descending=True).values
            sums = ((ranked - ranked[..., :1]) * layer.scale).exp_().cumsum(-1)
            kept = (sums < (1 - self.tolerance) * sums[..., -1:]).sum(-1, keepdim=True) + 1
            # Rounding may leave the last sum below the whole mass.
            kept = kept.minimum(rows.seen.to(kept.device)[:, None])
            return Choice(rows.scores >= ranked.gather(-1, kept - 1), kept=kept[..., 0])

        return select


@dataclass(frozen=True)
class Quest:
    """Tang et al., 2024: whole pages of 16 keys by a bound from the page's least and largest channels.

    The query's own page is always kept. Every layer is treated alike (the authors leave two dense). Its
    estimate of a score is the one of the middle of the page's box, which costs no further byte.
    """

    counts: Counts
    share = 2 / PAGE

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

    Heads of a group share their channels; scores are corrected for the share of the query that was left out.
    """

    counts: Counts
    share = 0.25

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
            ranked = torch.where((place >= newest) & rows.visible, torch.inf, near)
            return Choice(best(ranked, k), near)

        return select


@dataclass(frozen=True)
class Loki:
    """Singhania et al., 2024: scores in the leading directions of the keys; here of this text's own keys."""

    counts: Counts
    share = 0.25

    def prepare(self, layer: Layer) -> Select:
        square = layer.k.transpose(1, 2) @ layer.k
        basis = torch.linalg.eigh(square).eigenvectors[..., -int(layer.k.shape[-1] * self.share) :]
        return partial(_narrow, self.counts, lambda q: by_heads(q, basis), (layer.k @ basis).transpose(1, 2))


@dataclass(frozen=True)
class DoubleSparsity:
    """Yang et al., 2024: scores by the channels that matter most, chosen once; here from this text's own queries."""

    counts: Counts
    share = 0.25

    def prepare(self, layer: Layer) -> Select:
        matters = layer.q.abs().mean((1, 2)) * layer.k.abs().mean(1)
        some = matters.topk(int(layer.k.shape[-1] * self.share), dim=-1).indices
        keys = layer.k.gather(2, some[:, None].expand(-1, layer.k.shape[1], -1)).transpose(1, 2)

        def narrowed(q: torch.Tensor) -> torch.Tensor:
            return q.gather(3, some[:, None, None].expand(-1, *q.shape[1:3], -1))

        return partial(_narrow, self.counts, narrowed, keys)


def _narrow(counts: Counts, of: Callable[[torch.Tensor], torch.Tensor], keys: torch.Tensor, rows: Rows) -> Choice:
    near = hidden(by_heads(of(rows.q), keys[..., : rows.scores.shape[-1]]), rows)
    return Choice(best(near, counts(rows.seen)), near)


Selection = Exact | Share | Quest | SparQ | Loki | DoubleSparsity
RIVALS: dict[str, Any] = {"Quest": Quest, "SparQ": SparQ, "Loki": Loki, "Double Sparsity": DoubleSparsity}


# What stands in place of the values that are left out: the weights ``rest`` of the keys that are not kept, and the sum
# over them of weights times stand-ins.

#: (rows, rest ``[Hkv, G, m, n]``) to ``[Hkv, G, m, Dv]``
Added = Callable[[Rows, torch.Tensor], torch.Tensor]


def running(x: torch.Tensor, newest: int | None = None) -> torch.Tensor:
    """At every position the mean over it and those before, or the ``newest`` of them; ``[Hkv, N, C]``."""
    sums, n = x.double().cumsum(1), x.shape[1]
    count = torch.arange(1, n + 1, device=x.device)[:, None]
    if newest is not None and newest < n:
        sums = sums - torch.nn.functional.pad(sums[:, :-newest], (0, 0, newest, 0))
        count = count.clamp(max=newest)
    return (sums / count).float()


def within(x: torch.Tensor, size: int) -> torch.Tensor:
    """At every position the mean over its block of ``size`` up to it, ``[Hkv, N, C]``."""
    short = -x.shape[1] % size
    blocks = torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(1, (-1, size))
    count = torch.arange(1, size + 1, device=x.device)[:, None]
    return (blocks.cumsum(2) / count).flatten(1, 2)[:, : x.shape[1]]


def recent(layer: Layer) -> Added:
    """The mean of the newest values."""
    means = running(layer.v, RECENT)

    def added(rows: Rows, rest: torch.Tensor) -> torch.Tensor:
        return rest.sum(-1, keepdim=True) * means[:, None, rows.first : rows.first + rest.shape[2]]

    return added


class Blocks:
    """Means of blocks of neighbouring keys; of the block that is not full yet, the mean of what is there."""

    def __init__(self, size: int, x: torch.Tensor, complete: torch.Tensor | None = None) -> None:
        """``complete [Hkv, N // size, C]``: what stands for full blocks, if not their means."""
        self.size, self.own = size, within(x, size)
        self.means = self.own[:, size - 1 :: size] if complete is None else complete

    def masses(self, rest: torch.Tensor) -> torch.Tensor:
        """Sums of ``rest [..., n]`` over blocks, the last of them maybe not full."""
        short = -rest.shape[-1] % self.size
        whole = torch.nn.functional.pad(rest, (0, short)) if short else rest
        return whole.unflatten(-1, (-1, self.size)).sum(-1)

    def apart(self, rows: Rows, masses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masses of full blocks, and of the one that a row sees a part of (0 where there is none)."""
        place = (rows.seen // self.size).to(masses.device)[:, None].expand(*masses.shape[:-1], 1)
        masses = torch.nn.functional.pad(masses, (0, 1))
        own = masses.gather(-1, place)
        full = masses.scatter(-1, place, 0.0)[..., : self.means.shape[1]]
        return full, own

    def added(self, rows: Rows, masses: torch.Tensor) -> torch.Tensor:
        """Sums of masses times means, ``[Hkv, G, m, C]``."""
        full, own = self.apart(rows, masses)
        last = self.own[:, None, rows.first : rows.first + masses.shape[2]]
        return by_heads(full, self.means[:, : full.shape[-1]]) + own * last


def blocks(size: int, layer: Layer) -> Added:
    """The mean of each block of ``size`` neighbours."""
    found = Blocks(size, layer.v)
    return lambda rows, rest: found.added(rows, found.masses(rest))


def weighted(size: int, layer: Layer) -> Added:
    """Means of blocks that weigh their values: by the softmax, over the block, of its own mean query's scores.

    The mean is over queries of the block and heads of the group, so that it is known when the block is full, and costs
    the bytes of plain means.
    """
    n = layer.k.shape[1] // size * size
    if layer.q.shape[2] != layer.k.shape[1]:
        raise ValueError(f"queries={layer.q.shape[2]}: allowed is the whole window at once, {layer.k.shape[1]}")
    q = layer.q[:, :, :n].mean(1).unflatten(1, (-1, size)).mean(2, keepdim=True)
    keys, values = (x[:, :n].unflatten(1, (-1, size)) for x in (layer.k, layer.v))
    w = ((q * keys).sum(-1, keepdim=True) * layer.scale).softmax(2)
    found = Blocks(size, layer.v, (w * values).sum(2))
    return lambda rows, rest: found.added(rows, found.masses(rest))


def sloped(size: int, layer: Layer) -> Added:
    """Means of blocks, and one slope for all: least squares of values on scores within full blocks, pooled."""
    keys, values = Blocks(size, layer.k), Blocks(size, layer.v)
    n = layer.k.shape[1] // size * size
    centred = [
        x[:, :n].unflatten(1, (-1, size)) - found.means[:, :, None] for x, found in ((layer.v, values), (layer.k, keys))
    ]
    products = (torch.cat(centred, -1).transpose(-1, -2) @ centred[1]).cumsum(1)

    def added(rows: Rows, rest: torch.Tensor) -> torch.Tensor:
        masses = values.masses(rest)
        full, own = keys.apart(rows, masses)
        means = by_heads(rows.q, keys.means[:, : full.shape[-1]].transpose(1, 2))
        last = (rows.q * keys.own[:, None, rows.first : rows.first + rest.shape[2]]).sum(-1, keepdim=True)
        excess = (rest * rows.scores).sum(-1, keepdim=True) - (full * means).sum(-1, keepdim=True) - own * last
        out = values.added(rows, masses)
        for some, whole in runs(rows.first, rest.shape[2], size):
            if whole:
                q = rows.q[:, :, some]
                cross = by_heads(q, products[:, whole - 1].transpose(1, 2))
                dim = q.shape[-1]
                spread = (q * cross[..., -dim:]).sum(-1, keepdim=True)
                out[:, :, some] += excess[:, :, some] * cross[..., :-dim] / spread.clamp(min=1e-20)
        return out

    return added


def clusters(k: torch.Tensor, count: int) -> torch.Tensor:
    """Which of ``count`` clusters each key ``[Hkv, N, D]`` is in, int64 ``[Hkv, N]``: some rounds of Lloyd's."""
    centres = k[:, :: max(1, k.shape[1] // count)][:, :count].clone()
    which = torch.zeros(k.shape[:2], dtype=torch.int64, device=k.device)
    for _ in range(ROUNDS):
        which = (2 * k @ centres.transpose(1, 2) - centres.square().sum(-1)[:, None]).argmax(-1)
        one = torch.nn.functional.one_hot(which, centres.shape[1]).to(k.dtype).transpose(1, 2)
        size = one.sum(-1, keepdim=True)
        centres = torch.where(size > 0, one @ k / size.clamp(min=1), centres)
    return which


def clustered(layer: Layer) -> Added:
    """Means by clusters of keys, as many as there would be blocks of 64, over the full groups of 128 that a row sees.

    Which cluster a key is in, one byte, comes from all keys of the text, later ones too: that flatters it. A cluster
    of which a row sees no full group's key has the mean of all, and without a full group there is one mean.
    """
    count = max(1, layer.k.shape[1] // CLUSTER)
    one = torch.nn.functional.one_hot(clusters(layer.k, count), count).to(layer.k.dtype)
    n = layer.k.shape[1] // GROUP * GROUP
    by_group, values = (x[:, :n].unflatten(1, (-1, GROUP)) for x in (one, layer.v))
    sums = (by_group.transpose(-1, -2) @ values).cumsum(1)
    sizes, early = by_group.sum(2).cumsum(1), running(layer.v)

    def added(rows: Rows, rest: torch.Tensor) -> torch.Tensor:
        masses = by_heads(rest, one[:, : rest.shape[-1]])
        last = early[:, None, rows.first : rows.first + rest.shape[2]]
        out = masses.sum(-1, keepdim=True) * last
        for some, whole in runs(rows.first, rest.shape[2], GROUP):
            if whole:
                total, size = sums[:, whole - 1], sizes[:, whole - 1, :, None]
                mean = total.sum(1, keepdim=True) / size.sum(1, keepdim=True)
                means = torch.where(size > 0, total / size.clamp(min=1), mean)
                out[:, :, some] = by_heads(masses[:, :, some], means)
        return out

    return added


def of_rest(size: int, slope: bool, rows: Rows, choice: Choice, rest: torch.Tensor) -> torch.Tensor:
    """Weights ``[Hkv, G, m, n]`` of all values that stand for ``rest``: even in each block's keys that are not kept.

    A mean over the keys that are left out, where ``blocks`` takes that of all: kept values are read, so they can be
    taken out of a block's sum. With a slope, weights within blocks are affine in the score, one slope for all blocks.
    """
    n, short = rest.shape[-1], -rest.shape[-1] % size
    left = (~choice.selected & rows.visible).to(rest.dtype)

    def sums(x: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(x, (0, short)) if short else x
        return whole.unflatten(-1, (-1, size)).sum(-1)

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(size, -1)[..., :n]

    count = sums(left).clamp(min=1)
    weights = spread(sums(rest) / count).mul_(left)
    if slope:
        away = (rows.scores - spread(sums(rows.scores * left) / count)).mul_(left)
        square, excess = (x.sum(-1, keepdim=True) for x in (away.square(), rest * away))
        weights += away * (excess / square.clamp(min=1e-20))
    return weights


#: those with exact masses that the package does not have, by name
KINDS: dict[str, Callable[[Layer], Added]] = {
    "recent": recent,
    **{f"block {size}": partial(blocks, size) for size in (16, 32, 64, 128)},
    "block 64 + slope": partial(sloped, 64),
    "weighted 64": partial(weighted, 64),
    "clusters": clustered,
}
#: the same of the keys that are not kept alone, as the package's kinds are
REST: dict[str, Callable[[Rows, Choice, torch.Tensor], torch.Tensor]] = {
    "block 16 of the rest": partial(of_rest, 16, False),
    "block 64 of the rest": partial(of_rest, 64, False),
    "block 64 + slope of the rest": partial(of_rest, 64, True),
}
PACKAGE = ("mean", "linear")
#: in the order of tables
EVERY = ("none", "mean", *KINDS, *REST, "linear")


class Along(NamedTuple):
    """Sums over the keys of full groups that each of m rows sees, along its query; 0 where there is none."""

    #: how many keys, ``[m, 1]``
    many: torch.Tensor
    #: of scores and their squares, ``[Hkv, G, m, 1]``
    total: torch.Tensor
    second: torch.Tensor
    #: of values, and of values times scores, ``[Hkv, G, m, Dv]``
    values: torch.Tensor
    cross: torch.Tensor


def along(layer: Layer) -> Callable[[Rows], Along]:
    """Those sums from moments alone, as a decode step has them; ``completed_weights`` makes them of the scores."""
    dim, n = layer.k.shape[-1], layer.k.shape[1] // GROUP * GROUP
    both, keys = (x[:, :n].unflatten(1, (-1, GROUP)) for x in (torch.cat([layer.v, layer.k], -1), layer.k))
    products, sums = (both.transpose(-1, -2) @ keys).cumsum(1), both.sum(2).cumsum(1)

    def of(rows: Rows) -> Along:
        shape = rows.q.shape[:3]
        total, second = (torch.zeros(*shape, 1, device=rows.q.device) for _ in range(2))
        values, cross = (torch.zeros(*shape, layer.v.shape[-1], device=rows.q.device) for _ in range(2))
        for some, whole in runs(rows.first, shape[2], GROUP):
            if whole:
                q, added = rows.q[:, :, some], sums[:, whole - 1, None, None]
                product = by_heads(q, products[:, whole - 1].transpose(1, 2))
                total[:, :, some] = (q * added[..., -dim:]).sum(-1, keepdim=True)
                second[:, :, some] = (q * product[..., -dim:]).sum(-1, keepdim=True)
                values[:, :, some], cross[:, :, some] = added[..., :-dim], product[..., :-dim]
        many = (rows.seen // GROUP * GROUP).to(rows.q.device)[:, None]
        return Along(many, total, second, values, cross)

    return of


# The ways, and a model that attends by one of them.


class Parts(NamedTuple):
    """Output is (weights @ values + added) / below."""

    #: ``[Hkv, G, m, n]``
    weights: torch.Tensor
    added: torch.Tensor | float
    below: torch.Tensor | float


Finish = Callable[[Rows, Choice], Parts]


def powers(rows: Rows, choice: Choice, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights of all keys, none above the best kept one's, which is 1; the best kept score)."""
    top = torch.where(choice.selected, rows.scores, -torch.inf).amax(-1, keepdim=True)
    return (rows.scores - top).clamp_(max=0).mul_(scale).exp_(), top


def finishing(layer: Layer, kind: str) -> Finish:
    """What is made of scores and choice: ``kind`` is one of EVERY, ``"own mass"`` or ``"SparQ"``."""
    logits, scale = Logits(layer.scale), layer.scale

    def none(rows: Rows, choice: Choice) -> Parts:
        kept = powers(rows, choice, scale)[0].mul_(choice.selected)
        return Parts(kept, 0.0, kept.sum(-1, keepdim=True))

    def packaged(rows: Rows, choice: Choice) -> Parts:
        seen = rows.seen.to(rows.q.device)[None, None]
        scores, selected = (x.flatten(0, 1)[None] for x in (rows.scores, choice.selected))
        ends = Seen(torch.zeros_like(seen), seen)
        weights = completed_weights(scores, selected, rows.visible, ends, logits, kind)[0]
        # Who sees no complete group gets what there is without completion.
        return Parts(weights.unflatten(0, rows.scores.shape[:2]), 0.0, 1.0)

    def in_place(added: Added, rows: Rows, choice: Choice) -> Parts:
        rest = powers(rows, choice, scale)[0]
        total, kept = rest.sum(-1, keepdim=True), rest * choice.selected
        return Parts(kept, added(rows, rest.sub_(kept)), total)

    def of_the_rest(kind: Callable[[Rows, Choice, torch.Tensor], torch.Tensor], rows: Rows, choice: Choice) -> Parts:
        rest = powers(rows, choice, scale)[0]
        total, kept = rest.sum(-1, keepdim=True), rest * choice.selected
        return Parts(kept.add_(kind(rows, choice, rest.sub_(kept))), 0.0, total)

    def own(sums: Callable[[Rows], Along], rows: Rows, choice: Choice) -> Parts:
        kept, top = powers(rows, choice, scale)
        kept.mul_(choice.selected)
        near = rows.scores if choice.near is None else choice.near
        of = sums(rows)
        counted = choice.selected & (torch.arange(kept.shape[-1], device=kept.device) < of.many)
        taken = rows.scores * counted
        many = of.many - counted.sum(-1, keepdim=True)
        total = of.total - taken.sum(-1, keepdim=True)
        mean = total / many.clamp(min=1)
        spread = of.second - taken.mul_(rows.scores).sum(-1, keepdim=True) - total * mean
        rest = (near - top).clamp_(max=0).mul_(scale).exp_().masked_fill_(choice.selected | (many == 0), 0.0)
        mass = rest.sum(-1, keepdim=True)
        excess = rest.mul_(near - mean).sum(-1, keepdim=True)
        sloped = spread > of.second * LEAST_SPREAD
        beta = torch.where(sloped, excess / torch.where(sloped, spread, 1.0), 0.0)
        alpha = mass / many.clamp(min=1) - beta * mean
        below = kept.sum(-1, keepdim=True) + mass
        # What is kept is taken out of the sums over all.
        kept -= torch.where(counted, alpha + beta * rows.scores, 0.0)
        return Parts(kept, alpha * of.values + beta * of.cross, below)

    def sparq(means: torch.Tensor, rows: Rows, choice: Choice) -> Parts:
        kept = powers(rows, choice, scale)[0].mul_(choice.selected)
        near = rows.scores if choice.near is None else choice.near
        share = (near * scale).softmax(-1).mul_(choice.selected).sum(-1, keepdim=True).clamp(min=1e-6)
        below = kept.sum(-1, keepdim=True) / share
        mean = means[:, None, rows.first : rows.first + kept.shape[2]]
        return Parts(kept, (1 - share) * mean * below, below)

    if kind in PACKAGE:
        return packaged
    if kind in KINDS:
        return partial(in_place, KINDS[kind](layer))
    if kind in REST:
        return partial(of_the_rest, REST[kind])
    if kind == "own mass":
        return partial(own, along(layer))
    return partial(sparq, running(layer.v)) if kind == "SparQ" else none


@dataclass(frozen=True)
class Way:
    """One way to attend.

    ``select`` None keeps every key. ``stored``: keys and values come from 8-bit codes, as decoding token by token reads
    them (``rivals.streaming``): a query sees full groups of 128 quantised, the group that is not full as it is.
    """

    select: Selection | None = None
    complete: str = "none"
    stored: bool = False


class Tally:
    """How many keys were kept, where only the selection knows."""

    def __init__(self) -> None:
        self.kept: torch.Tensor | None = None
        self.rows = 0

    def add(self, choice: Choice) -> None:
        if choice.kept is not None:
            total = choice.kept.sum().double()
            self.kept = total if self.kept is None else self.kept + total
            self.rows += choice.kept.numel()

    @property
    def mean(self) -> float | None:
        return None if self.kept is None else float(self.kept) / self.rows


def attend(layer: Layer, way: Way, tally: Tally | None = None) -> torch.Tensor:
    """Output ``[Hkv, G, M, Dv]``, by chunks of queries."""
    (heads, group, m, dim), n = layer.q.shape, layer.k.shape[1]
    full = layer
    if way.stored:
        scheme = of_format(FORMATS["int8"], dim)
        keys, values = scheme.keys(layer.k[None])[0], scheme.values(layer.v[None])[0]
        layer = layer._replace(k=keys, v=values)
    select = None if way.select is None else way.select.prepare(layer)
    finish = finishing(layer, way.complete)
    out = torch.empty(heads, group, m, layer.v.shape[-1], dtype=layer.v.dtype, device=layer.v.device)
    at_once = max(16, ELEMENTS["cuda" if layer.q.is_cuda else "cpu"] // (heads * group * n))
    # Chunks of whole groups leave nothing to pad.
    at_once = at_once // GROUP * GROUP or at_once
    for start in range(0, m, at_once):
        stop = min(start + at_once, m)
        first = n - m + start
        rows = _scored(layer, full if way.stored else None, start, stop)
        if select is None:
            parts = Parts(rows.scores.mul_(layer.scale).softmax(-1), 0.0, 1.0)
        else:
            choice = select(rows)
            if tally is not None:
                tally.add(choice)
            parts = finish(rows, choice)
        sums = by_heads(parts.weights, layer.v[:, : n - m + stop])
        if way.stored:
            for some, whole in runs(first, stop - start, GROUP):
                tokens = slice(whole * GROUP, min((whole + 1) * GROUP, n - m + stop))
                sums[:, :, some] += by_heads(
                    parts.weights[:, :, some, tokens], full.v[:, tokens] - layer.v[:, tokens]
                )  # fmt: skip
        out[:, :, start:stop] = (sums + parts.added) / parts.below
    return out


def _scored(layer: Layer, full: Layer | None, start: int, stop: int) -> Rows:
    """A chunk of queries; of a quantised layer, those keys as they are that are not in a full group yet."""
    before = layer.k.shape[1] - layer.q.shape[2]
    q, n = layer.q[:, :, start:stop], before + stop
    scores = by_heads(q, layer.k[:, :n].transpose(1, 2))
    if full is not None:
        for some, whole in runs(before + start, stop - start, GROUP):
            tokens = slice(whole * GROUP, min((whole + 1) * GROUP, n))
            scores[:, :, some, tokens] = by_heads(q[:, :, some], full.k[:, tokens].transpose(1, 2))
    rows = Rows(q, scores, before + start)
    # Only the newest keys are hidden from some of these queries.
    corner = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1)
    scores[..., before + start :].masked_fill_(corner, LOW)
    return rows


def local(layer: Layer, window: int) -> torch.Tensor:
    """Dense attention to the newest ``window`` keys, ``[Hkv, G, M, Dv]``."""
    m, n = layer.q.shape[2], layer.k.shape[1]
    out = torch.empty(*layer.q.shape[:3], layer.v.shape[-1], dtype=layer.v.dtype, device=layer.v.device)
    for start in range(0, m, window):
        stop = min(start + window, m)
        first, end = max(0, n - m + start - window + 1), n - m + stop
        scores = by_heads(layer.q[:, :, start:stop], layer.k[:, first:end].transpose(1, 2)).mul_(layer.scale)
        at = torch.arange(n - m + start, end, device=scores.device)[:, None]
        place = torch.arange(first, end, device=scores.device)
        scores.masked_fill_((place > at) | (place <= at - window), -torch.inf)
        out[:, :, start:stop] = by_heads(scores.softmax(-1), layer.v[:, first:end])
    return out


_running: list[tuple[Way, Tally]] = []


def _forward(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    if query.shape[0] != 1 or softcap is not None:
        raise ValueError(f"batch={query.shape[0]}, softcap={softcap}: allowed is one sequence, and no soft cap")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = Layer(query[0].unflatten(0, (key.shape[1], -1)), key[0], value[0], scale)
    out = attend(layer, *_running[-1]) if sliding_window is None else local(layer, sliding_window)
    return out.flatten(0, 1).transpose(0, 1)[None].contiguous(), None


register(NAME, _forward)
# Which keys a query sees follows from positions; a mask would be as large as the scores.
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


@contextmanager
def attending_by(model: Any, way: Way) -> Iterator[Tally]:
    """Inside, every layer of ``model`` without a window attends this way."""
    tally = Tally()
    _running.append((way, tally))
    try:
        with attending(model, NAME):
            yield tally
    finally:
        _running.pop()
