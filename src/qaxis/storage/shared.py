"""What the layers of one cache share, and what each of them can do, whichever way it holds keys and values."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch

from ..validation import check_form, require
from .clock import Clock
from .key_index import KeyIndex
from .moments import Moments
from .summary import Summary, Summed


class Holder(Summed, Protocol):
    """Keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` of one layer, and the index of the keys.

    :class:`~qaxis.storage.in_place.KeyValues` holds numbers, :class:`~qaxis.storage.in_place_quantised.StoredKeyValues`
    codes.

    What it is for the sums over its tokens is in :class:`~qaxis.storage.summary.Summed`.

    Attributes:
        shared: what the layers of the cache share.
        indexed: places, from the first on, whose keys the index is of.
        reason: why the keys have no index of codes where one would be faster; empty if they have.
        summary: moments, for who asks for them.
    """

    shared: Shared
    indexed: int
    reason: str
    summary: Summary

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of keys and values."""

    @property
    def room(self) -> int:
        """Places that the buffers have."""

    @property
    def held(self) -> int:
        """Places that hold a token."""

    @property
    def window(self) -> int:
        """Newest tokens that a query sees, 0 for all."""

    @property
    def quantised(self) -> bool:
        """Whether :meth:`operands` are codes."""

    @property
    def capturable(self) -> bool:
        """Whether a GPU appends a token in one launch, whatever the clock says."""

    def check(self, k: torch.Tensor, v: torch.Tensor, names: tuple[str, str] = ("k", "v")) -> None:
        """Check that states can be appended, by form; ValueError names what cannot."""

    def takes(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether states of this kind can be appended."""

    def has_room(self, end: int) -> bool:
        """Whether ``end`` tokens in all find room where the buffers lie."""

    def reserve(self, m: int) -> None:
        """Make room for ``m`` more tokens."""

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append ``k [B, Hkv, m, D]`` and ``v [B, Hkv, m, Dv]`` that :meth:`check` allows; moves the clock."""

    def advance(self, m: int) -> None:
        """Count ``m`` tokens that a kernel, or a replayed graph, appended."""

    def operands(self) -> tuple[Any, Any, KeyIndex]:
        """Keys and values, tensors or :class:`~qaxis.storage.side.Stored`, and the index of the keys."""

    def moments(self, pads: torch.Tensor | None = None) -> Moments:
        """Moments of the complete groups of 128 tokens that hold no padding, as :mod:`qaxis.storage.moments` has them.

        Kept, and brought up to date, from the first time on that they are asked for. These are the buffers themselves:
        they change when more is asked for, or rows change places. Where kernels read what is stored, a GPU is not
        waited for; other formats, and a CPU, take PyTorch.

        Args:
            pads: int32 ``[B]`` on the holder's device, tokens at the start of a row that are padding; None for none.

        Returns:
            Float32 ``[B, Hkv, Dv + D, D]`` and ``[B, Hkv, Dv + D]``; 0 for a row that has no such group.

        Raises:
            ValueError: for a layer with a window, or pads that do not fit.
            RuntimeError: while a graph is captured, where they were not asked for before or PyTorch makes them.
        """

    def crop(self, length: int) -> None:
        """Keep the first ``length`` tokens."""

    def select(self, indices: torch.Tensor) -> None:
        """Batch rows that ``indices`` name, int64 or bool; buffers stay where they are if the batch stays as large."""

    def move(self, device: torch.device | str) -> None:
        """Move all buffers to ``device``, without waiting."""

    def nbytes(self) -> int:
        """Bytes of the buffers, room for growth included."""

    def leave(self) -> None:
        """Take no more part in what the cache's layers share."""


class Shared:
    """What the layers of one cache share.

    Attributes:
        pads: int32 ``[B]``, tokens at the start that a batch row does not see, or None.
        workspace: decoders and what else works on this cache; a copy of a cache starts without. A key is a tuple that
            begins with the room, in places, that its value was made for: it is dropped once no layer has that room.
        version: changes whenever any buffer of the cache moves in memory.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        """With the clock of a ``device``, or of those of the layers to come."""
        self.clocks: dict[str, Clock] = {}
        if device is not None:
            self.clock_on(torch.empty(0, device=device).device)
        self.pads: torch.Tensor | None = None
        self.workspace: dict[Any, Any] = {}
        self.version = 0
        # Not held: a cache that is dropped gives its memory back at once.
        self.references: list[weakref.ref[Holder]] = []

    def clock_on(self, device: torch.device) -> Clock:
        """The clock of the layers on ``device``; a model of several devices has one on each."""
        if str(device) not in self.clocks:
            self.clocks[str(device)] = Clock(device)
        return self.clocks[str(device)]

    @property
    def clock(self) -> Clock:
        """The clock of the first layer.

        Raises:
            ValueError: before anything was written.
        """
        require(bool(self.clocks), "cache", "empty", "a cache that was written to")
        return next(iter(self.clocks.values()))

    def advance(self, m: int) -> None:
        """Count ``m`` tokens that a replayed graph appended to every layer: the host catches up with the device."""
        for clock in self.clocks.values():
            clock.at += m
        for holder in self.holders:
            holder.advance(m)

    def mark(self) -> Any:
        """How far the host counted, for :meth:`rewind`."""
        return [clock.at for clock in self.clocks.values()], [(x.length, x.indexed) for x in self.holders]

    def rewind(self, mark: Any) -> None:
        """Count on the host as at ``mark``, where the device did nothing since, or does it again."""
        for clock, at in zip(self.clocks.values(), mark[0], strict=True):
            clock.at = at
        for holder, (length, indexed) in zip(self.holders, mark[1], strict=True):
            # A group that is completed once more may hold another token.
            holder.summary.cut(holder.length, length)
            holder.length, holder.indexed = length, indexed

    @property
    def holders(self) -> list[Holder]:
        """What holds the keys and values of each layer that has any, in the order in which they came."""
        return [holder for reference in self.references if (holder := reference()) is not None]

    def join(self, holder: Holder) -> None:
        """``holder`` takes part from now on."""
        self.references.append(weakref.ref(holder))
        self.moved()

    def part(self, holder: Holder) -> None:
        """``holder`` takes no more part."""
        self.references = [reference for reference in self.references if reference() is not holder]
        self.moved()

    def moved(self) -> None:
        """Note that a buffer of the cache moved in memory, and drop what was made for rooms that are no more.

        A graph that was captured over such work space is of an earlier version, and not replayed any more.
        """
        self.version += 1
        rooms = {holder.room for holder in self.holders}
        for key in [key for key in self.workspace if isinstance(key, tuple) and key[0] not in rooms]:
            del self.workspace[key]

    def __getstate__(self) -> dict[str, Any]:
        # Layers that are copied join the copy themselves.
        return {**vars(self), "workspace": {}, "references": []}


def check_states(holder: Holder, k: torch.Tensor, v: torch.Tensor, names: tuple[str, str]) -> None:
    """Check that ``holder`` can append states, by form: whether they are finite is left to who reads them.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    batch, heads = holder.batch, holder.heads
    for name, x, dtype, dim in zip(names, (k, v), holder.dtypes, holder.dims, strict=True):
        # Latent attention may keep all it needs in the keys, and values of no width beside them (GLM 5 Next).
        bare = dim == 0 and isinstance(x, torch.Tensor) and x.ndim == 4
        check_form(name, k if bare else x, 4)
        require(x.device == holder.device, f"{name}.device", str(x.device), f"the cache's {holder.device}")
        require(x.dtype == dtype, f"{name}.dtype", x.dtype, f"the cache's {dtype}")
        fits = (*x.shape[:2], x.shape[3]) == (batch, heads, dim)
        require(fits, f"{name}.shape", tuple(x.shape), f"the cache's [{batch}, {heads}, n, {dim}]")
    same = k.shape[2] == v.shape[2]
    require(same, f"{names[1]}.shape", tuple(v.shape), f"as many tokens as {names[0]} {tuple(k.shape)}")


def takes(holder: Holder, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether ``holder`` can append states of this kind."""
    alike = (k.dtype, v.dtype) == holder.dtypes and (k.shape[3], v.shape[3]) == holder.dims
    return alike and k.device == holder.device and tuple(k.shape[:2]) == (holder.batch, holder.heads)
