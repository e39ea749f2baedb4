"""Key/value caches, as transformers' ``Cache``: in place with an index beside the keys, and quantised.

Their layers are those that transformers itself would make; what holds keys and values of all tokens, and in place those
of a window, is replaced by a layer of the same kind. Chunks, recurrent states and shared layers stay what they are.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..storage.formats import FORMATS, Format
from ..storage.shared import Shared
from ..validation import is_integer, require
from . import cache_file
from .holding import HoldingLayer, holds_nothing
from .in_place import InPlaceLayer, InPlaceWindowLayer
from .quantised import QUANTIZED, QuantizedLayer
from .settings import NAME

#: attention implementations that may be handed lazy tensors: ours reads the codes, the others ask for the numbers by
#: ordinary operations. Any other one gets the numbers: a compiler or a foreign kernel may look for memory.
_READ_LAZILY = (NAME, "sdpa", "eager")


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


def _not_capturable(layer: Any) -> str:
    """Why a step over this layer cannot be captured; empty if it can."""
    if not isinstance(layer, HoldingLayer):
        return f"is a {type(layer).__name__} that is not in place"
    if not layer.savable:
        return "holds more than keys and values"
    if layer.kv is None or not layer.kv.length:
        return "is empty"
    if not layer.kv.capturable:
        return "quantises with PyTorch, which waits for the host"
    # Of codes that no kernel reads a graph would dequantise as many as there were when it was captured.
    unread = isinstance(layer, QuantizedLayer) and not layer.kv.quantised
    return "is dequantised for every token" if unread else ""


class InPlaceCache(DynamicCache):
    """What :class:`Cache` and :class:`Int8Cache` have in common: layers that transformers would make, some replaced.

    Attributes:
        shared: the clock, and what else layers share (:class:`qaxis.storage.shared.Shared`).
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

    # What inference mode makes could not be written to outside of it, a copy of a cache as little as a cache.

    def __deepcopy__(self, memo: dict[int, Any]) -> InPlaceCache:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        with torch.inference_mode(False):
            vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    def __setstate__(self, state: dict[str, Any]) -> None:
        if torch.is_inference_mode_enabled():
            # Its tensors are made already.
            with torch.inference_mode(False):
                state = copy.deepcopy(state)
        vars(self).update(state)

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

    def not_capturable(self) -> str:
        """Why a step over this cache cannot be captured in a graph; empty if it can."""
        if self.offloading:
            return "the cache is offloaded"
        for i, layer in enumerate(self.layers):
            if not holds_nothing(layer) and (why := _not_capturable(layer)):
                return f"layer {i} of the cache {why}"
        holders = self.shared.holders
        if not holders:
            return "no layer of the cache holds keys"
        if len({holder.device for holder in holders}) > 1:
            return "layers of the cache are on several devices"
        return "layers of the cache have different lengths" if len({x.length for x in holders}) > 1 else ""

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
        room: allocate for so many tokens at once instead of growing. A dense layer's token reads all of it.
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
                self.layers[i] = place(layer, self.shared, room, told=not offloading, index=index)  # type: ignore[arg-type]

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
            if type(layer) in QUANTIZED:
                place = QUANTIZED[type(layer)].in_place_of
                self.layers[i] = place(layer, self.shared, room, told=not offloading, format=self.format)  # type: ignore[arg-type]
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
