"""Ways to attend by name, how many keys each keeps, and how many bytes a decode step of it reads.

Bytes that a decode step reads, a token and layer, mean over all positions n of the window (H query and Hkv KV heads,
head_dim D, values Dv, numbers of 2 bytes, sums of 4, a query head reading its own kept ones; those that the heads of a
group share are read once, Hkv in place of H)::

    dense          Hkv n (D + Dv) 2
    exact          Hkv n D 2 + H k Dv 2 + summary
    a rival        Hkv n share D 2 + H k (D + Dv) 2 + summary      (with exact masses: the exact line + its own scan)
    INT8           the same with 1 byte a number, and 1 byte a channel and group of 128
    summary        mean, recent, SparQ: Hkv Dv 4; linear: Hkv (Dv + D)(D + 1) 4; blocks of b: Hkv n/b Dv 2;
                   block 64 + slope: Hkv (n/64 (Dv + D) 2 + (Dv + D) D 4); clusters: Hkv n (Dv 2 / 64 + 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

import qaxis
from qaxis.validation import require

from .choosing_keys import RIVALS, Counts, Exact, Share, budgeted
from .completing import Way
from .standing_in import EVERY


class Shape(NamedTuple):
    """Of a model's attention."""

    heads: int
    kv_heads: int
    dim: int
    value_dim: int


def shape_of(model: Any) -> Shape:
    """Heads and their sizes."""
    config = model.config
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(heads, config.num_key_value_heads, dim, dim)


@dataclass(frozen=True)
class Plan:
    """One way, by name.

    ``budget``: ``("coverage", c)`` with at least 64 keys, ``("k", k)``, ``("tolerance", t)`` of the mass,
    ``("like", t)`` (the coverage with the mean k that tolerance t came to, on this article), ``("bytes", c)`` (as many
    keys as the bytes of exact, linear coverage c pay for, over the same storage) or ``("all", 0)``.
    """

    budget: tuple[str, float]
    complete: str = "none"
    rival: str = ""
    stored: bool = False

    @property
    def name(self) -> str:
        what, x = self.budget
        said = {
            "coverage": f"coverage {x:g}", "k": f"k = {x:g}", "tolerance": f"tolerance {x:g}", "all": "",
            "like": f"mean k of tolerance {x:g}", "bytes": f"bytes of coverage {x:g}",
        }[what]  # fmt: skip
        if what == "all":
            return "INT8" if self.stored else "dense"
        return ", ".join(filter(None, ("INT8" * self.stored, self.rival, said, self.complete)))

    @property
    def source(self) -> str:
        """The name of the plan whose mean k this one takes."""
        return Plan(("tolerance", self.budget[1]), self.complete).name

    def counts(self, shape: Shape, length: int, kept: float | None = None) -> Counts | None:
        """How many keys are kept; None where no table says so."""
        what, x = self.budget
        if what == "coverage":
            return budgeted(qaxis.Budget(x, 64))
        if what == "k":
            return budgeted(qaxis.Budget(0, int(x)))
        if what == "like":
            return share_of(kept, length)
        return same_bytes(self, shape, length) if what == "bytes" else None

    def way(self, shape: Shape, length: int, kept: float | None = None) -> Way:
        """``kept``: the mean k of :attr:`source`."""
        if self.budget[0] == "all":
            return Way(stored=self.stored)
        if self.budget[0] == "tolerance":
            return Way(Share(self.budget[1]), self.complete)
        rival: Any = RIVALS.get(self.rival, Exact)
        return Way(rival(self.counts(shape, length, kept)), self.complete, self.stored)


DENSE = Plan(("all", 0))


def share_of(kept: float | None, length: int) -> Counts:
    """That share of the keys, rounded up, of which a window of ``length`` keeps so many in the mean."""
    require(kept is not None, "kept", kept, "the mean k that a tolerance came to")
    seen, low, high = np.arange(1, length + 1), 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        low, high = (share, high) if np.ceil(share * seen).mean() < float(kept or 0) else (low, share)
    return lambda n: (n * high).ceil().long().clamp(min=1)


def summary(complete: str, shape: Shape, n: np.ndarray) -> np.ndarray:
    """Bytes of what a completion reads beside weights, of ``n`` keys."""
    dim, value = shape.dim, shape.value_dim
    if complete in ("linear", "own mass"):
        each = 4.0 * (value + dim) * (dim + 1) + 0 * n
    elif complete in ("mean", "recent", "SparQ"):
        each = 4.0 * value + 0 * n
    elif complete.startswith("block 64 + slope"):
        each = n / 64 * (value + dim) * 2 + 4.0 * (value + dim) * dim
    elif complete == "clusters":
        each = n * (value * 2 / 64 + 1)
    elif complete in EVERY and complete != "none":
        each = n / int(complete.split()[1]) * value * 2
    else:
        each = 0.0 * n
    return shape.kv_heads * each


def bytes_of(plan: Plan, shape: Shape, n: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Bytes read a token and layer (the formulas above) where ``k`` of ``n`` keys are kept."""
    heads, kv, dim, value = shape
    size = 1 if plan.stored else 2
    scales = kv * n / 128 * (dim + value) if plan.stored else 0 * n
    if plan.budget[0] == "all":
        return kv * n * (dim + value) * size + scales
    rest = scales + summary(plan.complete, shape, n)
    if not plan.rival:
        return kv * n * dim * size + heads * k * value * size + rest
    rival = RIVALS[plan.rival]
    scan = kv * n * rival.share * dim * size
    readers = kv if rival.by_groups else heads
    if plan.complete in ("none", "own mass", "SparQ"):
        return scan + readers * k * (dim + value) * size + rest
    return scan + kv * n * dim * size + readers * k * value * size + rest


def same_bytes(plan: Plan, shape: Shape, length: int) -> Counts:
    """As many keys of a rival, at least one, as read what exact, linear top k of that coverage and storage reads."""
    n = np.arange(1, length + 1)
    ours = Plan(("coverage", plan.budget[1]), "linear", stored=plan.stored)
    k = budgeted(qaxis.Budget(plan.budget[1], 64))(torch.from_numpy(n)).numpy()
    fixed, one = (bytes_of(plan, shape, n, x + 0 * n) for x in (0, 1))
    afford = np.floor((bytes_of(ours, shape, n, k) - fixed) / (one - fixed)).clip(1, n)
    table = torch.from_numpy(np.concatenate([[0], afford]).astype(np.int64))
    return lambda seen: table[seen]


def mean_bytes(plan: Plan, shape: Shape, length: int, kept: float | None) -> float:
    """Mean over the positions of a window; ``kept`` is the mean k where that is all that is known."""
    n = np.arange(1, length + 1)
    counts = None if plan.budget[0] in ("all", "tolerance") else plan.counts(shape, length, kept)
    k = counts(torch.from_numpy(n)).numpy() if counts else np.full(length, kept or 0.0)
    return float(bytes_of(plan, shape, n, k).mean())
