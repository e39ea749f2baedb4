"""Triton: append tokens to keys and values in place, and to the index beside the keys, in one launch while decoding.

The number of tokens is read from device memory, so that a captured graph serves a cache that grows. The bits are those
of ``bounds.py``, which says what is kept. A launch that is repeated at the same clock changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..arithmetic.fast_scores import LARGEST_NORM, SMALLEST_NORM, UPWARD
from ..arithmetic.reference import ROUND_MAGIC, next_power_of_two
from ..arithmetic.triton import INTERPRETED, check_device, jit, log2, row_and_block, tl, tree_sum, widen
from .bounds import GROUP
from .triton import power_of_two, roots_of
from .triton_window import first_held

_GROUP, _LIMIT = tl.constexpr(GROUP), tl.constexpr(127)
_UPWARD, _SMALLEST, _LARGEST = tl.constexpr(UPWARD), tl.constexpr(SMALLEST_NORM), tl.constexpr(LARGEST_NORM)
_MAGIC = tl.constexpr(ROUND_MAGIC)
#: numbers of a tile: more take more registers, twice as many as they are float64 there; the interpreter likes them
TILE_ELEMENTS = 1 << 15 if INTERPRETED else 4096
#: groups that the program that finishes a prompt looks at together
GROUPS_AT_ONCE = 32


@jit
def norms_of(x, ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr):
    """Bounds on the lengths of float32 vectors, [ROWS, DIM] -> [ROWS]; as ``fast_scores.norms``."""
    wide = x.to(tl.float64)
    length = tl.sqrt(tree_sum(wide * wide, ROWS, DIM, LOG_DIM)) * _UPWARD
    inside = length <= _LARGEST
    bound = tl.maximum(tl.where(inside, length, 0.0).to(tl.float32), _SMALLEST)
    return tl.where(inside, tl.where(length > 0, bound, 0.0), float("inf"))


@jit
def exponents_of(largest):
    """Smallest e with largest <= 127 * 2^e, int32, in -126..126; 0 for zero. As ``grid.quantize`` with 8 bits."""
    bits = largest.to(tl.int32, bitcast=True)
    # 127 is 1.984375 * 2^6.
    exponent = (bits >> 23) - 127 - 6 + ((bits & 0x7FFFFF) > 0x7E0000).to(tl.int32)
    return tl.where(largest > 0, tl.minimum(tl.maximum(exponent, -126), 126), 0)


@jit
def codes_of(x, exponent, largest_number):
    """Codes of float32 numbers under 2^exponent, as float32 integers; nothing they stand for is beyond the dtype."""
    most = tl.minimum(tl.floor(largest_number * power_of_two(-tl.maximum(exponent, 0))), 127.0)
    rounded = (x * power_of_two(-exponent) + _MAGIC) - _MAGIC
    return tl.minimum(tl.maximum(rounded, -most), most)


@jit
def _copied(new, stored, t, start, place, moved, inside, d, dim, new_m, new_d, WINDOW: tl.constexpr):
    """Put tokens ``t`` of one head at their places, from ``start`` on new ones; as float32 numbers [ROWS, DIM].

    WINDOW: the others come from ``moved`` places further on.
    """
    channels = (d < dim)[None, :]
    fresh = (inside & (t >= start))[:, None] & channels
    x = tl.load(new + (t - start).to(tl.int64)[:, None] * new_m + d[None, :] * new_d, mask=fresh, other=0.0)
    rows = place.to(tl.int64)[:, None] * dim + d[None, :]
    if WINDOW:
        kept = (inside & (t < start))[:, None] & channels
        x = tl.where(fresh, x, tl.load(stored + rows + moved.to(tl.int64) * dim, mask=kept, other=0.0))
    tl.store(stored + rows, x, mask=inside[:, None] & channels)
    return widen(x)


@jit
def _whole(new, stored, t, start, d, dim, new_m, new_d):
    """Tokens ``t`` of one head, new ones or stored ones, as float32 numbers [ROWS, DIM]."""
    channels, late = (d < dim)[None, :], (t >= start)[:, None]
    fresh = new + (t - start).to(tl.int64)[:, None] * new_m + d[None, :] * new_d
    x = tl.load(fresh, mask=late & channels, other=0.0)
    old = tl.load(stored + t.to(tl.int64)[:, None] * dim + d[None, :], mask=(~late) & channels, other=0.0)
    return widen(tl.where(late, x, old))


@jit
def _quantized(
    new, stored, codes, scales, g, start, dim, new_m, new_d, largest_number,
    ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """Write the codes of group ``g``, complete now; (bounds on what they leave out, plain and scaled, scales [DIM])."""
    d = tl.arange(0, DIM).to(tl.int64)
    largest = tl.zeros((DIM,), tl.float32)
    for r in range(0, _GROUP, ROWS):
        t = g * _GROUP + r + tl.arange(0, ROWS)
        largest = tl.maximum(largest, tl.max(tl.abs(_whole(new, stored, t, start, d, dim, new_m, new_d)), 0))
    exponent = exponents_of(largest)
    tl.store(scales + g.to(tl.int64) * dim + d, exponent.to(tl.int8), mask=d < dim)
    left_out, scaled = 0.0, 0.0
    shares = roots_of(exponent)[None, :]
    for r in range(0, _GROUP, ROWS):
        t = g * _GROUP + r + tl.arange(0, ROWS)
        x = _whole(new, stored, t, start, d, dim, new_m, new_d)
        code = codes_of(x, exponent[None, :], largest_number)
        place = codes + t.to(tl.int64)[:, None] * dim + d[None, :]
        tl.store(place, code.to(tl.int32).to(tl.int8), mask=(d < dim)[None, :])
        rest = x - code * power_of_two(exponent)[None, :]
        left_out = tl.maximum(left_out, tl.max(norms_of(rest, ROWS, DIM, LOG_DIM), 0))
        scaled = tl.maximum(scaled, tl.max(norms_of(rest * shares, ROWS, DIM, LOG_DIM), 0))
    return left_out, scaled, power_of_two(exponent)


@jit
def _raise_bounds(
    head, found, left_out, largest, longest, norm, residual, largest_scales, dim, CODES: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Raise the bounds of a head to what was found among new tokens."""
    long = tl.maximum(tl.load(longest + head), found)
    tl.store(longest + head, long)
    if CODES:
        rest = tl.maximum(tl.load(residual + head), left_out)
        tl.store(residual + head, rest)
        tl.store(norm + head, (long + rest) * _UPWARD)
        d = tl.arange(0, DIM).to(tl.int64)
        scale = largest_scales + head * dim + d
        tl.store(scale, tl.maximum(tl.load(scale, mask=d < dim, other=0.0), largest), mask=d < dim)


@jit
def _append_kernel(
    clock, k_new, v_new, k, v, norms, longest, norm, residuals, residual, largest_scales, codes, scales,
    scaled_residuals, m, heads, dim, dim_v, room, slots, largest_number,
    k_b, k_h, k_m, k_d, v_b, v_h, v_m, v_d,
    CODES: tl.constexpr, SLOTS: tl.constexpr, FINISH: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    GROUP_ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """New tokens of one head, in SLOTS groups of 128. FINISH: these are all, so raise the bounds of the head."""
    head, slot = row_and_block(slots)
    b, h, groups = head // heads, head % heads, room // _GROUP
    end = tl.load(clock)
    start = end - m
    k_new, v_new = k_new + b * k_b + h * k_h, v_new + b * v_b + h * v_h
    k, v, codes = k + head * room * dim, v + head * room * dim_v, codes + head * room * dim
    norms, residuals, scales = norms + head * groups, residuals + head * groups, scales + head * groups * dim
    scaled_residuals += head * groups
    d, dv = tl.arange(0, DIM).to(tl.int64), tl.arange(0, DIM_V).to(tl.int64)
    found = 0.0
    left_out = 0.0
    largest = tl.zeros((DIM,), tl.float32)
    for i in range(SLOTS):
        g = start // _GROUP + slot * SLOTS + i
        low, high = tl.maximum(start, g * _GROUP), tl.minimum(end, (g + 1) * _GROUP)
        longest_here = tl.load(norms + g, mask=(low < high) & (low > g * _GROUP), other=0.0)
        for r in range(0, TILE, ROWS):
            t = low + r + tl.arange(0, ROWS)
            inside = t < high
            x = _copied(k_new, k, t, start, t, 0, inside, d, dim, k_m, k_d, False)
            _copied(v_new, v, t, start, t, 0, inside, dv, dim_v, v_m, v_d, False)
            longest_here = tl.maximum(longest_here, tl.max(norms_of(x, ROWS, DIM, LOG_DIM), 0))
        tl.store(norms + g, longest_here, mask=low < high)
        found = tl.maximum(found, longest_here)
        if CODES:
            if (low < high) & (high == (g + 1) * _GROUP):
                rest, scaled, scale = _quantized(
                    k_new, k, codes, scales, g, start, dim, k_m, k_d, largest_number, GROUP_ROWS, DIM, LOG_DIM
                )
                tl.store(residuals + g, rest)
                tl.store(scaled_residuals + g, scaled)
                left_out = tl.maximum(left_out, rest)
                largest = tl.maximum(largest, scale)
    if FINISH:
        _raise_bounds(head, found, left_out, largest, longest, norm, residual, largest_scales, dim, CODES, DIM)


@jit
def _finish_kernel(
    clock, norms, longest, norm, residuals, residual, largest_scales, scales, m, dim, room,
    CODES: tl.constexpr, DIM: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Raise the bounds of one head to those of all groups that new tokens are in."""
    head = tl.program_id(0).to(tl.int64)
    groups = room // _GROUP
    end = tl.load(clock)
    d = tl.arange(0, DIM).to(tl.int64)
    found = 0.0
    left_out = 0.0
    largest = tl.zeros((DIM,), tl.float32)
    for first in range((end - m) // _GROUP, (end + _GROUP - 1) // _GROUP, MANY):
        g = first + tl.arange(0, MANY)
        found = tl.maximum(found, tl.max(tl.load(norms + head * groups + g, mask=g * _GROUP < end, other=0.0), 0))
        if CODES:
            whole = (g + 1) * _GROUP <= end
            rest = tl.load(residuals + head * groups + g, mask=whole, other=0.0)
            left_out = tl.maximum(left_out, tl.max(rest, 0))
            place = scales + (head * groups + g)[:, None] * dim + d[None, :]
            exponent = tl.load(place, mask=whole[:, None] & (d < dim)[None, :], other=-126).to(tl.int32)
            scale = tl.where(whole[:, None], power_of_two(exponent), 0.0)
            largest = tl.maximum(largest, tl.max(scale, 0))
    _raise_bounds(head, found, left_out, largest, longest, norm, residual, largest_scales, dim, CODES, DIM)


@jit
def _window_kernel(
    clock, k_new, v_new, k, v, norms, norm, heads, dim, dim_v, room, window,
    k_b, k_h, k_d, v_b, v_h, v_d,
    ROWS: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr, DIM_V: tl.constexpr,
):  # fmt: skip
    """The new token of one head, at its place in a window; what is still needed moves to the front if that is full."""
    head = tl.program_id(0).to(tl.int64)
    b, h, groups = head // heads, head % heads, room // _GROUP
    k_new, v_new = k_new + b * k_b + h * k_h, v_new + b * v_b + h * v_h
    k, v, norms = k + head * room * dim, v + head * room * dim_v, norms + head * groups
    d, dv = tl.arange(0, DIM).to(tl.int64), tl.arange(0, DIM_V).to(tl.int64)
    end = tl.load(clock)
    token = end - 1
    first = first_held(end, window, room)
    moved = first - first_held(token, window, room)
    found = 0.0
    if moved > 0:
        for g in range(0, (end - first + _GROUP - 1) // _GROUP):
            longest = 0.0
            for r in range(0, _GROUP, ROWS):
                place = g * _GROUP + r + tl.arange(0, ROWS)
                inside = place < end - first
                x = _copied(k_new, k, place + first, token, place, moved, inside, d, dim, 0, k_d, True)
                _copied(v_new, v, place + first, token, place, moved, inside, dv, dim_v, 0, v_d, True)
                longest = tl.maximum(longest, tl.max(norms_of(x, ROWS, DIM, LOG_DIM), 0))
            tl.store(norms + g, longest)
            found = tl.maximum(found, longest)
    else:
        place = token - first + tl.arange(0, 1)
        inside = place >= 0
        x = _copied(k_new, k, place + first, token, place, 0, inside, d, dim, 0, k_d, False)
        _copied(v_new, v, place + first, token, place, 0, inside, dv, dim_v, 0, v_d, False)
        g = (token - first) // _GROUP
        earlier = tl.load(norms + g, mask=(token - first) % _GROUP > 0, other=0.0)
        longest = tl.maximum(earlier, tl.max(norms_of(x, 1, DIM, LOG_DIM), 0))
        tl.store(norms + g, longest)
        found = tl.maximum(longest, tl.load(norm + head))
    tl.store(norm + head, found)


def _append_to_window(
    parts: Mapping[str, torch.Tensor], clock: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> None:
    batch, heads, _, dim = k.shape
    dim_v, padded = v.shape[3], next_power_of_two(dim)
    # Small tiles: most launches write one token.
    rows = min(GROUP, max(1, TILE_ELEMENTS // padded))
    with torch.cuda.device_of(k):
        _window_kernel[(batch * heads,)](
            clock, k, v, parts["k"], parts["v"], parts["norms"], parts["norm"], heads, dim, dim_v, parts["k"].shape[2],
            window, *(x.stride(i) for x in (k, v) for i in (0, 1, 3)), ROWS=rows, DIM=padded, LOG_DIM=log2(padded),
            DIM_V=next_power_of_two(max(1, dim_v)), enable_fp_fusion=False,
        )  # fmt: skip


def append(
    parts: Mapping[str, torch.Tensor], clock: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = 0
) -> None:
    """Append ``k [B, Hkv, m, D]`` and ``v [B, Hkv, m, Dv]``, any strides, so that tokens end where the clock says.

    Args:
        parts: keys and values in place and the index beside them (:class:`qaxis.storage.in_place.KeyValues`).
        clock: int32 ``[1]``.
        window: newest tokens that are kept, of a layer that takes one at a time; 0 for all.
    """
    check_device("k", k)
    if window:
        _append_to_window(parts, clock, k, v, window)
        return
    batch, heads, m, dim = k.shape
    dim_v, room, coded = v.shape[3], parts["k"].shape[2], "codes" in parts
    padded = next_power_of_two(dim)
    rows = max(1, TILE_ELEMENTS // padded)
    tile = min(GROUP, next_power_of_two(m))
    # A program a head sees all new tokens while they are few, and so needs no other to finish.
    finish = m <= GROUP
    inside = 1 if m == 1 else 2
    slots = 1 if finish else (m - 1) // GROUP + 2
    index = {name: parts.get(name, parts["norm"]) for name in ("norms", "longest", "norm", "residuals", "residual",
                                                              "largest_scales", "codes", "scales",
                                                              "scaled_residuals")}  # fmt: skip
    with torch.cuda.device_of(k):
        _append_kernel[(batch * heads * slots,)](
            clock, k, v, parts["k"], parts["v"], *index.values(), m, heads, dim, dim_v, room, slots,
            torch.finfo(k.dtype).max, *k.stride(), *v.stride(), CODES=coded, SLOTS=inside if finish else 1,
            FINISH=finish, TILE=tile, ROWS=min(rows, tile), GROUP_ROWS=min(rows, GROUP), DIM=padded,
            LOG_DIM=log2(padded), DIM_V=next_power_of_two(max(1, dim_v)), enable_fp_fusion=False,
        )  # fmt: skip
        if not finish:
            names = ("norms", "longest", "norm", "residuals", "residual", "largest_scales", "scales")
            _finish_kernel[(batch * heads,)](
                clock, *(index[name] for name in names), m, dim, room,
                CODES=coded, DIM=padded, MANY=GROUPS_AT_ONCE,
            )  # fmt: skip
