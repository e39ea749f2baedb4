"""Triton: append one token to an 8-bit cache in place, and to the index of its keys, in one launch a layer.

A token of a group that is not complete waits in full; the one that completes it has it quantised. The number of tokens
is read from device memory. The bits are those of ``side.py`` and of ``decode.index_cache``; a launch that is repeated
at the same clock changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from ..arithmetic.reference import next_power_of_two
from ..arithmetic.triton import check_device, jit, log2, tl, widen
from .append import TILE_ELEMENTS, codes_of, exponents_of, norms_of
from .bounds import GROUP
from .triton import power_of_two

_GROUP = tl.constexpr(GROUP)


@jit
def _rows(new, newest, first, g, r, sinks, d, dim, new_d, ROWS: tl.constexpr):
    """Tokens of group ``g`` from its ``r``-th on as what is quantised, float32 [ROWS, DIM]; the last is the new one.

    A first token that stays in full must not widen the scales: the neighbour of the last such one stands in for it.
    """
    place = r + tl.arange(0, ROWS)
    place = tl.where((g == 0) & (place < sinks), sinks, place)
    inside, fresh = (d < dim)[None, :], (place == _GROUP - 1)[:, None]
    x = tl.load(newest + place.to(tl.int64)[:, None] * dim + d[None, :], mask=inside & ~fresh, other=0.0)
    late = tl.load(new + (place * 0).to(tl.int64)[:, None] + d[None, :] * new_d, mask=inside & fresh, other=0.0)
    return widen(tl.where(fresh, late, x))


@jit
def _complete(
    new, newest, first, codes, scales, g, sinks, dim, new_d, largest_number,
    ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """Write the codes of group ``g``; (bound on the numbers that they stand for, scales [DIM])."""
    d = tl.arange(0, DIM).to(tl.int64)
    largest = tl.zeros((DIM,), tl.float32)
    for r in range(0, _GROUP, ROWS):
        x = _rows(new, newest, first, g, r, sinks, d, dim, new_d, ROWS)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    exponent = exponents_of(largest)
    tl.store(scales + g.to(tl.int64) * dim + d, exponent.to(tl.int8), mask=d < dim)
    longest = 0.0
    for r in range(0, _GROUP, ROWS):
        x = _rows(new, newest, first, g, r, sinks, d, dim, new_d, ROWS)
        code = codes_of(x, exponent[None, :], largest_number)
        place = (g * _GROUP + r + tl.arange(0, ROWS)).to(tl.int64)[:, None] * dim + d[None, :]
        tl.store(codes + place, code.to(tl.int32).to(tl.int8), mask=(d < dim)[None, :])
        stands_for = code * power_of_two(exponent)[None, :]
        longest = tl.maximum(longest, tl.max(norms_of(stands_for, ROWS, DIM, LOG_DIM), 0))
    return longest, power_of_two(exponent)


@jit
def _longest_of(norms, first, g, sinks, dim, DIM: tl.constexpr, LOG_DIM: tl.constexpr, MANY: tl.constexpr):
    """The largest bound of the groups before ``g`` and of the first tokens."""
    d = tl.arange(0, DIM).to(tl.int64)
    found = 0.0
    for start in range(0, g, MANY):
        i = start + tl.arange(0, MANY)
        found = tl.maximum(found, tl.max(tl.load(norms + i, mask=i < g, other=0.0), 0))
    for i in range(0, sinks):
        x = widen(tl.load(first + i * dim + d, mask=d < dim, other=0.0))
        found = tl.maximum(found, tl.max(norms_of(x[None, :], 1, DIM, LOG_DIM), 0))
    return found


@jit
def _append_side(
    end, new, first, newest, codes, scales, broken, norms, norm, largest_scales, head, heads, dim, room, sinks,
    largest_number, new_b, new_h, new_d,
    INDEX: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    groups = room // _GROUP
    new = new + (head // heads) * new_b + (head % heads) * new_h
    first, newest = first + head * sinks * dim, newest + head * _GROUP * dim
    codes, scales, norms = codes + head * room * dim, scales + head * groups * dim, norms + head * groups
    d = tl.arange(0, DIM).to(tl.int64)
    t = end - 1
    g, place = t // _GROUP, t % _GROUP
    x = tl.load(new + d * new_d, mask=d < dim, other=0.0)
    tl.store(first + t.to(tl.int64) * dim + d, x, mask=(d < dim) & (t < sinks))
    tl.store(newest + place.to(tl.int64) * dim + d, x, mask=(d < dim) & (place < _GROUP - 1))
    wide = widen(x)
    odd = tl.sum((~(tl.abs(wide) < float("inf"))).to(tl.int32), 0)
    tl.store(broken, 1, mask=odd > 0)
    if place == _GROUP - 1:
        longest, scale = _complete(
            new, newest, first, codes, scales, g, sinks, dim, new_d, largest_number, ROWS, DIM, LOG_DIM
        )
        if INDEX:
            tl.store(norms + g, longest)
            tl.store(norm + head, tl.maximum(longest, _longest_of(norms, first, g, sinks, dim, DIM, LOG_DIM, 128)))
            at = largest_scales + head * dim + d
            tl.store(at, tl.maximum(tl.load(at, mask=d < dim, other=0.0), scale), mask=d < dim)
    else:
        if INDEX:
            found = tl.max(norms_of(wide[None, :], 1, DIM, LOG_DIM), 0)
            tl.store(norm + head, tl.maximum(tl.load(norm + head), found))


@jit
def _append_kernel(
    clock, k_new, k_first, k_newest, k_codes, k_scales, v_new, v_first, v_newest, v_codes, v_scales,
    broken, norms, norm, largest_scales, programs, heads, dim, dim_v, room, sinks, largest_k, largest_v,
    k_b, k_h, k_d, v_b, v_h, v_d,
    INDEX: tl.constexpr, ROWS: tl.constexpr, ROWS_V: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
    DIM_V: tl.constexpr, LOG_DIM_V: tl.constexpr,
):  # fmt: skip
    """The new token of one head: the first half of the programs takes keys, the other values."""
    end = tl.load(clock)
    head = tl.program_id(0).to(tl.int64)
    if head < programs:
        _append_side(
            end, k_new, k_first, k_newest, k_codes, k_scales, broken, norms, norm, largest_scales, head, heads, dim,
            room, sinks, largest_k, k_b, k_h, k_d, INDEX, ROWS, DIM, LOG_DIM,
        )  # fmt: skip
    else:
        _append_side(
            end, v_new, v_first, v_newest, v_codes, v_scales, broken, norms, norm, largest_scales, head - programs,
            heads, dim_v, room, sinks, largest_v, v_b, v_h, v_d, False, ROWS_V, DIM_V, LOG_DIM_V,
        )  # fmt: skip


def append(kv: Any, clock: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Append one token, ``k [B, Hkv, 1, D]`` and ``v [B, Hkv, 1, Dv]``, any strides, as the clock says.

    Args:
        kv: the :class:`~qaxis.storage.in_place_quantised.StoredKeyValues`, with room for it.
        clock: int32 ``[1]``.
    """
    check_device("k", k)
    batch, heads, _, dim = k.shape
    parts = [[side.parts[name].buffer for name in ("first", "newest", "codes", "scales")] for side in kv.sides]
    dims = [next_power_of_two(x.shape[3]) for x in (k, v)]
    rows = [min(GROUP, max(1, TILE_ELEMENTS // x)) for x in dims]
    with torch.cuda.device_of(k):
        _append_kernel[(2 * batch * heads,)](
            clock, k, *parts[0], v, *parts[1], kv.broken, kv.norms.buffer, kv.norm, kv.largest_scales,
            batch * heads, heads, dim, v.shape[3], parts[0][2].shape[2], kv.format.sinks,
            torch.finfo(k.dtype).max, torch.finfo(v.dtype).max,
            *(x.stride(i) for x in (k, v) for i in (0, 1, 3)), INDEX=kv.quantised, ROWS=rows[0], ROWS_V=rows[1],
            DIM=dims[0], LOG_DIM=log2(dims[0]), DIM_V=dims[1], LOG_DIM_V=log2(dims[1]), enable_fp_fusion=False,
        )  # fmt: skip
