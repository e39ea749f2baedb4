"""What a decode step was made for, and whether what it is given fits that and itself: by form, never by the numbers.

It does not wait for a device, so a step can be captured in a CUDA graph. Arguments of an :func:`outline` that passed
once are not checked again: then it costs microseconds on the host.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from ..storage.lazy import ReadOnlyTensor, dequantized, stored_or_tensor
from ..storage.side import Stored
from ..storage.triton import readable
from ..validation import MOST_KEYS, check_form, check_like, check_shapes, has_memory, is_integer, require
from .index import KeyIndex

#: keys or values ``[B, Hkv, N, D]``
Numbers: TypeAlias = torch.Tensor | Stored
#: positions in a row are 32-bit numbers in the kernels, padding and the last round of a loop included
MOST_POSITIONS = MOST_KEYS - (1 << 22)


def device_of(device: torch.device | str) -> torch.device:
    """``device`` with its number, as tensors there have it.

    Raises:
        ValueError: for another device than a CPU or a GPU that is there.
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError):
        found = None
    allowed = found is not None and found.type in ("cpu", "cuda")
    require(allowed, "device", str(device), "'cpu', or a 'cuda' device that this machine has")
    assert found is not None
    return found


def _outline(x: object) -> object:
    if isinstance(x, torch.Tensor):
        if x.is_nested or x.is_neg() or not (x.numel() == 0 or has_memory(x)):
            # Like nothing else: checked, and refused, each time.
            return object()
        return x.shape, x.dtype, x.device, x.stride(), x.data_ptr() % 16
    if isinstance(x, Stored):
        return x.grid, x.dtype, x.dim, x.width, *map(_outline, (x.codes, x.scales, x.first, x.zeros, x.newest))
    if isinstance(x, KeyIndex):
        return tuple(map(_outline, (x.norm, x.residual, x.largest_scales, x.codes, x.scaled_residuals)))
    return type(x)


def outline(q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex) -> Hashable:
    """Form, strides and alignment of every argument: equal outlines are allowed, and run, alike."""
    same = isinstance(k, Stored) and isinstance(index, KeyIndex) and index.is_of(k)
    return *map(_outline, (q, k, v, index)), same


def _layout(x: object) -> object:
    if isinstance(x, torch.Tensor):
        batches, heads, tokens, dim = x.shape
        return batches, heads, min(tokens, 2), dim, x.dtype, x.stride(), x.data_ptr() % 16
    if isinstance(x, Stored):
        return x.grid, x.dtype, x.first.shape[2], *map(_layout, (x.codes, x.scales, x.first, x.newest))
    return None


def layout(q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex) -> Hashable:
    """How the arguments lie, whatever number of tokens they have: what a kernel can read is decided by it."""
    alike = isinstance(k, Stored) and isinstance(v, Stored) and k.codes.shape[2] == v.codes.shape[2]
    return *map(_layout, (q, k, v, index.codes)), alike, index.largest_scales.data_ptr() % 16


def readable_of(k: Any, v: Any, index: object) -> tuple[Any, Any]:
    """Keys and values as a step reads them: of what a cache returned the codes, or its numbers if they do not serve."""
    if not isinstance(k, ReadOnlyTensor) and not isinstance(v, ReadOnlyTensor):
        return k, v
    keys, values = stored_or_tensor(k), stored_or_tensor(v)
    if isinstance(k, ReadOnlyTensor) and isinstance(keys, Stored):
        indexed = isinstance(index, KeyIndex) and index.is_of(keys)
        keys = keys if indexed and readable(keys) else dequantized(keys)
    if isinstance(v, ReadOnlyTensor) and isinstance(values, Stored):
        values = values if readable(values) else dequantized(values)
    return keys, values


def _check_numbers(name: str, x: Numbers) -> None:
    if not isinstance(x, Stored):
        check_form(name, x, 4)
        return
    x.check_form(name)
    what = f"{x.grid.bits} bits of {x.dtype}"
    require(readable(x), name, what, "a tensor, or a cache of 8 bits of float32 or bfloat16: dequantise it first")


@dataclass(frozen=True)
class MadeFor:
    """The sizes B, H, N, D of a step, the keys every query keeps at most, and the device.

    Raises:
        ValueError: naming the size that is not allowed.
    """

    batch: int
    heads: int
    n: int
    head_dim: int
    k_eff: int
    device: torch.device

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "n", "head_dim"):
            size = getattr(self, name)
            most = MOST_POSITIONS if name == "n" else MOST_KEYS
            require(is_integer(size) and 1 <= size <= most, name, size, f"an integer in 1..{most}")
        allowed = is_integer(self.k_eff) and 1 <= self.k_eff <= self.n
        require(allowed, "k_eff", self.k_eff, f"an integer in 1..{self.n}, the number of keys")

    def check(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, *, shorter: bool = False) -> None:
        """Check that everything fits: ``q [B, H, 1, D]``, ``k [B, Hkv, N, D]``, ``v [B, Hkv, N, Dv]``.

        Keys and values may be ``shorter`` than the room N where rows say how many of them are seen.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        check_form("q", q, 4)
        for i, size in enumerate((self.batch, self.heads, 1, self.head_dim)):
            why = "one query a head, as in decoding" if i == 2 else "for which this was made"
            require(q.shape[i] == size, f"q.shape[{i}]", q.shape[i], f"{size}: {why}")
        require(q.device == self.device, "q.device", str(q.device), f"{self.device}, for which this was made")
        _check_numbers("k", k)
        _check_numbers("v", v)
        fits, bound = (k.shape[2] <= self.n, "at most ") if shorter else (k.shape[2] == self.n, "")
        require(fits, "k.shape[2]", k.shape[2], f"{bound}{self.n}, for which this was made")
        check_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape))
        for name, x in (("k", k), ("v", v)):
            check_like(name, x, q)  # type: ignore[arg-type]
        require(isinstance(index, KeyIndex), "index", type(index).__name__, "what index_keys or index_cache return")
        index.check_form(k)
