"""Triton kernels of selection-exact prefill: 15-bit scores, a cut with its band, the band's canonical order, attention.

A row is one query of one head; ``chunk`` queries of every head are in flight. What a row selects is kept as one bit a
key. Offsets into tensors are 64-bit: any stride of theirs may be large.
"""

from __future__ import annotations

from ..arithmetic.fast_scores import LARGEST, SMALLEST, UNITS
from ..arithmetic.triton import jit, score_of, tl, tree_last, units_per_score, widen

_UNITS, _SMALLEST, _LARGEST = tl.constexpr(UNITS), tl.constexpr(SMALLEST), tl.constexpr(LARGEST)
#: 2^23 + 2^14: added to a float32 it leaves an integer, moved up by 2^14, in the lowest bits
_TO_FIFTEEN_BITS = tl.constexpr(8404992.0)
#: the score 0, and what is behind all scores
_ZERO, _BEHIND = tl.constexpr(16384), tl.constexpr(32768)
_NO_SCORE = tl.constexpr(-2147483648)
_LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def _visible(i, first, n, CAUSAL: tl.constexpr):
    """How many keys query ``i`` of the chunk sees; ``first`` is the position of the chunk's first query."""
    return tl.minimum(first + i + 1, n) if CAUSAL else i * 0 + n


@jit
def _split(place, many):
    """(quotient, remainder): grids have one dimension, as their second ends at 65535."""
    return place // many, place % many


@jit
def _heads(head, heads, group):
    """64-bit (batch, query head, KV head) of a head among those of all batches."""
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), (head % heads // group).to(tl.int64)


@jit
def _query(q_ptr, b, h, place, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM: tl.constexpr):
    """The query ``place``, widened."""
    d = tl.arange(0, DIM)
    queries = q_ptr + b * stride_qb + h * stride_qh + place.to(tl.int64) * stride_qm + d.to(tl.int64) * stride_qd
    return widen(tl.load(queries, mask=d < dim, other=0.0))


@jit
def _queries(q_ptr, b, h, place, here, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM: tl.constexpr):
    """The queries ``place``, where they are ``here``."""
    d = tl.arange(0, DIM)
    queries = q_ptr + b * stride_qb + h * stride_qh + place.to(tl.int64)[:, None] * stride_qm
    return tl.load(queries + d.to(tl.int64)[None, :] * stride_qd, mask=here[:, None] & (d < dim)[None, :], other=0.0)


@jit
def _vectors(rows_ptr, offset, n, dim, stride, ROWS: tl.constexpr, DIM: tl.constexpr):
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
def _product(q, k, WIDE: tl.constexpr):
    """Scores on the tensor cores; ``WIDE`` for the interpreter, which cannot multiply bfloat16."""
    if WIDE:
        return tl.dot(widen(q), tl.trans(widen(k)), input_precision="ieee")
    else:
        return tl.dot(q, tl.trans(k), input_precision="ieee")


@jit
def prefill_scores_kernel(
    q_ptr, k_ptr, norm_ptr, fast_ptr, heads, group, start, chunk, first, n, padded, dim, key_tiles, query_tiles,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn,
    CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, LOOP: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """15-bit scores of QUERIES queries and LOOP times KEYS keys."""
    place, key_tile = _split(tl.program_id(0), key_tiles)
    head, query_tile = _split(place, query_tiles)
    b, h, kv = _heads(head, heads, group)
    i = query_tile * QUERIES + tl.arange(0, QUERIES)
    here = i < chunk
    q = _queries(q_ptr, b, h, start + i, here, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM)
    wide = widen(q)
    units = units_per_score(tl.sqrt(tl.sum(wide * wide, 1)), tl.load(norm_ptr + b * (heads // group) + kv))
    keys = k_ptr + b * stride_kb + kv * stride_kh
    rows = fast_ptr + (head.to(tl.int64) * chunk + i)[:, None] * padded
    begin = key_tile * (LOOP * KEYS)
    end = tl.minimum(begin + LOOP * KEYS, n)
    if CAUSAL:
        end = tl.minimum(end, first + (query_tile + 1) * QUERIES)
    for offset in tl.range(begin, end, KEYS, num_stages=STAGES):
        score = _product(q, _vectors(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
        fast = (score * (0.5 * units)[:, None] + _TO_FIFTEEN_BITS).to(tl.int32, bitcast=True).to(tl.uint16)
        tl.store(rows + (offset + tl.arange(0, KEYS))[None, :], fast, mask=here[:, None])


@jit
def _first_guess(fast_ptr, quantile_ptr, slope_ptr, seen, SAMPLE: tl.constexpr):
    """(where the k best would begin if a sample's mean and spread told all, how far one key moves that)."""
    each = tl.maximum(seen // SAMPLE, 1)
    s = tl.arange(0, SAMPLE) * each
    some = tl.load(fast_ptr + s, mask=s < seen, other=0).to(tl.float32)
    many = tl.minimum(SAMPLE, (seen + each - 1) // each).to(tl.float32)
    mean = tl.sum(some, 0) / many
    spread = tl.sqrt(tl.sum(tl.where(s < seen, (some - mean) * (some - mean), 0.0), 0) / many)
    return mean + tl.load(quantile_ptr + seen) * spread, tl.load(slope_ptr + seen) * spread


@jit
def _reached(fast, fast_ptr, seen, trial, BLOCK: tl.constexpr):
    """How many scores of a row reach ``trial``; ``fast`` holds the first BLOCK."""
    o = tl.arange(0, BLOCK)
    enough = tl.sum((fast >= trial).to(tl.int32), 0)
    for offset in range(BLOCK, seen, BLOCK):
        more = tl.load(fast_ptr + offset + o, mask=offset + o < seen, other=0).to(tl.int32)
        enough += tl.sum((more >= trial).to(tl.int32), 0)
    return enough


@jit
def _narrow(fast, fast_ptr, quantile_ptr, slope_ptr, seen, k_eff, BLOCK: tl.constexpr, SAMPLE: tl.constexpr,
            SLACK: tl.constexpr):  # fmt: skip
    """(found, behind): at least k_eff scores reach the one and at most k_eff the other, few of them between."""
    found = tl.full((), 0, tl.int32)
    behind = tl.full((), _BEHIND, tl.int32)
    at_least = seen
    beyond = tl.full((), 0, tl.int32)
    tries = tl.full((), 0, tl.int32)
    guess, per_key = _first_guess(fast_ptr, quantile_ptr, slope_ptr, seen, SAMPLE)
    # A wide band costs less than one more trial.
    while (behind - found > 1) & (at_least - beyond > SLACK):
        trial = tl.minimum(tl.maximum(guess.to(tl.int32), found + 1), behind - 1)
        enough = _reached(fast, fast_ptr, seen, trial, BLOCK)
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
    fast, j, seen, low, high, so_far, bits_ptr, position_ptr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Write the bits of the keys surely selected and list those of the band; returns how many there are of both."""
    sure = (fast >= high) & (j < seen)
    band = ((fast >= low) & (fast < high) & (j < seen)).to(tl.int32)
    bit = tl.where(sure, 1 << (tl.arange(0, BLOCK) % 8), 0)
    byte = tl.sum(tl.reshape(bit, (BLOCK // 8, 8)), 1)
    tl.store(bits_ptr + tl.min(j, 0) // 8 + tl.arange(0, BLOCK // 8), byte.to(tl.uint8))
    slot = so_far + tl.cumsum(band, 0) - 1
    tl.store(position_ptr + slot, j, mask=(band > 0) & (slot < CAPACITY))
    return tl.sum(sure.to(tl.int32), 0), tl.sum(band, 0)


@jit
def prefill_cut_kernel(
    q_ptr, norm_ptr, fast_ptr, k_eff_ptr, quantile_ptr, slope_ptr,
    bits_ptr, position_ptr, band_ptr, missing_ptr, low_ptr, high_ptr, top_ptr,
    heads, group, start, chunk, first, n, padded, words, dim, error,
    stride_qb, stride_qh, stride_qm, stride_qd,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr, SLACK: tl.constexpr, CAPACITY: tl.constexpr,
    DIM: tl.constexpr,
):  # fmt: skip
    """Of one row: which keys are surely among its k best, which may be (the band), and how many of the band are.

    If at least k fast scores reach ``found``, the k-th canonical score is at most one error below it, and a key more
    than two errors below is out. If at most k reach ``behind``, a key two errors above it has at most k - 1 rivals.
    """
    head, i = _split(tl.program_id(0), chunk)
    b, h, kv = _heads(head, heads, group)
    row = tl.program_id(0).to(tl.int64)
    seen = _visible(i, first, n, CAUSAL)
    k_eff = tl.minimum(tl.load(k_eff_ptr + seen), seen).to(tl.int32)
    wide = _query(q_ptr, b, h, start + i, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM)
    largest = tl.sqrt(tl.sum(wide * wide, 0)) * tl.load(norm_ptr + b * (heads // group) + kv) * 1.001
    # A little narrower than for the scores: where these are not usable, neither may be taken to be here.
    usable = (largest > _SMALLEST * 1.01) & (largest < _LARGEST / 1.01)
    everything = k_eff >= seen
    fast_ptr += row * padded
    bits_ptr += row * (words * 4)
    position_ptr += row * CAPACITY
    o = tl.arange(0, BLOCK)
    fast = tl.load(fast_ptr + o, mask=o < seen, other=0).to(tl.int32)
    found = tl.full((), 0, tl.int32)
    behind = tl.full((), _BEHIND, tl.int32)
    if (k_eff < seen) & usable:
        found, behind = _narrow(fast, fast_ptr, quantile_ptr, slope_ptr, seen, k_eff, BLOCK, SAMPLE, SLACK)
    low = tl.where(usable | everything, found - error, -1)
    high = tl.where(everything, -1, tl.where(usable, behind + error, 1 << 20))
    sure, band = _keep(fast, o, seen, low, high, 0, bits_ptr, position_ptr, BLOCK, CAPACITY)
    top = tl.max(fast, 0)
    # To the end of the row, as attention reads whole tiles.
    for offset in range(BLOCK, words * 32, BLOCK):
        more = tl.load(fast_ptr + offset + o, mask=offset + o < seen, other=0).to(tl.int32)
        top = tl.maximum(top, tl.max(more, 0))
        and_sure, and_band = _keep(more, offset + o, seen, low, high, band, bits_ptr, position_ptr, BLOCK, CAPACITY)
        sure += and_sure
        band += and_band
    tl.store(band_ptr + row, band)
    tl.store(missing_ptr + row, k_eff - sure)
    tl.store(low_ptr + row, low)
    tl.store(high_ptr + row, high)
    tl.store(top_ptr + row, top)


@jit
def _canonical(wide, keys, j, mask, stride_kn, dim, BLOCK: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr):
    """Canonical scores of the keys ``j [BLOCK]`` as integers in the order of the scores (rules 2 and 4)."""
    d = tl.arange(0, TREE)
    rows = keys + j.to(tl.int64)[:, None] * stride_kn
    k = tl.load(rows + d[None, :], mask=mask[:, None] & (d < dim)[None, :], other=0.0)
    return score_of(tree_last(wide[None, :] * widen(k), BLOCK, TREE, LOG_TREE).to(tl.int32, bitcast=True))


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


@jit
def prefill_band_kernel(
    q_ptr, k_ptr, position_ptr, word_ptr, band_ptr, missing_ptr, bits_ptr,
    heads, group, start, chunk, words, dim,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn,
    CAPACITY: tl.constexpr, BLOCK: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr,
):  # fmt: skip
    """The band of one row in canonical order: sets the bits of as many of its best as the row misses."""
    row = tl.program_id(0).to(tl.int64)
    band = tl.load(band_ptr + row)
    missing = tl.load(missing_ptr + row)
    if (missing > 0) & (band <= CAPACITY):
        head, i = _split(tl.program_id(0), chunk)
        b, h, kv = _heads(head, heads, group)
        wide = _query(q_ptr, b, h, start + i, dim, stride_qb, stride_qh, stride_qm, stride_qd, TREE)
        keys = k_ptr + b * stride_kb + kv * stride_kh
        position_ptr += row * CAPACITY
        word_ptr += row * CAPACITY
        bits_ptr += row * words
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
def _rescore(
    wide, keys, fast_ptr, line_ptr, seen, low, high, stride_kn, dim,
    BLOCK: tl.constexpr, TREE: tl.constexpr, LOG_TREE: tl.constexpr,
):  # fmt: skip
    """Writes the canonical scores of the band to the line, and no score for the other keys."""
    for offset in range(0, seen, BLOCK):
        j = offset + tl.arange(0, BLOCK)
        fast = tl.load(fast_ptr + j, mask=j < seen, other=0).to(tl.int32)
        inside = (j < seen) & (fast >= low) & (fast < high)
        word = _NO_SCORE + tl.zeros((BLOCK,), tl.int32)
        if tl.sum(inside.to(tl.int32), 0) > 0:
            word = _canonical(wide, keys, j, inside, stride_kn, dim, BLOCK, TREE, LOG_TREE)
        tl.store(line_ptr + j, tl.where(inside, word, _NO_SCORE), mask=j < seen)


@jit
def _line_reaches(line_ptr, seen, trial, BLOCK: tl.constexpr):
    """How many scores of the line reach ``trial``."""
    o = tl.arange(0, BLOCK)
    enough = tl.full((), 0, tl.int32)
    for offset in range(0, seen, BLOCK):
        word = tl.load(line_ptr + offset + o, mask=offset + o < seen, other=_NO_SCORE)
        enough += tl.sum((word.to(tl.int64) >= trial).to(tl.int32), 0)
    return enough


@jit
def _largest_of_line(line_ptr, seen, missing, BLOCK: tl.constexpr):
    """The ``missing``-th largest score of the line, by halving."""
    kth = tl.full((), -2147483647, tl.int64)
    behind = tl.full((), 2147483648, tl.int64)
    while behind - kth > 1:
        trial = (kth + behind) >> 1
        enough = _line_reaches(line_ptr, seen, trial, BLOCK)
        kth = tl.where(enough >= missing, trial, kth)
        behind = tl.where(enough >= missing, behind, trial)
    return kth


@jit
def _take_from_line(line_ptr, bits_ptr, seen, missing, kth, BLOCK: tl.constexpr):
    """Sets the bits of the scores above ``kth``, and of the first of those at it until ``missing`` are taken."""
    o = tl.arange(0, BLOCK)
    above = _line_reaches(line_ptr, seen, kth + 1, BLOCK)
    equal = tl.full((), 0, tl.int32)
    for offset in range(0, seen, BLOCK):
        word = tl.load(line_ptr + offset + o, mask=offset + o < seen, other=_NO_SCORE).to(tl.int64)
        at_kth = (word == kth).to(tl.int32)
        earlier = equal + tl.cumsum(at_kth, 0) - at_kth
        take = (word > kth) | ((at_kth > 0) & (earlier < missing - above))
        bit = tl.where(take, 1 << (o % 32), 0)
        word_of = offset // 32 + tl.arange(0, BLOCK // 32)
        picked = tl.sum(tl.reshape(bit, (BLOCK // 32, 32)), 1)
        tl.store(bits_ptr + word_of, tl.load(bits_ptr + word_of) | picked)
        equal += tl.sum(at_kth, 0)


@jit
def prefill_wide_band_kernel(
    q_ptr, k_ptr, fast_ptr, line_ptr, band_ptr, missing_ptr, low_ptr, high_ptr, bits_ptr,
    heads, group, start, chunk, first, n, padded, words, rows, dim,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn,
    CAUSAL: tl.constexpr, CAPACITY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TREE: tl.constexpr,
    LOG_TREE: tl.constexpr,
):  # fmt: skip
    """As the kernel before it, for rows whose band did not fit: their fast scores are looked through again.

    Every program takes the rows in turn, ROWS at a time, and keeps the canonical scores of one row in its own line.
    """
    line_ptr += tl.program_id(0).to(tl.int64) * padded
    for first_row in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        r = first_row + tl.arange(0, ROWS)
        crowded = tl.load(band_ptr + r, mask=r < rows, other=0) > CAPACITY
        if tl.sum(crowded.to(tl.int32), 0) > 0:
            for short in range(first_row, tl.minimum(first_row + ROWS, rows)):
                row = tl.full((), 0, tl.int64) + short
                missing = tl.load(missing_ptr + row)
                if (missing > 0) & (tl.load(band_ptr + row) > CAPACITY):
                    head, i = _split(row.to(tl.int32), chunk)
                    b, h, kv = _heads(head, heads, group)
                    seen = _visible(i, first, n, CAUSAL)
                    wide = _query(q_ptr, b, h, start + i, dim, stride_qb, stride_qh, stride_qm, stride_qd, TREE)
                    keys = k_ptr + b * stride_kb + kv * stride_kh
                    low = tl.load(low_ptr + row)
                    high = tl.load(high_ptr + row)
                    tl.debug_barrier()
                    _rescore(wide, keys, fast_ptr + row * padded, line_ptr, seen, low, high, stride_kn, dim, BLOCK,
                             TREE, LOG_TREE)  # fmt: skip
                    tl.debug_barrier()
                    kth = _largest_of_line(line_ptr, seen, missing, BLOCK)
                    _take_from_line(line_ptr, bits_ptr + row * words, seen, missing, kth, BLOCK)


@jit
def _selected(bits_ptr, words, offset, here, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Bits ``[QUERIES, KEYS]`` of a tile, as a mask; ``bits_ptr`` points to the rows."""
    w = offset // 32 + tl.arange(0, KEYS // 32)
    packed = tl.load(bits_ptr[:, None] + w[None, :], mask=here[:, None], other=0)
    bit = (packed[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bit, (QUERIES, KEYS)) != 0


@jit
def _highest(
    q, keys, bits_ptr, here, end, n, words, dim, stride_kn,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The highest score of the selected keys of every query."""
    top = tl.full((QUERIES,), -1e38, tl.float32)
    for offset in range(0, end, KEYS):
        score = _product(q, _vectors(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
        chosen = _selected(bits_ptr, words, offset, here, QUERIES, KEYS)
        top = tl.maximum(top, tl.max(tl.where(chosen, score, -1e38), 1))
    return top


@jit
def prefill_attend_kernel(
    q_ptr, k_ptr, v_ptr, norm_ptr, bits_ptr, top_ptr, out_ptr,
    heads, group, start, chunk, m, first, n, words, dim, dim_v, tiles, scale, off,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    CAUSAL: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    DIM: tl.constexpr, DIM_V: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Softmax attention of QUERIES queries over the keys whose bits are set, on the tensor cores."""
    head, tile = _split(tl.program_id(0), tiles)
    # Later queries see more keys: they start first.
    tile = tiles - 1 - tile
    b, h, kv = _heads(head, heads, group)
    i = tile * QUERIES + tl.arange(0, QUERIES)
    here = i < chunk
    q = _queries(q_ptr, b, h, start + i, here, dim, stride_qb, stride_qh, stride_qm, stride_qd, DIM)
    keys = k_ptr + b * stride_kb + kv * stride_kh
    values = v_ptr + b * stride_vb + kv * stride_vh
    row = head.to(tl.int64) * chunk + i
    bits_ptr += row * words
    end = n
    if CAUSAL:
        end = tl.minimum(end, first + (tile + 1) * QUERIES)
    # The highest fast score bounds the highest score from above, so nothing has to be rescaled on the way.
    wide = widen(q)
    units = units_per_score(tl.sqrt(tl.sum(wide * wide, 1)), tl.load(norm_ptr + b * (heads // group) + kv))
    factor = scale * _LOG2_E
    one = tl.where(units > 0.0, 2.0 / tl.where(units > 0.0, units, 1.0), 0.0)
    top = (tl.load(top_ptr + row, mask=here, other=0) - _ZERO + off) * one
    if tl.max(tl.where((units > 0.0) & (one * (2.0 * off * factor) < 1.0), 0, 1), 0) > 0:
        # Except where that bound is too far above it.
        top = _highest(q, keys, bits_ptr, here, end, n, words, dim, stride_kn, QUERIES, KEYS, DIM, WIDE)
    behind = top * factor
    weight = tl.zeros((QUERIES,), tl.float32)
    total = tl.zeros((QUERIES, DIM_V), tl.float32)
    for offset in tl.range(0, end, KEYS, num_stages=STAGES):
        score = _product(q, _vectors(keys, offset, n, dim, stride_kn, KEYS, DIM), WIDE)
        chosen = _selected(bits_ptr, words, offset, here, QUERIES, KEYS)
        p = tl.where(chosen, tl.exp2(score * factor - behind[:, None]), 0.0)
        weight += tl.sum(p, 1)
        v = _vectors(values, offset, n, dim_v, stride_vn, KEYS, DIM_V)
        if WIDE:
            total += tl.dot(p, widen(v), input_precision="ieee")
        else:
            total = tl.dot(p.to(v.dtype), v, total, input_precision="ieee")
    out = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
    e = tl.arange(0, DIM_V)
    place = out_ptr + ((head.to(tl.int64) * m + start + i)[:, None] * dim_v + e[None, :])
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=here[:, None] & (e < dim_v)[None, :])
