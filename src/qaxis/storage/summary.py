"""Moments of keys and values that grow with a cache, of the groups of 128 tokens that are complete.

Made when they are first asked for, and then followed: a group is added once. As nothing is taken out of a sum again,
all groups are added anew once tokens of one are cropped, or done once more. On a GPU one launch adds what became
complete, by the clock and by numbers that it keeps itself in device memory, so that a captured graph serves a cache
that grows.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ..validation import check_memory, require
from .clock import Clock, is_captured
from .moments import GROUP, Moments, add_groups, tiles_of
from .side import Stored

#: a first group that no row has: nothing is counted yet
_NOTHING = -1
#: groups whose numbers are made at once
_AT_ONCE = 64


def first_groups(pads: torch.Tensor) -> torch.Tensor:
    """The first group of every row that holds no padding, int32 ``[B]``."""
    pads = pads.clamp(min=0)
    return pads // GROUP + (pads % GROUP > 0).int()


class Summed(Protocol):
    """What a summary is of: as much of a layer's keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` as sums need.

    Attributes:
        length: tokens appended, also those that a window dropped.
    """

    length: int

    @property
    def clock(self) -> Clock:
        """That of the layers on the same device."""

    @property
    def device(self) -> torch.device:
        """Where the buffers lie."""

    @property
    def dims(self) -> tuple[int, int]:
        """D and Dv."""

    @property
    def batch(self) -> int:
        """B."""

    @property
    def heads(self) -> int:
        """Hkv."""

    @property
    def lasting(self) -> bool:
        """Whether what a complete group of 128 tokens holds stays as it is while others follow."""

    def groups(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and the values of the groups [first, end) of 128 tokens, which are complete."""

    def all_room(self) -> tuple[torch.Tensor | Stored, torch.Tensor | Stored]:
        """The keys and the values of every place, as they are stored: where these lie does not change with a token."""


class Summary:
    """Moments of one layer.

    Attributes:
        moments: the buffers, ``products [B, Hkv, Dv + D, D]`` and ``sums [B, Hkv, Dv + D]``; None before they are
            asked for.
        state: int32 ``[B, Hkv, tiles, 2]``, of every tile the first group that it counts and the one that comes next.
    """

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.state: torch.Tensor | None = None

    @torch.no_grad()
    def of(self, holder: Summed, pads: torch.Tensor | None) -> Moments:
        """As :meth:`qaxis.storage.shared.Holder.moments`."""
        _check_pads(holder, pads)
        captured = is_captured(holder.clock.tensor)
        if self.moments is None:
            if captured:
                raise RuntimeError("moments are asked for first while a graph is captured: ask for them once before")
            self.make(holder)
        assert self.moments is not None and self.state is not None
        if holder.device.type == "cuda" and holder.lasting:
            # Triton exists for Linux only: without a GPU nothing here needs it.
            from . import triton_moments
            from .triton import readable

            sides = holder.all_room()
            if readable(*sides):
                # Tokens that were cropped, or taken back, are behind it else.
                holder.clock.move_to(holder.length)
                triton_moments.follow(self.moments, self.state, holder.clock.tensor, *sides, pads)
                return self.moments
        if captured:
            raise RuntimeError(
                "moments of such a cache are made by PyTorch, which waits for the device: no graph has them"
            )
        self._follow(holder, pads)
        return self.moments

    def make(self, holder: Summed) -> None:
        """Make the buffers, in which no group is counted yet."""
        head, (dim, dim_v) = (holder.batch, holder.heads), holder.dims
        of_values, of_keys, columns = tiles_of(dim, dim_v)
        with torch.inference_mode(False):
            products = torch.zeros(*head, dim_v + dim, dim, dtype=torch.float32, device=holder.device)
            sums = torch.zeros(*head, dim_v + dim, dtype=torch.float32, device=holder.device)
            size = (*head, (of_values + of_keys) * columns, 2)
            self.state = torch.full(size, _NOTHING, dtype=torch.int32, device=holder.device)
        self.moments = Moments(products, sums)

    def _follow(self, holder: Summed, pads: torch.Tensor | None) -> None:
        """Add what became complete by PyTorch: rows that count the same groups together."""
        assert self.moments is not None and self.state is not None
        if not holder.lasting:
            self.restart()
        end, batch = holder.length // GROUP, holder.batch
        begins = [0] * batch if pads is None else first_groups(pads).tolist()
        alike: dict[tuple[int, int], list[int]] = {}
        for row, (begin, (counted, done)) in enumerate(zip(begins, self.state[:, 0, 0].tolist(), strict=True)):
            if counted != begin:
                alike.setdefault((begin, _NOTHING), []).append(row)
            elif done < end:
                alike.setdefault((begin, done), []).append(row)
        for (begin, done), rows in alike.items():
            some = slice(None) if len(rows) == batch else torch.tensor(rows, device=holder.device)
            moments = Moments(*(x[some] for x in self.moments))
            if done == _NOTHING:
                moments = Moments(*(torch.zeros_like(x) for x in moments))
            for first in range(max(begin, done), end, _AT_ONCE):
                last = min(first + _AT_ONCE, end)
                k, v = holder.groups(first, last)
                moments = add_groups(moments, k[some], v[some], 0, last - first)
            for to, x in zip(self.moments, moments, strict=True):
                to[some] = x
            self.state[some] = torch.tensor([begin, max(begin, end)], dtype=torch.int32, device=holder.device)

    def restart(self) -> None:
        """Add all groups anew the next time: some hold other tokens now."""
        if self.state is not None:
            self.state.fill_(_NOTHING)

    def cut(self, before: int, after: int) -> None:
        """Of ``before`` tokens the first ``after`` are left, or are taken as all there are."""
        if after // GROUP < before // GROUP:
            self.restart()

    @torch.no_grad()
    def select(self, indices: torch.Tensor) -> None:
        """Batch rows that ``indices`` name, int64 or bool; buffers stay where they are if the batch stays as large."""
        if self.moments is None or self.state is None:
            return
        rows = indices.to(self.state.device)
        with torch.inference_mode(False):
            chosen = [x[rows] for x in (*self.moments, self.state)]
        if chosen[0].shape == self.moments.products.shape:
            for to, x in zip((*self.moments, self.state), chosen, strict=True):
                to.copy_(x)
        else:
            self.moments, self.state = Moments(*chosen[:2]), chosen[2]

    def move(self, device: torch.device | str) -> None:
        """Move all buffers to ``device``, without waiting."""
        if self.moments is None or self.state is None:
            return
        with torch.inference_mode(False):
            self.moments = Moments(*(x.to(device, non_blocking=True) for x in self.moments))
            self.state = self.state.to(device, non_blocking=True)

    def nbytes(self) -> int:
        """Bytes of the buffers."""
        if self.moments is None or self.state is None:
            return 0
        return sum(x.untyped_storage().nbytes() for x in (*self.moments, self.state))


def _check_pads(holder: Summed, pads: torch.Tensor | None) -> None:
    if pads is None:
        return
    check_memory("pads", pads)
    require(tuple(pads.shape) == (holder.batch,), "pads.shape", tuple(pads.shape), f"[{holder.batch}]")
    require(pads.dtype == torch.int32, "pads.dtype", pads.dtype, "torch.int32")
    require(pads.is_contiguous(), "pads.stride()", pads.stride(), "a contiguous tensor")
    require(pads.device == holder.device, "pads.device", str(pads.device), f"the cache's {holder.device}")
