"""Layers of a cache whose keys and values stay in place, with the index that fast exact decoding needs beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from ..storage.buffer import joined
from ..storage.in_place import KeyValues
from .holding import HoldingLayer, tokens_left

#: widths of keys that codes are scored in
CODED_DIMS = (64, 128, 256)


def index_for(k: torch.Tensor, index: str) -> tuple[str, str]:
    """The index that keys ``[B, Hkv, n, D]`` get where ``index`` is asked for, and why it is another."""
    if index == "codes" and k.shape[3] not in CODED_DIMS:
        return "bounds", f"keys of {k.shape[3]} numbers have no codes: no kernel scores by them"
    return index, ""


class InPlaceLayer(HoldingLayer):
    """A layer that holds keys and values of all tokens in place, with an ``index`` (``"codes"`` or ``"bounds"``)."""

    index: str
    kv: KeyValues | None = None

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """The keys ``[B, Hkv, N, D]``, a view; None before anything was written."""
        return None if self.kv is None else self.kv.views()[0]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """The values ``[B, Hkv, N, Dv]``, a view; None before."""
        return None if self.kv is None else self.kv.views()[1]

    @property
    def index_reason(self) -> str:
        """Why there are no codes where they were asked for; empty otherwise."""
        return "" if self.kv is None else self.kv.reason

    def _new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValues:
        index, reason = index_for(key_states, self.index)
        return KeyValues(self.shared, key_states, value_states, index=index, room=self.room, reason=reason)

    @torch.compiler.disable(reason="a compiler would specialise on every length")
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, Hkv, n, D]`` keys and ``[B, Hkv, n, Dv]`` values; views of all that are stored.

        Whether they are finite is left to attention, as looking at them would wait for the device. What is returned is
        a view of what is stored: it changes when tokens are reordered, or cropped and others appended.

        Raises:
            ValueError: on a change of dtype, device or shape. The cache is then unchanged.
        """
        self._append(key_states, value_states)
        assert self.kv is not None
        return self._tell(*self.kv.views())


class InPlaceWindowLayer(InPlaceLayer, DynamicSlidingWindowLayer):
    """A layer that holds the newest tokens, as many as a sliding window needs, in a buffer of fixed size.

    What transformers asks is answered as by its own layer. While the past is recorded (:meth:`activate_past_recording`,
    for assisted decoding) all tokens since then are held beside it, so that they can be cropped.
    """

    past: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def cumulative_length(self) -> int:  # type: ignore[override]
        """Tokens that the layer has seen."""
        return self.get_seq_length()

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """The keys that a next token looks back to, or all that are recorded; None before anything was written."""
        return None if self.kv is None else self._before()[0]

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """The values of the same tokens; None before."""
        return None if self.kv is None else self._before()[1]

    def _new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> KeyValues:
        return KeyValues(self.shared, key_states, value_states, window=self.sliding_window)

    def _before(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.kv is not None
        return self.past or self.kv.newest(self.sliding_window - 1)

    @torch.compiler.disable(reason="a compiler would specialise on every length")
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`InPlaceLayer.update`; what the new tokens may see, a view if it lies in one piece."""
        kv = self._place_for(key_states, value_states)
        self._hold(kv)
        if not self.record_past:
            self.past = None
        states, seen = (key_states, value_states), self.sliding_window - 1 + key_states.shape[2]
        # Where a window starts to slide, what its first new tokens see is overwritten.
        apart = self.record_past or kv.slides(key_states.shape[2])
        if apart:
            with torch.no_grad():
                k, v = (joined([x, new], 2) for x, new in zip(self._before(), states, strict=True))
        kv.append(key_states, value_states)
        if self.record_past:
            self.past = k, v
        if apart:
            return k[:, :, -seen:], v[:, :, -seen:]
        return self._tell(*kv.newest(seen))

    def reset(self) -> None:
        super().reset()
        self.past = None

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens; once the window slides only while the past is recorded.

        Raises:
            ValueError: for a positive number, or more tokens than are stored.
            RuntimeError: if what comes before is not held any more.
        """
        if self.kv is None:
            return
        length = tokens_left(self.kv.length, tokens_to_remove)
        window, sliding = self.sliding_window, self.kv.length >= self.sliding_window
        if sliding and not self.record_past:
            raise RuntimeError(
                "crop: the window is full, and what came before it is dropped; call activate_past_recording() before"
            )
        if not sliding:
            self.kv.crop(length)
        elif tokens_to_remove:
            k, v = (x[:, :, : x.shape[2] + tokens_to_remove].clone() for x in self.past or self.kv.views())
            if k.shape[2] < min(length, window - 1):
                raise RuntimeError(f"crop: only the newest {k.shape[2] - tokens_to_remove} tokens are held")
            self.kv.refill(k, v, length)
        if self.past is not None:
            kept = (x[:, :, : x.shape[2] + tokens_to_remove] for x in self.past)
            self.past = tuple(x[:, :, -(window - 1) :] if sliding else x for x in kept)  # type: ignore[assignment]

    def _change(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.past is not None:
            self.past = f(self.past[0]), f(self.past[1])

    def _select(self, indices: torch.Tensor) -> None:
        super()._select(indices)
        self._change(lambda x: x[indices.to(x.device)])

    def offload(self) -> None:
        super().offload()
        self._change(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._change(lambda x: x.to(self.device, non_blocking=True))
