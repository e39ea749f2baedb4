"""The canonical arithmetic in Triton: kernels, launchers, and the selection around them.

The rules are those of canonical.py. Compiled on a GPU, or run by Triton's interpreter on a CPU, the
kernels return the bits of the PyTorch reference. Blocks are powers of two, so that a tree within
blocks followed by a tree over blocks is the same tree whatever the block size.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # The decorator below reads this once; without a GPU the interpreter is the only way to run.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl

from .budget import Budget
from .canonical import (
    CHUNK_ELEMENTS,
    EXP2_COEFFICIENTS,
    ROUND_MAGIC,
    exponent_factor,
    next_power_of_two,
    sort_key,
)
from .ranking import check_scores

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

#: keys a program handles; any powers of two give the same bits, the interpreter likes few programs
SCORE_BLOCK = 4096 if INTERPRETED else 128
ATTEND_BLOCK = 1024 if INTERPRETED else 64
#: block partials that one program of the combining kernel adds
COMBINE_BLOCK = 64

_C7, _C6, _C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(c) for c in EXP2_COEFFICIENTS)
_MAGIC = tl.constexpr(ROUND_MAGIC)


@triton.jit
def _tree_last(x, ROWS: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr):
    """Balanced adjacent-pair tree over the last dimension, [ROWS, N] -> [ROWS] (rule 2)."""
    for level in tl.static_range(LOG_N):
        even, odd = tl.split(tl.reshape(x, (ROWS, N >> (level + 1), 2)))
        x = even + odd
    return tl.reshape(x, (ROWS,)) + 0.0


@triton.jit
def _widen(x):
    """To float32, exactly. bfloat16 by its bits: Triton's interpreter converts its subnormals wrongly."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _exp2(t):
    """2^t by separate multiply and add (rule 3); launch with enable_fp_fusion=False."""
    t = tl.minimum(tl.maximum(t, -200.0), 200.0)
    rounded = (t + _MAGIC) - _MAGIC
    f = t - rounded
    p = f * _C7 + _C6
    p = p * f + _C5
    p = p * f + _C4
    p = p * f + _C3
    p = p * f + _C2
    p = p * f + _C1
    p = p * f + _C0
    n = rounded.to(tl.int32)
    half = n >> 1
    p = p * ((half + 127) << 23).to(tl.float32, bitcast=True)
    return p * ((n - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, indices_ptr, out_ptr,
    heads, group, m, n_keys, n_out, dim,
    stride_qb, stride_qh, stride_qm, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """Raw scores of one query row against BLOCK keys: consecutive ones, or those that indices name."""
    row = tl.program_id(1).to(tl.int64)
    b = row // (heads * m)
    h = (row // m) % heads
    i = row % m
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n_out
    if GATHER:
        position = tl.load(indices_ptr + row * n_out + j, mask=inside, other=0)
        position = tl.maximum(position, 0)
    else:
        position = j.to(tl.int64)
    d = tl.arange(0, DIM)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + i * stride_qm + d * stride_qd, mask=d < dim, other=0.0)
    keys = k_ptr + b * stride_kb + (h // group) * stride_kh + position[:, None] * stride_kn + d[None, :] * stride_kd
    k = tl.load(keys, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    score = _tree_last(_widen(q)[None, :] * _widen(k), BLOCK, DIM, LOG_DIM)
    tl.store(out_ptr + row * n_out + j, score, mask=inside)


@triton.jit
def _partials_kernel(
    score_ptr, top_ptr, indices_ptr, v_ptr, numerator_ptr, denominator_ptr,
    heads, group, m, width, dim, blocks, factor,
    stride_vb, stride_vh, stride_vn, stride_vd,
    BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Numerator and denominator of the softmax over BLOCK selected keys of one query row."""
    row = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    b = row // (heads * m)
    h = (row // m) % heads
    j = block * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(indices_ptr + row * width + j, mask=j < width, other=-1)
    live = position >= 0
    score = tl.load(score_ptr + row * width + j, mask=live, other=0.0)
    top = tl.load(top_ptr + row)
    t = tl.where(live, (score - top) * factor, 0.0)
    p = tl.where(live, _exp2(t), 0.0)
    d = tl.arange(0, DIM)
    base = v_ptr + b * stride_vb + (h // group) * stride_vh
    values = base + tl.maximum(position, 0)[None, :] * stride_vn + d[:, None] * stride_vd
    v = tl.load(values, mask=live[None, :] & (d < dim)[:, None], other=0.0)
    numerator = _tree_last(p[None, :] * _widen(v), DIM, BLOCK, LOG_BLOCK)
    denominator = _tree_last(tl.reshape(p, (1, BLOCK)), 1, BLOCK, LOG_BLOCK)
    tl.store(numerator_ptr + (row * blocks + block) * dim + d, numerator, mask=d < dim)
    tl.store(denominator_ptr + row * blocks + block + tl.arange(0, 1), denominator)


@triton.jit
def _combine_kernel(
    numerator_ptr, denominator_ptr, out_ptr, out_denominator_ptr,
    blocks, out_blocks, dim,
    LAST: tl.constexpr, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Add BLOCK neighbouring partials; the last round divides."""
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    j = part * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    inside = (j < blocks)[None, :] & (d < dim)[:, None]
    tile = tl.load(numerator_ptr + (row * blocks + j)[None, :] * dim + d[:, None], mask=inside, other=0.0)
    numerator = _tree_last(tile, DIM, BLOCK, LOG_BLOCK)
    weights = tl.load(denominator_ptr + row * blocks + j, mask=j < blocks, other=0.0)
    denominator = _tree_last(tl.reshape(weights, (1, BLOCK)), 1, BLOCK, LOG_BLOCK)
    if LAST:
        # A row that may see no key has weight 0 and output 0.
        safe = tl.where(denominator > 0, denominator, 1.0)
        tl.store(out_ptr + row * dim + d, tl.div_rn(numerator, tl.broadcast_to(safe, (DIM,))), mask=d < dim)
    else:
        tl.store(out_ptr + (row * out_blocks + part) * dim + d, numerator, mask=d < dim)
        tl.store(out_denominator_ptr + row * out_blocks + part + tl.arange(0, 1), denominator)


@triton.jit
def _exp2_kernel(t_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, _exp2(tl.load(t_ptr + i, mask=i < n, other=0.0)), mask=i < n)


def _log2(n: int) -> int:
    return n.bit_length() - 1


def _check_device(x: torch.Tensor) -> None:
    if x.is_cuda == INTERPRETED:
        where = "the interpreter (TRITON_INTERPRET=1)" if INTERPRETED else "a GPU"
        raise ValueError(
            f"q.device={str(x.device)!r}: allowed is a tensor for {where}; TRITON_INTERPRET is read once, when "
            "qaxis.kernels is first imported"
        )


def scores(
    q: torch.Tensor,
    k: torch.Tensor,
    indices: torch.Tensor | None = None,
    *,
    block: int = SCORE_BLOCK,
    num_warps: int = 4,
    fuse: bool = False,
) -> torch.Tensor:
    """Canonical raw scores, float32 ``[B, H, M, N]``, or of the keys in ``indices [B, H, M, K]``.

    ``block`` and ``num_warps`` change no bit. ``fuse=True`` lets the compiler contract a multiply and an
    add into one rounding: no longer canonical, it exists to show what that changes.
    """
    _check_device(q)
    batch, heads, m, dim = q.shape
    n_out = k.shape[2] if indices is None else indices.shape[-1]
    block = min(block, next_power_of_two(n_out))
    out = torch.full((batch, heads, m, n_out), torch.nan, dtype=torch.float32, device=q.device)
    dim_padded = next_power_of_two(dim)
    _scores_kernel[(triton.cdiv(n_out, block), batch * heads * m)](
        q, k, out if indices is None else indices, out,
        heads, heads // k.shape[1], m, k.shape[2], n_out, dim,
        *q.stride(), *k.stride(),
        GATHER=indices is not None, BLOCK=block, DIM=dim_padded, LOG_DIM=_log2(dim_padded),
        enable_fp_fusion=fuse, num_warps=num_warps,
    )  # fmt: skip
    return out


def exp2(t: torch.Tensor) -> torch.Tensor:
    """The kernels' exponential of every element of a float32 tensor, for comparison with canonical.exp2."""
    _check_device(t)
    out = torch.full_like(t, torch.nan)
    _exp2_kernel[(triton.cdiv(t.numel(), 1024),)](t, out, t.numel(), BLOCK=1024, enable_fp_fusion=False)
    return out


def topk_indices(q: torch.Tensor, k: torch.Tensor, budget: Budget, allowed: torch.Tensor) -> torch.Tensor:
    """Selected positions, int64 ``[B, H, M, k_eff]``, padded with -1; see :func:`qaxis.topk_indices`."""
    batch, heads, m, _ = q.shape
    n = k.shape[2]
    table = budget.table(n, q.device)
    allowed = allowed.expand(-1, -1, m, -1) if allowed.shape[2] == 1 else allowed
    k_eff = table[allowed.sum(-1)]
    width = int(k_eff.max())
    out = torch.empty(batch, heads, m, width, dtype=torch.int64, device=q.device)
    # One 64-bit word orders by score, then by lower position: all words differ, so top-k has no ties.
    position = torch.arange(n, device=q.device)
    step = max(1, 8 * CHUNK_ELEMENTS // (batch * heads * n))
    for start in range(0, m, step):
        rows = slice(start, start + step)
        score = scores(q[:, :, rows], k)
        check_scores(score)
        word = (sort_key(score).to(torch.int64) << 32) | (n - 1 - position)
        word = torch.where(allowed[:, :, rows], word, torch.iinfo(torch.int64).min)
        best = torch.topk(word, width, dim=-1, sorted=True).values
        keep = torch.arange(width, device=q.device) < k_eff[:, :, rows, None]
        chosen = torch.where(keep, n - 1 - (best & 0xFFFFFFFF), n)
        chosen = chosen.sort(dim=-1).values
        out[:, :, rows] = torch.where(chosen == n, -1, chosen)
    return out


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, scale: float,
    *, block: int = ATTEND_BLOCK, combine_block: int = COMBINE_BLOCK, num_warps: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Canonical attention over given ``indices``, ``[B, H, M, Dv]`` in q's dtype."""
    _check_device(q)
    batch, heads, m, _ = q.shape
    rows, width, dim = batch * heads * m, indices.shape[-1], v.shape[-1]
    indices = indices.contiguous()
    score = scores(q, k, indices)
    check_scores(score)
    top = torch.where(indices >= 0, score, -torch.inf).amax(-1).clamp(min=torch.finfo(torch.float32).min)
    dim_padded = next_power_of_two(dim)
    block = min(block, next_power_of_two(width))

    def buffer(*shape: int) -> torch.Tensor:
        # Poisoned: a program that failed to write its part cannot go unnoticed.
        return torch.full(shape, torch.nan, dtype=torch.float32, device=q.device)

    blocks = triton.cdiv(width, block)
    numerator, denominator = buffer(rows, blocks, dim), buffer(rows, blocks)
    _partials_kernel[(blocks, rows)](
        score, top, indices, v, numerator, denominator,
        heads, heads // k.shape[1], m, width, dim, blocks, exponent_factor(scale),
        *v.stride(),
        BLOCK=block, LOG_BLOCK=_log2(block), DIM=dim_padded,
        enable_fp_fusion=False, num_warps=num_warps,
    )  # fmt: skip
    while True:
        out_blocks = triton.cdiv(blocks, combine_block)
        last = out_blocks == 1
        out = buffer(rows, out_blocks, dim)
        out_denominator = buffer(rows, out_blocks)
        _combine_kernel[(out_blocks, rows)](
            numerator, denominator, out, out_denominator,
            blocks, out_blocks, dim,
            LAST=last, BLOCK=combine_block, LOG_BLOCK=_log2(combine_block), DIM=dim_padded,
            enable_fp_fusion=False, num_warps=num_warps,
        )  # fmt: skip
        if last:
            return out.reshape(batch, heads, m, dim).to(q.dtype)
        numerator, denominator, blocks = out, out_denominator, out_blocks
