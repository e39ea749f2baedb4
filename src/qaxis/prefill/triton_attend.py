"""The Triton kernel that attends, of a prefill, to the keys whose bits are set."""

from __future__ import annotations

from functools import partial

from ..arithmetic.triton import jit, tl, units_per_score, widen
from .triton import VARYING, heads_of, product, queries_of, range_of, split, vectors_of

#: the 15-bit score of 0
_ZERO = tl.constexpr(16384)
_LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def selected_of(bits_ptr, words, offset, here, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Bits ``[QUERIES, KEYS]`` of a tile, as a mask; ``bits_ptr`` points to the rows."""
    w = offset // 32 + tl.arange(0, KEYS // 32)
    packed = tl.load(bits_ptr[:, None] + w[None, :], mask=here[:, None], other=0)
    bit = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bit, (QUERIES, KEYS)) != 0


@jit
def highest_of(
    q, keys, bits_ptr, here, begin, end, n, words, dim, stride_kn,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The highest score of the selected keys of every query, of which there are none before ``begin``."""
    top = tl.full((QUERIES,), -1e38, tl.float32)
    for offset in range(begin, end, KEYS):
        score = product(q, vectors_of(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
        chosen = selected_of(bits_ptr, words, offset, here, QUERIES, KEYS)
        top = tl.maximum(top, tl.max(tl.where(chosen, score, -1e38), 1))
    return top


@jit
def in_base_two(score, factor, cap, CAP: tl.constexpr):
    """Logits in powers of two: ``score * factor``, or capped: ``cap * tanh(score * factor)``."""
    if CAP:
        return cap * (1.0 - 2.0 / (tl.exp2(score * (factor * (2.0 * _LOG2_E))) + 1.0))
    else:
        return score * factor


@partial(jit, any_integer=VARYING)
def prefill_attend_kernel(
    q_ptr, k_ptr, v_ptr, norm_ptr, largest_ptr, bits_ptr, top_ptr, long_top_ptr, sink_ptr, out_ptr,
    heads, group, start, chunk, m, first, n, pads_ptr, origin, window, words, dim, dim_v, tiles, scale, factor, cap,
    off, of_product,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, SKIP: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Softmax attention of QUERIES queries over the keys whose bits are set, on the tensor cores.

    ``scale`` is that of the plain logits in powers of two; ``factor`` and ``cap`` are those of in_base_two. SKIP:
    tiles without a key that is attended to are left out.
    """
    head, tile = split(tl.program_id(0), tiles)
    # Later queries see more keys: they start first.
    tile = tiles - 1 - tile
    b, h, kv = heads_of(head, heads, group)
    i = tile * QUERIES + tl.arange(0, QUERIES)
    here = i < chunk
    q = queries_of(q_ptr, b, h, start + i, here, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM)
    keys = k_ptr + b * stride_kb + kv * stride_kh
    values = v_ptr + b * stride_vb + kv * stride_vh
    row = head.to(tl.int64) * chunk + i
    bits_ptr += row * words
    begin, _ = range_of(tile * QUERIES, b, first, n, pads_ptr, origin, window, CAUSAL, PADDED)
    begin = begin // KEYS * KEYS
    end = n
    if CAUSAL:
        end = tl.minimum(end, first + (tile + 1) * QUERIES)
    # The highest fast score, or the highest score of the long keys, bounds the highest score from above, so nothing has
    # to be rescaled on the way.
    wide = widen(q)
    length = tl.sqrt(tl.sum(wide * wide, 1))
    units = units_per_score(length, tl.load(norm_ptr + b * (heads // group) + kv))
    one = tl.where(units > 0.0, 2.0 / tl.where(units > 0.0, units, 1.0), 0.0)
    top = (tl.load(top_ptr + row, mask=here, other=0) - _ZERO + off) * one
    top = tl.maximum(top, tl.load(long_top_ptr + row, mask=here, other=-1e38))
    of_long = length * tl.load(largest_ptr + b * (heads // group) + kv) * (of_product * scale)
    if tl.max(tl.where(here & ((units <= 0.0) | (one * (2.0 * off * scale) >= 1.0) | (of_long >= 1.0)), 1, 0), 0) > 0:
        # Except where that bound is too far above it, or products of long keys too far from it.
        top = highest_of(q, keys, bits_ptr, here, begin, end, n, words, dim, stride_kn, QUERIES, KEYS, DIM, WIDE)
    behind = in_base_two(top, factor, cap, CAP)
    weight = tl.zeros((QUERIES,), tl.float32)
    if SINK:
        sink = widen(tl.load(sink_ptr + h)) * _LOG2_E
        behind = tl.maximum(behind, sink)
        weight = tl.exp2(sink - behind)
    total = tl.zeros((QUERIES, DIM_V), tl.float32)
    for offset in tl.range(begin, end, KEYS, num_stages=STAGES):
        chosen = selected_of(bits_ptr, words, offset, here, QUERIES, KEYS)
        any_chosen = 1
        if SKIP:
            any_chosen = tl.max(tl.max(chosen.to(tl.int32), 1), 0)
        if any_chosen > 0:
            score = product(q, vectors_of(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
            p = tl.where(chosen, tl.exp2(in_base_two(score, factor, cap, CAP) - behind[:, None]), 0.0)
            weight += tl.sum(p, 1)
            v = vectors_of(values, offset, n, dim_v, stride_vn, KEYS, DIM_V)
            if WIDE:
                total += tl.dot(p, widen(v), input_precision="ieee")
            else:
                total = tl.dot(p.to(v.dtype), v, total, input_precision="ieee")
    out = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
    e = tl.arange(0, DIM_V)
    place = out_ptr + ((head.to(tl.int64) * m + start + i)[:, None] * dim_v + e[None, :])
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=here[:, None] & (e < dim_v)[None, :])
