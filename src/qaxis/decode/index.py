"""The index of given keys, made at once; a cache keeps the same beside its keys as it grows (``storage.in_place``)."""

from __future__ import annotations

from functools import reduce

import torch

from ..arithmetic.fast_scores import UPWARD, largest_norm, norms, over_roots
from ..storage.grid import Grid
from ..storage.key_index import GROUP_SIZES, KeyIndex, check_codes, largest_scales, whole_groups
from ..storage.lazy import checked_tensor, stored_or_tensor
from ..storage.side import Side, Stored
from ..storage.triton import readable
from ..validation import check_flag, require

__all__ = ["AT_ONCE", "GROUP_SIZES", "KeyIndex", "check_codes", "index_cache", "index_keys"]

#: keys that are quantised, or looked at, at once: more of them take fewer steps, and memory for float64 copies
AT_ONCE = 1 << 14


def index_keys(k: torch.Tensor, *, codes: bool = False) -> KeyIndex:
    """Index of keys ``k [B, Hkv, N, D]``; with ``codes`` it holds half of a bfloat16 key more, and scores faster.

    Args:
        k: float32, float16 or bfloat16, of any strides. Whether its numbers are finite is left to the caller. What the
            ``update`` of a quantised cache returns is dequantised: :func:`index_cache` is the index of its codes.
        codes: whether to keep 8-bit codes of the keys beside their bounds.

    Raises:
        ValueError: naming ``k``, on another type, layout, dtype or shape; or ``codes``.
    """
    k = checked_tensor("k", k, 4)
    check_flag("codes", codes)
    norm = _largest_norm(k)
    zero = torch.zeros_like(norm)
    if not codes:
        return KeyIndex(norm, zero, torch.zeros(*norm.shape, k.shape[3], dtype=torch.float32, device=k.device))
    side = Side(k, Grid(), room=k.shape[2])
    for part in k.split(AT_ONCE, dim=2):
        side.prepare(part)()
    stored = side.stored()
    whole = stored.codes.shape[2]
    residuals, scaled = (zero[:, :, None].repeat(1, 1, whole // stored.grid.tokens) for _ in range(2))
    for start in range(0, whole, AT_ONCE):
        some = slice(start, min(start + AT_ONCE, whole))
        groups = slice(start // stored.grid.tokens, some.stop // stored.grid.tokens)
        left_out = k[:, :, some].float() - whole_groups(stored, some)
        over = over_roots(left_out, stored.scales[:, :, groups], stored.grid.tokens)
        for found, x in ((residuals, left_out), (scaled, over)):
            found[:, :, groups] = norms(x).unflatten(2, (-1, stored.grid.tokens)).amax(3)
    residual = residuals.amax(2) if whole else zero
    return KeyIndex((norm + residual) * UPWARD, residual, largest_scales(stored), stored, scaled)


def index_cache(stored: Stored) -> KeyIndex:
    """Index of keys that are an 8-bit cache themselves: the codes are the keys, nothing is left out.

    Args:
        stored: the keys ``[B, Hkv, N, D]`` of a layer, 8 bits per channel, of float32 or bfloat16, or what the
            ``update`` of such a cache returned for them. The index is of this state: once the cache has grown, make
            another. Whether its numbers are finite is left to the caller.

    Raises:
        ValueError: naming ``stored``, for a tensor, parts that do not fit, or a format that no kernel scores by.
    """
    stored = stored_or_tensor(stored)
    check_codes("stored", stored)
    require(readable(stored), "stored.dtype", stored.dtype, "torch.float32 or torch.bfloat16, which hold every number")
    n = stored.codes.shape[2]
    norm = largest_norm(stored.first)
    if stored.newest is not None:
        norm = torch.maximum(norm, largest_norm(stored.newest))
    for start in range(0, n, AT_ONCE):
        norm = torch.maximum(norm, largest_norm(whole_groups(stored, slice(start, min(start + AT_ONCE, n)))))
    return KeyIndex(norm, torch.zeros_like(norm), largest_scales(stored), stored)


def _largest_norm(k: torch.Tensor) -> torch.Tensor:
    return reduce(torch.maximum, map(largest_norm, k.split(AT_ONCE, dim=2)))
