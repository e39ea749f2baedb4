"""The selection of select.cu, or None where it does not run and the Triton kernels do."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..cuda.compiler import ELEMENTS, SHARED_LIMIT, compiled, in_16_bytes, readable, runs_on, units
from .plan import MOST_HEADS, Chunk, Part

SOURCE = Path(__file__).with_name("select.cu")
#: keys whose scores a warp keeps in shared memory, so that three rows fit on a multiprocessor
MOST_KEYS = 32768


class Selector(NamedTuple):
    """How select.cu is launched."""

    kernel: Any
    #: 1024s of keys that a row has room for
    spans: int
    warps: int
    #: bytes of shared memory
    shared: int


def row_selector(part: Part, visible: int) -> Selector | None:
    """What selects for queries that see ``visible`` keys; None if that is left to Triton."""
    q, k, tuning, dim = part.q, part.k, part.plan.tuning, part.q.shape[3]
    if visible > MOST_KEYS or part.heads > MOST_HEADS or not 32 <= tuning.capacity <= 128:
        return None
    if not runs_on(q.device, (8, 0)) or not readable(in_16_bytes(q), (dim,), q, k):
        return None
    spans = -(-visible // 1024)
    # As in select.cu.
    each = spans * 2176 + tuning.capacity * 4 + 16
    warps = 4 if 12 * each <= SHARED_LIMIT else 1
    kernel = compiled(
        SOURCE, "select_rows", SHARED_LIMIT if warps == 1 else SHARED_LIMIT // 3 // 16 * 16, q.device,
        elem=ELEMENTS[q.dtype], dim=dim, group=part.plan.group, capacity=tuning.capacity, slack=tuning.listed,
        warps=warps,
    )  # fmt: skip
    return None if kernel is None else Selector(kernel, spans, warps, warps * each)


def select(part: Part, chunk: Chunk) -> int | None:
    """Write the bits of every row and tell how many words each has; None, and nothing done, if it does not run."""
    selector = row_selector(part, chunk.visible)
    if selector is None:
        return None
    kernel, spans, warps, shared = selector
    plan, b, each = part.plan, part.buffers, in_16_bytes(part.q)
    kernel((-(-chunk.rows // warps), part.heads, 1), (32 * warps, 1, 1), [
        part.q, part.k, part.norm, b.fast, *part.tables, b.bits, b.band, b.missing, b.low, b.high, b.top,
        part.q.shape[1], chunk.start, chunk.rows, chunk.first, plan.n, plan.padded, plan.error, int(plan.causal), spans,
        *units(part.q, each), *units(part.k, each),
    ], shared_mem=shared)  # fmt: skip
    return spans * 32
