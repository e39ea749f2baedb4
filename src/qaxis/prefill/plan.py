"""How a prefill is cut: into parts (heads in flight), chunks (queries at once) and buffers that are used again.

A row is one query of one head. Buffers hold the rows of one chunk of one part: memory is bounded whatever the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import next_power_of_two
from ..budget import Budget
from ..validation import is_integer, require

#: ends of tiles and of programs are 32-bit integers too: this leaves room for the last ones
MOST_KEYS = (1 << 31) - (1 << 16)
#: where the second dimension of a CUDA grid ends, which select.cu gives to the heads
MOST_HEADS = 65535
#: rows a program of prefill_wide_band_kernel looks at together
WIDE_ROWS = 64
#: keys that a row of scores is a multiple of, for loads of whole lines
_LINE = 256


@dataclass(frozen=True)
class PrefillTuning:
    """How the work is cut; no value changes which keys are selected.

    Raises:
        ValueError: naming the field, unless every one is an integer of at least 1, and sizes of tiles powers of two.
    """

    #: bytes that the rows in flight may take: more fill a GPU better where contexts are long
    memory: int = 4 << 30
    #: queries of a head in flight: more fill a GPU better and launch fewer kernels, for more memory
    chunk: int = 2048
    #: queries of a tile of scores: more use a loaded key more often, for registers
    queries: int = 128
    #: keys of a tile of scores: more make larger products, for registers and shared memory
    keys: int = 64
    #: tiles of keys that a program scores one after another: more load the queries less often, fewer balance better
    loop: int = 32
    #: tiles of keys on their way at a time: more hide latency, for shared memory
    stages: int = 4
    #: warps that share a tile of scores: more leave each lane fewer registers to fill, but have to wait for each other
    warps: int = 8
    #: scores that a program of prefill_cut_kernel keeps in registers: a longer row is read anew with every trial
    cut: int = 8192
    #: of them, scores a warp has: fewer need fewer registers, but more warps have to add up
    cut_elements: int = 1024
    #: scores that the first trial is guessed from: more guess better, and take longer
    sample: int = 256
    #: keys between the two sides of the Triton cut that end the search: more save trials, and are rescored one by one
    slack: int = 16
    #: the same in select.cu, which lists those keys and searches in the list: it may be longer
    listed: int = 100
    #: keys that a row's list has room for, 32 to 128 in select.cu: more take memory, fewer overflow more often
    capacity: int = 128
    #: keys of the band that are rescored at once: more overlap their loads, for registers
    band: int = 32
    #: programs that share the rows whose list overflowed: more run at once, each with a line of 4 bytes a key
    wide_programs: int = 512
    #: queries of a tile of attention: more use loaded keys and values more often, for registers
    attend_queries: int = 64
    #: keys of a tile of attention, 32 to 128: more make larger products, for registers and shared memory
    attend_keys: int = 64
    #: tiles of keys and values on their way at a time: more hide latency, for shared memory
    attend_stages: int = 3
    #: warps that share a tile of attention: more leave each lane fewer registers to fill, but wait for each other
    attend_warps: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            x = getattr(self, field.name)
            require(is_integer(x) and x >= 1, f"tuning.{field.name}", x, "an integer of at least 1")
            if field.name not in (
                "memory",
                "chunk",
                "loop",
                "stages",
                "attend_stages",
                "slack",
                "listed",
                "wide_programs",
            ):
                require(x & (x - 1) == 0, f"tuning.{field.name}", x, "a power of two")
        # A tile reads whole words of bits, and no further than the 128 keys that a row of bits is a multiple of.
        require(32 <= self.attend_keys <= 128, "tuning.attend_keys", self.attend_keys, "32, 64 or 128")
        require(self.cut >= 128, "tuning.cut", self.cut, "at least 128")


DEFAULT_TUNING = PrefillTuning()


class Chunk(NamedTuple):
    """Queries that are handled at once."""

    #: the first of them, and how many there are
    start: int
    rows: int
    #: position of the first among the keys, and how many keys the last one sees
    first: int
    visible: int


@dataclass(frozen=True)
class Plan:
    """Sizes of one prefill."""

    heads: int
    kv_heads: int
    m: int
    n: int
    dim: int
    causal: bool
    #: queries of a head in flight
    chunk: int
    #: KV heads in flight, of one batch or of whole ones
    kv_heads_at_once: int
    #: scores a row has room for, and words of bits
    padded: int
    words: int
    #: programs of prefill_wide_band_kernel
    wide_programs: int
    tuning: PrefillTuning

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Rows in flight."""
        return self.kv_heads_at_once * self.group * self.chunk

    @property
    def off(self) -> float:
        """Units of the 15-bit score between the fast score and the canonical, either way: half a unit is rounding."""
        return fast_scores.UNITS / 2 * fast_scores.rounding(self.dim) * 1.02 + 0.51

    @property
    def error(self) -> int:
        """Units between two keys that suffice to tell their canonical order."""
        return math.ceil(2 * self.off)

    def parts(self, batch: int) -> Iterator[tuple[slice, slice, slice]]:
        """Slices of batches, query heads and KV heads that are in flight together: whole batches, or of one."""
        batches, at_once = self.kv_heads_at_once // self.kv_heads, self.kv_heads_at_once
        if batches:
            for b in range(0, batch, batches):
                yield slice(b, b + batches), slice(None), slice(None)
            return
        for b in range(batch):
            for h in range(0, self.kv_heads, at_once):
                yield slice(b, b + 1), slice(h * self.group, (h + at_once) * self.group), slice(h, h + at_once)

    def chunks(self) -> Iterator[Chunk]:
        """Chunks of the queries, in order."""
        for start in range(0, self.m, self.chunk):
            rows, first = min(self.chunk, self.m - start), self.n - self.m + start
            yield Chunk(start, rows, first, min(self.n, first + rows) if self.causal else self.n)


def make_plan(
    shape: tuple[int, ...], kv_heads: int, n: int, *, causal: bool = True, tuning: PrefillTuning = DEFAULT_TUNING
) -> Plan:
    """Sizes for queries of ``shape [B, H, M, D]`` and ``n`` keys of ``kv_heads``.

    Chunks shrink, down to one tile of scores, until all heads fit into ``tuning.memory``; then fewer heads are in
    flight, then fewer queries still. One query of a KV head's group is the least.
    """
    batch, heads, m, dim = shape
    group, t = heads // kv_heads, tuning
    padded = round_up(n, _LINE)
    words = max(bit_words(n, cut_block(n, t)), round_up(n, 1024) // 32)
    most = max(1, min(t.memory // bytes_a_row(padded, words, t), 1 << 30))
    chunk = min(m, t.chunk, max(t.queries, most // (batch * heads) // t.queries * t.queries))
    chunk = min(chunk, max(1, most // group))
    kv_heads_at_once = min(batch * kv_heads, max(1, min(most // chunk, MOST_HEADS) // group))
    # A quarter of the memory for lines; and no program without rows.
    lines = min(
        t.wide_programs, max(1, t.memory // 4 // (4 * padded)), -(-kv_heads_at_once * group * chunk // WIDE_ROWS)
    )
    return Plan(heads, kv_heads, m, n, dim, causal, chunk, kv_heads_at_once, padded, words, lines, tuning)


def round_up(n: int, multiple: int) -> int:
    """The next multiple."""
    return -(-n // multiple) * multiple


def cut_block(visible: int, tuning: PrefillTuning) -> int:
    """Scores that prefill_cut_kernel looks at together in rows that see ``visible`` keys."""
    return max(128, min(tuning.cut, next_power_of_two(visible)))


def bit_words(visible: int, block: int) -> int:
    """Words of bits of a row that sees ``visible`` keys, written ``block`` keys at a time."""
    return round_up(visible, block) // 32


def bytes_a_row(padded: int, words: int, tuning: PrefillTuning) -> int:
    """Bytes of :class:`Buffers` for one row: scores, bits, a list and its scores, five numbers."""
    return 2 * padded + 4 * words + 8 * tuning.capacity + 20


class Buffers:
    """What is written for the rows in flight, ``plan.rows`` of each; int32 but for the scores.

    At most ``tuning.memory`` bytes and, for ``line``, a quarter of that; or what one query of a KV head's group takes.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        rows, capacity = plan.rows, plan.tuning.capacity
        #: 15-bit scores
        self.fast = empty(rows, plan.padded, dtype=torch.uint16)
        #: a bit a key: selected or not
        self.bits = empty(rows * plan.words)
        #: keys of the band, and their canonical scores
        self.positions, self.listed = empty(rows, capacity), empty(rows, capacity)
        #: keys in the band, and how many of them are missing in the selection
        self.band, self.missing = empty(rows), empty(rows)
        #: 15-bit scores from which on a key is in the band, and from which on surely selected; the largest
        self.low, self.high, self.top = empty(rows), empty(rows), empty(rows)
        #: canonical scores of one row a program, where its band outgrew the list
        self.line = empty(plan.wide_programs, plan.padded)


class Tables(NamedTuple):
    """Of every number of visible keys, from 0 to n."""

    #: int32: keys that a query keeps
    k_eff: torch.Tensor
    #: float32: where normal scores would put the cut, in deviations above the mean
    quantile: torch.Tensor
    #: float32: how many deviations one key more moves it
    slope: torch.Tensor


@lru_cache(maxsize=64)
def tables(budget: Budget, n: int, device: str) -> Tables:
    """The tables on ``device``."""
    k_eff = budget.table(n)
    seen = torch.arange(n + 1, device="cpu").clamp(min=1)
    share = (1 - k_eff.float() / seen.float()).clamp(1e-4, 1 - 1e-4).double()
    quantile = torch.special.ndtri(share)
    density = torch.exp(-quantile * quantile / 2) / (2 * torch.pi) ** 0.5
    return Tables(k_eff.int().to(device), quantile.float().to(device), (1 / (seen * density)).float().to(device))


@dataclass(frozen=True)
class Part:
    """Heads in flight, as views, and what is kept of them."""

    plan: Plan
    buffers: Buffers
    tables: Tables
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    #: float32 ``[B, Hkv]``: upper bound on the length of the keys
    norm: torch.Tensor
    out: torch.Tensor
    #: as in ``Prefill``
    bits: torch.Tensor | None
    band: torch.Tensor | None

    @property
    def heads(self) -> int:
        """Query heads, of all batches."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Of q, four, and k, three, as the kernels take them."""
        return (*self.q.stride(), *self.k.stride()[:3])

    def common(self, chunk: Chunk) -> tuple[int, int, int, int]:
        """What every kernel is told first: heads, group, first query and queries of the chunk."""
        return (self.q.shape[1], self.plan.group, chunk.start, chunk.rows)
