"""Attention of a token, or of a few, by the certified decode step, over what a cache keeps in place.

What changes with a token lies in device memory (``qaxis/decode/rows.py``), so a captured step serves a growing cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..attention.logits import Logits
from ..budget import Budget
from ..storage.clock import Clock
from ..storage.key_index import KeyIndex
from ..storage.lazy import tensor_of
from ..storage.shared import Shared
from .holding import HOLDER
from .masks import Shown
from .settings import Settings

#: queries of a call that are steps, one after the other: so many that drafted tokens are judged by the bits that decode
MOST_QUERIES = 16
#: places that a step without a cache of ours is made for at least, and a multiple of: fewer would be made more often
PLACES = 4096
#: in a cache's work space, while a step is captured: what was written before is not in the graph
_CAPTURE = "capture"


class Attended(NamedTuple):
    """Output ``[B, H, M, Dv]``, indices int64 ``[B, H, M, K]`` padded with -1, what ran, and why nothing faster did."""

    output: torch.Tensor
    indices: torch.Tensor
    engine: str
    reason: str
    #: what index the first of the keys has: of a window's buffer some places may lie before it
    first: int = 0


@dataclass
class _Rows:
    """Rows of the steps of one kind of layer, and for which state of the cache they were written."""

    tensor: torch.Tensor
    table: torch.Tensor
    written: Any = None


class _Local(threading.local):
    """Work space of one thread, for calls without a cache of ours."""

    def __init__(self) -> None:
        self.shared: dict[torch.device, Shared] = {}


_local = _Local()


@dataclass(frozen=True)
class _Kept:
    """Keys, values and their index, as a step reads them, and where they lie."""

    keys: Any
    values: Any
    index: KeyIndex
    shared: Shared
    clock: Clock
    room: int
    window: int
    reason: str


def forget_rows(shared: Shared) -> None:
    """What rows hold was changed, by replays of a captured step, without being written here."""
    for x in shared.workspace.values():
        if isinstance(x, _Rows):
            x.written = None


@contextmanager
def capturing(shared: Shared, graph: object) -> Iterator[None]:
    """Inside, rows are written into ``graph``, with the pads of ``shared``."""
    shared.workspace[_CAPTURE] = graph
    try:
        yield
    finally:
        shared.workspace[_CAPTURE] = None
        forget_rows(shared)


def _kept(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Kept:
    kept: Any = getattr(k, HOLDER, None)
    same = kept is not None and getattr(v, HOLDER, None) is kept
    if same:
        keys, values, index = kept.operands()
        return _Kept(keys, values, index, kept.shared, kept.clock, kept.room, kept.window, kept.reason)
    k, v, n = tensor_of("key", k), tensor_of("value", v), k.shape[2]
    shared = _local.shared.setdefault(q.device, Shared(q.device))
    shared.clock.move_to(n)
    # Of another room the work space would not be used again.
    room = -(-n // PLACES) * PLACES
    if shared.workspace.setdefault("room", room) != room:
        shared.workspace.clear()
        shared.workspace["room"] = room
    # Triton exists for Linux only: without a GPU nothing here needs it.
    from ..decode import index_keys

    why = "keys do not lie in a qaxis.Cache: their index is made anew for every token"
    return _Kept(k, v, index_keys(k), shared, shared.clock, room, 0, why)


def _decoder(q: torch.Tensor, kept: _Kept, budget: Budget, triton: bool) -> Any:
    """The decoder, or with ``triton`` its Triton step alone, of such queries."""
    shape = (q.shape[0], q.shape[1], kept.room, q.shape[3], budget.k_eff(kept.room))
    key = (kept.room, "triton" if triton else "decoder", q.dtype, q.device, *shape)
    if key not in kept.shared.workspace:
        from ..decode import Decoder
        from ..decode.triton_step import TritonStep

        kept.shared.workspace[key] = (TritonStep if triton else Decoder)(*shape, q.device)
    return kept.shared.workspace[key]


def _rows(batch: int, kept: _Kept, shown: Shown, budget: Budget, before: int) -> torch.Tensor:
    """Rows of queries that stand ``before`` tokens before the newest."""
    space, pads = kept.shared.workspace, shown.pads
    window = kept.window or shown.window or 0
    if pads is None and space.get(_CAPTURE) is not None:
        pads = kept.shared.pads
    key = (kept.room, _Rows, kept.clock.tensor.device, batch, budget, window, kept.window > 0, before)
    if key not in space:
        device = kept.clock.tensor.device
        table = budget.table(kept.room, device).int()
        space[key] = _Rows(torch.zeros(batch, 4, dtype=torch.int32, device=device), table)
    rows = space[key]
    state = (kept.clock.at, None if pads is None else id(pads), space.get(_CAPTURE))
    if rows.written is None or rows.written[:3] != state:
        clock = kept.clock.tensor if before == 0 else kept.clock.tensor - before
        places = kept.room if kept.window else 0
        from ..decode.rows import write_rows

        # A layer with a window counts all tokens that it ever saw, padding too.
        first = pads + shown.offset if pads is not None and places and pads is shown.pads else pads
        write_rows(rows.tensor, clock, rows.table, pads=first, window=window, places=places)
        # The pads are kept, so that no other tensor has their id.
        rows.written = (*state, pads)
    return rows.tensor


def refusal(q: torch.Tensor, k: torch.Tensor, shown: Shown | None, settings: Settings) -> str:
    """Why these queries cannot be steps; empty if they can."""
    if settings.budget is None:
        return "the layer is dense"
    if settings.backend == "reference":
        return "backend='reference'"
    if q.device.type == "cpu" and settings.backend == "auto":
        return "there is no GPU"
    if q.shape[2] > MOST_QUERIES:
        return f"{q.shape[2]} queries"
    if shown is None:
        return "the mask is no range of keys"
    kept = getattr(k, HOLDER, None)
    if q.shape[2] > 1 and kept is not None and (kept.window or kept.quantised):
        return "several queries over a window or an 8-bit cache"
    return ""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown, logits: Logits, settings: Settings
) -> Attended:
    """One step a query, of what :func:`refusal` does not refuse."""
    budget = settings.budget
    assert budget is not None
    kept, m, one = _kept(q, k, v), q.shape[2], q[:, :, :1]
    if settings.backend == "triton":
        step, engine, reason = _decoder(q, kept, budget, True), "triton", "backend='triton'"
    else:
        step = _decoder(q, kept, budget, False)
        engine, reason = step.engine(one, kept.keys, kept.values, kept.index, settings.always, logits)
    done = []
    for i in range(m):
        rows = _rows(q.shape[0], kept, shown, budget, m - 1 - i)
        query = q[:, :, i : i + 1]
        done.append(step.run(query, kept.keys, kept.values, kept.index, rows, logits, settings.always))
    why = "; ".join(x for x in (reason, kept.reason) if x)
    first = kept.keys.shape[2] - k.shape[2] if kept.window else 0
    if m == 1:
        return Attended(done[0].output, done[0].indices, engine, why, first)
    output, indices = (torch.cat([getattr(x, name) for x in done], 2) for name in ("output", "indices"))
    return Attended(output, indices, engine, why)
