"""Selection and canonical attention in Triton, on a GPU or through the interpreter: the bits of the reference.

Keys and values are tensors or 8-bit caches, told apart by a constant: what differs is the load alone.
"""

from __future__ import annotations

import torch

from ..arithmetic.reference import CHUNK_ELEMENTS, check_scores, exponent_factor, next_power_of_two, sort_key
from ..arithmetic.triton import INTERPRETED, check_device, exp2, jit, log2, row_and_block, tl, tree_last, triton, widen
from ..storage.side import Stored
from ..storage.triton import load_numbers, side_arguments

#: keys a program handles; any powers of two give the same bits. More keys mean fewer programs, which the interpreter
#: likes, and larger trees in registers, which a GPU does not.
SCORE_BLOCK = 4096 if INTERPRETED else 128
ATTEND_BLOCK = 1024 if INTERPRETED else 64
#: block partials that one program of the combining kernel adds; more of them save rounds and cost registers
COMBINE_BLOCK = 64
#: numbers of the partial sums that are held at once; more of them mean fewer launches
PARTIAL_ELEMENTS = 1 << 28


@jit
def _scores_kernel(
    q_ptr, indices_ptr, out_ptr, heads, group, m, n_out, dim, blocks,
    stride_qb, stride_qh, stride_qm, stride_qd,
    rows, scales, first, newest, whole, sinks,
    rows_b, rows_h, rows_n, rows_d, scales_b, scales_h, scales_n, first_b, first_h, first_n,
    newest_b, newest_h, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """Raw scores of one query row against BLOCK keys: consecutive ones, or those that indices name."""
    row, block = row_and_block(blocks)
    b = row // (heads * m)
    h = (row // m) % heads
    i = row % m
    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n_out
    if GATHER:
        position = tl.maximum(tl.load(indices_ptr + row * n_out + j, mask=inside, other=0), 0)
    else:
        position = j
    d = tl.arange(0, DIM).to(tl.int64)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + i * stride_qm + d * stride_qd, mask=d < dim, other=0.0)
    g = h // group
    k = load_numbers(
        rows + b * rows_b + g * rows_h, scales + b * scales_b + g * scales_h,
        first + b * first_b + g * first_h, newest + b * newest_b + g * newest_h,
        position[:, None], d[None, :], inside[:, None] & (d < dim)[None, :], whole, sinks,
        rows_n, rows_d, scales_n, first_n, newest_n, STORED, SHARING, WIDTH, PER_TOKEN,
    )  # fmt: skip
    score = tree_last(widen(q)[None, :] * k, BLOCK, DIM, LOG_DIM)
    tl.store(out_ptr + row * n_out + j, score, mask=inside)


@jit
def _partials_kernel(
    score_ptr, top_ptr, indices_ptr, numerator_ptr, denominator_ptr, heads, group, m, width, dim, blocks, factor,
    rows, scales, first, newest, whole, sinks,
    rows_b, rows_h, rows_n, rows_d, scales_b, scales_h, scales_n, first_b, first_h, first_n,
    newest_b, newest_h, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Numerator and denominator of the softmax over BLOCK selected keys of one query row."""
    row, block = row_and_block(blocks)
    b = row // (heads * m)
    h = (row // m) % heads
    j = block * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(indices_ptr + row * width + j, mask=j < width, other=-1)
    live = position >= 0
    score = tl.load(score_ptr + row * width + j, mask=live, other=0.0)
    top = tl.load(top_ptr + row)
    t = tl.where(live, (score - top) * factor, 0.0)
    p = tl.where(live, exp2(t), 0.0)
    d = tl.arange(0, DIM).to(tl.int64)
    g = h // group
    v = load_numbers(
        rows + b * rows_b + g * rows_h, scales + b * scales_b + g * scales_h,
        first + b * first_b + g * first_h, newest + b * newest_b + g * newest_h,
        tl.maximum(position, 0)[None, :], d[:, None], live[None, :] & (d < dim)[:, None], whole, sinks,
        rows_n, rows_d, scales_n, first_n, newest_n, STORED, SHARING, WIDTH, PER_TOKEN,
    )  # fmt: skip
    numerator = tree_last(p[None, :] * v, DIM, BLOCK, LOG_BLOCK)
    denominator = tree_last(tl.reshape(p, (1, BLOCK)), 1, BLOCK, LOG_BLOCK)
    tl.store(numerator_ptr + (row * blocks + block) * dim + d, numerator, mask=d < dim)
    tl.store(denominator_ptr + row * blocks + block + tl.arange(0, 1), denominator)


@jit
def _combine_kernel(
    numerator_ptr, denominator_ptr, out_ptr, out_denominator_ptr,
    blocks, out_blocks, dim,
    LAST: tl.constexpr, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Add BLOCK neighbouring partials; the last round divides."""
    row, part = row_and_block(out_blocks)
    j = part * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    inside = (j < blocks)[None, :] & (d < dim)[:, None]
    tile = tl.load(numerator_ptr + (row * blocks + j)[None, :] * dim + d[:, None], mask=inside, other=0.0)
    numerator = tree_last(tile, DIM, BLOCK, LOG_BLOCK)
    weights = tl.load(denominator_ptr + row * blocks + j, mask=j < blocks, other=0.0)
    denominator = tree_last(tl.reshape(weights, (1, BLOCK)), 1, BLOCK, LOG_BLOCK)
    if LAST:
        # A row that may see no key has weight 0 and output 0.
        safe = tl.where(denominator > 0, denominator, 1.0)
        tl.store(out_ptr + row * dim + d, tl.div_rn(numerator, tl.broadcast_to(safe, (DIM,))), mask=d < dim)
    else:
        tl.store(out_ptr + (row * out_blocks + part) * dim + d, numerator, mask=d < dim)
        tl.store(out_denominator_ptr + row * out_blocks + part + tl.arange(0, 1), denominator)


def _buffer(like: torch.Tensor, *shape: int, poison: bool = True) -> torch.Tensor:
    """A float32 buffer, of NaN if poisoned: then a program that failed to write its part cannot go unnoticed."""
    empty = torch.empty(shape, dtype=torch.float32, device=like.device)
    return empty.fill_(torch.nan) if poison else empty


def scores(
    q: torch.Tensor, keys: torch.Tensor | Stored, indices: torch.Tensor | None = None,
    *, block: int = SCORE_BLOCK, num_warps: int = 4, fuse: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Canonical raw scores, float32 ``[B, H, M, N]``, or of the keys in ``indices [B, H, M, K]``.

    ``block`` and ``num_warps`` change no bit. ``fuse=True`` lets the compiler contract a multiply and an
    add into one rounding: no longer canonical, it exists to show what that changes.
    """
    check_device("q", q)
    batch, heads, m, dim = q.shape
    n_out = keys.shape[2] if indices is None else indices.shape[-1]
    block = min(block, next_power_of_two(n_out))
    blocks = triton.cdiv(n_out, block)
    out = _buffer(q, batch, heads, m, n_out)
    dim_padded = next_power_of_two(dim)
    pointers, sizes, constants = side_arguments(keys)
    _scores_kernel[(blocks * batch * heads * m,)](
        q, out if indices is None else indices, out, heads, heads // keys.shape[1], m, n_out, dim, blocks,
        *q.stride(), *pointers, *sizes, **constants,
        GATHER=indices is not None, BLOCK=block, DIM=dim_padded, LOG_DIM=log2(dim_padded),
        enable_fp_fusion=fuse, num_warps=num_warps,
    )  # fmt: skip
    return out


def choose(q: torch.Tensor, keys: torch.Tensor | Stored, allowed: torch.Tensor, k_eff: torch.Tensor) -> torch.Tensor:
    """As :func:`qaxis.attention.selection.choose`, by scoring every key canonically."""
    batch, heads, m, _ = q.shape
    n = keys.shape[2]
    allowed, k_eff = allowed.expand(-1, -1, m, -1), k_eff.expand(-1, -1, m)
    width = int(k_eff.max())
    out = torch.empty(batch, heads, m, width, dtype=torch.int64, device=q.device)
    # One 64-bit word orders by score, then by lower position: all words differ, so top-k has no ties.
    lowest_first = n - 1 - torch.arange(n, device=q.device)
    at_once = max(1, 8 * CHUNK_ELEMENTS // (batch * heads * n))
    for start in range(0, m, at_once):
        rows = slice(start, start + at_once)
        score = scores(q[:, :, rows], keys)
        check_scores(score)
        word = (sort_key(score).to(torch.int64) << 32) | lowest_first
        word = torch.where(allowed[:, :, rows], word, torch.iinfo(torch.int64).min)
        best = torch.topk(word, width, dim=-1, sorted=True).values
        keep = torch.arange(width, device=q.device) < k_eff[:, :, rows, None]
        chosen = torch.where(keep, n - 1 - (best & 0xFFFFFFFF), n).sort(dim=-1).values
        out[:, :, rows] = torch.where(chosen == n, -1, chosen)
    return out


def attend(
    q: torch.Tensor, keys: torch.Tensor | Stored, values: torch.Tensor | Stored, indices: torch.Tensor, scale: float,
    *, block: int = ATTEND_BLOCK, combine_block: int = COMBINE_BLOCK, num_warps: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Canonical attention over given ``indices``, ``[B, H, M, Dv]`` in q's dtype, without soft cap or sink."""
    batch, heads, m, _ = q.shape
    width, dim = indices.shape[-1], values.shape[3]
    out = torch.empty(batch, heads, m, dim, dtype=q.dtype, device=q.device)
    per_query = batch * heads * triton.cdiv(width, min(block, next_power_of_two(width))) * dim
    at_once = max(1, PARTIAL_ELEMENTS // per_query)
    for start in range(0, m, at_once):
        rows = slice(start, start + at_once)
        some = indices[:, :, rows].contiguous()
        score = scores(q[:, :, rows], keys, some)
        check_scores(score)
        top = torch.where(some >= 0, score, -torch.inf).amax(-1).clamp(min=torch.finfo(torch.float32).min)
        numerator, denominator = partials(score, top, some, values, scale, block=block, num_warps=num_warps)
        whole = combined(numerator, denominator, block=combine_block, num_warps=num_warps)
        out[:, :, rows] = whole.reshape(*some.shape[:3], dim).to(q.dtype)
    return out


def partials(
    score: torch.Tensor, top: torch.Tensor, indices: torch.Tensor, values: torch.Tensor | Stored, scale: float,
    *, block: int = ATTEND_BLOCK, num_warps: int = 4, poison: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Numerators ``[rows, blocks, Dv]`` and denominators ``[rows, blocks]`` of the softmax over blocks of chosen keys.

    Args:
        score: canonical raw scores float32 ``[B, H, M, K]``. top: the highest of every row, float32 ``[B, H, M]``.
        indices: int64 ``[B, H, M, K]``, contiguous, padded with -1.
    """
    batch, heads, m, width = indices.shape
    rows, dim, block = batch * heads * m, values.shape[3], min(block, next_power_of_two(width))
    blocks = triton.cdiv(width, block)
    numerator = _buffer(score, rows, blocks, dim, poison=poison)
    denominator = _buffer(score, rows, blocks, poison=poison)
    pointers, sizes, constants = side_arguments(values)
    _partials_kernel[(blocks * rows,)](
        score, top, indices, numerator, denominator,
        heads, heads // values.shape[1], m, width, dim, blocks, exponent_factor(scale),
        *pointers, *sizes, **constants, BLOCK=block, LOG_BLOCK=log2(block), DIM=next_power_of_two(dim),
        enable_fp_fusion=False, num_warps=num_warps,
    )  # fmt: skip
    return numerator, denominator


def combined(
    numerator: torch.Tensor, denominator: torch.Tensor,
    *, block: int = COMBINE_BLOCK, num_warps: int = 4, poison: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Add all partials and divide: ``[rows, blocks, Dv]``, ``[rows, blocks]`` -> float32 ``[rows, Dv]``."""
    rows, blocks, dim = numerator.shape
    while True:
        block = min(block, next_power_of_two(blocks))
        left = triton.cdiv(blocks, block)
        out = _buffer(numerator, rows, left, dim, poison=poison)
        weight = _buffer(numerator, rows, left, poison=poison)
        _combine_kernel[(left * rows,)](
            numerator, denominator, out, weight, blocks, left, dim,
            LAST=left == 1, BLOCK=block, LOG_BLOCK=log2(block), DIM=next_power_of_two(dim),
            enable_fp_fusion=False, num_warps=num_warps,
        )  # fmt: skip
        if left == 1:
            return out[:, 0]
        numerator, denominator, blocks = out, weight, left
