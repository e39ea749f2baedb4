"""Key/value caches, as transformers' ``Cache``: in place with an index beside the keys, and quantised.

Of the quantised one: keys have outlier *channels*, so a scale belongs to one channel over 128 tokens; values fare
better so, too. Tokens of the newest, incomplete group wait in the model's dtype until 128 are there, and are counted:
below one group the cache is lossless. Every dequantised number is exact in bfloat16: qaxis/storage/grid.py says why.
``update`` returns what is *stored*, dequantised, also to the forward pass that just wrote it: a perplexity
measured on this cache reads the quantised numbers.

The layers are those that transformers itself would make; what holds keys and values of all tokens is replaced by a
layer of the same kind. Windows, chunks, recurrent states and shared layers stay what they always are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from ..storage.formats import FORMATS, Format
from ..storage.in_place import Shared
from ..storage.in_place_quantised import StoredKeyValues
from ..storage.lazy import LazyTensor, dequantized
from ..storage.side import Side
from ..validation import check_form, is_integer, require
from . import cache_file
from .in_place import KEPT, InPlaceLayer, InPlaceWindowLayer, tokens_left
from .settings import NAME

#: attention implementations that may be handed lazy tensors: ours reads the codes, the others ask for the numbers by
#: ordinary operations. Any other one gets the numbers: a compiler or a foreign kernel may look for memory.
_READ_LAZILY = (NAME, "sdpa", "eager")


class QuantizedLayer(DynamicLayer):
    """A layer of :class:`Int8Cache` that holds keys and values of all tokens, quantised."""

    shared: Shared
    format: Format
    room: int
    #: whether what is returned tells attention what holds it: not if that is elsewhere by then
    told: bool
    kv: StoredKeyValues | None = None
    #: whether keys and values are all there is to it
    savable = True

    @classmethod
    def in_place_of(
        cls, layer: DynamicLayer, shared: Shared, format: Format, room: int, *, told: bool = True
    ) -> QuantizedLayer:
        """One with all that the empty ``layer`` has, but for its keys and values."""
        new = cls.__new__(cls)
        vars(new).update({name: x for name, x in vars(layer).items() if name not in cache_file.SIDES})
        new.shared, new.format, new.room, new.told = shared, format, room, told
        return new

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

    def _empty(self, states: tuple[torch.Tensor, torch.Tensor]) -> StoredKeyValues:
        return StoredKeyValues(self.shared, states[0], states[1], self.format, self.room)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._hold(self._empty((key_states, value_states)), key_states)

    def _hold(self, kv: StoredKeyValues, key_states: torch.Tensor) -> None:
        if self.kv is not None and self.kv is not kv:
            self.kv.leave()
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv, self.is_initialized = kv, True

    def _place_for(self, key_states: torch.Tensor, value_states: torch.Tensor) -> StoredKeyValues:
        """Where these states go: what is here, or anew while nothing is stored."""
        check_form("key_states", key_states, 4)
        # Latent attention may keep all it needs in the keys, and values of no width beside them (GLM 5 Next).
        bare = isinstance(value_states, torch.Tensor) and value_states.ndim == 4 and value_states.shape[3] == 0
        check_form("value_states", key_states if bare else value_states, 4)
        same = key_states.shape[:3] == value_states.shape[:3]
        require(same, "value_states.shape", tuple(value_states.shape), f"that of key_states {tuple(key_states.shape)}")
        here = value_states.device == key_states.device
        require(here, "value_states.device", str(value_states.device), f"that of key_states, {key_states.device}")
        if self.get_seq_length() == 0:
            return self._empty((key_states, value_states))
        assert self.kv is not None
        require(
            key_states.device == self.device, "key_states.device", str(key_states.device), f"the cache's {self.device}"
        )
        self.kv.check(key_states, value_states, ("key_states", "value_states"))
        return self.kv

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
        for x in (keys, values) if self.told else ():
            setattr(x, KEPT, self.kv)
        return keys, values

    @torch.no_grad()
    def _append(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        kv = self._place_for(key_states, value_states)
        try:
            kv.append(key_states, value_states)
        except ValueError:
            if kv is not self.kv:
                kv.leave()
            raise
        self._hold(kv, key_states)

    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` in the model's dtype."""
        keys, values = (side.dequantized() for side in self.sides)
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.kv is None else self.kv.length

    def reset(self) -> None:
        if self.kv is not None:
            self.kv.leave()
        self.kv, self.is_initialized = None, False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens (transformers passes a negative number).

        Raises:
            ValueError: for a positive number, or more tokens than are stored.
        """
        if self.kv is not None:
            self.kv.crop(tokens_left(self.get_seq_length(), tokens_to_remove))

    def _select(self, indices: torch.Tensor) -> None:
        if self.kv is not None:
            self.kv.select(indices)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv is not None:
            self._select(torch.arange(self.kv.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(indices)

    def offload(self) -> None:
        if self.kv is not None:
            self.kv.move("cpu")

    def prefetch(self) -> None:
        if self.kv is not None:
            self.kv.move(self.device)


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
_QUANTIZED: dict[type, type[QuantizedLayer]] = {
    DynamicLayer: QuantizedLayer,
    DynamicIndexedLayer: QuantizedIndexedLayer,
    LinearAttentionAndFullAttentionLayer: QuantizedHybridLayer,
}


class _Readers:
    """Whether what reads the cache takes lazy tensors: asks the configurations that the cache was made with.

    A model that was enabled since reads another one: it may get numbers where it could have read codes.
    """

    def __init__(self, *configs: PreTrainedConfig) -> None:
        self.configs = configs

    def lazy(self) -> bool:
        return bool(self.configs) and all(c._attn_implementation in _READ_LAZILY for c in self.configs)

    def __deepcopy__(self, memo: Any) -> _Readers:
        return self

    def __reduce__(self) -> Any:
        # In another process there is no model to ask; ordinary tensors are right for all.
        return _Readers, ()


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    """Those that an attribute of a layer holds."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, (dict, list, tuple)):
        for each in x.values() if isinstance(x, dict) else x:
            yield from _tensors(each)


class InPlaceCache(DynamicCache):
    """What :class:`Cache` and :class:`Int8Cache` have in common: layers that transformers would make, some replaced.

    Attributes:
        shared: the clock, and what else layers share (:class:`qaxis.storage.in_place.Shared`).
    """

    #: also where every layer of a model could be: a step is captured by CUDA graphs, not compiled
    is_compileable = False

    def __init__(self, config: PreTrainedConfig, room: int, offloading: bool) -> None:
        wanted = "a model's configuration (model.config)"
        require(isinstance(config, PreTrainedConfig), "config", type(config).__name__, wanted)
        require(is_integer(room) and room >= 0, "room", room, "a number of tokens, at least 0")
        available = not offloading or torch.cuda.is_available()
        require(available, "offloading", offloading, "False where torch finds no CUDA")
        try:
            super().__init__(config=config, offloading=offloading)
        except (AttributeError, KeyError, TypeError) as error:
            kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
            about = f"{type(config).__name__} with layer_types={kinds}"
            raise ValueError(
                f"config={about}: allowed is {wanted} for which transformers knows a cache ({error!r})"
            ) from error
        self.shared = Shared()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to one layer; see the layer's ``update``."""
        require(layer_idx < len(self.layers), "layer_idx", layer_idx, f"a layer of the configuration's {len(self)}")
        kwargs |= self._told(self.layers[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _told(self, layer: Any) -> dict[str, Any]:
        """What the ``update`` of a layer is told beside the states."""
        return {}

    def reserve(self, m: int) -> None:
        """Make room for ``m`` more tokens in every layer, one after the other."""
        for layer in self.shared.layers:
            layer.reserve(m)

    def advance(self, m: int) -> None:
        """Count ``m`` tokens that a replayed graph appended to every layer: the host catches up with the device."""
        self.shared.advance(m)

    def mark(self) -> Any:
        """How far the host counted, for :meth:`rewind`."""
        return self.shared.mark()

    def rewind(self, mark: Any) -> None:
        """Count on the host as at ``mark``, where the device did nothing since, or does it again."""
        self.shared.rewind(mark)

    def not_capturable(self) -> str:
        """Why a forward pass over this cache cannot be captured in a graph; empty if it can."""
        if self.offloading:
            return "the cache is offloaded"
        for i, layer in enumerate(self.layers):
            if type(layer).__name__ == "DummyLayer":
                continue
            if not getattr(layer, "savable", False):
                return f"layer {i} of the cache is a {type(layer).__name__} that is not in place"
            kv = getattr(layer, "kv", None)
            if kv is not None and not kv.capturable:
                return f"layer {i} of the cache quantises with PyTorch"
        return ""

    def stored_bytes(self) -> int:
        """Bytes that the cache holds, counted from the storage of its tensors, room for growth included."""
        total = 0
        for layer in self.layers:
            kv = getattr(layer, "kv", None)
            total += 0 if kv is None else kv.nbytes()
            total += sum(x.untyped_storage().nbytes() for x in _tensors([*vars(layer).values()]))
        return total

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file; see :func:`qaxis.models.cache_file.save`."""
        cache_file.save(self, path)


class Cache(InPlaceCache):
    """KV cache in place, with the key index that fast exact decoding needs: pass it as ``past_key_values``.

    Every way of ``generate`` works, with any attention implementation. Nothing is concatenated: room grows by blocks.
    What ``update`` returns are views of what is stored. Whether numbers are finite is left to attention, as looking at
    them would wait for the device. Inference only.

    Args:
        config: the model's configuration. Layers that hold keys and values, of all tokens or a sliding window, are in
            place; every other kind (chunk, recurrent state, shared) is as ``DynamicCache(config=config)`` holds it.
        index: ``"codes"``: bounds and 8-bit codes of the keys (half of a bfloat16 key more); ``"bounds"``: bounds.
            Where no kernel scores by codes there are bounds, and ``index_reason`` of the layer says why.
        room: allocate for so many tokens at once instead of growing.
        offloading: keep all layers but the one at work on the CPU, as in transformers; needs CUDA.

    Raises:
        ValueError: for a configuration that the cache cannot hold, another index, or offloading without CUDA.
    """

    def __init__(
        self, config: PreTrainedConfig, *, index: str = "codes", room: int = 0, offloading: bool = False
    ) -> None:
        require(index in ("codes", "bounds"), "index", index, "'codes' or 'bounds'")
        super().__init__(config, room, offloading)
        # Chunks are held by the same layers as windows, but not seen as one.
        chunked = getattr(config.get_text_config(decoder=True), "attention_chunk_size", None) is not None
        kinds: dict[type, type[InPlaceLayer]] = {DynamicLayer: InPlaceLayer}
        if not chunked:
            kinds[DynamicSlidingWindowLayer] = InPlaceWindowLayer
        for i, layer in enumerate(self.layers):
            if type(layer) in kinds:
                place = kinds[type(layer)].in_place_of
                self.layers[i] = place(layer, self.shared, index, room, told=not offloading)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: Any, device: torch.device | str = "cpu", *, index: str = "codes"
    ) -> Cache:
        """Read a cache that :meth:`save` wrote; its index is made anew. See :func:`qaxis.models.cache_file.read`."""
        about, tensors = cache_file.read(path, device)
        return cache_file.restored(path, about, tensors, lambda _: cls(config, index=index))


class Int8Cache(InPlaceCache):
    """Quantised KV cache: pass it as ``past_key_values`` to a model's forward or to ``generate()``.

    For an encoder-decoder, ``EncoderDecoderCache(Int8Cache(config), Int8Cache(config))``, or with a ``DynamicCache``
    for either. Inference only: what it gives back carries no gradient.

    Args:
        config: the model's configuration. Layers that hold keys and values of all tokens are quantised; every other
            kind (sliding window, chunk, recurrent state, shared) is held as ``DynamicCache(config=config)`` holds it.
        format: ``"int8"`` (about 0.50 of the bfloat16 bytes), ``"int6"`` (0.38), ``"int4"`` (0.29), or a
            :class:`~qaxis.storage.formats.Format` of your own.
        room: allocate for so many tokens at once instead of growing.
        offloading: keep all layers but the one at work on the CPU, as in transformers; needs CUDA.

    Raises:
        ValueError: for a configuration or a format that the cache cannot hold, or offloading without CUDA.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        format: str | Format = "int8",
        room: int = 0,
        offloading: bool = False,
    ) -> None:
        known = isinstance(format, Format) or (isinstance(format, str) and format in FORMATS)
        require(known, "format", format, f"one of {tuple(FORMATS)}, or a qaxis.storage.formats.Format")
        super().__init__(config, room, offloading)
        self.format = format if isinstance(format, Format) else FORMATS[format]
        for i, layer in enumerate(self.layers):
            if type(layer) in _QUANTIZED:
                place = _QUANTIZED[type(layer)].in_place_of
                self.layers[i] = place(layer, self.shared, self.format, room, told=not offloading)  # type: ignore[arg-type]
        self._readers = _Readers(config, config.get_text_config(decoder=True))

    def _told(self, layer: Any) -> dict[str, Any]:
        return {"lazy": self._readers.lazy()} if isinstance(layer, QuantizedLayer) else {}

    def check_finite(self) -> None:
        """Refuse what NaN or Inf was appended to on a GPU; waits for it.

        Raises:
            ValueError: if there was one.
        """
        for layer in self.layers:
            if isinstance(layer, QuantizedLayer) and layer.kv is not None:
                layer.kv.check_finite()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file; see :func:`qaxis.models.cache_file.save`."""
        self.check_finite()
        super().save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any, device: torch.device | str = "cpu") -> Int8Cache:
        """Read a cache that :meth:`save` wrote; see :func:`qaxis.models.cache_file.read`."""
        about, tensors = cache_file.read(path, device)
        return cache_file.restored(path, about, tensors, lambda about: cls(config, format=cache_file.format_of(about)))
