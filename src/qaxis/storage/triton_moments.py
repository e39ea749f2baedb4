"""Triton: moments of keys and values follow a cache, in one launch a layer that may be captured and repeated.

A program has a tile of products: some channels of values, or of keys, with some of keys. Which groups of tokens it
counted lies beside it in device memory, and how many there are is read from the clock, so most tokens cost it a look at
both. The bits are those of ``moments.py``. A launch that is repeated at the same clock changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from ..arithmetic.triton import INTERPRETED, check_device, jit, log2, row_and_block, tl
from .moments import GROUP, TILE_COLUMNS, TILE_ROWS, Moments, tiles_of
from .side import Stored
from .triton import load_numbers, side_arguments

_GROUP = tl.constexpr(GROUP)
#: tokens whose products are formed at once: more take more registers; the interpreter likes many
AT_ONCE = GROUP if INTERPRETED else 16
WARPS = 8


@jit
def _of_tokens(
    x_rows, x_scales, x_first, x_rows_n, x_rows_d, x_scales_n, x_first_n, x_sinks,
    k_rows, k_scales, k_first, k_rows_n, k_rows_d, k_scales_n, k_first_n, k_sinks,
    t, end, row, x_dim, column, dim,
    X_STORED: tl.constexpr, X_SHARING: tl.constexpr, X_WIDTH: tl.constexpr, X_PER_TOKEN: tl.constexpr,
    K_STORED: tl.constexpr, K_SHARING: tl.constexpr, K_WIDTH: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    TOKENS: tl.constexpr, AT_ONCE: tl.constexpr, LOG_AT_ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Trees over TOKENS tokens from ``t`` on: of products [ROWS, COLUMNS], and of x [ROWS]."""
    if TOKENS > AT_ONCE:
        # What is added to -0.0 stays what it is: the sum of both halves.
        products, sums = tl.full((ROWS, COLUMNS), -0.0, tl.float32), tl.full((ROWS,), -0.0, tl.float32)
        for half in range(2):
            more, further = _of_tokens(
                x_rows, x_scales, x_first, x_rows_n, x_rows_d, x_scales_n, x_first_n, x_sinks,
                k_rows, k_scales, k_first, k_rows_n, k_rows_d, k_scales_n, k_first_n, k_sinks,
                t + half * (TOKENS // 2), end, row, x_dim, column, dim, X_STORED, X_SHARING, X_WIDTH, X_PER_TOKEN,
                K_STORED, K_SHARING, K_WIDTH, K_PER_TOKEN, TOKENS // 2, AT_ONCE, LOG_AT_ONCE, ROWS, COLUMNS,
            )  # fmt: skip
            products += more
            sums += further
        return products, sums
    else:
        position = t + tl.arange(0, TOKENS)[:, None]
        x = load_numbers(
            x_rows, x_scales, x_first, x_first, position, row[None, :], (row < x_dim)[None, :],
            end, x_sinks, x_rows_n, x_rows_d, x_scales_n, x_first_n, 0, X_STORED, X_SHARING, X_WIDTH, X_PER_TOKEN,
        )  # fmt: skip
        k = load_numbers(
            k_rows, k_scales, k_first, k_first, position, column[None, :], (column < dim)[None, :],
            end, k_sinks, k_rows_n, k_rows_d, k_scales_n, k_first_n, 0, K_STORED, K_SHARING, K_WIDTH, K_PER_TOKEN,
        )  # fmt: skip
        # Tokens are the slowest dimension: those of a pair are in the registers of one thread.
        sums = x[:, :, None]
        products = sums * k[:, None, :]
        for level in tl.static_range(LOG_AT_ONCE):
            sums = tl.sum(tl.reshape(sums, (TOKENS >> (level + 1), 2, ROWS, 1)), 1)
            products = tl.sum(tl.reshape(products, (TOKENS >> (level + 1), 2, ROWS, COLUMNS)), 1)
        return tl.reshape(products, (ROWS, COLUMNS)), tl.reshape(sums, (ROWS,))


@jit
def _follow_tile(
    products, sums, state, begin, end, row, x_dim, column, dim, sums_too,
    x_rows, x_scales, x_first, x_rows_n, x_rows_d, x_scales_n, x_first_n, x_sinks,
    k_rows, k_scales, k_first, k_rows_n, k_rows_d, k_scales_n, k_first_n, k_sinks,
    X_STORED: tl.constexpr, X_SHARING: tl.constexpr, X_WIDTH: tl.constexpr, X_PER_TOKEN: tl.constexpr,
    K_STORED: tl.constexpr, K_SHARING: tl.constexpr, K_WIDTH: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    GROUP: tl.constexpr, AT_ONCE: tl.constexpr, LOG_AT_ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the groups that the tile lacks, all of [begin, end) if it counted from another one; pointers are those of
    one head, and of the rows of one side."""
    counted, done = tl.load(state), tl.load(state + 1)
    goes_on = counted == begin
    if (counted != begin) | (done < end):
        inside = (row < x_dim)[:, None] & (column < dim)[None, :]
        place = products + row[:, None] * dim + column[None, :]
        total = tl.load(place, mask=inside & goes_on, other=0.0)
        alone = tl.load(sums + row, mask=(row < x_dim) & goes_on, other=0.0)
        first = tl.where(goes_on, done, begin)
        t = first.to(tl.int64) * GROUP
        for _ in range(first, end):
            more, further = _of_tokens(
                x_rows, x_scales, x_first, x_rows_n, x_rows_d, x_scales_n, x_first_n, x_sinks,
                k_rows, k_scales, k_first, k_rows_n, k_rows_d, k_scales_n, k_first_n, k_sinks,
                t, end.to(tl.int64) * GROUP, row, x_dim, column, dim,
                X_STORED, X_SHARING, X_WIDTH, X_PER_TOKEN, K_STORED, K_SHARING, K_WIDTH, K_PER_TOKEN,
                GROUP, AT_ONCE, LOG_AT_ONCE, ROWS, COLUMNS,
            )  # fmt: skip
            # The reference's trees end so: no sum is -0.0.
            total += more + 0.0
            alone += further + 0.0
            t += GROUP
        # Every thread has read what the tile counted before one of them overwrites it.
        tl.debug_barrier()
        tl.store(place, total, mask=inside)
        # Tiles of other columns have the same rows: what one wrote another may not have read yet.
        tl.store(sums + row, alone, mask=(row < x_dim) & sums_too)
        tl.store(state, begin)
        tl.store(state + 1, tl.maximum(begin, end))


@jit
def _follow_kernel(
    clock, pads, state, products, sums, heads, dim, dim_v, tiles, value_tiles, column_tiles,
    k_rows, k_scales, k_first, k_sinks, k_rows_b, k_rows_h, k_rows_n, k_rows_d, k_scales_b, k_scales_h, k_scales_n,
    k_first_b, k_first_h, k_first_n,
    v_rows, v_scales, v_first, v_sinks, v_rows_b, v_rows_h, v_rows_n, v_rows_d, v_scales_b, v_scales_h, v_scales_n,
    v_first_b, v_first_h, v_first_n,
    PADDED: tl.constexpr,
    K_STORED: tl.constexpr, K_SHARING: tl.constexpr, K_WIDTH: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    V_STORED: tl.constexpr, V_SHARING: tl.constexpr, V_WIDTH: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    AT_ONCE: tl.constexpr, LOG_AT_ONCE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of one head: the first tiles have rows of values, the others of keys."""
    head, tile = row_and_block(tiles)
    b, h = head // heads, head % heads
    begin = 0
    if PADDED:
        pad = tl.maximum(tl.load(pads + b), 0)
        begin = pad // _GROUP + (pad % _GROUP > 0).to(tl.int32)
    end = tl.load(clock) // _GROUP
    state += (head * tiles + tile) * 2
    products, sums = products + head * (dim_v + dim) * dim, sums + head * (dim_v + dim)
    part, sums_too = tile // column_tiles, tile % column_tiles == 0
    column = ((tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    k_rows, k_scales = k_rows + b * k_rows_b + h * k_rows_h, k_scales + b * k_scales_b + h * k_scales_h
    k_first += b * k_first_b + h * k_first_h
    v_rows, v_scales = v_rows + b * v_rows_b + h * v_rows_h, v_scales + b * v_scales_b + h * v_scales_h
    v_first += b * v_first_b + h * v_first_h
    if part < value_tiles:
        row = (part * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        _follow_tile(
            products, sums, state, begin, end, row, dim_v, column, dim, sums_too,
            v_rows, v_scales, v_first, v_rows_n, v_rows_d, v_scales_n, v_first_n, v_sinks,
            k_rows, k_scales, k_first, k_rows_n, k_rows_d, k_scales_n, k_first_n, k_sinks,
            V_STORED, V_SHARING, V_WIDTH, V_PER_TOKEN, K_STORED, K_SHARING, K_WIDTH, K_PER_TOKEN,
            _GROUP, AT_ONCE, LOG_AT_ONCE, ROWS, COLUMNS,
        )  # fmt: skip
    else:
        row = ((part - value_tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        _follow_tile(
            products + dim_v * dim, sums + dim_v, state, begin, end, row, dim, column, dim, sums_too,
            k_rows, k_scales, k_first, k_rows_n, k_rows_d, k_scales_n, k_first_n, k_sinks,
            k_rows, k_scales, k_first, k_rows_n, k_rows_d, k_scales_n, k_first_n, k_sinks,
            K_STORED, K_SHARING, K_WIDTH, K_PER_TOKEN, K_STORED, K_SHARING, K_WIDTH, K_PER_TOKEN,
            _GROUP, AT_ONCE, LOG_AT_ONCE, ROWS, COLUMNS,
        )  # fmt: skip


def follow(
    moments: Moments,
    state: torch.Tensor,
    clock: torch.Tensor,
    k: torch.Tensor | Stored,
    v: torch.Tensor | Stored,
    pads: torch.Tensor | None = None,
) -> None:
    """Add what became complete, as the clock says, to ``moments``, and note it in ``state``.

    Args:
        moments: contiguous float32 ``[B, Hkv, Dv + D, D]`` and ``[B, Hkv, Dv + D]``.
        state: int32 ``[B, Hkv, tiles, 2]``, contiguous, of every tile (:func:`qaxis.storage.moments.tiles_of`) the
            first group that it counts and the one that comes next.
        clock: int32 ``[1]``.
        k, v: ``[B, Hkv, N, D]`` and ``[B, Hkv, N, Dv]`` with all room, as kernels read them
            (:func:`qaxis.storage.triton.readable`).
        pads: int32 ``[B]``, or None.
    """
    check_device("cache", state, calls_library=True)
    batch, heads, _, dim = k.shape
    dim_v = v.shape[3]
    of_values, of_keys, columns = tiles_of(dim, dim_v)
    tiles = (of_values + of_keys) * columns
    numbers: list[torch.Tensor | int] = []
    constants: dict[str, Any] = {}
    for name, side in zip("KV", (k, v), strict=True):
        pointers, sizes, own = side_arguments(side)
        # Complete groups are all in codes, and an end that the host knows is not told to a kernel that reads the clock.
        numbers += [*pointers[:3], *sizes[1:-3]]
        constants |= {f"{name}_{key}": value for key, value in own.items()}
    with torch.cuda.device_of(state):
        _follow_kernel[(batch * heads * tiles,)](
            clock, clock if pads is None else pads, state, *moments, heads, dim, dim_v, tiles,
            of_values, columns, *numbers, **constants, PADDED=pads is not None, AT_ONCE=AT_ONCE,
            LOG_AT_ONCE=log2(AT_ONCE), ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
