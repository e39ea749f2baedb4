"""Keys and values of one layer as codes in place, and the index of the keys: the twin of :class:`KeyValues`.

Two sides of 8 bits per channel in groups of 128 take a token in one launch on a GPU (``append_quantised.py``), and can
be captured. Prompts, and other formats, are quantised by PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch

from ..arithmetic.fast_scores import largest_norm, norms
from ..validation import check_finite, require
from . import lazy
from .buffer import Growing
from .clock import Clock, is_captured
from .formats import EIGHT, Format
from .key_index import KeyIndex, largest_scales, whole_groups
from .moments import Moments
from .shared import Shared, check_states, takes
from .side import Side, Stored
from .summary import Summary

#: groups whose numbers are made at once
_AT_ONCE = 64
_GROUP = EIGHT.group_size


class StoredKeyValues:
    """Keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` of one layer as codes.

    Args:
        shared: what the layers of the cache share.
        k, v: states whose batch, heads, width, dtype and device the layer takes; of any length, not appended.
        format: grids, and first tokens in full.
        room: tokens to make room for at once.

    Attributes:
        sides: keys, values.
        reason: why the keys have no index that kernels read; empty if they have.
        capturable: whether a GPU appends a token in one launch, whatever the clock says.
        lasting: whether what a complete group of 128 tokens holds stays as it is while others follow.
        summary: moments, for who asks for them.
    """

    window = 0

    def __init__(self, shared: Shared, k: torch.Tensor, v: torch.Tensor, format: Format, room: int = 0) -> None:
        likes = (x.new_zeros(*x.shape[:2], 1, x.shape[3]) for x in (k, v))
        grids = (format.keys, format.values)
        self.sides = tuple(Side(x, grid, format.sinks, room) for x, grid in zip(likes, grids, strict=True))
        self.shared, self.format = shared, format
        eight = grids == (EIGHT, EIGHT)
        self.quantised = eight and k.dtype in (torch.float32, torch.bfloat16) and v.shape[3] > 0
        self.capturable = eight and v.shape[3] > 0
        self.reason = "" if self.quantised else "keys of this format are dequantised for every token"
        self.lasting = all(_GROUP % grid.tokens == 0 for grid in grids)
        self.summary = Summary()
        #: tokens that the index is of
        self.indexed = 0
        self.norms = Growing(k.new_zeros(*k.shape[:2], 0, dtype=torch.float32))
        with torch.inference_mode(False):
            head, device = tuple(k.shape[:2]), k.device
            self.norm, self.residual = torch.zeros(2, *head, device=device).unbind()
            self.largest_scales = torch.zeros(*head, k.shape[3], device=device)
            #: int32 ``[1]``: not 0 once a number that is not finite was appended on a GPU
            self.broken = torch.zeros(1, dtype=torch.int32, device=device)
        shared.clock_on(k.device)
        shared.join(self)
        self._addresses = self.addresses()

    @property
    def clock(self) -> Clock:
        return self.shared.clock_on(self.device)

    @property
    def device(self) -> torch.device:
        return self.sides[0].parts["codes"].buffer.device

    @property
    def batch(self) -> int:
        return self.sides[0].parts["codes"].buffer.shape[0]

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of keys and values."""
        return self.sides[0].dtype, self.sides[1].dtype

    @property
    def dims(self) -> tuple[int, int]:
        """D and Dv."""
        return self.sides[0].dim, self.sides[1].dim

    @property
    def heads(self) -> int:
        return self.sides[0].parts["codes"].buffer.shape[1]

    @property
    def length(self) -> int:
        """Tokens."""
        return self.sides[1].length

    @length.setter
    def length(self, n: int) -> None:
        for side in self.sides:
            side.count(n)

    @property
    def held(self) -> int:
        return self.length

    @property
    def room(self) -> int:
        """Places: those of codes, and of a group that is not complete."""
        return self.sides[0].parts["codes"].buffer.shape[2] + self.sides[0].grid.tokens

    def takes(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether states of this kind can be appended."""
        return takes(self, k, v)

    def check(self, k: torch.Tensor, v: torch.Tensor, names: tuple[str, str] = ("k", "v")) -> None:
        """As :func:`~qaxis.storage.shared.check_states`."""
        check_states(self, k, v, names)

    def has_room(self, end: int) -> bool:
        """Whether ``end`` tokens in all find room where the buffers lie."""
        return all(side.has_room(end) for side in self.sides)

    def reserve(self, m: int) -> None:
        """Make room for ``m`` more tokens."""
        end = self.length + m
        for side in self.sides:
            side.reserve(end)
        if self.quantised:
            groups = self.sides[0].parts["scales"].buffer.shape[2]
            if self.norms.buffer.shape[2] < groups:
                self.norms.grow(groups)
        self._note_moves()

    def addresses(self) -> list[int]:
        """Where the buffers lie."""
        growing = (g for side in self.sides for g in side.parts.values())
        return [g.buffer.data_ptr() for g in (*growing, self.norms)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy lies elsewhere, and nothing was made for it yet.
        vars(self).update(state)
        self._addresses = self.addresses()
        self.shared.join(self)

    def _note_moves(self) -> None:
        addresses = self.addresses()
        if addresses != self._addresses:
            self._addresses = addresses
            self.shared.moved()

    @torch.no_grad()
    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append states that :meth:`check` allows; moves the clock.

        Raises:
            ValueError: on NaN or Inf, or what a format of few bits cannot hold; nothing is appended then. On a GPU NaN
                and Inf are noted instead, as looking at them would wait for it: :meth:`check_finite` tells.
        """
        m, commits = k.shape[2], []
        by_kernel = k.is_cuda and m == 1 and self.capturable
        if not k.is_cuda:
            # One look at both, which a decoding step feels less.
            if not bool(torch.isfinite(k).all() & torch.isfinite(v).all()):
                check_finite(key_states=k, value_states=v)
        elif not by_kernel:
            self.broken += (~(torch.isfinite(k).all() & torch.isfinite(v).all())).int()
        if not by_kernel:
            commits = [side.prepare(x) for side, x in zip(self.sides, (k, v), strict=True)]
        end = self.length + m
        self.reserve(m)
        self.clock.move_to(end)
        if by_kernel:
            from .append_quantised import append

            append(self, self.clock.tensor, k, v)
            self.advance(1)
            return
        for commit in commits:
            commit()
        self._note_moves()
        if k.is_cuda:
            self._follow()

    def check_finite(self) -> None:
        """Refuse NaN and Inf among what was appended on a GPU; waits for it.

        Raises:
            ValueError: if there was one.
        """
        require(not bool(self.broken), "states", "NaN or Inf", "finite values: what this cache holds is not to be used")

    def advance(self, m: int) -> None:
        """Count ``m`` tokens that a kernel, or a replayed graph, appended."""
        self.length += m
        self.indexed = self.length

    def _follow(self) -> None:
        """Let the index follow the keys: groups that are complete, then the largest of all."""
        if not self.quantised or self.indexed == self.length:
            return
        with torch.no_grad():
            side, stored = self.sides[0], self.sides[0].stored()
            whole = stored.scales.shape[2]
            if self.norms.buffer.shape[2] < whole:
                self.norms.grow(side.parts["scales"].buffer.shape[2])
            for first in range(min(self.indexed // _GROUP, whole), whole, _AT_ONCE):
                some = slice(first * _GROUP, min(first + _AT_ONCE, whole) * _GROUP)
                found = norms(whole_groups(stored, some)).unflatten(2, (-1, _GROUP)).amax(3)
                self.norms.buffer[:, :, first : first + found.shape[2]] = found
            assert stored.newest is not None
            norm = torch.maximum(largest_norm(stored.first), largest_norm(stored.newest))
            if whole:
                norm = torch.maximum(norm, self.norms.buffer[:, :, :whole].amax(2))
            self.norm.copy_(norm)
            self.largest_scales.copy_(largest_scales(stored))
        self.indexed = self.length
        self._note_moves()

    def operands(self) -> tuple[Any, Any, KeyIndex]:
        """Keys, values and the index of the keys: codes, or numbers where no kernel reads these."""
        if not self.quantised:
            keys, values = (lazy.dequantized(side.stored()) for side in self.sides)
            norm = largest_norm(keys)
            return keys, values, KeyIndex(norm, torch.zeros_like(norm), torch.zeros_like(self.largest_scales))
        self._follow()
        if is_captured(self.norm):
            for side in self.sides:
                side.open_group()
            k, v = self.all_room()
        else:
            k, v = (side.stored() for side in self.sides)
        return k, v, KeyIndex(self.norm, self.residual, self.largest_scales, k)

    def all_room(self) -> tuple[Stored, Stored]:
        """Both sides with every place that they have room for: where these lie does not change with a token."""
        k, v = (
            Stored(side.grid, side.dtype, side.dim, side.width, **{n: g.buffer for n, g in side.parts.items()})
            for side in self.sides
        )
        return k, v

    def groups(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of the groups [first, end) of 128 tokens, which are complete, dequantised."""
        k, v = (side.numbers(first * _GROUP, end * _GROUP) for side in self.sides)
        return k, v

    def moments(self, pads: torch.Tensor | None = None) -> Moments:
        """As :meth:`qaxis.storage.shared.Holder.moments`."""
        return self.summary.of(self, pads)

    @torch.no_grad()
    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens. Those of a group that is cut open wait again, with the values they had."""
        if self.device.type == "cuda":
            self.check_finite()
        if length >= self.length:
            return
        self.summary.cut(self.length, length)
        for side in self.sides:
            side.crop(length)
        self.indexed = min(self.indexed, length // _GROUP * _GROUP)
        self._note_moves()
        if length == 0:
            self.norm.zero_()
            self.largest_scales.zero_()
        elif self.indexed == self.length:
            # Anew also where nothing but complete groups is left.
            self.indexed = self.length - 1
        if self.device.type == "cuda":
            self._follow()

    @torch.no_grad()
    def select(self, indices: torch.Tensor) -> None:
        """Batch rows that ``indices`` name, int64 or bool; buffers stay where they are if the batch stays as large."""
        for growing in (*(g for side in self.sides for g in side.parts.values()), self.norms):
            growing.select(indices)
        rows = indices.to(self.device)
        for name in ("norm", "residual", "largest_scales"):
            x = getattr(self, name)
            with torch.inference_mode(False):
                chosen = x[rows]
            setattr(self, name, x.copy_(chosen) if chosen.shape == x.shape else chosen)
        self.summary.select(indices)
        self._note_moves()

    def move(self, device: torch.device | str) -> None:
        """Move all buffers to ``device``, without waiting."""
        for growing in (*(g for side in self.sides for g in side.parts.values()), self.norms):
            growing.change(lambda x: x.to(device, non_blocking=True))
        with torch.inference_mode(False):
            for name in ("norm", "residual", "largest_scales", "broken"):
                setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        self.summary.move(device)
        self._note_moves()

    def nbytes(self) -> int:
        """Bytes of the buffers, room for growth included, of what the index needs, and of moments asked for."""
        own = (self.norms.buffer, self.norm, self.residual, self.largest_scales, self.broken)
        # Two of them may lie in one storage.
        index = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in own}
        return sum(side.nbytes() for side in self.sides) + sum(index.values()) + self.summary.nbytes()

    def leave(self) -> None:
        """Take no more part in what the cache's layers share."""
        self.shared.part(self)
