"""The Triton kernel that attends, of a prefill, to the keys whose bits are set and puts back what the others weigh."""

from __future__ import annotations

from functools import partial

from ..arithmetic.triton import jit, tl, units_per_score, widen
from ..attention.completion import LEAST_SPREAD
from ..storage.moments import GROUP
from .triton import VARYING, heads_of, product, queries_of, range_of, split, vectors_of
from .triton_attend import highest_of, in_base_two, selected_of

_GROUP, _LEAST_SPREAD = tl.constexpr(GROUP), tl.constexpr(LEAST_SPREAD)
#: the 15-bit score of 0
_ZERO = tl.constexpr(16384)
_LOG2_E = tl.constexpr(1.4426950408889634)
#: what float16 weights are brought to: far from where it ends, which is 65504
_ROOM = tl.constexpr(8192.0)


@jit
def _fitted_of(begin, end, shift):
    """The keys [first, last) of the complete groups in [begin, end); ``shift`` keys of a group come before key 0."""
    first = (begin + shift + _GROUP - 1) // _GROUP * _GROUP - shift
    return first, tl.maximum((end + shift) // _GROUP * _GROUP - shift, first)


@jit
def _usual_of(q, keys, begin, n, dim, stride_kn, KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr):
    """The mean score of the first KEYS keys: squares of distances from it lose nothing where all scores are large."""
    score = product(q, vectors_of(keys, begin, n, dim, stride_kn, KEYS, DIM), WIDE)
    return tl.sum(score, 1) / tl.minimum(tl.maximum(n - begin, 1), KEYS)


@jit
def _top_of(
    q, keys, norm_ptr, largest_ptr, bits_ptr, top_ptr, long_top_ptr, of_head, row, here, begin, end, n, words, dim,
    scale, off, of_product, stride_kn,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The bound on the scores of the selected keys that prefill_attend_kernel begins with, or the highest of them.

    Not shared with that kernel: called, it is compiled to other machine code than written out.
    """
    wide = widen(q)
    length = tl.sqrt(tl.sum(wide * wide, 1))
    units = units_per_score(length, tl.load(norm_ptr + of_head))
    one = tl.where(units > 0.0, 2.0 / tl.where(units > 0.0, units, 1.0), 0.0)
    top = (tl.load(top_ptr + row, mask=here, other=0) - _ZERO + off) * one
    top = tl.maximum(top, tl.load(long_top_ptr + row, mask=here, other=-1e38))
    of_long = length * tl.load(largest_ptr + of_head) * (of_product * scale)
    if tl.max(tl.where(here & ((units <= 0.0) | (one * (2.0 * off * scale) >= 1.0) | (of_long >= 1.0)), 1, 0), 0) > 0:
        top = highest_of(q, keys, bits_ptr, here, begin, end, n, words, dim, stride_kn, QUERIES, KEYS, DIM, WIDE)
    return top


@jit
def _tail_of(
    q, keys, bits_ptr, here, behind, usual, seen_from, seen_to, fitted_from, fitted_to,
    begin, end, n, words, dim, factor, cap, stride_kn,
    CAP: tl.constexpr, LINEAR: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The first pass: sums over the visible keys of [begin, end) that are left out, of every query ``[QUERIES]``.

    Their mass, 0 where none of them is of a complete group; of those that are how many, and, if LINEAR, the sums of
    their scores' distances from ``usual`` and of the squares; also the excess of all that are left, relative to
    ``usual``, and the squared scores of all keys of complete groups.
    """
    many = tl.zeros((QUERIES,), tl.int32)
    mass = tl.zeros((QUERIES,), tl.float32)
    excess = tl.zeros((QUERIES,), tl.float32)
    away_sum = tl.zeros((QUERIES,), tl.float32)
    squares = tl.zeros((QUERIES,), tl.float32)
    second = tl.zeros((QUERIES,), tl.float32)
    for offset in tl.range(begin, end, KEYS, num_stages=STAGES):
        chosen = selected_of(bits_ptr, words, offset, here, QUERIES, KEYS)
        j = (offset + tl.arange(0, KEYS))[None, :]
        score = product(q, vectors_of(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
        left = (j >= seen_from[:, None]) & (j < seen_to[:, None]) & (chosen == 0)
        fitted = left & (j >= fitted_from[:, None]) & (j < fitted_to[:, None])
        many += tl.sum(fitted.to(tl.int32), 1)
        # By rounding alone a key that is left can be above those that are not.
        power = tl.minimum(in_base_two(score, factor, cap, CAP) - behind[:, None], 0.0)
        p = tl.where(left, tl.exp2(power), 0.0)
        mass += tl.sum(p, 1)
        if LINEAR:
            away = score - usual[:, None]
            excess += tl.sum(p * away, 1)
            away = tl.where(fitted, away, 0.0)
            away_sum += tl.sum(away, 1)
            squares += tl.sum(away * away, 1)
            of_group = (j >= fitted_from[:, None]) & (j < fitted_to[:, None])
            second += tl.sum(tl.where(of_group, score * score, 0.0), 1)
    return many, tl.where(many > 0, mass, 0.0), excess, away_sum, squares, second


@jit
def _line_of(many, mass, excess, usual, away_sum, squares, second, QUERIES: tl.constexpr, LINEAR: tl.constexpr):
    """The weights ``share + slope * (score - mean)`` of keys left out of complete groups, and their scores' spread."""
    keys_fitted = tl.maximum(many, 1).to(tl.float32)
    share = mass / keys_fitted
    slope = tl.zeros((QUERIES,), tl.float32)
    mean = tl.zeros((QUERIES,), tl.float32)
    spread = tl.zeros((QUERIES,), tl.float32)
    if LINEAR:
        mean = away_sum / keys_fitted
        spread = squares - away_sum * mean
        excess -= mass * mean
        mean += usual
        # Next to the scores of all keys of complete groups: those of a few that are left may lie close together.
        sloped = spread > second * _LEAST_SPREAD
        slope = tl.where(sloped, excess / tl.where(sloped, spread, 1.0), 0.0)
    return share, slope, mean, spread


@jit
def _weighted_of(
    q, keys, values, bits_ptr, here, behind, weight, share, slope, mean, room, fitted_from, fitted_to,
    begin, end, n, words, dim, dim_v, factor, cap, stride_kn, stride_vn,
    CAP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The second pass: values times softmax weights, or affine ones, summed, and ``weight`` plus the former.

    Where values are float16 the affine weights come multiplied by ``room``, and the others are multiplied here.
    """
    total = tl.zeros((QUERIES, DIM_V), tl.float32)
    for offset in tl.range(begin, end, KEYS, num_stages=STAGES):
        chosen = selected_of(bits_ptr, words, offset, here, QUERIES, KEYS)
        j = (offset + tl.arange(0, KEYS))[None, :]
        score = product(q, vectors_of(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
        p = tl.where(chosen, tl.exp2(in_base_two(score, factor, cap, CAP) - behind[:, None]), 0.0)
        weight += tl.sum(p, 1)
        if values.dtype.element_ty == tl.float16:
            p *= room[:, None]
        line = share[:, None] + slope[:, None] * (score - mean[:, None])
        fitted = (j >= fitted_from[:, None]) & (j < fitted_to[:, None]) & (chosen == 0)
        p += tl.where(fitted, line, 0.0)
        v = vectors_of(values, offset, n, dim_v, stride_vn, KEYS, DIM_V)
        if WIDE:
            # Rounded as for tensor cores, then widened.
            total += tl.dot(widen(p.to(v.dtype)), widen(v), input_precision="ieee")
        else:
            total = tl.dot(p.to(v.dtype), v, total, input_precision="ieee")
    return total, weight


@partial(jit, any_integer=(*VARYING, "shift"))
def prefill_completed_kernel(
    q_ptr, k_ptr, v_ptr, norm_ptr, largest_ptr, bits_ptr, top_ptr, long_top_ptr, sink_ptr, out_ptr,
    heads, group, start, chunk, m, first, n, pads_ptr, origin, window, words, dim, dim_v, tiles, scale, factor, cap,
    off, of_product,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    shift,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, LINEAR: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As prefill_attend_kernel, completed by what the other visible keys weigh: ``completion.completed_weights``.

    The keys are scored twice. First those that are left out are summed: their mass and excess, and of those in complete
    groups number, scores and squares, from which the affine weight of each follows. Then values are multiplied once, by
    a softmax weight where a key is selected, else by an affine one. A query that leaves out no key of a complete group
    gets the bits that prefill_attend_kernel gives.
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
    lowest, _ = range_of(tile * QUERIES, b, first, n, pads_ptr, origin, window, CAUSAL, PADDED)
    begin = lowest // KEYS * KEYS
    end = n
    if CAUSAL:
        end = tl.minimum(end, first + (tile + 1) * QUERIES)
    top = _top_of(
        q, keys, norm_ptr, largest_ptr, bits_ptr, top_ptr, long_top_ptr, b * (heads // group) + kv, row, here,
        begin, end, n, words, dim, scale, off, of_product, stride_kn, QUERIES, KEYS, DIM, WIDE,
    )  # fmt: skip
    behind = in_base_two(top, factor, cap, CAP)
    weight = tl.zeros((QUERIES,), tl.float32)
    if SINK:
        sink = widen(tl.load(sink_ptr + h)) * _LOG2_E
        behind = tl.maximum(behind, sink)
        weight = tl.exp2(sink - behind)
    seen_from, seen_to = range_of(i, b, first, n, pads_ptr, origin, window, CAUSAL, PADDED)
    fitted_from, fitted_to = _fitted_of(seen_from, seen_to, shift)
    usual = tl.zeros((QUERIES,), tl.float32)
    if LINEAR:
        usual = _usual_of(q, keys, lowest, n, dim, stride_kn, KEYS, DIM, WIDE)
    # Nothing is put back for a tile of queries without a group.
    counted = tl.where(tl.max(fitted_to - fitted_from, 0) > 0, end, begin)
    many, mass, excess, away_sum, squares, second = _tail_of(
        q, keys, bits_ptr, here, behind, usual, seen_from, seen_to, fitted_from, fitted_to,
        begin, counted, n, words, dim, factor, cap, stride_kn, CAP, LINEAR, QUERIES, KEYS, STAGES, DIM, WIDE,
    )  # fmt: skip
    share, slope, mean, spread = _line_of(many, mass, excess, usual, away_sum, squares, second, QUERIES, LINEAR)
    room = tl.full((QUERIES,), 1.0, tl.float32)
    if v_ptr.dtype.element_ty == tl.float16:
        # A share of many keys is below float16's smallest number. No weight is above 2 + share + |slope| sqrt(spread).
        largest = 2.0 + share + tl.abs(slope) * tl.sqrt(tl.maximum(spread, 0.0))
        room = tl.where(many > 0, _ROOM / largest, 1.0)
        share *= room
        slope *= room
    total, weight = _weighted_of(
        q, keys, values, bits_ptr, here, behind, weight, share, slope, mean, room, fitted_from, fitted_to,
        begin, end, n, words, dim, dim_v, factor, cap, stride_kn, stride_vn,
        CAP, QUERIES, KEYS, STAGES, DIM, DIM_V, WIDE,
    )  # fmt: skip
    weight = (weight + mass) * room
    out = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
    e = tl.arange(0, DIM_V)
    place = out_ptr + ((head.to(tl.int64) * m + start + i)[:, None] * dim_v + e[None, :])
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=here[:, None] & (e < dim_v)[None, :])
