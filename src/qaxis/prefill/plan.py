"""How a prefill is cut: into parts (heads in flight), stretches, chunks and buffers that are used again.

A row is one query of one head. A stretch is the queries that are attended for at once, of whose selection a bit a key
is kept; a chunk is the queries of it whose scores, 16 times as large, are kept. Memory is bounded whatever the length.
Everything of a stretch counts keys from its ``origin``, before which none of its queries sees one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import next_power_of_two, rounded_up
from ..attention.always import NONE, Always
from ..attention.logits import Logits
from ..budget import Budget
from ..validation import is_integer, require

#: ends of tiles and of programs are 32-bit integers too: this leaves room for the last ones
MOST_KEYS = (1 << 31) - (1 << 16)
#: where the second dimension of a CUDA grid ends, which select.cu gives to the heads
MOST_HEADS = 65535
#: rows a program of prefill_wide_band_kernel looks at together
WIDE_ROWS = 64
#: keys that a row of scores is a multiple of, for loads of whole lines; and a row of bits
_LINE, SPAN = 256, 1024
#: of a query that may see all keys before it
NO_WINDOW = MOST_KEYS


@dataclass(frozen=True)
class PrefillTuning:
    """How the work is cut; no value changes which keys are selected.

    Raises:
        ValueError: naming the field, unless every one is an integer of at least 1, and sizes of tiles powers of two.
    """

    #: bytes that the rows in flight may take: more fill a GPU better where contexts are long
    memory: int = 4 << 30
    #: queries of a head in a stretch: more fill a GPU better and launch fewer kernels, for more memory
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
    #: scores that a warp of prefill_cut_kernel looks at together: more overlap their loads, for registers
    cut: int = 512
    #: keys of a row for each of which it gets one more warp: more warps finish a row sooner, but have to add up
    cut_keys: int = 16384
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
    #: programs that share the rows whose list overflowed: more run at once, each with lines of 8 bytes a key
    wide_programs: int = 512
    #: keys for each of which one may be long and is scored canonically for every row: more long ones cost more, but
    #: leave the others a narrower band
    keys_a_long: int = 64
    #: rows that a program scores long keys for: more use a loaded key more often, for registers
    long_rows: int = 64
    #: warps that select.cu is to have on a multiprocessor: where few rows fit, several warps share one
    select_warps: int = 12
    #: queries of a tile of attention: more use loaded keys and values more often, for registers
    attend_queries: int = 64
    #: keys of a tile of attention, 32 to 128: more make larger products, for registers and shared memory
    attend_keys: int = 64
    #: tiles of keys and values on their way at a time: more hide latency, for shared memory
    attend_stages: int = 3
    #: 2: tiles of attention of whose keys no query attends to any are left out; 1: all are looked at
    attend_skip: int = 1
    #: warps that share a tile of attention: more leave each lane fewer registers to fill, but wait for each other
    attend_warps: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            x = getattr(self, field.name)
            require(is_integer(x) and x >= 1, f"tuning.{field.name}", x, "an integer of at least 1")
            if field.name not in (
                "memory",
                "chunk",
                "keys_a_long",
                "select_warps",
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
        require(128 <= self.cut <= 4096, "tuning.cut", self.cut, "128 to 4096")


DEFAULT_TUNING = PrefillTuning()


class Frame(NamedTuple):
    """Queries that are handled at once, a stretch or a chunk of one; keys are counted from its origin."""

    #: the first of the queries, and how many there are
    start: int
    rows: int
    #: a multiple of 1024 before which none of them sees a key
    origin: int
    #: of the first query, among the keys from the origin on
    first: int
    #: how many of those the last one sees
    visible: int

    @property
    def padded(self) -> int:
        """Scores that a row has room for."""
        return rounded_up(self.visible, _LINE)

    @property
    def words(self) -> int:
        """Words of bits of a row."""
        return rounded_up(self.visible, SPAN) // 32


@dataclass(frozen=True)
class Plan:
    """Sizes of one prefill."""

    heads: int
    kv_heads: int
    m: int
    n: int
    dim: int
    causal: bool
    #: keys that a query sees at most
    window: int
    always: Always
    #: queries of a head that are attended for at once
    stretch: int
    #: of them, queries whose scores are kept, if they see as many keys as any
    chunk: int
    #: KV heads in flight, of one batch or of whole ones
    kv_heads_at_once: int
    #: scores a row has room for, and words of bits
    padded: int
    words: int
    #: keys of a head that may be long
    long: int
    #: programs of prefill_wide_band_kernel
    wide_programs: int
    tuning: PrefillTuning
    #: what is put back of the keys that are left out, of ``completion.KINDS``
    completion: str = "none"
    #: tokens before the first key, which a window dropped
    offset: int = 0

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def heads_at_once(self) -> int:
        """Query heads in flight, of all batches."""
        return self.kv_heads_at_once * self.group

    @property
    def off(self) -> float:
        """Units of the 15-bit score between the fast score and the canonical, either way: half a unit is rounding.

        Kernels add up the squares of a query in orders of their own, which moves a score by less than 0.03.
        """
        return fast_scores.UNITS / 2 * fast_scores.rounding(self.dim) * 1.02 + 0.53

    @property
    def of_product(self) -> float:
        """Bound on the distance of a product from the canonical score, of ``|q||k|``."""
        return fast_scores.rounding(self.dim) * 1.02

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

    def stretches(self) -> Iterator[Frame]:
        """Stretches of the queries, in order."""
        for start in range(0, self.m, self.stretch):
            rows, first = min(self.stretch, self.m - start), self.n - self.m + start
            origin = first + 1 if self.causal else self.n
            origin = max(0, origin - self.window) // SPAN * SPAN
            visible = (min(self.n, first + rows) if self.causal else self.n) - origin
            yield Frame(start, rows, origin, first - origin, visible)

    def chunks(self, stretch: Frame) -> Iterator[Frame]:
        """Chunks of a stretch, in order: of more queries where these see fewer keys."""
        tile = self.tuning.queries
        at_once = max(self.chunk, self.chunk * self.padded // stretch.padded // tile * tile)
        for offset in range(0, stretch.rows, at_once):
            rows, first = min(at_once, stretch.rows - offset), stretch.first + offset
            visible = min(stretch.visible, first + rows) if self.causal else stretch.visible
            yield Frame(stretch.start + offset, rows, stretch.origin, first, visible)


def make_plan(
    shape: tuple[int, ...], kv_heads: int, n: int, *, causal: bool = True, tuning: PrefillTuning = DEFAULT_TUNING,
    window: int = NO_WINDOW, always: Always = NONE, completion: str = "none", offset: int = 0,
) -> Plan:  # fmt: skip
    """Sizes for queries of ``shape [B, H, M, D]`` and ``n`` keys of ``kv_heads``.

    If a stretch of all heads does not fit into ``tuning.memory``, scores get half of it: chunks shrink, down to one
    tile of scores; then fewer heads are in flight, then fewer queries still. One query of a KV head's group is the
    least.
    """
    batch, heads, m, dim = shape
    group, t = heads // kv_heads, tuning
    widest = n if window >= n else min(n, window + min(m, t.chunk) + SPAN)
    padded, words = rounded_up(widest, _LINE), rounded_up(widest, SPAN) // 32
    scores, bits = bytes_of_scores(padded), bytes_of_bits(words, t)
    stretch = chunk = min(m, t.chunk)
    most = max(1, min(t.memory // (scores + bits), 1 << 30))
    kv_heads_at_once = batch * kv_heads
    if stretch * kv_heads_at_once * group > most:
        most = max(1, min(t.memory // (2 * scores), most))
        chunk = min(chunk, max(t.queries, most // (batch * heads) // t.queries * t.queries), max(1, most // group))
        kv_heads_at_once = _evenly(batch, kv_heads, min(kv_heads_at_once, max(1, most // (chunk * group))))
        chunk = max(chunk, min(m, t.chunk, most // (kv_heads_at_once * group)) // t.queries * t.queries)
        left = t.memory // (kv_heads_at_once * group) - chunk * scores
        # Fewer heads leave room for more of their queries.
        longest = min(m, t.chunk if window < n else 2 * t.chunk)
        stretch = max(chunk, min(longest, left // bits) // chunk * chunk)
        stretch = rounded_up(_part_of(m, stretch), chunk)
    kv_heads_at_once = min(kv_heads_at_once, max(1, MOST_HEADS // group))
    # An eighth of the memory for lines; and no program without rows.
    rows = kv_heads_at_once * group * stretch
    lines = max(1, min(t.wide_programs, t.memory // 8 // (8 * padded), -(-rows // WIDE_ROWS)))
    long = min(n - 1, max(16, n // t.keys_a_long))
    return Plan(
        heads, kv_heads, m, n, dim, causal, window, always, stretch, chunk, kv_heads_at_once, padded, words, long,
        lines, t, completion, offset,
    )  # fmt: skip


def tuning_for(batch: int, heads: int, m: int, n: int, room: int = 0) -> PrefillTuning:
    """What suits ``m`` queries of ``batch * heads`` heads that meet ``n`` keys, with little memory beside the cache.

    Up to 16384 keys, where a prompt is most of what waits for its first token, 2.25 GiB are taken at most; up to 32768
    half of it, and beyond a quarter. So it is by ``room`` if that is more: the places of a cache that is yet to fill.
    """
    longest = max(n, room)
    memory = (2 << 30) if longest <= 16384 else (1 << 30) if longest <= 32768 else (512 << 20)
    return replace(DEFAULT_TUNING, memory=min(memory, max(1 << 20, batch * heads * m * 3 * rounded_up(n, SPAN))))


def _evenly(batch: int, kv_heads: int, at_once: int) -> int:
    """KV heads in flight, ``at_once`` at most: whole batches, or of one, in parts that are as large as each other."""
    if at_once >= kv_heads:
        return kv_heads * _part_of(batch, at_once // kv_heads)
    return _part_of(kv_heads, at_once)


def _part_of(many: int, at_once: int) -> int:
    """The least number that goes as often into ``many``, rounded up, as ``at_once`` does."""
    return -(-many // -(-many // at_once))


def cut_warps(visible: int, tuning: PrefillTuning) -> int:
    """Warps of prefill_cut_kernel for rows that see ``visible`` keys."""
    return max(1, min(16, next_power_of_two(visible) // tuning.cut_keys))


def bytes_of_scores(padded: int) -> int:
    """Bytes of :class:`Buffers` for the scores of one row."""
    return 2 * padded


def bytes_of_bits(words: int, tuning: PrefillTuning) -> int:
    """Bytes of :class:`Buffers` for what else is kept of one row: bits, a list and its scores, six numbers."""
    return 4 * words + 8 * tuning.capacity + 24


class Buffers:
    """What is written for the rows in flight; int32 but for scores.

    At most ``tuning.memory`` bytes and, for ``line``, an eighth of that; or what one query of a KV head's group takes.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        heads, capacity = plan.heads_at_once, plan.tuning.capacity
        rows = heads * plan.stretch
        #: 15-bit scores of a chunk
        self.fast = empty(heads * plan.chunk * plan.padded, dtype=torch.uint16)
        #: of a stretch a bit a key: selected or not
        self.bits = empty(rows * plan.words)
        #: of its rows the largest 15-bit score, and the largest canonical score of a long key
        self.top, self.long_top = empty(rows), empty(rows, dtype=torch.float32)
        #: keys of the band, and their canonical scores
        self.positions, self.listed = empty(rows, capacity), empty(rows, capacity)
        #: keys in the band, and how many of them are missing in the selection
        self.band, self.missing = empty(rows), empty(rows)
        #: 15-bit scores from which on a key is in the band, and from which on surely selected
        self.low, self.high = empty(rows), empty(rows)
        #: keys and canonical scores of one row a program, where its band outgrew the list
        self.line = empty(plan.wide_programs, 2, plan.padded)


class Tables(NamedTuple):
    """Of every number of visible keys, from 0 to n."""

    #: int32: keys that a query keeps beside those it always keeps
    k_eff: torch.Tensor
    #: float32: where normal scores would put the cut, in deviations above the mean
    quantile: torch.Tensor
    #: float32: how many deviations one key more moves it
    slope: torch.Tensor


def tables(budget: Budget, n: int, device: str, always: Always = NONE) -> Tables:
    """The tables on ``device``, for ``n`` keys at least."""
    # By powers of two: a cache that grows must not make one for each length.
    return _tables(budget, (1 << n.bit_length()) - 1, device, always)


@lru_cache(maxsize=64)
def _tables(budget: Budget, n: int, device: str, always: Always) -> Tables:
    seen = torch.arange(n + 1, device="cpu")
    kept = seen.clamp(max=always.sinks + always.recent)
    k_eff, seen = (budget.table(n) - kept).clamp(min=0), (seen - kept).clamp(min=1)
    share = (1 - k_eff.float() / seen.float()).clamp(1e-4, 1 - 1e-4).double()
    quantile = torch.special.ndtri(share)
    density = torch.exp(-quantile * quantile / 2) / (2 * torch.pi) ** 0.5
    return Tables(k_eff.int().to(device), quantile.float().to(device), (1 / (seen * density)).float().to(device))


class Ranges(NamedTuple):
    """Of every KV head: what its scores' range comes from, and the keys that are longer."""

    #: float32 ``[B, Hkv]``: upper bound on the length of all keys but the long ones; 0 if too small to be told
    norm: torch.Tensor
    #: float32 ``[B, Hkv]``: upper bound on the length of all keys
    largest: torch.Tensor
    #: int64 ``[B, Hkv, L]``: the longest keys, of which the first ``[B, Hkv]`` are long
    longest: torch.Tensor
    long: torch.Tensor


@dataclass(frozen=True)
class Part:
    """Heads in flight, as views, and what is kept of them."""

    plan: Plan
    buffers: Buffers
    tables: Tables
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    ranges: Ranges
    #: int32 ``[B]``, or None: first keys that are not seen
    pads: torch.Tensor | None
    logits: Logits
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

    def keys(self, frame: Frame) -> torch.Tensor:
        """The keys from the origin on."""
        return self.k[:, :, frame.origin :]

    def seen(self, frame: Frame) -> tuple[Any, ...]:
        """What Triton kernels are told of who sees what: first query, end of the keys, pads, origin, window."""
        pads = self.ranges.long if self.pads is None else self.pads
        return (frame.first, frame.visible, pads, frame.origin, self.plan.window)

    def common(self, frame: Frame) -> tuple[int, int, int, int]:
        """What every kernel is told first: heads, group, first query and queries of the frame."""
        return (self.q.shape[1], self.plan.group, frame.start, frame.rows)
