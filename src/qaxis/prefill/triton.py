"""Triton kernels that select for a prefill: 15-bit scores, a cut with its band, the band's canonical order.

A row is one query of one head; ``chunk`` queries of every head are in flight, from the query ``start`` on. It sees the
keys [begin, end), of which it always keeps those outside [lo, hi) and ranks the others. What it selects is kept as one
bit a key, in row ``bit_start + i`` of the ``bit_rows`` of its head. Keys are counted from ``origin``, where ``k_ptr``
points to. Offsets into tensors are 64-bit: any stride of theirs may be large.
"""

from __future__ import annotations

from functools import partial

from ..arithmetic.fast_scores import LARGEST, SMALLEST, UNITS
from ..arithmetic.triton import jit, score_of, tl, tree_sum, units_per_score, widen

_SMALLEST, _LARGEST = tl.constexpr(SMALLEST), tl.constexpr(LARGEST)
#: 2^23 + 2^14: added to a float32 it leaves an integer, moved up by 2^14, in the lowest bits
_TO_FIFTEEN_BITS = tl.constexpr(8404992.0)
#: the score 0, and what is behind all scores
_ZERO, _BEHIND = tl.constexpr(16384), tl.constexpr(32768)
_NO_SCORE = tl.constexpr(-2147483648)
#: arguments that differ from chunk to chunk: a prompt of many would compile the kernels over and over
VARYING = (
    "start",
    "chunk",
    "m",
    "first",
    "origin",
    "bit_rows",
    "bit_start",
    "key_tiles",
    "query_tiles",
    "tiles",
    "room",
    "rows",
)
#: where the range ends, from the score 0
_HALF = tl.constexpr(UNITS / 2)


@jit
def range_of(i, b, first, n, pads_ptr, origin, window, CAUSAL: tl.constexpr, PADDED: tl.constexpr):
    """The keys [begin, end) that queries ``i`` see; ``first`` is the position of query 0."""
    end = tl.minimum(first + i + 1, n) if CAUSAL else i * 0 + n
    begin = tl.maximum(end - window, 0)
    if PADDED:
        begin = tl.maximum(begin, tl.load(pads_ptr + b) - origin)
    return tl.minimum(begin, end), end


@jit
def _ranked(begin, end, sinks, recent):
    """Of the keys that are seen those that are ranked, [lo, hi): the others are always kept."""
    lo = tl.minimum(begin + sinks, end)
    return lo, tl.maximum(end - recent, lo)


@jit
def _bit_row(head, i, bit_rows, bit_start):
    """Row of a query's bits."""
    return head.to(tl.int64) * bit_rows + bit_start + i


@jit
def split(place, many):
    """(quotient, remainder): grids have one dimension, as their second ends at 65535."""
    return place // many, place % many


@jit
def heads_of(head, heads, group):
    """64-bit (batch, query head, KV head) of a head among those of all batches."""
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), (head % heads // group).to(tl.int64)


@jit
def _query(q_ptr, b, h, place, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM: tl.constexpr):
    """The query ``place``, widened."""
    d = tl.arange(0, DIM)
    queries = q_ptr + b * stride_qb + h * stride_qh + place.to(tl.int64) * stride_qm + d.to(tl.int64) * stride_qd
    return widen(tl.load(queries, mask=d < dim, other=0.0))


@jit
def queries_of(q_ptr, b, h, place, here, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM: tl.constexpr):
    """The queries ``place``, where they are ``here``."""
    d = tl.arange(0, DIM)
    queries = q_ptr + b * stride_qb + h * stride_qh + place.to(tl.int64)[:, None] * stride_qm
    return tl.load(queries + d.to(tl.int64)[None, :] * stride_qd, mask=here[:, None] & (d < dim)[None, :], other=0.0)


@jit
def vectors_of(rows_ptr, offset, n, dim, stride, ROWS: tl.constexpr, DIM: tl.constexpr):
    """The ROWS keys or values of a head from ``offset`` on, where there are that many."""
    o = tl.arange(0, ROWS)
    d = tl.arange(0, DIM)
    # What is the same for every tile first: only the start of a tile is multiplied in the loop.
    rows = rows_ptr + (tl.full((), 0, tl.int64) + offset) * stride
    return tl.load(
        rows + (o.to(tl.int64)[:, None] * stride + d[None, :]),
        mask=(offset + o < n)[:, None] & (d < dim)[None, :], other=0.0,
    )  # fmt: skip


@jit
def product(q, k, WIDE: tl.constexpr):
    """Scores on the tensor cores; ``WIDE`` for the interpreter, which cannot multiply bfloat16."""
    if WIDE:
        return tl.dot(widen(q), tl.trans(widen(k)), input_precision="ieee")
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


@partial(jit, any_integer=VARYING)
def prefill_scores_kernel(
    q_ptr, k_ptr, norm_ptr, fast_ptr, heads, group, start, chunk, first, n, pads_ptr, origin, window, padded, dim,
    key_tiles, query_tiles,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LOOP: tl.constexpr,
    STAGES: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """15-bit scores of QUERIES queries and LOOP times KEYS keys, but for tiles that none of them sees.

    What is written for keys longer than the norm is no score: prefill_long_kernel writes theirs.
    """
    place, key_tile = split(tl.program_id(0), key_tiles)
    head, query_tile = split(place, query_tiles)
    b, h, kv = heads_of(head, heads, group)
    i = query_tile * QUERIES + tl.arange(0, QUERIES)
    here = i < chunk
    q = queries_of(q_ptr, b, h, start + i, here, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM)
    wide = widen(q)
    units = units_per_score(tl.sqrt(tl.sum(wide * wide, 1)), tl.load(norm_ptr + b * (heads // group) + kv))
    keys = k_ptr + b * stride_kb + kv * stride_kh
    rows = fast_ptr + (head.to(tl.int64) * chunk + i)[:, None] * padded
    lowest, _ = range_of(query_tile * QUERIES, b, first, n, pads_ptr, origin, window, CAUSAL, PADDED)
    begin = key_tile * (LOOP * KEYS)
    end = tl.minimum(begin + LOOP * KEYS, n)
    if CAUSAL:
        end = tl.minimum(end, first + (query_tile + 1) * QUERIES)
    begin = tl.maximum(begin, lowest // KEYS * KEYS)
    for offset in tl.range(begin, end, KEYS, num_stages=STAGES):
        score = product(q, vectors_of(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
        fast = (score * (0.5 * units)[:, None] + _TO_FIFTEEN_BITS).to(tl.int32, bitcast=True).to(tl.uint16)
        tl.store(rows + (offset + tl.arange(0, KEYS))[None, :], fast, mask=here[:, None])


@jit
def prefill_lengths_kernel(k_ptr, norm_ptr, kv_heads, n, dim, tiles, stride_kb, stride_kh, stride_kn,
                           KEYS: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    """Lengths of KEYS keys of a head."""
    head, tile = split(tl.program_id(0), tiles)
    keys = k_ptr + (head // kv_heads).to(tl.int64) * stride_kb + (head % kv_heads).to(tl.int64) * stride_kh
    wide = widen(vectors_of(keys, tile * KEYS, n, dim, stride_kn, KEYS, DIM))
    j = tile * KEYS + tl.arange(0, KEYS)
    tl.store(norm_ptr + head.to(tl.int64) * n + j, tl.sqrt(tl.sum(wide * wide, 1)), mask=j < n)


@partial(jit, any_integer=VARYING)
def prefill_long_kernel(
    q_ptr, k_ptr, norm_ptr, longest_ptr, long_ptr, k_eff_ptr, fast_ptr, long_top_ptr,
    heads, group, start, chunk, first, n, pads_ptr, origin, window, sinks, recent, bit_rows, bit_start, padded, dim,
    room, tiles, stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr,
):  # fmt: skip
    """15-bit scores of the long keys, from their canonical ones; and the largest of these, where it may be kept.

    Why the selection stays exact: let f(s) be the canonical score s in units, cut off at both ends of the range. f
    never falls, and every key's 15-bit score is within ``off`` of its f: that of a long key by rounding f itself, that
    of another key as its length bounds both s and the error of its product. If 15-bit scores of two keys are more than
    2 off apart, their f are in the same order, and so are their canonical scores; that is all that the cut relies on.
    Long keys beyond the ends tie there, and are put in canonical order if the cut falls among them.
    """
    head, tile = split(tl.program_id(0), tiles)
    b, h, kv = heads_of(head, heads, group)
    i = tile * ROWS + tl.arange(0, ROWS)
    here = i < chunk
    many = tl.load(long_ptr + b * (heads // group) + kv)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    if many > 0:
        wide = widen(queries_of(q_ptr, b, h, start + i, here, dim, stride_qb, stride_qh, stride_qm, stride_qd, TREE))
        norm = tl.load(norm_ptr + b * (heads // group) + kv)
        units = 0.5 * units_per_score(tl.sqrt(tl.sum(wide * wide, 1)), norm)
        keys = k_ptr + b * stride_kb + kv * stride_kh
        begin, end = range_of(i, b, first, n, pads_ptr, origin, window, CAUSAL, PADDED)
        lo, hi = _ranked(begin, end, sinks, recent)
        ranks = tl.load(k_eff_ptr + (end - begin), mask=here, other=0) > 0
        lowest, furthest = tl.min(begin, 0), tl.max(end, 0)
        longest_ptr += (b * (heads // group) + kv) * room
        rows = fast_ptr + (head.to(tl.int64) * chunk + i) * padded
        d = tl.arange(0, TREE)
        for at in range(0, many):
            j = (tl.load(longest_ptr + at) - origin).to(tl.int32)
            if (j >= lowest) & (j < furthest):
                key = widen(tl.load(keys + j.to(tl.int64) * stride_kn + d, mask=d < dim, other=0.0))
                score = tree_sum(wide * key[None, :], ROWS, TREE, LOG_TREE)
                place = tl.minimum(tl.maximum(score * units, -_HALF), _HALF) + _TO_FIFTEEN_BITS
                seen = here & (j >= begin) & (j < end)
                tl.store(rows + j, place.to(tl.int32, bitcast=True).to(tl.uint16), mask=seen)
                kept = seen & (ranks | (j < lo) | (j >= hi))
                highest = tl.where(kept, tl.maximum(highest, score), highest)
    tl.store(long_top_ptr + _bit_row(head, i, bit_rows, bit_start), highest, mask=here)


@jit
def _first_guess(fast_ptr, quantile_ptr, slope_ptr, lo, hi, seen, SAMPLE: tl.constexpr):
    """(where the k best would begin if a sample's mean and spread told all, how far one key moves that)."""
    each = tl.maximum((hi - lo) // SAMPLE, 1)
    s = lo + tl.arange(0, SAMPLE) * each
    some = tl.load(fast_ptr + s, mask=s < hi, other=0).to(tl.float32)
    many = tl.minimum(SAMPLE, (hi - lo + each - 1) // each).to(tl.float32)
    mean = tl.sum(some, 0) / many
    spread = tl.sqrt(tl.sum(tl.where(s < hi, (some - mean) * (some - mean), 0.0), 0) / many)
    return mean + tl.load(quantile_ptr + seen) * spread, tl.load(slope_ptr + seen) * spread


@jit
def _scores(fast_ptr, offset, lo, hi, BLOCK: tl.constexpr):
    """BLOCK scores of a row from ``offset`` on; -1 outside [lo, hi)."""
    j = offset + tl.arange(0, BLOCK)
    # A mask that is the same for eight keys leaves loads of 16 bytes; only the first and last block need a finer one.
    fast = tl.load(fast_ptr + j, mask=j // 8 < (hi + 7) // 8, other=0).to(tl.int32)
    if (offset < lo) | (offset + BLOCK > hi):
        fast = tl.where((j >= lo) & (j < hi), fast, -1)
    return fast


@jit
def _reached(fast_ptr, lo, hi, trial, BLOCK: tl.constexpr):
    """How many scores of a row reach ``trial``."""
    enough = tl.zeros((BLOCK,), tl.int32)
    for offset in range(0, hi, BLOCK):
        enough += (_scores(fast_ptr, offset, lo, hi, BLOCK) >= trial).to(tl.int32)
    return tl.sum(enough, 0)


@jit
def _narrow(fast_ptr, guess, per_key, lo, hi, k_eff, BLOCK: tl.constexpr, SLACK: tl.constexpr):
    """(found, behind): at least k_eff scores reach the one and at most k_eff the other, few of them between."""
    found = tl.full((), 0, tl.int32)
    behind = tl.full((), _BEHIND, tl.int32)
    at_least = hi - lo
    beyond = tl.full((), 0, tl.int32)
    tries = tl.full((), 0, tl.int32)
    # A wide band costs less than one more trial.
    while (behind - found > 1) & (at_least - beyond > SLACK):
        trial = tl.minimum(tl.maximum(guess.to(tl.int32), found + 1), behind - 1)
        enough = _reached(fast_ptr, lo, hi, trial, BLOCK)
        at_least = tl.where(enough >= k_eff, enough, at_least)
        found = tl.where(enough >= k_eff, trial, found)
        beyond = tl.where(enough <= k_eff, enough, beyond)
        behind = tl.where(enough <= k_eff, trial, behind)
        tries += 1
        # Now at the other side of the k-th, a quarter of the slack away; if that does not end soon, by halving.
        aim = k_eff + tl.where(enough >= k_eff, -(SLACK // 4), SLACK // 4)
        near = trial.to(tl.float32) + (enough - aim).to(tl.float32) * per_key
        near = tl.minimum(tl.maximum(near, 0.0), _BEHIND - 1.0)
        guess = tl.where(tries < 6, near, ((found + behind) >> 1).to(tl.float32))
    return found, behind


@jit
def _keep(
    fast, offset, base, end, low, high, band, bytes_ptr, position_ptr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Write the bits of the keys surely selected and list those of the band, in no order, ``band`` of which there are.

    Keys count from ``base``, the row of bits ends at ``end``. Returns how many of every eight keys are surely selected,
    and ``band`` with those of this block.
    """
    place = tl.arange(0, BLOCK) % 8
    # Of eight keys, in bits 0 to 7 those that are sure, in 8 to 15 those of the band, above how many are sure.
    mark = tl.where(fast >= high, (1 << place) + 65536, tl.where(fast >= low, 256 << place, 0))
    eight = tl.sum(tl.reshape(mark, (BLOCK // 8, 8)), 1)
    at = offset // 8 + tl.arange(0, BLOCK // 8)
    tl.store(bytes_ptr + at, eight.to(tl.uint8), mask=at < end // 8)
    left = (eight >> 8) & 255
    # The band is few keys: mostly none or one of eight, so it is done at once, or not at all.
    while tl.max(left, 0) > 0:
        lowest = left & -left
        some = (left > 0).to(tl.int32)
        slot = band + tl.cumsum(some, 0) - 1
        bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(position_ptr + slot, base + at * 8 + bit, mask=(some > 0) & (slot < CAPACITY))
        band += tl.sum(some, 0)
        left -= lowest
    return eight >> 16, band


@jit
def _keep_always(fast_ptr, bits_ptr, begin, end, top):
    """Sets the bits of the keys [begin, end); returns the larger of ``top`` and their scores."""
    for offset in range(begin, end, 128):
        j = offset + tl.arange(0, 128)
        tl.atomic_or(bits_ptr + (j >> 5), 1 << (j & 31), mask=j < end, sem="relaxed")
        top = tl.maximum(top, tl.max(tl.load(fast_ptr + j, mask=j < end, other=0).to(tl.int32), 0))
    return top


@partial(jit, any_integer=VARYING)
def prefill_cut_kernel(
    q_ptr, norm_ptr, fast_ptr, k_eff_ptr, quantile_ptr, slope_ptr,
    bytes_ptr, bits_ptr, position_ptr, band_ptr, missing_ptr, low_ptr, high_ptr, top_ptr,
    heads, group, start, chunk, first, n, pads_ptr, origin, window, sinks, recent, bit_rows, bit_start, padded, words,
    dim, error, stride_qb, stride_qh, stride_qm, stride_qd,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr, SLACK: tl.constexpr,
    CAPACITY: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Of one row: which keys are surely among its k best, which may be (the band), and how many of the band are.

    Every fast score is within half an error of the same growing function of the canonical score. If at least k reach
    ``found``, the k-th canonical score is at most half an error below it, and a key more than an error below is out. If
    at most k reach ``behind``, a key an error above it has at most k - 1 rivals. All bits are 0 before.
    """
    head, i = split(tl.program_id(0), chunk)
    b, h, kv = heads_of(head, heads, group)
    row = tl.program_id(0).to(tl.int64)
    bit_row = _bit_row(head, i, bit_rows, bit_start)
    begin, end = range_of(i, b, first, n, pads_ptr, origin, window, CAUSAL, PADDED)
    from_key, to_key = _ranked(begin, end, sinks, recent)
    k_eff = tl.minimum(tl.load(k_eff_ptr + (end - begin)), to_key - from_key).to(tl.int32)
    wide = _query(q_ptr, b, h, start + i, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM)
    largest = tl.sqrt(tl.sum(wide * wide, 0)) * tl.load(norm_ptr + b * (heads // group) + kv) * 1.001
    # A little narrower than for the scores: where these are not usable, neither may be taken to be here. Those of a
    # query too short to have a length all tie: its band has every key.
    usable = (largest > _SMALLEST * 1.01) & (largest < _LARGEST / 1.01)
    everything = k_eff >= to_key - from_key
    fast_ptr += row * padded
    bytes_ptr += bit_row * (words * 4)
    bits_ptr += bit_row * words
    position_ptr += row * CAPACITY
    # From the first whole bytes of what is ranked.
    base = from_key // 128 * 128
    lo, hi = from_key - base, to_key - base
    found = tl.full((), 0, tl.int32)
    behind = tl.full((), _BEHIND, tl.int32)
    if (k_eff > 0) & (k_eff < to_key - from_key) & usable:
        guess, per_key = _first_guess(fast_ptr + base, quantile_ptr, slope_ptr, lo, hi, end - begin, SAMPLE)
        found, behind = _narrow(fast_ptr + base, guess, per_key, lo, hi, k_eff, BLOCK, SLACK)
    low = tl.maximum(found - error, 0)
    high = tl.where(everything, 0, tl.where(usable, behind + error, 1 << 20))
    # Nothing is ranked where all is taken by what is always kept.
    low = tl.where(k_eff > 0, low, 1 << 20)
    high = tl.where(k_eff > 0, high, 1 << 20)
    sure = tl.zeros((BLOCK // 8,), tl.int32)
    best = tl.zeros((BLOCK,), tl.int32)
    band = tl.full((), 0, tl.int32)
    for offset in range(0, hi, BLOCK):
        fast = _scores(fast_ptr + base, offset, lo, hi, BLOCK)
        best = tl.maximum(best, fast)
        and_sure, band = _keep(fast, offset, base, words * 32 - base, low, high, band, bytes_ptr + base // 8,
                               position_ptr, BLOCK, CAPACITY)  # fmt: skip
        sure += and_sure
    top = tl.where(k_eff > 0, tl.max(best, 0), 0)
    if sinks + recent > 0:
        tl.debug_barrier()
        top = _keep_always(fast_ptr, bits_ptr, begin, from_key, top)
        top = _keep_always(fast_ptr, bits_ptr, to_key, end, top)
    tl.store(band_ptr + row, band)
    tl.store(missing_ptr + row, k_eff - tl.sum(sure, 0))
    tl.store(low_ptr + row, low)
    tl.store(high_ptr + row, high)
    tl.store(top_ptr + bit_row, top)


@jit
def _canonical(wide, keys, j, mask, stride_kn, dim, BLOCK: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr):
    """Canonical scores of the keys ``j [BLOCK]`` as integers in the order of the scores (rules 2 and 4)."""
    d = tl.arange(0, TREE)
    rows = keys + j.to(tl.int64)[:, None] * stride_kn
    k = tl.load(rows + d[None, :], mask=mask[:, None] & (d < dim)[None, :], other=0.0)
    return score_of(tree_sum(wide[None, :] * widen(k), BLOCK, TREE, LOG_TREE).to(tl.int32, bitcast=True))


@jit
def _beaten(word, j, by_word, by_j):
    """How many of the second list come before each of the first: higher score, or the same and a lower position."""
    before = (by_word[None, :] > word[:, None]) | ((by_word[None, :] == word[:, None]) & (by_j[None, :] < j[:, None]))
    return tl.sum(before.to(tl.int32), 1)


@jit
def _order_list(
    wide, keys, position_ptr, word_ptr, bits_ptr, band, missing, stride_kn, dim,
    BLOCK: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr,
):  # fmt: skip
    """Sets the bits of the ``missing`` best of a list of more than BLOCK keys."""
    o = tl.arange(0, BLOCK)
    for offset in range(0, band, BLOCK):
        inside = offset + o < band
        j = tl.load(position_ptr + offset + o, mask=inside, other=0)
        word = _canonical(wide, keys, j, inside, stride_kn, dim, BLOCK, TREE, LOG_TREE)
        tl.store(word_ptr + offset + o, word, mask=inside)
    tl.debug_barrier()
    for offset in range(0, band, BLOCK):
        inside = offset + o < band
        j = tl.load(position_ptr + offset + o, mask=inside, other=0)
        word = tl.load(word_ptr + offset + o, mask=inside, other=_NO_SCORE)
        rank = tl.zeros((BLOCK,), tl.int32)
        for other in range(0, band, BLOCK):
            by_j = tl.load(position_ptr + other + o, mask=other + o < band, other=0)
            by_word = tl.load(word_ptr + other + o, mask=other + o < band, other=_NO_SCORE)
            rank += _beaten(word, j, by_word, by_j)
        take = (rank < missing) & inside
        tl.atomic_or(bits_ptr + (j >> 5), 1 << (j & 31), mask=take, sem="relaxed")


@partial(jit, any_integer=VARYING)
def prefill_band_kernel(
    q_ptr, k_ptr, position_ptr, word_ptr, band_ptr, missing_ptr, bits_ptr,
    heads, group, start, chunk, bit_rows, bit_start, words, dim,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr,
):  # fmt: skip
    """The band of one row in canonical order: sets the bits of as many of its best as the row misses."""
    row = tl.program_id(0).to(tl.int64)
    band = tl.load(band_ptr + row)
    missing = tl.load(missing_ptr + row)
    if (missing > 0) & (band <= CAPACITY):
        head, i = split(tl.program_id(0), chunk)
        b, h, kv = heads_of(head, heads, group)
        wide = _query(q_ptr, b, h, start + i, dim, stride_qb, stride_qh, stride_qm, stride_qd, TREE)
        keys = k_ptr + b * stride_kb + kv * stride_kh
        position_ptr += row * CAPACITY
        word_ptr += row * CAPACITY
        bits_ptr += _bit_row(head, i, bit_rows, bit_start) * words
        if band <= BLOCK:
            o = tl.arange(0, BLOCK)
            j = tl.load(position_ptr + o, mask=o < band, other=0)
            word = _canonical(wide, keys, j, o < band, stride_kn, dim, BLOCK, TREE, LOG_TREE)
            word = tl.where(o < band, word, _NO_SCORE)
            take = (_beaten(word, j, word, j) < missing) & (o < band)
            tl.atomic_or(bits_ptr + (j >> 5), 1 << (j & 31), mask=take, sem="relaxed")
        else:
            _order_list(wide, keys, position_ptr, word_ptr, bits_ptr, band, missing, stride_kn, dim, BLOCK, TREE,
                        LOG_TREE)  # fmt: skip


@jit
def _list_band(fast_ptr, line_ptr, lo, hi, low, high, BLOCK: tl.constexpr):
    """Lists the keys of the band, ascending; returns how many they are."""
    band = tl.full((), 0, tl.int32)
    for offset in range(lo // BLOCK * BLOCK, hi, BLOCK):
        j = offset + tl.arange(0, BLOCK)
        fast = tl.load(fast_ptr + j, mask=(j >= lo) & (j < hi), other=0).to(tl.int32)
        inside = ((j >= lo) & (j < hi) & (fast >= low) & (fast < high)).to(tl.int32)
        slot = band + tl.cumsum(inside, 0) - 1
        tl.store(line_ptr + slot, j, mask=inside > 0)
        band += tl.sum(inside, 0)
    return band


@jit
def _rescore(
    wide, keys, line_ptr, word_ptr, band, stride_kn, dim, BLOCK: tl.constexpr, TREE: tl.constexpr,
    LOG_TREE: tl.constexpr,
):  # fmt: skip
    """Writes the canonical scores of the band."""
    for offset in range(0, band, BLOCK):
        o = offset + tl.arange(0, BLOCK)
        j = tl.load(line_ptr + o, mask=o < band, other=0)
        word = _canonical(wide, keys, j, o < band, stride_kn, dim, BLOCK, TREE, LOG_TREE)
        tl.store(word_ptr + o, word, mask=o < band)


@jit
def _band_reaches(word_ptr, band, trial, BLOCK: tl.constexpr):
    """How many scores of the band reach ``trial``."""
    o = tl.arange(0, BLOCK)
    enough = tl.full((), 0, tl.int32)
    for offset in range(0, band, BLOCK):
        word = tl.load(word_ptr + offset + o, mask=offset + o < band, other=_NO_SCORE)
        enough += tl.sum((word.to(tl.int64) >= trial).to(tl.int32), 0)
    return enough


@jit
def _largest_of_band(word_ptr, band, missing, BLOCK: tl.constexpr):
    """The ``missing``-th largest score of the band, by halving."""
    kth = tl.full((), -2147483647, tl.int64)
    behind = tl.full((), 2147483648, tl.int64)
    while behind - kth > 1:
        trial = (kth + behind) >> 1
        enough = _band_reaches(word_ptr, band, trial, BLOCK)
        kth = tl.where(enough >= missing, trial, kth)
        behind = tl.where(enough >= missing, behind, trial)
    return kth


@jit
def _take_from_band(line_ptr, word_ptr, bits_ptr, band, missing, kth, BLOCK: tl.constexpr):
    """Sets the bits of the scores above ``kth``, and of the first of those at it until ``missing`` are taken."""
    o = tl.arange(0, BLOCK)
    above = _band_reaches(word_ptr, band, kth + 1, BLOCK)
    equal = tl.full((), 0, tl.int32)
    for offset in range(0, band, BLOCK):
        inside = offset + o < band
        j = tl.load(line_ptr + offset + o, mask=inside, other=0)
        word = tl.load(word_ptr + offset + o, mask=inside, other=_NO_SCORE).to(tl.int64)
        at_kth = (word == kth).to(tl.int32)
        earlier = equal + tl.cumsum(at_kth, 0) - at_kth
        take = inside & ((word > kth) | ((at_kth > 0) & (earlier < missing - above)))
        tl.atomic_or(bits_ptr + (j >> 5), 1 << (j & 31), mask=take, sem="relaxed")
        equal += tl.sum(at_kth, 0)


@partial(jit, any_integer=VARYING)
def prefill_wide_band_kernel(
    q_ptr, k_ptr, fast_ptr, line_ptr, band_ptr, missing_ptr, low_ptr, high_ptr, bits_ptr,
    heads, group, start, chunk, first, n, pads_ptr, origin, window, sinks, recent, bit_rows, bit_start, padded, room,
    words, rows, dim, stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn,
    CAUSAL: tl.constexpr, PADDED: tl.constexpr, CAPACITY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr,
):  # fmt: skip
    """As the kernel before it, for rows whose band did not fit: their fast scores are looked through again.

    Every program takes the rows in turn, ROWS at a time, and lists the band of one row with its canonical scores in two
    lines of its own, BLOCK keys at a time.
    """
    line_ptr += tl.program_id(0).to(tl.int64) * (2 * room)
    word_ptr = line_ptr + room
    for first_row in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first_row + tl.arange(0, ROWS)
        crowded = tl.load(band_ptr + r, mask=r < rows, other=0) > CAPACITY
        if tl.sum(crowded.to(tl.int32), 0) > 0:
            for short in range(first_row, tl.minimum(first_row + ROWS, rows)):
                row = tl.full((), 0, tl.int64) + short
                missing = tl.load(missing_ptr + row)
                if (missing > 0) & (tl.load(band_ptr + row) > CAPACITY):
                    head, i = split(row.to(tl.int32), chunk)
                    b, h, kv = heads_of(head, heads, group)
                    begin, end = range_of(i, b, first, n, pads_ptr, origin, window, CAUSAL, PADDED)
                    lo, hi = _ranked(begin, end, sinks, recent)
                    wide = _query(q_ptr, b, h, start + i, dim, stride_qb, stride_qh, stride_qm, stride_qd, TREE)
                    keys = k_ptr + b * stride_kb + kv * stride_kh
                    low = tl.load(low_ptr + row)
                    high = tl.load(high_ptr + row)
                    tl.debug_barrier()
                    band = _list_band(fast_ptr + row * padded, line_ptr, lo, hi, low, high, BLOCK)
                    tl.debug_barrier()
                    _rescore(wide, keys, line_ptr, word_ptr, band, stride_kn, dim, KEYS, TREE, LOG_TREE)
                    tl.debug_barrier()
                    kth = _largest_of_band(word_ptr, band, missing, BLOCK)
                    bits = bits_ptr + _bit_row(head, i, bit_rows, bit_start) * words
                    _take_from_band(line_ptr, word_ptr, bits, band, missing, kth, BLOCK)
