"""Triton kernels of the certified decode step: fast scores, a cut, canonical scores behind it, the exact choice.

What is read from outside may have any strides: offsets into it are 64 bits. So are those of queries in the work space;
positions within the keys of a query are 32, as their padded number is. Grids are made for the most keys there may be;
how many a row of the batch has is read from device memory, and a program behind the last of them ends at once.
"""

from __future__ import annotations

from ..arithmetic.fast_scores import LEAST_CODE_SCALE
from ..arithmetic.triton import jit, row_and_block, score_of, tl, tree_sum, units_per_score, widen
from ..attention.triton import coded_of, logit_of
from ..storage.triton import load_numbers
from .rows import BEGIN, END, K_EFF

_BEGIN, _END, _K_EFF = tl.constexpr(BEGIN), tl.constexpr(END), tl.constexpr(K_EFF)
_LEAST_CODE_SCALE = tl.constexpr(LEAST_CODE_SCALE)


@jit
def _visible(rows_ptr, b):
    """(begin, end, k_eff) of a row of the batch."""
    begin = tl.load(rows_ptr + b * 4 + _BEGIN)
    end = tl.maximum(tl.load(rows_ptr + b * 4 + _END), begin)
    return begin, end, tl.maximum(tl.minimum(tl.load(rows_ptr + b * 4 + _K_EFF), end - begin), 0)


@jit
def _always(k_eff, sinks, recent):
    """How many of the first and of the newest visible keys are always kept: they count towards k_eff."""
    oldest = tl.minimum(k_eff, sinks)
    return oldest, tl.minimum(k_eff - oldest, recent)


@jit
def _scored(rows_ptr, b, sinks, recent, in_full, GROUP_SIZE: tl.constexpr):
    """Keys [start, stop) have a fast score: what is always kept has none, nor has what has no code.

    GROUP_SIZE tokens share the scales of codes, 0 where the keys themselves are scored.
    """
    begin, end, k_eff = _visible(rows_ptr, b)
    oldest, newest = _always(k_eff, sinks, recent)
    start = begin + oldest
    stop = end - newest
    if GROUP_SIZE > 0:
        start = tl.maximum(start, in_full)
        stop = tl.minimum(stop, coded_of(end, GROUP_SIZE, False))
    return start, stop


@jit
def _sixteen_bits(score, units):
    # No canonical score lies beyond the range, so moving a fast score back to it brings the two closer.
    place = tl.minimum(tl.maximum(tl.floor(score * units), -32768.0), 32767.0)
    return (place + 32768.0).to(tl.int32)


@jit
def _store(out, best, place, mask, first, some, SUB: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """Scores ``place [BLOCK, HEADS]`` and the best of every SUB neighbours; 0 stands for a key without a fast score."""
    j = first + tl.arange(0, BLOCK)
    tl.store(out + j[:, None], place.to(tl.uint16), mask=mask)
    highest = tl.max(tl.reshape(tl.where(mask, place, 0), (BLOCK // SUB, SUB, HEADS)), 1)
    i = first // SUB + tl.arange(0, BLOCK // SUB)
    tl.store(best + i[:, None], highest.to(tl.uint16), mask=some)


@jit
def score_product_kernel(
    q_ptr, k_ptr, norm_ptr, rows_ptr, fast_ptr, best_ptr,
    heads, kv_heads, sinks, recent, padded, dim, programs,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, DIM: tl.constexpr,
    STAGES: tl.constexpr, SUB: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """16-bit scores of the GROUP query heads of one key head, by matrix product of the keys themselves."""
    kv, program = row_and_block(programs)
    b = kv // kv_heads
    g = kv % kv_heads
    first = program.to(tl.int64) * (BLOCK * LOOP)
    start, stop = _scored(rows_ptr, b, sinks, recent, 0, 0)
    if (first >= stop) | (first + BLOCK * LOOP <= start):
        return
    d = tl.arange(0, DIM).to(tl.int64)
    r = tl.arange(0, HEADS)
    pointers = q_ptr + b * stride_qb + (g * GROUP + r)[None, :] * stride_qh + d[:, None] * stride_qd
    q = tl.load(pointers, mask=(r < GROUP)[None, :] & (d < dim)[:, None], other=0.0)
    wide = widen(q)
    units = units_per_score(tl.sqrt(tl.sum(wide * wide, 0)), tl.load(norm_ptr + kv))
    keys = k_ptr + b * stride_kb + g * stride_kh
    query = b * heads + g * GROUP + r
    out = fast_ptr + query[None, :] * padded
    best = best_ptr + query[None, :] * (padded // SUB)
    mine = (r < GROUP)[None, :]
    for turn in tl.range(0, LOOP, num_stages=STAGES):
        at = first + turn * BLOCK
        j = at + tl.arange(0, BLOCK)
        inside = ((j >= start) & (j < stop))[:, None]
        k = tl.load(keys + j[:, None] * stride_kn + d[None, :] * stride_kd, mask=inside & (d < dim)[None, :], other=0.0)
        # The interpreter cannot multiply bfloat16.
        score = tl.dot(widen(k), wide, input_precision="ieee") if WIDE else tl.dot(k, q, input_precision="ieee")
        place = _sixteen_bits(score, units[None, :])
        some = (at < stop) & (at + BLOCK > start)
        _store(out, best, place, inside & mine, at, some & mine, SUB, BLOCK, HEADS)


@jit
def score_codes_kernel(
    q_ptr, codes_ptr, scales_ptr, norm_ptr, largest_scales_ptr, rows_ptr, fast_ptr, best_ptr,
    heads, kv_heads, sinks, recent, in_full, padded, dim, programs,
    stride_qb, stride_qh, stride_qd, codes_b, codes_h, codes_n, codes_d, scales_b, scales_h, scales_n, scales_d,
    GROUP: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, DIM: tl.constexpr,
    STAGES: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """16-bit scores from 8-bit codes whose scales are shared by BLOCK tokens, by exact integer products.

    The query, times a block's scales, is split into two 8-bit parts; both are columns of one product. The first
    ``in_full`` tokens, which a cache keeps in full, have no code: the codes there stand for nothing.
    """
    kv, program = row_and_block(programs)
    b = kv // kv_heads
    g = kv % kv_heads
    first = program.to(tl.int64) * LOOP
    start, stop = _scored(rows_ptr, b, sinks, recent, in_full, BLOCK)
    if (first * BLOCK >= stop) | ((first + LOOP) * BLOCK <= start):
        return
    d = tl.arange(0, DIM).to(tl.int64)
    r = tl.arange(0, HEADS)
    pointers = q_ptr + b * stride_qb + (g * GROUP + r)[None, :] * stride_qh + d[:, None] * stride_qd
    wide = widen(tl.load(pointers, mask=(r < GROUP)[None, :] & (d < dim)[:, None], other=0.0))
    units = units_per_score(tl.sqrt(tl.sum(wide * wide, 0)), tl.load(norm_ptr + kv))
    largest_scales = tl.maximum(tl.load(largest_scales_ptr + kv * dim + d, mask=d < dim, other=0.0), _LEAST_CODE_SCALE)
    largest = tl.maximum(tl.max(tl.abs(wide) * largest_scales[:, None], 0), 1e-30)
    wide = wide * (127.0 / largest)[None, :]
    coarse, fine = units * (largest / 127.0), units * (largest / (127.0 * 254.0))
    codes = codes_ptr + b * codes_b + g * codes_h
    scales = scales_ptr + b * scales_b + g * scales_h
    query = b * heads + g * GROUP + r
    out = fast_ptr + query[None, :] * padded
    best = best_ptr + query[None, :] * (padded // SUB)
    mine = (r < GROUP)[None, :]
    for turn in tl.range(0, LOOP, num_stages=STAGES):
        block = first + turn
        inside = (block * BLOCK < stop) & ((block + 1) * BLOCK > start)
        j = block * BLOCK + tl.arange(0, BLOCK)
        channels = inside & (d < dim)
        code = tl.load(codes + j[:, None] * codes_n + d[None, :] * codes_d, mask=channels[None, :], other=0)
        exponent = tl.load(scales + block * scales_n + d * scales_d, mask=channels, other=0).to(tl.int32)
        scaled = wide * ((exponent + 127) << 23).to(tl.float32, bitcast=True)[:, None]
        high = tl.floor(scaled + 0.5)
        low = tl.minimum(tl.maximum(tl.floor((scaled - high) * 254.0 + 0.5), -128.0), 127.0)
        parts = tl.reshape(tl.join(high.to(tl.int8), low.to(tl.int8)), (DIM, 2 * HEADS))
        upper, lower = tl.split(tl.reshape(tl.dot(code, parts), (BLOCK, HEADS, 2)))
        score = upper.to(tl.float32) * coarse[None, :] + lower.to(tl.float32) * fine[None, :]
        mask = ((j >= start) & (j < stop))[:, None] & mine
        _store(out, best, _sixteen_bits(score, 1.0), mask, block * BLOCK, inside & mine, SUB, BLOCK, HEADS)


@jit
def _tail(share):
    """(z, density): a normal number is above z with probability ``share``, to 5e-4."""
    tail = tl.minimum(share, 1.0 - share)
    t = tl.sqrt(-2.0 * tl.log(tail))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return tl.where(share < 0.5, z, -z), 0.3989423 * tl.exp(-0.5 * z * z)


@jit
def _found(best_ptr, low, high, k_free, BLOCK: tl.constexpr):
    """A fast score that at least ``k_free`` of the bests [low, high) reach, about the highest, or 0."""
    # From a multiple of 16 to another, so that masks do not break up words.
    i = low // 16 * 16 + tl.arange(0, BLOCK)
    until = (high + 15) // 16 * 16
    inside = (i >= low) & (i < high)
    kept = tl.where(inside, tl.load(best_ptr + i, mask=i < until, other=0).to(tl.int32), 0)
    count = tl.maximum(tl.sum(inside.to(tl.int32), 0), 1).to(tl.float32)
    mean = tl.sum(kept.to(tl.float32), 0) / count
    spread = tl.sqrt(tl.sum(tl.where(inside, (kept - mean) * (kept - mean), 0.0), 0) / count)
    # A guess as if they were normal, steps of Newton from there, then halving. Slightly too low a threshold only means
    # a few more candidates.
    many = tl.maximum(high - low, 1).to(tl.float32)
    z, density = _tail(tl.minimum(tl.maximum(k_free / many, 1e-6), 1.0 - 1e-6))
    guess = mean + z * spread
    slope = spread / (many * density)
    found = tl.full((), 0, tl.int32)
    behind = tl.full((), 65536, tl.int32)
    tries = tl.full((), 0, tl.int32)
    while behind - found > 1:
        trial = tl.minimum(tl.maximum(guess.to(tl.int32), found + 1), behind - 1)
        enough = tl.sum((kept >= trial).to(tl.int32), 0)
        for offset in range(BLOCK, until - low // 16 * 16, BLOCK):
            more = tl.load(best_ptr + offset + i, mask=offset + i < until, other=0).to(tl.int32)
            enough += tl.sum(((more >= trial) & (offset + i < high)).to(tl.int32), 0)
        found = tl.where(enough >= k_free, trial, found)
        behind = tl.where(enough >= k_free, behind, trial)
        close = (enough >= k_free) & (enough <= k_free + k_free // 64)
        behind = tl.where(close, found + 1, behind)
        tries += 1
        near = trial.to(tl.float32) + (enough - k_free - k_free // 128).to(tl.float32) * slope
        near = tl.minimum(tl.maximum(near, 0.0), 65535.0)
        guess = tl.where(tries < 5, near, ((found + behind) >> 1).to(tl.float32))
    return found


@jit
def _cut(
    q, best_ptr, norm_ptr, residual_ptr, largest_scales_ptr, dim, low, high, k_free, relative, split,
    BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Where the fast scores begin whose keys may be among the ``k_free`` best of the query ``q [DIM]``.

    The k_free-th largest of the bests of neighbours, [low, high), is reached by as many different keys, so the
    k_free-th canonical score is at most one error below it; a key more than two errors below cannot be among the best.
    """
    d = tl.arange(0, DIM)
    wide = widen(q)
    # Sums differ in their order from that of the score kernels: a thousandth covers it.
    norm_q = tl.sqrt(tl.sum(wide * wide, 0)) * 1.001
    norm_k = tl.load(norm_ptr)
    units = units_per_score(norm_q, norm_k)
    largest_scales = tl.maximum(tl.load(largest_scales_ptr + d, mask=d < dim, other=0.0), _LEAST_CODE_SCALE)
    error = norm_q * (tl.load(residual_ptr) + relative * norm_k) + tl.max(tl.abs(wide) * largest_scales, 0) * split
    found = _found(best_ptr, low, high, k_free, BLOCK)
    cut = found.to(tl.float32) - 2.0 * (error * units * 1.01 + 1.0) - 1.0
    # 0 also stands for keys without a score, and for too few of them: then every key may.
    return tl.where((units > 0.0) & (found > 0), cut, -1.0)


@jit
def _stretch_of(begin, end, STRETCHES: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr):
    """(where the first of a row's stretches begins, how long each is), in whole lines."""
    base = begin // LINE * LINE
    each = (end - base + STRETCHES - 1) // STRETCHES
    return base, (each + LINES * LINE - 1) // (LINES * LINE) * (LINES * LINE)


@jit
def compact_kernel(
    q_ptr, norm_ptr, residual_ptr, largest_scales_ptr, rows_ptr, fast_ptr, best_ptr, position_ptr, count_ptr,
    heads, group, sinks, recent, in_full, padded, stride_best, dim, relative, split,
    stride_qb, stride_qh, stride_qd,
    GROUP_SIZE: tl.constexpr, SUB: tl.constexpr, STRETCHES: tl.constexpr, MANY: tl.constexpr,
    LINES: tl.constexpr, LINE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The positions of one stretch of a query's keys that reach the cut, in order; every stretch finds it for itself.

    Visible keys without a fast score always reach it.
    """
    query, stretch = row_and_block(STRETCHES)
    b = query // heads
    h = query % heads
    kv = b * (heads // group) + h // group
    begin, end, k_eff = _visible(rows_ptr, b)
    base, span = _stretch_of(begin, end, STRETCHES, LINES, LINE)
    base += stretch * span
    if (base >= end) | (k_eff == 0):
        tl.store(count_ptr + query * STRETCHES + stretch, 0)
        return
    oldest, newest = _always(k_eff, sinks, recent)
    start, stop = _scored(rows_ptr, b, sinks, recent, in_full, GROUP_SIZE)
    d = tl.arange(0, DIM).to(tl.int64)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + d * stride_qd, mask=d < dim, other=0.0)
    cut = _cut(
        q, best_ptr + query * stride_best, norm_ptr + kv, residual_ptr + kv, largest_scales_ptr + kv * dim,
        dim, start // SUB, (tl.maximum(stop, start) + SUB - 1) // SUB, k_eff - oldest - newest, relative, split,
        MANY, DIM,
    )  # fmt: skip
    position_ptr += query * padded + stretch * span
    place = tl.arange(0, LINES)[:, None] * LINE + tl.arange(0, LINE)[None, :]
    # Scores are read in whole lines: what is visible is no multiple of anything, and would break up words.
    lines = (end + LINE - 1) // LINE * LINE
    found = 0
    for offset in range(0, span, LINES * LINE):
        j = base + offset + place
        fast = tl.load(fast_ptr + query * padded + j, mask=j < lines, other=0).to(tl.float32)
        may = (fast >= cut) | (j < start) | (j >= stop)
        may = (may & (j >= begin) & (j < end)).to(tl.int32)
        # A line is within a warp, so that only the lines' totals have to cross warps.
        total = tl.sum(may, 1)
        before = found + tl.cumsum(total, 0) - total
        tl.store(position_ptr + (before[:, None] + tl.cumsum(may, 1) - 1), j, mask=may > 0)
        found += tl.sum(total, 0)
    tl.store(count_ptr + query * STRETCHES + stretch, found)


@jit
def rescore_kernel(
    q_ptr, rows_ptr, position_ptr, count_ptr, flat_position_ptr, flat_key_ptr,
    heads, group, padded, dim, programs, stride_qb, stride_qh, stride_qd,
    numbers, scales, first, newest, in_full,
    numbers_b, numbers_h, numbers_n, numbers_d, scales_b, scales_h, scales_n, first_b, first_h, first_n,
    newest_b, newest_h, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    STRETCHES: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr, BLOCK: tl.constexpr,
    DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """Canonical scores of a query's candidates, as integers in the order of the scores, without the gaps."""
    query, program = row_and_block(programs)
    b = query // heads
    h = query % heads
    g = h // group
    d = tl.arange(0, DIM).to(tl.int64)
    wide = widen(tl.load(q_ptr + b * stride_qb + h * stride_qh + d * stride_qd, mask=d < dim, other=0.0))
    begin, end, _ = _visible(rows_ptr, b)
    _, span = _stretch_of(begin, end, STRETCHES, LINES, LINE)
    whole = coded_of(end, SHARING, PER_TOKEN)
    s = tl.arange(0, STRETCHES)
    counts = tl.load(count_ptr + query * STRETCHES + s)
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    shift = s * span - (ends - counts)
    for offset in range(program * BLOCK, total, programs * BLOCK):
        i = offset + tl.arange(0, BLOCK)
        inside = i < total
        # Where the i-th candidate of the query lies among the stretches: the first that ends behind it.
        before = ends[None, :] <= i[:, None]
        stretch = tl.sum(before.to(tl.int32), 1)
        place = i + tl.sum(tl.where(s[None, :] == stretch[:, None], shift[None, :], 0), 1)
        short = tl.load(position_ptr + query * padded + place, mask=inside, other=0)
        k = load_numbers(
            numbers + b * numbers_b + g * numbers_h, scales + b * scales_b + g * scales_h,
            first + b * first_b + g * first_h, newest + b * newest_b + g * newest_h,
            short.to(tl.int64)[:, None], d[None, :], inside[:, None] & (d < dim)[None, :], whole, in_full,
            numbers_n, numbers_d, scales_n, first_n, newest_n, STORED, SHARING, WIDTH, PER_TOKEN,
        )  # fmt: skip
        bits = tree_sum(wide[None, :] * k, BLOCK, DIM, LOG_DIM).to(tl.int32, bitcast=True)
        tl.store(flat_key_ptr + query * padded + i, score_of(bits), mask=inside)
        tl.store(flat_position_ptr + query * padded + i, short, mask=inside)


@jit
def _count_above(word, key_ptr, bound, total, i, BLOCK: tl.constexpr):
    """How many of ``total`` words are larger; the first BLOCK are at hand in ``word``, the others are read."""
    count = tl.sum((word > bound).to(tl.int32), 0)
    for offset in range(BLOCK, total, BLOCK):
        more = tl.load(key_ptr + offset + i, mask=offset + i < total, other=-2147483648)
        count += tl.sum((more > bound).to(tl.int32), 0)
    return count


@jit
def _kth_largest(word, key_ptr, low, top, total, k_eff, i, BLOCK: tl.constexpr):
    """The k_eff-th largest of ``total`` words, or a lower number that just ``k_eff`` of them reach.

    Between the lowest and the highest word, by interpolation of the counts, later by halving; it ends as soon as just
    enough words are left.
    """
    kth = low.to(tl.int64)
    behind = top.to(tl.int64) + 1
    at_least = total
    beyond = 0
    tries = 0
    while behind - kth > 1:
        # In turn: at the count itself, a little below it so that both ends come closer, and halving, as one far score
        # can lead the others astray.
        aim = k_eff + tl.where(tries % 3 == 1, (at_least - k_eff) // 8, 0)
        part = (at_least - aim).to(tl.float32) / (at_least - beyond).to(tl.float32)
        part = tl.where((tries % 3 < 2) & (tries < 15), part, 0.5)
        stride = ((behind - kth).to(tl.float32) * part).to(tl.int64)
        trial = kth + tl.minimum(tl.maximum(stride, 1), behind - kth - 1)
        enough = _count_above(word, key_ptr, (trial - 1).to(tl.int32), total, i, BLOCK)
        kth = tl.where(enough >= k_eff, trial, kth)
        at_least = tl.where(enough >= k_eff, enough, at_least)
        behind = tl.where(enough >= k_eff, behind, trial)
        beyond = tl.where(enough >= k_eff, beyond, enough)
        behind = tl.where(enough == k_eff, kth, behind)
        tries += 1
    return kth.to(tl.int32)


@jit
def choose_kernel(
    position_ptr, key_ptr, count_ptr, rows_ptr, sink_ptr, index_ptr, logit_ptr, top_ptr,
    heads, sinks, recent, padded, width, scale, cap, sink_stride,
    PLAIN: tl.constexpr, CAPPED: tl.constexpr, SINK: tl.constexpr,
    STRETCHES: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Of one query's candidates, in order of position: what is always kept, and the best of the others.

    Among equal scores lower positions come first. Written are positions, up to ``width`` padded with -1, their logits,
    and the highest logit, the SINK of the head included. The last score that is kept is found by trials: BLOCK
    candidates stay in registers; more are read again.
    """
    query = tl.program_id(0).to(tl.int64)
    b = query // heads
    _, _, k_eff = _visible(rows_ptr, b)
    oldest, newest = _always(k_eff, sinks, recent)
    k_free = k_eff - oldest - newest
    total = tl.sum(tl.load(count_ptr + query * STRETCHES + tl.arange(0, STRETCHES)), 0)
    key_ptr += query * padded
    position_ptr += query * padded
    index_ptr += query * width
    logit_ptr += query * width
    # What is always kept are the first and the last candidates.
    free_ptr = key_ptr + oldest
    free = total - oldest - newest
    i = tl.arange(0, BLOCK)
    # No score has the lowest word: it stands for none.
    word = tl.load(free_ptr + i, mask=i < free, other=-2147483648)
    highest = tl.max(word, 0)
    lowest = tl.min(tl.where(i < free, word, 2147483647), 0)
    for offset in range(BLOCK, free, BLOCK):
        more = tl.load(free_ptr + offset + i, mask=offset + i < free, other=-2147483648)
        highest = tl.maximum(highest, tl.max(more, 0))
        lowest = tl.minimum(lowest, tl.min(tl.where(offset + i < free, more, 2147483647), 0))
    kth = _kth_largest(word, free_ptr, lowest, highest, free, k_free, i, BLOCK)
    missing = k_free - _count_above(word, free_ptr, kth, free, i, BLOCK)

    o = tl.arange(0, OUT)
    higher = 0
    equal = 0
    top = tl.full((OUT,), -3.4028234663852886e38, tl.float32)
    for offset in range(0, total, OUT):
        inside = offset + o < total
        next = tl.load(key_ptr + offset + o, mask=inside, other=0)
        j = tl.load(position_ptr + offset + o, mask=inside, other=0)
        always = (offset + o < oldest) | (offset + o >= total - newest)
        above_kth = (inside & (always | (next > kth))).to(tl.int32)
        at_kth = (inside & (next == kth) & (above_kth == 0)).to(tl.int32)
        # Both counts in one sum: OUT is less than 2^16.
        before = tl.cumsum(above_kth + (at_kth << 16), 0)
        higher_before = higher + (before & 65535) - above_kth
        equal_before = equal + (before >> 16) - at_kth
        take = (above_kth > 0) | ((at_kth > 0) & (equal_before < missing))
        slot = higher_before + tl.minimum(equal_before, missing)
        logit = logit_of(score_of(next).to(tl.float32, bitcast=True), scale, cap, PLAIN, CAPPED)
        tl.store(index_ptr + slot, j.to(tl.int64), mask=take)
        tl.store(logit_ptr + slot, logit, mask=take)
        top = tl.maximum(top, tl.where(take, logit, top))
        higher += tl.sum(above_kth, 0)
        equal += tl.sum(at_kth, 0)
    for offset in range(k_eff, width, OUT):
        tl.store(index_ptr + offset + o, tl.full((OUT,), -1, tl.int64), mask=offset + o < width)
    top = tl.max(top, 0)
    if SINK:
        top = tl.maximum(top, widen(tl.load(sink_ptr + (query % heads) * sink_stride)))
    tl.store(top_ptr + query, top)
