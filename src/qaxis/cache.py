"""An INT8 key/value cache with power-of-two scales, as a transformers ``Cache``.

Keys have outlier *channels*, so their scale belongs to a channel; values do not, so theirs belongs to
a token. A scale is one signed byte, the exponent of a power of two: quantising divides exactly, and
every dequantised number is an 8-bit integer times a power of two, hence exact in bfloat16.

Layout per layer, for head_dim D and groups of G = 128 tokens:

* keys of whole groups: int8 ``[B, Hkv, n, D]`` and one exponent per group and channel;
* keys of the newest, incomplete group: bfloat16 (float16 models keep float16);
* values: int8 ``[B, Hkv, N, Dv]`` and one exponent per token and 64 channels.

``update`` returns what is *stored*, dequantised, also to the forward pass that just wrote it: a
perplexity measured on this cache reads the quantised numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from .canonical import power_of_two
from .validation import check_tensor, require

KEY_GROUP = 128
VALUE_GROUP = 64


def quantize(x: torch.Tensor, dim: int, bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise float32 ``x`` with one power-of-two scale along ``dim``.

    Returns:
        (int8 codes of x's shape, int8 exponents with ``dim`` of size 1). The scale is the smallest
        2^e with max|x| <= (2^(bits-1) - 1) * 2^e, so no code is clipped.
    """
    largest = x.abs().amax(dim=dim, keepdim=True)
    limit = 2 ** (bits - 1) - 1
    # frexp: largest = m * 2^e with m in [0.5, 1). limit < 2^(bits-1), hence the correction by one.
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - (bits - 1) + (mantissa * 2 ** (bits - 1) > limit).to(torch.int32)
    exponent = torch.where(largest > 0, exponent, 0).clamp(-126, 126)
    codes = torch.round(x * power_of_two(-exponent)).clamp(-limit, limit).to(torch.int8)
    return codes, exponent.to(torch.int8)


def dequantize(codes: torch.Tensor, exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``codes * 2^exponent`` in ``dtype``; exact in float32 and bfloat16 within their ranges."""
    return (codes.to(torch.float32) * power_of_two(exponent.to(torch.int32))).to(dtype)


class Int8Layer(DynamicLayer):
    """One layer of :class:`Int8Cache`; see the module's text for the layout."""

    def __init__(self, key_bits: int = 8, value_bits: int = 8, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.key_bits, self.value_bits = key_bits, value_bits
        self._tensors: dict[str, torch.Tensor] = {}

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, heads, _, dim = key_states.shape
        value_dim = value_states.shape[-1]
        self.value_group = VALUE_GROUP if value_dim % VALUE_GROUP == 0 else value_dim
        tail_dtype = torch.float16 if self.dtype == torch.float16 else torch.bfloat16

        def empty(tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(batch, heads, tokens, width, dtype=dtype, device=self.device)

        self._tensors = {
            "key_codes": empty(0, dim, torch.int8),
            "key_exponents": empty(0, dim, torch.int8),
            "key_tail": empty(0, dim, tail_dtype),
            "value_codes": empty(0, value_dim, torch.int8),
            "value_exponents": empty(0, value_dim // self.value_group, torch.int8),
        }
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``[B, Hkv, n, D]`` keys and values; return all stored ones, dequantised.

        Raises:
            ValueError: on NaN or Inf, or on a change of dtype or device. The cache is then unchanged.
        """
        check_tensor("key_states", key_states, 4)
        check_tensor("value_states", value_states, 4)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        require(key_states.dtype == self.dtype, "key_states.dtype", key_states.dtype, f"the cache's {self.dtype}")
        require(
            key_states.device == self.device, "key_states.device", str(key_states.device), f"the cache's {self.device}"
        )
        old = self._tensors
        tail = torch.cat([old["key_tail"], key_states.to(old["key_tail"].dtype)], dim=2)
        whole = tail.shape[2] // KEY_GROUP * KEY_GROUP
        new = dict(old)
        if whole:
            # Quantise from the incoming precision where it is at hand, from the tail where it is not.
            fresh = torch.cat([old["key_tail"].to(self.dtype), key_states], dim=2)[:, :, :whole].float()
            groups = fresh.reshape(*fresh.shape[:2], whole // KEY_GROUP, KEY_GROUP, fresh.shape[-1])
            codes, exponents = quantize(groups, 3, self.key_bits)
            new["key_codes"] = torch.cat([old["key_codes"], codes.flatten(2, 3)], dim=2)
            new["key_exponents"] = torch.cat([old["key_exponents"], exponents.squeeze(3)], dim=2)
        new["key_tail"] = tail[:, :, whole:].clone()
        split = value_states.float().unflatten(-1, (-1, self.value_group))
        codes, exponents = quantize(split, -1, self.value_bits)
        new["value_codes"] = torch.cat([old["value_codes"], codes.flatten(-2)], dim=2)
        new["value_exponents"] = torch.cat([old["value_exponents"], exponents.squeeze(-1)], dim=2)
        self._tensors = new
        return self.dequantized()

    def dequantized(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The stored keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]`` in the model's dtype."""
        t = self._tensors
        groups = t["key_codes"].unflatten(2, (-1, KEY_GROUP)) if t["key_codes"].shape[2] else None
        tail = t["key_tail"].to(self.dtype)
        if groups is None:
            keys = tail
        else:
            whole = dequantize(groups, t["key_exponents"][:, :, :, None], self.dtype).flatten(2, 3)
            keys = torch.cat([whole, tail], dim=2)
        codes = t["value_codes"].unflatten(-1, (-1, self.value_group))
        return keys, dequantize(codes, t["value_exponents"][..., None], self.dtype).flatten(-2)

    def stored_bytes(self) -> int:
        """Bytes of the storage behind this layer: codes, scales and the unquantised tail."""
        return sum(t.untyped_storage().nbytes() for t in self._tensors.values())

    def get_seq_length(self) -> int:
        return self._tensors["value_codes"].shape[2] if self.is_initialized else 0

    def reset(self) -> None:
        self._tensors = {}
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` tokens (transformers passes a negative number).

        Keys of a group that is cut open go back to the unquantised tail, with the values they had.
        """
        require(tokens_to_remove <= 0, "tokens_to_remove", tokens_to_remove, "0 or a negative number of tokens")
        length = self.get_seq_length() + tokens_to_remove
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        require(length >= 0, "tokens_to_remove", tokens_to_remove, f"at most the {self.get_seq_length()} stored")
        whole = min(length // KEY_GROUP * KEY_GROUP, self._tensors["key_codes"].shape[2])
        keys, _ = self.dequantized()
        t = self._tensors
        self._tensors = {
            "key_codes": t["key_codes"][:, :, :whole].clone(),
            "key_exponents": t["key_exponents"][:, :, : whole // KEY_GROUP].clone(),
            "key_tail": keys[:, :, whole:length].to(t["key_tail"].dtype).clone(),
            "value_codes": t["value_codes"][:, :, :length].clone(),
            "value_exponents": t["value_exponents"][:, :, :length].clone(),
        }

    def _map(self, change: Any) -> None:
        self._tensors = {name: change(t) for name, t in self._tensors.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda t: t[indices, ...])

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._map(lambda t: t.to(self.device, non_blocking=True))


class Int8Cache(Cache):
    """INT8 KV cache: pass it as ``past_key_values`` to a model's forward or to ``generate()``.

    Args:
        config: the model's configuration; models with sliding-window layers are refused.
        key_bits, value_bits: 8 by default. Smaller values store the same bytes and exist so that a
            measurement can show that it would notice a bad cache.

    Raises:
        ValueError: for a configuration or a bit width that the cache cannot hold.
    """

    def __init__(self, config: Any, *, key_bits: int = 8, value_bits: int = 8) -> None:
        for name, bits in (("key_bits", key_bits), ("value_bits", value_bits)):
            require(isinstance(bits, int) and 2 <= bits <= 8, name, bits, "an integer in 2..8")
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
        require(kinds == {"full_attention"}, "config.layer_types", sorted(kinds), "full attention in every layer")
        layers = [Int8Layer(key_bits, value_bits) for _ in range(text.num_hidden_layers)]
        super().__init__(layers=layers)  # type: ignore[arg-type]

    def stored_bytes(self) -> int:
        """Bytes that the cache holds, counted from the storage of its tensors."""
        return sum(layer.stored_bytes() for layer in self.layers)  # type: ignore[union-attr]
