"""Attention of a token, or of a few, by the certified decode step, over what a cache keeps in place.

What changes with a token lies in device memory (``qaxis/decode/rows.py``), so a captured step serves a growing cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..attention.logits import Logits
from ..attention.selection import indices_to_mask
from ..budget import Budget
from ..storage.clock import Clock
from ..storage.in_place import KeyValues
from ..storage.key_index import KeyIndex
from ..storage.lazy import tensor_of
from ..storage.moments import GROUP
from ..storage.shared import Shared
from . import masked
from .attended import DENSE, NO_GPU, NO_RANGE, REFERENCE, TOLERANCE, Attended, Refusal
from .holding import HOLDER
from .masks import Shown
from .settings import Settings

#: queries of a call that are steps, one after the other: so many that drafted tokens are judged by the bits that decode
MOST_QUERIES = 16
#: places that a step without a cache of ours is made for at least, and a multiple of: fewer would be made more often
PLACES = 4096
#: in a cache's work space, while a step is captured: what was written before is not in the graph
_CAPTURE = "capture"
#: in a cache's work space, by what holds a layer's keys: what the last step over them saw
_SHOWN = "shown"
#: of a dense layer, whose rows tell what is seen
_EVERY_KEY = Budget(coverage=1.0, minimum=1)
SEVERAL = Refusal("several queries over a window or an 8-bit cache")
#: what a step cannot complete: sums over the keys are kept for one token over all keys in place
FOREIGN = Refusal("a completion of keys that do not lie in a qaxis.Cache", canonical=True)
DRAFTED = Refusal("a completion of several queries", canonical=True)
WINDOW = Refusal("a completion in a window", canonical=True)
TRITON = Refusal("a completion, and backend='triton'", asked=True, canonical=True)
CODES = Refusal("a completion over 8-bit codes, and exactness='bitwise'", asked=True, canonical=True)


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
class Held:
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
def rows_into(shared: Shared, graph: object) -> Iterator[None]:
    """Inside, rows are written into ``graph``, with the pads of ``shared``."""
    shared.workspace[_CAPTURE] = graph
    try:
        yield
    finally:
        shared.workspace[_CAPTURE] = None
        forget_rows(shared)


def _held(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Held:
    holder: Any = getattr(k, HOLDER, None)
    same = holder is not None and getattr(v, HOLDER, None) is holder
    if same:
        keys, values, index = holder.operands()
        return Held(keys, values, index, holder.shared, holder.clock, holder.room, holder.window, holder.reason)
    k, v, n = tensor_of("key", k), tensor_of("value", v), k.shape[2]
    shared = _local.shared.setdefault(q.device, Shared(q.device))
    shared.clock.move_to(n)
    # Of another room the work space would not be used again.
    room = -(-n // PLACES) * PLACES
    if shared.workspace.setdefault("room", room) != room:
        shared.workspace.clear()
        shared.workspace["room"] = room
    # Triton, for Linux only, is loaded when it is needed.
    from ..decode import index_keys

    why = "keys do not lie in a qaxis.Cache: their index is made anew for every token"
    return Held(k, v, index_keys(k), shared, shared.clock, room, 0, why)


def _decoder(q: torch.Tensor, held: Held, budget: Budget, backend: str) -> Any:
    """The decoder of such queries, or for ``"triton"`` its Triton step alone."""
    triton = backend == "triton"
    shape = (q.shape[0], q.shape[1], held.room, q.shape[3], budget.k_eff(held.room))
    key = (held.room, "triton" if triton else "decoder", q.dtype, q.device, *shape)
    if key not in held.shared.workspace:
        # Triton, for Linux only, is loaded when it is needed.
        from ..decode import Decoder
        from ..decode.triton_step import TritonStep

        held.shared.workspace[key] = (TritonStep if triton else Decoder)(*shape, q.device)
    return held.shared.workspace[key]


def _pads(held: Held, shown: Shown) -> torch.Tensor | None:
    """How many tokens at the start of a batch row are padding, int32 ``[B]``: while a step is captured the graph's."""
    captured = held.shared.workspace.get(_CAPTURE) is not None
    return held.shared.pads if shown.pads is None and captured else shown.pads


def _rows(batch: int, held: Held, shown: Shown, budget: Budget, before: int) -> torch.Tensor:
    """Rows of queries that stand ``before`` tokens before the newest."""
    space, pads = held.shared.workspace, _pads(held, shown)
    window = held.window or shown.window or 0
    key = (held.room, _Rows, held.clock.tensor.device, batch, budget, window, held.window > 0, before)
    if key not in space:
        device = held.clock.tensor.device
        table = budget.table(held.room, device).int()
        space[key] = _Rows(torch.zeros(batch, 4, dtype=torch.int32, device=device), table)
    rows = space[key]
    state = (held.clock.at, None if pads is None else id(pads), space.get(_CAPTURE))
    if rows.written is None or rows.written[:3] != state:
        clock = held.clock.tensor if before == 0 else held.clock.tensor - before
        places = held.room if held.window else 0
        # Triton, for Linux only, is loaded when it is needed.
        from ..decode.rows import write_rows

        # A layer with a window counts all tokens that it ever saw, padding too.
        first = pads + shown.offset if pads is not None and places and pads is shown.pads else pads
        write_rows(rows.tensor, clock, rows.table, pads=first, window=window, places=places)
        # The pads are kept, so that no other tensor has their id.
        rows.written = (*state, pads)
    return rows.tensor


def refusal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown | None, logits: Logits, settings: Settings
) -> Refusal | None:
    """Why these queries cannot, or are not to, be steps; None if they can. Arguments as for :func:`attend`."""
    holder = getattr(k, HOLDER, None)
    if settings.budget is None:
        return None if _is_dense_step(q, k, v, shown, settings) else DENSE
    # How many keys a query needs is known once all are scored: the table that a step reads has no such number.
    if settings.budget.tolerance is not None:
        return TOLERANCE
    if settings.backend == "reference":
        return REFERENCE
    if q.device.type == "cpu" and settings.backend == "auto":
        return NO_GPU
    if q.shape[2] > MOST_QUERIES:
        return Refusal(f"{q.shape[2]} queries")
    if shown is None:
        return NO_RANGE
    if _completion(q, k, v, shown, logits, settings) != "none":
        return _not_completed(q, k, v, shown, logits, settings)
    if q.shape[2] > 1 and holder is not None and (holder.window or holder.quantised):
        return SEVERAL
    return None


def _completion(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown, logits: Logits, settings: Settings
) -> str:
    """What a step puts back: ``"none"`` also where it can put nothing back, and there is nothing to put back.

    Where it can it is told all the same: what it needs is there before a step is captured.
    """
    if settings.completion == "none" or not _sees_no_group(k, shown):
        return settings.completion
    return settings.completion if _not_completed(q, k, v, shown, logits, settings) is None else "none"


def _sees_no_group(k: torch.Tensor, shown: Shown) -> bool:
    """Whether every query sees fewer keys than a complete group has: completed or not, it gets the same bits."""
    holder: Any = getattr(k, HOLDER, None)
    windows = (shown.window, None if holder is None else holder.window)
    return min([k.shape[2], *(window for window in windows if window)]) < GROUP


def _not_completed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown, logits: Logits, settings: Settings
) -> Refusal | None:
    """Why a step cannot complete what it leaves out; None if it can."""
    holder: Any = getattr(k, HOLDER, None)
    in_place = holder is not None and getattr(v, HOLDER, None) is holder
    if not in_place:
        return FOREIGN
    if q.shape[2] > 1:
        return DRAFTED
    # Also one that hides nothing yet: a step that is captured then is repeated once it does.
    if holder.window or shown.window is not None:
        return WINDOW
    if settings.backend == "triton":
        return TRITON
    held, budget = _held(q, k, v), settings.budget
    assert budget is not None
    if settings.exactness == "bitwise" and held.index.codes is not None:
        return CODES
    step, kind = _decoder(q, held, budget, "auto"), settings.completion
    # Triton, for Linux only, is loaded when it is needed.
    from ..decode.asked import LEAST_SCALE

    if logits.scale < LEAST_SCALE:
        return Refusal(f"a completion of logits scaled by less than {LEAST_SCALE:g}", canonical=True)
    try:
        step.engine(q, held.keys, held.values, held.index, settings.always, logits, completion=kind)
    except RuntimeError as error:
        return Refusal(str(error), canonical=True)
    return None


def _is_dense_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown | None, settings: Settings) -> bool:
    """Whether one query of a dense layer meets full keys in place, where steps are captured or emulated.

    Codes of any format have no numbers at every place: what stands for them has as many as there are tokens.
    """
    holder: Any = getattr(k, HOLDER, None)
    in_full = isinstance(holder, KeyValues) and getattr(v, HOLDER, None) is holder
    steps = q.is_cuda or settings.backend in ("cuda", "triton")
    return in_full and steps and q.shape[2] == 1 and shown is not None


def not_repeatable(k: torch.Tensor, shown: Shown | None) -> str:
    """Why a captured step over these keys would not be that of the next token; empty if it would."""
    if not hasattr(k, HOLDER):
        return "its keys do not lie in a qaxis.Cache"
    return "" if shown is not None and shown.lasts else "what it sees changes with later tokens"


def shown_again(k: torch.Tensor, pads: torch.Tensor | None) -> Shown:
    """What a token sees of keys that a cache of ours returned, where no mask tells it.

    The window is that of the last step over them that had a mask; ``pads`` are int32 ``[B]`` or None.

    Raises:
        RuntimeError: if there was no such step, or it says nothing of later tokens.
    """
    holder: Any = getattr(k, HOLDER, None)
    seen: Shown | None = None if holder is None else holder.shared.workspace.get(_SHOWN, {}).get(holder)
    why = not_repeatable(k, seen)
    if why or seen is None:
        raise RuntimeError(f"attention of a layer is no step that can be repeated: {why}")
    return Shown(pads, seen.window)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown, logits: Logits, settings: Settings
) -> Attended:
    """One step a query, of what :func:`refusal` does not refuse.

    Args:
        q: ``[B, H, M, D]``. k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``.
    """
    budget, held, m, n, one = settings.budget, _held(q, k, v), q.shape[2], k.shape[2], q[:, :, :1]
    if m == 1 and hasattr(k, HOLDER):
        held.shared.workspace.setdefault(_SHOWN, WeakKeyDictionary())[getattr(k, HOLDER)] = shown
    if budget is None:
        return Attended(_dense(q, k, held, shown, logits), None, "dense")
    kind = _completion(q, k, v, shown, logits, settings)
    completing: dict[str, Any] = {} if kind == "none" else {"completion": kind}
    if settings.backend == "triton":
        step, engine, reason = _decoder(q, held, budget, "triton"), "triton", "backend='triton'"
    else:
        step = _decoder(q, held, budget, "auto")
        engine, reason = step.engine(one, held.keys, held.values, held.index, settings.always, logits, **completing)
    if completing:
        # Launched before the step that reads them, so that a graph that is captured has both.
        completing["moments"] = getattr(k, HOLDER).moments(_pads(held, shown))
    done = []
    for i in range(m):
        rows = _rows(q.shape[0], held, shown, budget, m - 1 - i)
        query = q[:, :, i : i + 1]
        done.append(step.run(query, held.keys, held.values, held.index, rows, logits, settings.always, **completing))
    output, indices = done[0].output, done[0].indices
    if m > 1:
        output, indices = (torch.cat([getattr(x, name) for x in done], 2) for name in ("output", "indices"))
    # Of a window's buffer some places may lie before the first of the keys.
    first = held.keys.shape[2] - n if held.window else 0

    def kept() -> torch.Tensor:
        return indices_to_mask(torch.where(indices < 0, -1, indices - first), n)

    asked = settings.backend == "triton"
    refusals = (Refusal(reason, asked), Refusal(held.reason))
    return Attended(output, kept, engine, tuple(x for x in refusals if x.text))


def _dense(q: torch.Tensor, k: torch.Tensor, held: Held, shown: Shown, logits: Logits) -> torch.Tensor:
    """Attention of one query ``[B, H, 1, D]`` to every key it sees, of all places: a captured one serves any length."""
    # Triton, for Linux only, is loaded when it is needed.
    from ..decode.rows import BEGIN, END

    rows, (keys, values) = _rows(q.shape[0], held, shown, _EVERY_KEY, 0), getattr(k, HOLDER).whole()
    places = torch.arange(held.room, device=q.device)
    allowed = (places >= rows[:, BEGIN, None]) & (places < rows[:, END, None])
    return masked.one_query(q, keys, values, allowed, logits)
