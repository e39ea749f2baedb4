"""Layers of a cache that hold keys and values of all tokens quantised.

Keys have outlier *channels*, so a scale belongs to one channel over 128 tokens; values fare better so, too. Tokens of
the newest, incomplete group wait in the model's dtype until 128 are there, and are counted: below one group the cache
is lossless. Every dequantised number is exact in bfloat16: qaxis/storage/grid.py says why. ``update`` returns what is
*stored*, dequantised, also to the forward pass that just wrote it: a perplexity measured on this cache reads the
quantised numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from ..storage.formats import Format
from ..storage.in_place_quantised import StoredKeyValues
from ..storage.lazy import LazyTensor, dequantized
from ..storage.side import Side
from .holding import HoldingLayer


class QuantizedLayer(HoldingLayer):
    """A layer of :class:`~qaxis.Int8Cache` that holds keys and values of all tokens, in a ``format``."""

    format: Format
    kv: StoredKeyValues | None = None

    @property
    def sides(self) -> tuple[Side, ...]:
        """Keys and values as they are stored; nothing before anything was written."""
        return () if self.kv is None else self.kv.sides

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """The stored keys ``[B, Hkv, N, D]``, dequantised anew at every look; None before anything was written."""
        return dequantized(self.sides[0].stored()) if self.sides else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """The stored values ``[B, Hkv, N, Dv]``, dequantised anew at every look; None before."""
        return dequantized(self.sides[1].stored()) if self.sides else None

    def _new(self, key_states: torch.Tensor, value_states: torch.Tensor) -> StoredKeyValues:
        return StoredKeyValues(self.shared, key_states, value_states, self.format, self.room)

    @torch.compiler.disable(reason="quantising is eager: a compiler would specialise on every length of the buffers")
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, lazy: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, Hkv, n, D]`` keys and ``[B, Hkv, n, Dv]`` values; return all stored ones, without gradient.

        With ``lazy`` they pass for tensors, ``[B, Hkv, N, D]`` and ``[B, Hkv, N, Dv]`` in the dtype they came in, and
        are dequantised when an operation other than qaxis's own attention reads them.

        Raises:
            ValueError: on NaN or Inf, or on a change of dtype, device or shape. The cache is then unchanged. On a GPU
                NaN and Inf are noted instead, as looking at them would wait for it: :meth:`Int8Cache.check_finite`,
                cropping and saving refuse them.
        """
        self._append(key_states, value_states)
        stored = (LazyTensor(side.stored()) for side in self.sides)
        keys, values = stored if lazy else (x.dequantized() for x in stored)
        return self._tell(keys, values)

    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` in the model's dtype."""
        keys, values = (side.dequantized() for side in self.sides)
        return keys, values


class QuantizedIndexedLayer(DynamicIndexedLayer, QuantizedLayer):
    """The same with an indexer's keys beside it (DeepSeek V3.2, GLM MoE DSA), which stay in full."""

    savable = False


class QuantizedHybridLayer(LinearAttentionAndFullAttentionLayer, QuantizedLayer):  # type: ignore[misc, override]
    """The same with a recurrent state beside it (Falcon-H1, Zamba 2), which stays in full."""

    savable = False

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # Keys and values come by position, states by name.
        (QuantizedLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def offload(self) -> None:
        LinearAttentionLayer.offload(self)
        QuantizedLayer.offload(self)

    def prefetch(self) -> None:
        LinearAttentionLayer.prefetch(self)
        QuantizedLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        QuantizedLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        QuantizedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        QuantizedLayer.crop(self, tokens_to_remove)


#: by the layer that transformers makes, the one that takes its place; all others stay
QUANTIZED: dict[type, type[QuantizedLayer]] = {
    DynamicLayer: QuantizedLayer,
    DynamicIndexedLayer: QuantizedIndexedLayer,
    LinearAttentionAndFullAttentionLayer: QuantizedHybridLayer,
}
