"""What stands in place of the values that a selection leaves out, beside what the package does.

Of the weights ``rest`` of the keys that are not kept, the sum over them of weights times stand-ins; or, of the keys
that are not kept alone, weights of all values. Layouts are those of ``choosing_keys.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from qaxis.storage.moments import GROUP

from .choosing_keys import Choice, Layer, Rows, by_heads, runs

CLUSTER, ROUNDS, RECENT = 64, 5, 256

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
