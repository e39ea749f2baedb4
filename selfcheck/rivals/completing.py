"""Attention of a model by other ways: a selection of keys, and what stands in place of the values that it leaves out.

Selections are in ``choosing_keys.py``. Of completions, ``"none"``, ``"mean"`` and ``"linear"`` are the package's
(``qaxis.attention.completion``); the others are for comparison alone (``standing_in.py``, and here what needs no exact
score of a key that is not kept). All of it is matrix products in float32, and nothing is canonical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AttentionMaskInterface

from qaxis.attention.completion import LEAST_SPREAD, Seen, completed_weights
from qaxis.attention.logits import Logits
from qaxis.storage.formats import FORMATS
from qaxis.storage.moments import GROUP

from .attending import attending, register
from .choosing_keys import LOW, Choice, Layer, Rows, Selection, by_heads, runs
from .schemes import of_format
from .standing_in import KINDS, PACKAGE, REST, Added, running

NAME = "selfcheck_completing"
#: scores of a chunk of queries, all heads together
ELEMENTS = {"cuda": 1 << 26, "cpu": 1 << 22}


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
