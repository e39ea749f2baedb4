"""A dense decode step that reads an 8-bit cache: half the bytes of bfloat16, so the fair rival of exact steps that do.

Flash decoding over codes: a group of 128 tokens has one power of two a channel, which goes to the query before the
product with its keys, and to the sums after the product with its values. The first tokens and those of the group that
is not complete are read in full.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from qaxis.storage.side import Stored

from .dense_decoding import merge

GROUP_SIZE = 128


@triton.jit
def _scale(ptr, place, d):
    """2^e of a group's exponents, float32 ``[DIM]``."""
    return ((tl.load(ptr + place + d).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _more(s, v, top, weight, total, factor):
    """One block of the online softmax: scores ``[ROWS, n]`` and values ``[n, DIM]`` times ``factor [DIM]``."""
    now = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - now[:, None])
    shrink = tl.exp2(top - now)
    weight = weight * shrink + tl.sum(p, 1)
    total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v) * factor[None, :]
    return now, weight, total


@triton.jit
def _codes_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, k_first_ptr, v_first_ptr, k_new_ptr, v_new_ptr, out_ptr, lse_ptr,
    k_batch, k_head, v_batch, v_head, ks_batch, ks_head, vs_batch, vs_head,
    kf_batch, kf_head, vf_batch, vf_head, kn_batch, kn_head, vn_batch, vn_head,
    heads, groups, first, skipped, newest, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    head, split = tl.program_id(1).to(tl.int64), tl.program_id(0)
    b, h = head // heads, head % heads
    r, d, t = tl.arange(0, ROWS), tl.arange(0, DIM), tl.arange(0, TOKENS)
    q = tl.load(q_ptr + (head * GROUP + r)[:, None] * DIM + d[None, :], mask=(r < GROUP)[:, None], other=0.0)
    top = tl.full((ROWS,), -1e30, tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    if split == tl.num_programs(0) - 1:
        one = tl.full((DIM,), 1.0, tl.float32)
        f = tl.arange(0, FIRST)
        here = (f < first)[:, None]
        k = tl.load(k_first_ptr + b * kf_batch + h * kf_head + f[:, None] * DIM + d[None, :], mask=here, other=0.0)
        v = tl.load(v_first_ptr + b * vf_batch + h * vf_head + f[:, None] * DIM + d[None, :], mask=here, other=0.0)
        s = tl.where((f < first)[None, :], tl.dot(q, tl.trans(k)) * scale, -1e30)
        top, weight, total = _more(s, v, top, weight, total, one)
        here = (t < newest)[:, None]
        k = tl.load(k_new_ptr + b * kn_batch + h * kn_head + t[:, None] * DIM + d[None, :], mask=here, other=0.0)
        v = tl.load(v_new_ptr + b * vn_batch + h * vn_head + t[:, None] * DIM + d[None, :], mask=here, other=0.0)
        seen = (t < newest) & (t >= skipped)
        s = tl.where(seen[None, :], tl.dot(q, tl.trans(k)) * scale, -1e30)
        top, weight, total = _more(s, v, top, weight, total, one)
    else:
        span = tl.cdiv(groups, tl.num_programs(0) - 1)
        begin = split * span
        for g in tl.range(begin, tl.minimum(begin + span, groups), num_stages=3):
            at = g * TOKENS + t
            place = at.to(tl.int64)[:, None] * DIM + d[None, :]
            shared = g * DIM
            k = tl.load(k_ptr + b * k_batch + h * k_head + place).to(q.dtype)
            v = tl.load(v_ptr + b * v_batch + h * v_head + place).to(q.dtype)
            turned = (q * _scale(k_scale_ptr + b * ks_batch + h * ks_head, shared, d)[None, :]).to(q.dtype)
            s = tl.where((at >= first)[None, :], tl.dot(turned, tl.trans(k)) * scale, -1e30)
            factor = _scale(v_scale_ptr + b * vs_batch + h * vs_head, shared, d)
            top, weight, total = _more(s, v, top, weight, total, factor)
    part = (head * tl.num_programs(0) + split) * ROWS + r
    tl.store(out_ptr + part[:, None] * DIM + d[None, :], total / tl.maximum(weight, 1e-30)[:, None])
    tl.store(lse_ptr + part, tl.where(weight > 0, top + tl.log2(tl.maximum(weight, 1e-30)), -1e30))


def attend(q: torch.Tensor, keys: Stored, values: Stored, splits: int = 31) -> torch.Tensor:
    """Dense attention of ``q [B, H, 1, D]`` over an 8-bit cache; the groups in ``splits`` stretches.

    Scales go to the query in its own dtype, which is exact for powers of two.
    """
    batch, heads, _, dim = q.shape
    kv, sides = keys.codes.shape[1], (keys, values)
    if keys.newest is None or values.newest is None or keys.grid.bits != 8 or keys.grid.tokens != GROUP_SIZE:
        raise ValueError(f"keys.grid={keys.grid}: allowed are 8 bits per channel in groups of {GROUP_SIZE} tokens")
    q = q.contiguous()
    part = torch.empty(batch * kv, splits + 1, 16, dim, device=q.device)
    lse = torch.empty(batch * kv, splits + 1, 16, device=q.device)
    tensors = [getattr(side, name) for name in ("codes", "scales", "first", "newest") for side in sides]
    strides = [x.stride(axis) for x in tensors for axis in (0, 1)]
    groups, first = keys.codes.shape[2] // GROUP_SIZE, keys.first.shape[2]
    # Without a group the first tokens are among the newest, too.
    _codes_kernel[(splits + 1, batch * kv)](
        q, *tensors, part, lse, *strides, kv, groups, first, 0 if groups else first, keys.newest.shape[2],
        math.log2(math.e) / math.sqrt(dim), GROUP=heads // kv, ROWS=16, TOKENS=GROUP_SIZE, DIM=dim, FIRST=16,
    )  # fmt: skip
    return merge(q, part, lse)
