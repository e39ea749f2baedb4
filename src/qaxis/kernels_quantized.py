"""Scores and attention that read the 8-bit cache itself: no dequantised copy is made.

A code times its power of two is what dequantising gives, exactly, in float32 and in bfloat16; from there on the
arithmetic is that of kernels.py, and so are the bits.
"""

from __future__ import annotations

from typing import Any

import torch

from .budget import Budget
from .canonical import CHUNK_ELEMENTS, exponent_factor, next_power_of_two, sort_key
from .kernels import (
    ATTEND_BLOCK,
    COMBINE_BLOCK,
    SCORE_BLOCK,
    _check_device,
    _combine_kernel,
    _exp2,
    _log2,
    _tree_last,
    _widen,
    tl,
    triton,
)
from .ranking import check_scores
from .sides import Stored


def readable(*sides: Stored) -> bool:
    """Whether the kernels read these as they are: 8 bits, and no rounding between float32 and the model's dtype."""
    return all(s.grid.bits == 8 and s.dtype in (torch.float32, torch.bfloat16) for s in sides)


@triton.jit
def _load(
    codes, scales, head, tail, position, d, mask, whole, sinks,
    codes_n, scales_n, head_n, tail_n,
    STEP: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Numbers at (position, d), which broadcast against each other, as float32; pointers are those of one head."""
    first = mask & (position < sinks)
    newest = mask & (position >= whole) & (position >= sinks)
    coded = mask & (position >= sinks) & (position < whole)
    code = tl.load(codes + position * codes_n + d, mask=coded, other=0)
    if PER_TOKEN:
        exponent = tl.load(scales + position * scales_n + d // WIDTH, mask=coded, other=0)
    else:
        exponent = tl.load(scales + (position // STEP) * scales_n + d, mask=coded, other=0)
    x = code.to(tl.float32) * ((exponent.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    x = tl.where(first, _widen(tl.load(head + position * head_n + d, mask=first, other=0.0)), x)
    return tl.where(newest, _widen(tl.load(tail + (position - whole) * tail_n + d, mask=newest, other=0.0)), x)


@triton.jit
def _scores_kernel(
    q_ptr, codes, scales, head, tail, indices_ptr, out_ptr,
    heads, group, m, n_out, dim, whole, sinks,
    stride_qb, stride_qh, stride_qm, stride_qd,
    codes_b, codes_h, codes_n, scales_b, scales_h, scales_n, head_b, head_h, head_n, tail_b, tail_h, tail_n,
    STEP: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """As kernels._scores_kernel, keys read from the cache."""
    row = tl.program_id(1).to(tl.int64)
    b = row // (heads * m)
    h = (row // m) % heads
    i = row % m
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n_out
    if GATHER:
        position = tl.maximum(tl.load(indices_ptr + row * n_out + j, mask=inside, other=0), 0)
    else:
        position = j.to(tl.int64)
    d = tl.arange(0, DIM)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + i * stride_qm + d * stride_qd, mask=d < dim, other=0.0)
    g = h // group
    k = _load(
        codes + b * codes_b + g * codes_h, scales + b * scales_b + g * scales_h,
        head + b * head_b + g * head_h, tail + b * tail_b + g * tail_h,
        position[:, None], d[None, :], inside[:, None] & (d < dim)[None, :], whole, sinks,
        codes_n, scales_n, head_n, tail_n, STEP, WIDTH, PER_TOKEN,
    )  # fmt: skip
    score = _tree_last(_widen(q)[None, :] * k, BLOCK, DIM, LOG_DIM)
    tl.store(out_ptr + row * n_out + j, score, mask=inside)


@triton.jit
def _partials_kernel(
    score_ptr, top_ptr, indices_ptr, codes, scales, head, tail, numerator_ptr, denominator_ptr,
    heads, group, m, width, dim, blocks, factor, whole, sinks,
    codes_b, codes_h, codes_n, scales_b, scales_h, scales_n, head_b, head_h, head_n, tail_b, tail_h, tail_n,
    STEP: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """As kernels._partials_kernel, values read from the cache."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    b = row // (heads * m)
    h = (row // m) % heads
    j = block * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(indices_ptr + row * width + j, mask=j < width, other=-1)
    live = position >= 0
    score = tl.load(score_ptr + row * width + j, mask=live, other=0.0)
    top = tl.load(top_ptr + row)
    p = tl.where(live, _exp2(tl.where(live, (score - top) * factor, 0.0)), 0.0)
    d = tl.arange(0, DIM)
    g = h // group
    v = _load(
        codes + b * codes_b + g * codes_h, scales + b * scales_b + g * scales_h,
        head + b * head_b + g * head_h, tail + b * tail_b + g * tail_h,
        tl.maximum(position, 0)[None, :], d[:, None], live[None, :] & (d < dim)[:, None], whole, sinks,
        codes_n, scales_n, head_n, tail_n, STEP, WIDTH, PER_TOKEN,
    )  # fmt: skip
    numerator = _tree_last(p[None, :] * v, DIM, BLOCK, LOG_BLOCK)
    denominator = _tree_last(tl.reshape(p, (1, BLOCK)), 1, BLOCK, LOG_BLOCK)
    tl.store(numerator_ptr + (row * blocks + block) * dim + d, numerator, mask=d < dim)
    tl.store(denominator_ptr + row * blocks + block + tl.arange(0, 1), denominator)


@triton.jit
def _dequantize_kernel(
    codes, scales, head, tail, out_ptr, heads, n, dim, whole, sinks,
    codes_b, codes_h, codes_n, scales_b, scales_h, scales_n, head_b, head_h, head_n, tail_b, tail_h, tail_n,
    STEP: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one head as ordinary numbers."""
    b = tl.program_id(1).to(tl.int64) // heads
    g = tl.program_id(1).to(tl.int64) % heads
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    mask = (position < n)[:, None] & (d < dim)[None, :]
    x = _load(
        codes + b * codes_b + g * codes_h, scales + b * scales_b + g * scales_h,
        head + b * head_b + g * head_h, tail + b * tail_b + g * tail_h,
        position[:, None], d[None, :], mask, whole, sinks,
        codes_n, scales_n, head_n, tail_n, STEP, WIDTH, PER_TOKEN,
    )  # fmt: skip
    out = out_ptr + ((b * heads + g) * n + position[:, None]) * dim + d[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=mask)


def _arguments(stored: Stored) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...], dict[str, Any]]:
    """(tensors, strides, constants) of a side; every part has its last dimension contiguous."""
    tail = stored.head if stored.tail is None else stored.tail
    tensors = tuple(
        x if x.stride(-1) == 1 else x.contiguous() for x in (stored.codes, stored.scales, stored.head, tail)
    )
    per_token = stored.grid.per == "token"
    constants = {"STEP": stored.grid.group, "WIDTH": stored.width, "PER_TOKEN": per_token}
    return tensors, tuple(s for x in tensors for s in x.stride()[:3]), constants


def scores(
    q: torch.Tensor,
    stored: Stored,
    indices: torch.Tensor | None = None,
    *,
    block: int = SCORE_BLOCK,
    num_warps: int = 4,
) -> torch.Tensor:
    """As :func:`qaxis.kernels.scores`, for keys in the cache."""
    _check_device(q)
    batch, heads, m, dim = q.shape
    n_out = stored.length if indices is None else indices.shape[-1]
    block = min(block, next_power_of_two(n_out))
    out = torch.full((batch, heads, m, n_out), torch.nan, dtype=torch.float32, device=q.device)
    padded = next_power_of_two(dim)
    tensors, strides, constants = _arguments(stored)
    _scores_kernel[(triton.cdiv(n_out, block), batch * heads * m)](
        q, *tensors, out if indices is None else indices, out,
        heads, heads // stored.codes.shape[1], m, n_out, dim, stored.codes.shape[2], stored.head.shape[2],
        *q.stride(), *strides, **constants,
        GATHER=indices is not None, BLOCK=block, DIM=padded, LOG_DIM=_log2(padded),
        enable_fp_fusion=False, num_warps=num_warps,
    )  # fmt: skip
    return out


def partials(
    score: torch.Tensor, top: torch.Tensor, indices: torch.Tensor, stored: Stored, scale: float,
    *, block: int = ATTEND_BLOCK, num_warps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Numerators ``[rows, blocks, Dv]`` and denominators ``[rows, blocks]`` of the softmax over blocks of keys."""
    batch, heads, m, width = indices.shape
    rows, dim, block = batch * heads * m, stored.dim, min(block, next_power_of_two(width))
    blocks = triton.cdiv(width, block)
    numerator = torch.full((rows, blocks, dim), torch.nan, dtype=torch.float32, device=score.device)
    denominator = torch.full((rows, blocks), torch.nan, dtype=torch.float32, device=score.device)
    tensors, strides, constants = _arguments(stored)
    _partials_kernel[(blocks, rows)](
        score, top, indices, *tensors, numerator, denominator,
        heads, heads // stored.codes.shape[1], m, width, dim, blocks, exponent_factor(scale),
        stored.codes.shape[2], stored.head.shape[2], *strides, **constants,
        BLOCK=block, LOG_BLOCK=_log2(block), DIM=next_power_of_two(dim),
        enable_fp_fusion=False, num_warps=num_warps,
    )  # fmt: skip
    return numerator, denominator


def dequantized(stored: Stored, *, block: int = ATTEND_BLOCK) -> torch.Tensor:
    """As :meth:`qaxis.sides.Stored.dequantized`, of 8-bit codes, in one kernel."""
    batch, heads, n, dim = stored.shape
    out = torch.empty(stored.shape, dtype=stored.dtype, device=stored.codes.device)
    tensors, strides, constants = _arguments(stored)
    _dequantize_kernel[(triton.cdiv(n, block), batch * heads)](
        *tensors, out, heads, n, dim, stored.codes.shape[2], stored.head.shape[2], *strides, **constants,
        BLOCK=block, DIM=next_power_of_two(dim),
    )  # fmt: skip
    return out


def topk_indices(q: torch.Tensor, keys: Stored, budget: Budget, allowed: torch.Tensor) -> torch.Tensor:
    """As :func:`qaxis.kernels.topk_indices`, for keys in the cache."""
    batch, heads, m, _ = q.shape
    n = keys.length
    allowed = allowed.expand(-1, -1, m, -1)
    k_eff = budget.table(n, q.device)[allowed.sum(-1)]
    width = int(k_eff.max())
    lowest_first = n - 1 - torch.arange(n, device=q.device)
    slots = torch.arange(width, device=q.device)
    step = max(1, 8 * CHUNK_ELEMENTS // (batch * heads * n))
    parts = []
    for start in range(0, m, step):
        rows = slice(start, start + step)
        score = scores(q[:, :, rows], keys)
        check_scores(score)
        # Score above, position below: no two words are equal, so the order of top-k is the canonical one.
        word = (sort_key(score).to(torch.int64) << 32) | lowest_first
        word = word.masked_fill(~allowed[:, :, rows], torch.iinfo(torch.int64).min)
        position = n - 1 - (word.topk(width, dim=-1).values & 0xFFFFFFFF)
        position = position.masked_fill(slots >= k_eff[:, :, rows, None], n).sort(dim=-1).values
        parts.append(position.masked_fill(position == n, -1))
    return torch.cat(parts, dim=2)


def attend(q: torch.Tensor, keys: Stored, values: Stored, indices: torch.Tensor, scale: float) -> torch.Tensor:
    """As :func:`qaxis.kernels.attend`, for keys and values in the cache."""
    indices = indices.contiguous()
    score = scores(q, keys, indices)
    check_scores(score)
    top = torch.where(indices >= 0, score, -torch.inf).amax(-1).clamp(min=torch.finfo(torch.float32).min)
    numerator, denominator = partials(score, top, indices, values, scale)
    return _combined(numerator, denominator).reshape(*q.shape[:3], values.dim).to(q.dtype)


def _combined(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Add all partials and divide: ``[rows, blocks, Dv]``, ``[rows, blocks]`` -> float32 ``[rows, Dv]``."""
    rows, blocks, dim = numerator.shape
    while True:
        left = triton.cdiv(blocks, COMBINE_BLOCK)
        out, weight = (
            torch.full((rows, left, *x.shape[2:]), torch.nan, device=x.device) for x in (numerator, denominator)
        )
        _combine_kernel[(left, rows)](
            numerator, denominator, out, weight, blocks, left, dim,
            LAST=left == 1, BLOCK=COMBINE_BLOCK, LOG_BLOCK=_log2(COMBINE_BLOCK), DIM=next_power_of_two(dim),
            enable_fp_fusion=False,
        )  # fmt: skip
        if left == 1:
            return out[:, 0]
        numerator, denominator, blocks = out, weight, left
