"""The selection of select.cu, where it runs; elsewhere the Triton kernels do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..arithmetic.reference import rounded_up
from ..cuda.compiler import ELEMENTS, SHARED_LIMIT, compiled, in_16_bytes, readable, runs_on, units
from .plan import MOST_HEADS, SPAN, Frame, Part

SOURCE = Path(__file__).with_name("select.cu")
#: keys of a row whose bits still fit into shared memory
MOST_KEYS = 1 << 20
#: bytes of shared memory of a multiprocessor, and those that every program takes beside its own
SHARED, SHARED_OF_PROGRAM = 228 * 1024, 1024
#: keys that the list has its capacity for: more have more keys within an error of the cut
KEYS_A_CAPACITY = 32768


class Selector(NamedTuple):
    """How select.cu is launched."""

    kernel: Any
    #: 1024s of keys that a row has room for
    spans: int
    #: of a program, and of a row
    warps: int
    team: int
    #: bytes of shared memory
    shared: int
    #: keys that a list has room for
    capacity: int


class Shape(NamedTuple):
    """How rows share a multiprocessor."""

    warps: int
    team: int
    shared: int
    #: whether scores stay in global memory
    in_global: bool


def shape_of(spans: int, capacity: int, wanted: int) -> Shape:
    """So that ``wanted`` warps are on a multiprocessor, if rows of ``spans`` leave as many."""
    beside = capacity * 8 + 16 + 16
    each = spans * 2176 + beside
    rows = SHARED // (4 * each + SHARED_OF_PROGRAM) * 4
    if rows >= wanted:
        return Shape(4, 1, 4 * each, False)
    in_global = each + 16 * 16 > SHARED_LIMIT
    if in_global:
        each = spans * 128 + beside
    # Reading scores anew, a row waits for memory: eight warps at least.
    rows, team = SHARED // (each + 16 * 16 + SHARED_OF_PROGRAM), 8 if in_global else 2
    while team < 16 and team * rows < wanted:
        team *= 2
    return Shape(team, team, each + team * 16, in_global)


def row_selector(part: Part, visible: int) -> Selector | None:
    """What selects for queries that see ``visible`` keys; None if that is left to Triton."""
    q, k, tuning, dim = part.q, part.k, part.plan.tuning, part.q.shape[3]
    if visible > MOST_KEYS or part.heads > MOST_HEADS or not 32 <= tuning.capacity <= 128:
        return None
    if not runs_on(q.device, (8, 0)) or not readable(in_16_bytes(q), (dim,), q, k):
        return None
    spans, many = -(-visible // SPAN), 1
    while many < 4 and many * KEYS_A_CAPACITY < visible:
        many *= 2
    capacity = tuning.capacity * many
    warps, team, shared, in_global = shape_of(spans, capacity, tuning.select_warps)
    kernel = compiled(
        SOURCE, "select_rows", SHARED_LIMIT, q.device,
        elem=ELEMENTS[q.dtype], dim=dim, group=part.plan.group, capacity=capacity, slack=tuning.listed * many,
        warps=warps, team=team, **{"global": int(in_global)},
    )  # fmt: skip
    return None if kernel is None else Selector(kernel, spans, warps, team, shared, capacity)


def select(part: Part, stretch: Frame, chunk: Frame) -> int | None:
    """Write the bits of every row and tell what a list has room for; None, and nothing done, if it does not run."""
    plan, b = part.plan, part.buffers
    # From the block of 256 keys on in which a row begins.
    selector = row_selector(part, min(rounded_up(chunk.visible, 256), plan.window + 256))
    if selector is None:
        return None
    kernel, spans, warps, team, shared, capacity = selector
    keys, each, rows = part.keys(chunk), in_16_bytes(part.q), warps // team
    pads = part.ranges.long if part.pads is None else part.pads
    kernel((-(-chunk.rows // rows), part.heads, 1), (32 * warps, 1, 1), [
        part.q, keys, part.ranges.norm, b.fast, *part.tables, pads, b.bits, b.band, b.missing, b.low, b.high, b.top,
        part.q.shape[1], chunk.start, chunk.rows, chunk.first, chunk.visible, int(part.pads is not None), chunk.origin,
        plan.window, *plan.always, stretch.rows, chunk.start - stretch.start, chunk.padded, stretch.words, plan.error,
        int(plan.causal), spans, *units(part.q, each), *units(keys, each),
    ], shared_mem=shared)  # fmt: skip
    return capacity
