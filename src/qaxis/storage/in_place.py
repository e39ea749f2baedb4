"""Keys and values of one layer in place: room that grows by blocks, and the index of the keys beside them.

Tokens are appended where they stay. What changes with a token lies in device memory (the clock, the bounds), so that a
captured graph serves a cache that grows until its buffers move, which :attr:`Shared.version` tells.
"""

from __future__ import annotations

from typing import Any

import torch

from ..arithmetic.reference import rounded_up
from ..validation import require
from . import bounds
from .buffer import zeros
from .clock import Clock, is_captured
from .formats import EIGHT
from .key_index import KeyIndex
from .moments import Moments
from .shared import Shared, check_states, takes
from .side import Stored
from .summary import Summary
from .window import first_held, places_for

#: places that buffers grow by: a sixteenth of the length, at least so many, and a multiple of a block
LEAST, SHARE, BLOCK = 1024, 16, 512

#: parts by their third dimension: places, groups of places, none (of a head)
_OF_PLACES, _OF_GROUPS = ("k", "v", "codes"), ("norms", "residuals", "scaled_residuals", "scales")


class KeyValues:
    """Keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` of one layer, and the index of the keys.

    Args:
        shared: what the layers of the cache share.
        k, v: states whose batch, heads, width, dtype and device the layer takes; of any length, not appended.
        index: ``"bounds"``, or ``"codes"`` for 8-bit codes of complete groups of 128 tokens as well.
        window: newest tokens that a query sees, 0 for all. Only ``"bounds"`` then.
        room: tokens to make room for at once.
        reason: why there are no codes where they were asked for; empty otherwise.

    Attributes:
        length: tokens appended, also those that a window dropped.
        indexed: places whose keys the index is of: on a CPU, where nothing needs it, it follows when it is asked for.
        parts: the buffers, contiguous; ``bounds.py`` says what they are.
        summary: moments, for who asks for them.
    """

    #: one launch appends on a GPU, whatever the clock says
    capturable = True
    #: whether :meth:`operands` are codes
    quantised = False
    #: whether what a complete group of 128 tokens holds stays as it is while others follow
    lasting = True

    def __init__(
        self,
        shared: Shared,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        index: str = "bounds",
        window: int = 0,
        room: int = 0,
        reason: str = "",
    ) -> None:
        require(index in ("bounds", "codes"), "index", index, "'bounds' or 'codes'")
        require(not (window and index == "codes"), "index", index, "'bounds' where there is a window")
        self.shared, self.window, self.room_at_first, self.reason = shared, window, room, reason
        self.length = self.indexed = 0
        self.summary = Summary()
        self.dtypes, self.dims, self.heads = (k.dtype, v.dtype), (k.shape[3], v.shape[3]), k.shape[1]
        self.parts = _empty(k, v, index == "codes", places_for(window) if window else 0)
        shared.clock_on(k.device)
        shared.join(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.shared.join(self)

    def leave(self) -> None:
        """Take no more part in what the cache's layers share."""
        self.shared.part(self)

    @property
    def clock(self) -> Clock:
        """That of the layers on the same device."""
        return self.shared.clock_on(self.device)

    @property
    def device(self) -> torch.device:
        return self.parts["k"].device

    @property
    def batch(self) -> int:
        return self.parts["k"].shape[0]

    @property
    def room(self) -> int:
        """Places."""
        return self.parts["k"].shape[2]

    @property
    def held(self) -> int:
        """Places that hold a token: all tokens, or those that are left of a window."""
        return self.length - (first_held(self.length, self.window, self.room) if self.window else 0)

    def check(self, k: torch.Tensor, v: torch.Tensor, names: tuple[str, str] = ("k", "v")) -> None:
        """As :func:`~qaxis.storage.shared.check_states`."""
        check_states(self, k, v, names)

    def slides(self, m: int) -> bool:
        """Whether appending ``m`` tokens overwrites one that the first of them sees."""
        if not self.window:
            return False
        return first_held(self.length + m, self.window, self.room) > max(0, self.length - self.window + 1)

    def takes(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether states of this kind can be appended."""
        return takes(self, k, v)

    def has_room(self, end: int) -> bool:
        """Whether ``end`` tokens in all find room where the buffers lie."""
        return bool(self.window) or end <= self.room

    def reserve(self, m: int) -> None:
        """Make room for ``m`` more tokens; an exact fit, in blocks, the first time. A window has all it needs."""
        end = self.length + m
        if self.has_room(end):
            return
        room = max(end, self.room_at_first)
        if self.length:
            room = max(end, self.room + max(LEAST, self.room // SHARE))
        self._move(rounded_up(room, BLOCK))

    def _move(self, room: int) -> None:
        """Move what is stored into larger buffers, part by part."""
        for name in (*_OF_PLACES, *_OF_GROUPS):
            if name in self.parts:
                old, many = self.parts.pop(name), room if name in _OF_PLACES else room // bounds.GROUP
                self.parts[name] = zeros((*old.shape[:2], many, *old.shape[3:]), old)
                self.parts[name][:, :, : old.shape[2]] = old
        self.shared.moved()

    @torch.no_grad()
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append ``k [B, Hkv, m, D]`` and ``v [B, Hkv, m, Dv]`` that :meth:`check` allows; moves the clock."""
        start, end = self.length, self.length + k.shape[2]
        self.reserve(k.shape[2])
        self.clock.move_to(end)
        if k.is_cuda and (not self.window or k.shape[2] == 1):
            from .append import append

            append(self.parts, self.clock.tensor, k, v, self.window)
            self.length = end
            self.indexed = self.held
        else:
            self._put(k, v, start, end)
            self.length = end
            if k.is_cuda:
                self._follow()

    def _put(self, k: torch.Tensor, v: torch.Tensor, start: int, end: int) -> None:
        """Put tokens at their places, once what a window still needs has moved to the front."""
        first, before = 0, 0
        if self.window:
            first, before = (first_held(n, self.window, self.room) for n in (end, start))
        for name, x in (("k", k), ("v", v)):
            buffer = self.parts[name]
            if first > before:
                kept = buffer[:, :, first - before : start - before].clone()
                buffer[:, :, : kept.shape[2]] = kept
            fresh = x[:, :, max(0, first - start) :]
            buffer[:, :, end - first - fresh.shape[2] : end - first] = fresh
        if first > before:
            self.indexed = 0
            bounds.restate(self.parts, 0)

    def _follow(self) -> None:
        """Let the index follow the keys."""
        if self.indexed < self.held:
            with torch.no_grad():
                bounds.raise_bounds(self.parts, self.indexed, self.held)
            self.indexed = self.held

    def newest(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the newest ``n`` tokens, of those that are held."""
        held = self.held
        k, v = (self.parts[name][:, :, held - min(n, held) : held] for name in ("k", "v"))
        return k, v

    @torch.no_grad()
    def refill(self, k: torch.Tensor, v: torch.Tensor, length: int) -> None:
        """Hold the tokens up to ``length``, of which ``k`` and ``v`` are the newest; what a window drops may lack."""
        first = first_held(length, self.window, self.room) if self.window else 0
        have = min(k.shape[2], length - first)
        for name, x in (("k", k), ("v", v)):
            self.parts[name].zero_()
            self.parts[name][:, :, length - first - have : length - first] = x[:, :, x.shape[2] - have :]
        self.length, self.indexed = length, 0
        self.summary.restart()
        bounds.restate(self.parts, 0)
        if k.is_cuda:
            self._follow()

    def advance(self, m: int) -> None:
        """Count ``m`` tokens that a replayed graph appended."""
        self.length += m
        self.indexed = self.held

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values, views of the host's length; a window's are of its places."""
        n = self.held
        return self.parts["k"][:, :, :n], self.parts["v"][:, :, :n]

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of all places, also of those that hold no token."""
        return self.parts["k"], self.parts["v"]

    def all_room(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`whole`."""
        return self.whole()

    def groups(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the keys and the values of the groups [first, end) of 128 tokens, which are complete."""
        k, v = (self.parts[name][:, :, first * bounds.GROUP : end * bounds.GROUP] for name in ("k", "v"))
        return k, v

    def moments(self, pads: torch.Tensor | None = None) -> Moments:
        """As :meth:`qaxis.storage.shared.Holder.moments`."""
        require(not self.window, "window", self.window, "0: of a window no moments are kept")
        return self.summary.of(self, pads)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor, KeyIndex]:
        """Views as :meth:`views` has them, and the index of these keys; of all room while a graph is captured."""
        self._follow()
        parts, n = self.parts, self.room if is_captured(self.parts["k"]) else self.held
        k, v, codes, scaled = parts["k"][:, :, :n], parts["v"][:, :, :n], None, None
        if "codes" in parts:
            whole = n // bounds.GROUP
            coded, scales = parts["codes"][:, :, : whole * bounds.GROUP], parts["scales"][:, :, :whole]
            newest = k[:, :, whole * bounds.GROUP :]
            codes = Stored(EIGHT, k.dtype, k.shape[3], k.shape[3], coded, scales, k[:, :, :0], None, newest)
            scaled = parts["scaled_residuals"][:, :, :whole]
        return k, v, KeyIndex(parts["norm"], parts["residual"], parts["largest_scales"], codes, scaled)

    @torch.no_grad()
    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens; of a window only while nothing was dropped from it."""
        for name in ("k", "v"):
            # A dense token reads all places: what was NaN there would be so in a product with 0.
            self.parts[name][:, :, length : self.length].zero_()
        self.summary.cut(self.length, length)
        self.length = min(length, self.length)
        if self.indexed > self.length:
            self.indexed = self.length
            bounds.restate(self.parts, self.length)

    @torch.no_grad()
    def select(self, indices: torch.Tensor) -> None:
        """Batch rows that ``indices`` name, int64 or bool; buffers stay where they are if the batch stays as large."""
        for name, x in list(self.parts.items()):
            rows = indices.to(x.device)
            with torch.inference_mode(False):
                chosen = x[rows]
            if chosen.shape == x.shape:
                x.copy_(chosen)
            else:
                self._replace(name, chosen)
        self.summary.select(indices)

    def move(self, device: torch.device | str) -> None:
        """Move all buffers to ``device``, without waiting."""
        for name, x in list(self.parts.items()):
            if x.device != torch.device(device):
                with torch.inference_mode(False):
                    self._replace(name, x.to(device, non_blocking=True))
        self.summary.move(device)

    def _replace(self, name: str, x: torch.Tensor) -> None:
        self.parts[name] = x
        self.shared.moved()

    def nbytes(self) -> int:
        """Bytes of the buffers, room for growth included, and of moments that were asked for."""
        return sum(x.untyped_storage().nbytes() for x in self.parts.values()) + self.summary.nbytes()


def _empty(k: torch.Tensor, v: torch.Tensor, coded: bool, places: int) -> dict[str, torch.Tensor]:
    head, dim, groups = tuple(k.shape[:2]), k.shape[3], places // bounds.GROUP
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "k": ((*head, places, dim), k.dtype), "v": ((*head, places, v.shape[3]), v.dtype),
        "norms": ((*head, groups), torch.float32), "norm": (head, torch.float32),
        "residual": (head, torch.float32), "largest_scales": ((*head, dim), torch.float32),
    }  # fmt: skip
    if coded:
        sizes |= {
            "codes": ((*head, places, dim), torch.int8), "scales": ((*head, groups, dim), torch.int8),
            "residuals": ((*head, groups), torch.float32), "scaled_residuals": ((*head, groups), torch.float32),
            "longest": (head, torch.float32),
        }  # fmt: skip
    with torch.inference_mode(False):
        return {name: torch.zeros(size, dtype=dtype, device=k.device) for name, (size, dtype) in sizes.items()}
