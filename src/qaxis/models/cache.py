"""The quantised key/value cache, as a transformers ``Cache``.

Keys have outlier *channels*, so a scale belongs to one channel over 128 tokens; values fare better so, too. Tokens
of the newest, incomplete group wait in the model's dtype until 128 are there, and are counted. Every dequantised
number is exact in bfloat16: qaxis/storage/grid.py says why.

``update`` returns what is *stored*, dequantised, also to the forward pass that just wrote it: a perplexity
measured on this cache reads the quantised numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..storage.formats import FORMATS, Format
from ..storage.lazy import LazyTensor
from ..storage.side import Side
from ..validation import check_finite, check_form, is_integer, require
from . import cache_file


class QuantizedLayer(DynamicLayer):
    """One layer of :class:`Int8Cache`."""

    def __init__(self, format: Format, room: int = 0) -> None:
        super().__init__()
        self.format, self.room = format, room
        self.sides: tuple[Side, ...] = ()

    def _empty(self, states: tuple[torch.Tensor, ...]) -> tuple[Side, ...]:
        grids = (self.format.keys, self.format.values)
        return tuple(Side(x, grid, self.format.sinks, self.room) for x, grid in zip(states, grids, strict=True))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.sides, self.is_initialized = self._empty((key_states, value_states)), True

    @torch.compiler.disable(reason="quantising is eager: a compiler would specialise on every length of the buffers")
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, Hkv, n, D]`` keys and values; return all stored ones.

        They pass for tensors ``[B, Hkv, N, D]`` in the model's dtype, and are dequantised when an operation other
        than qaxis's own attention reads them.

        Raises:
            ValueError: on NaN or Inf, or on a change of dtype, device or shape. The cache is then unchanged.
        """
        check_form("key_states", key_states, 4)
        check_form("value_states", value_states, 4)
        same = key_states.shape[:3] == value_states.shape[:3]
        require(same, "value_states.shape", tuple(value_states.shape), f"that of key_states {tuple(key_states.shape)}")
        if not self.is_initialized:
            sides = self._empty((key_states, value_states))
        else:
            sides = self.sides
            require(key_states.dtype == self.dtype, "key_states.dtype", key_states.dtype, f"the cache's {self.dtype}")
            here = key_states.device == self.device
            require(here, "key_states.device", str(key_states.device), f"the cache's {self.device}")
            for name, x, side in zip(("key_states", "value_states"), (key_states, value_states), sides, strict=True):
                batch, heads = side.parts["codes"].buffer.shape[:2]
                fits = (*x.shape[:2], x.shape[3]) == (batch, heads, side.dim)
                require(fits, f"{name}.shape", tuple(x.shape), f"the cache's [{batch}, {heads}, n, {side.dim}]")
        # One wait for the device instead of two, which a decoding step would feel.
        if not bool(torch.isfinite(key_states).all() & torch.isfinite(value_states).all()):
            check_finite(key_states=key_states, value_states=value_states)
        commits = [side.prepare(x) for side, x in zip(sides, (key_states, value_states), strict=True)]
        for commit in commits:
            commit()
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.sides, self.is_initialized = sides, True
        keys, values = (LazyTensor(side.stored()) for side in self.sides)
        return keys, values

    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` in the model's dtype."""
        keys, values = (side.dequantized() for side in self.sides)
        return keys, values

    def stored_bytes(self) -> int:
        """Bytes of the storage behind this layer: codes, scales, the newest tokens in full, room for growth."""
        return sum(side.nbytes() for side in self.sides)

    def get_seq_length(self) -> int:
        return self.sides[1].length if self.is_initialized else 0

    def reset(self) -> None:
        self.sides = ()
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens (transformers passes a negative number).

        Raises:
            ValueError: for a positive number, or more tokens than are stored.
        """
        require(tokens_to_remove <= 0, "tokens_to_remove", tokens_to_remove, "0 or a negative number of tokens")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        length = self.get_seq_length() + tokens_to_remove
        require(length >= 0, "tokens_to_remove", tokens_to_remove, f"at most the {self.get_seq_length()} stored")
        for side in self.sides:
            side.crop(length)

    def _change(self, f: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for side in self.sides:
            for part in side.parts.values():
                part.change(f)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._change(lambda t: t[indices.to(t.device), ...])

    def offload(self) -> None:
        self._change(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._change(lambda t: t.to(self.device, non_blocking=True))


class Int8Cache(Cache):
    """Quantised KV cache: pass it as ``past_key_values`` to a model's forward or to ``generate()``.

    Args:
        config: the model's configuration. Sliding-window layers keep their window in full precision, as
            transformers does; other layer types are refused.
        format: ``"int8"`` (0.504 of the bfloat16 bytes), ``"int6"`` (0.383), ``"int4"`` (0.289), or a
            :class:`~qaxis.storage.formats.Format` of your own.
        room: allocate for so many tokens at once instead of growing.
        offloading: keep all layers but the one at work on the CPU, as in transformers.

    Raises:
        ValueError: for a configuration or a format that the cache cannot hold.
    """

    def __init__(
        self,
        config: Any,
        *,
        format: str | Format = "int8",
        room: int = 0,
        offloading: bool = False,
    ) -> None:
        known = isinstance(format, Format) or format in FORMATS
        require(known, "format", format, f"one of {tuple(FORMATS)}, or a qaxis.storage.formats.Format")
        require(is_integer(room) and room >= 0, "room", room, "a number of tokens, at least 0")
        self.format = format if isinstance(format, Format) else FORMATS[format]
        text = config.get_text_config(decoder=True)
        window = int(getattr(text, "sliding_window", None) or 0)
        plain = "sliding_attention" if window and not hasattr(text, "layer_types") else "full_attention"
        kinds = getattr(text, "layer_types", None) or [plain] * text.num_hidden_layers
        known = set(kinds) <= {"full_attention", "sliding_attention"}
        require(known, "config.layer_types", sorted(set(kinds)), "full_attention and sliding_attention")
        layers: list[DynamicLayer] = [
            QuantizedLayer(self.format, room)
            if kind == "full_attention"
            else DynamicSlidingWindowLayer(sliding_window=window)
            for kind in kinds
        ]
        super().__init__(layers=layers, offloading=offloading)  # type: ignore[arg-type]

    def stored_bytes(self) -> int:
        """Bytes that the cache holds, counted from the storage of its tensors."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer):
                total += layer.stored_bytes()
            elif isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None and layer.values is not None:
                total += layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file; see :func:`qaxis.models.cache_file.save`."""
        cache_file.save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any, device: torch.device | str = "cpu") -> Int8Cache:
        """Read a cache that :meth:`save` wrote; see :func:`qaxis.models.cache_file.read`."""
        about, tensors = cache_file.read(path, device)
        return cache_file.restored(path, about, tensors, lambda **f: cls(config, format=Format(**f)))
