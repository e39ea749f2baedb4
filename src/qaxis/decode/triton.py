"""Triton kernels of the certified decode step: fast scores, a cut, canonical scores behind it, the exact choice.

What is read from outside may have any strides: offsets into it are 64 bits. So are those of rows in the work space;
positions within a row are 32, as its padded length is.
"""

from __future__ import annotations

from ..arithmetic.triton import jit, row_and_block, score_of, tl, tree_last, units_per_score, widen
from ..storage.triton import load_numbers


@jit
def _sixteen_bits(score, units):
    # No canonical score lies beyond the range, so moving a fast score back to it brings the two closer.
    place = tl.minimum(tl.maximum(tl.floor(score * units), -32768.0), 32767.0)
    return (place + 32768.0).to(tl.int32)


@jit
def _store(out, best, place, mask, first, some, SUB: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Scores ``place [BLOCK, ROWS]`` and the best of every SUB neighbours; 0 stands for a key without a fast score."""
    j = first + tl.arange(0, BLOCK)
    tl.store(out + j[:, None], place.to(tl.uint16), mask=mask)
    highest = tl.max(tl.reshape(tl.where(mask, place, 0), (BLOCK // SUB, SUB, ROWS)), 1)
    i = first // SUB + tl.arange(0, BLOCK // SUB)
    tl.store(best + i[:, None], highest.to(tl.uint16), mask=some)


@jit
def score_product_kernel(
    q_ptr, k_ptr, norm_ptr, fast_ptr, best_ptr, heads, kv_heads, n, padded, dim, programs,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, DIM: tl.constexpr,
    STAGES: tl.constexpr, SUB: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """16-bit scores of the GROUP query heads of one key head, by matrix product of the keys themselves."""
    kv, program = row_and_block(programs)
    b = kv // kv_heads
    g = kv % kv_heads
    d = tl.arange(0, DIM).to(tl.int64)
    r = tl.arange(0, ROWS)
    pointers = q_ptr + b * stride_qb + (g * GROUP + r)[None, :] * stride_qh + d[:, None] * stride_qd
    q = tl.load(pointers, mask=(r < GROUP)[None, :] & (d < dim)[:, None], other=0.0)
    wide = widen(q)
    units = units_per_score(tl.sqrt(tl.sum(wide * wide, 0)), tl.load(norm_ptr + kv))
    keys = k_ptr + b * stride_kb + g * stride_kh
    row = b * heads + g * GROUP + r
    out = fast_ptr + row[None, :] * padded
    best = best_ptr + row[None, :] * (padded // SUB)
    mine = (r < GROUP)[None, :]
    first = program.to(tl.int64) * (BLOCK * LOOP)
    for turn in tl.range(0, LOOP, num_stages=STAGES):
        j = first + turn * BLOCK + tl.arange(0, BLOCK)
        inside = (j < n)[:, None] & (d < dim)[None, :]
        k = tl.load(keys + j[:, None] * stride_kn + d[None, :] * stride_kd, mask=inside, other=0.0)
        # The interpreter cannot multiply bfloat16.
        score = tl.dot(widen(k), wide, input_precision="ieee") if WIDE else tl.dot(k, q, input_precision="ieee")
        place = _sixteen_bits(score, units[None, :])
        start = first + turn * BLOCK
        _store(out, best, place, (j < n)[:, None] & mine, start, (start < n) & mine, SUB, BLOCK, ROWS)


@jit
def score_codes_kernel(
    q_ptr, codes_ptr, scales_ptr, norm_ptr, largest_scales_ptr, fast_ptr, best_ptr,
    heads, kv_heads, blocks, sinks, padded, dim, programs,
    stride_qb, stride_qh, stride_qd, codes_b, codes_h, codes_n, codes_d, scales_b, scales_h, scales_n, scales_d,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr, DIM: tl.constexpr,
    STAGES: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """16-bit scores from 8-bit codes whose scales are shared by BLOCK tokens, by exact integer products.

    The query, times a block's scales, is split into two 8-bit parts; both are columns of one product.
    """
    kv, program = row_and_block(programs)
    b = kv // kv_heads
    g = kv % kv_heads
    d = tl.arange(0, DIM).to(tl.int64)
    r = tl.arange(0, ROWS)
    pointers = q_ptr + b * stride_qb + (g * GROUP + r)[None, :] * stride_qh + d[:, None] * stride_qd
    wide = widen(tl.load(pointers, mask=(r < GROUP)[None, :] & (d < dim)[:, None], other=0.0))
    units = units_per_score(tl.sqrt(tl.sum(wide * wide, 0)), tl.load(norm_ptr + kv))
    largest_scales = tl.load(largest_scales_ptr + kv * dim + d, mask=d < dim, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(wide) * largest_scales[:, None], 0), 1e-30)
    wide = wide * (127.0 / largest)[None, :]
    coarse, fine = units * (largest / 127.0), units * (largest / (127.0 * 254.0))
    codes = codes_ptr + b * codes_b + g * codes_h
    scales = scales_ptr + b * scales_b + g * scales_h
    row = b * heads + g * GROUP + r
    out = fast_ptr + row[None, :] * padded
    best = best_ptr + row[None, :] * (padded // SUB)
    mine = (r < GROUP)[None, :]
    first = program.to(tl.int64) * LOOP
    for turn in tl.range(0, LOOP, num_stages=STAGES):
        block = first + turn
        inside = block < blocks
        j = block * BLOCK + tl.arange(0, BLOCK)
        channels = inside & (d < dim)
        code = tl.load(codes + j[:, None] * codes_n + d[None, :] * codes_d, mask=channels[None, :], other=0)
        exponent = tl.load(scales + block * scales_n + d * scales_d, mask=channels, other=0).to(tl.int32)
        scaled = wide * ((exponent + 127) << 23).to(tl.float32, bitcast=True)[:, None]
        high = tl.floor(scaled + 0.5)
        low = tl.minimum(tl.maximum(tl.floor((scaled - high) * 254.0 + 0.5), -128.0), 127.0)
        parts = tl.reshape(tl.join(high.to(tl.int8), low.to(tl.int8)), (DIM, 2 * ROWS))
        upper, lower = tl.split(tl.reshape(tl.dot(code, parts), (BLOCK, ROWS, 2)))
        score = upper.to(tl.float32) * coarse[None, :] + lower.to(tl.float32) * fine[None, :]
        # What the cache keeps in full has no code: the codes there stand for nothing.
        mask = inside & (j >= sinks)[:, None] & mine
        _store(out, best, _sixteen_bits(score, 1.0), mask, block * BLOCK, inside & mine, SUB, BLOCK, ROWS)


@jit
def _cut(
    q, best_ptr, norm_ptr, residual_ptr, largest_scales_ptr, dim, many, k_eff, quantile, slope, relative, split,
    BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Where the fast scores begin whose keys may be among the ``k_eff`` best of the query ``q [DIM]``.

    The k_eff-th largest of the ``many`` best-of-neighbours is reached by as many different keys, so the k_eff-th
    canonical score is at most one error below it; a key more than two errors below cannot be among the best.
    """
    d = tl.arange(0, DIM)
    wide = widen(q)
    # Sums differ in their order from that of the score kernels: a thousandth covers it.
    norm_q = tl.sqrt(tl.sum(wide * wide, 0)) * 1.001
    norm_k = tl.load(norm_ptr)
    units = units_per_score(norm_q, norm_k)
    largest_scales = tl.load(largest_scales_ptr + d, mask=d < dim, other=0.0)
    error = norm_q * (tl.load(residual_ptr) + relative * norm_k) + tl.max(tl.abs(wide) * largest_scales, 0) * split
    i = tl.arange(0, BLOCK)
    kept = tl.load(best_ptr + i, mask=i < many, other=0).to(tl.int32)
    count = tl.minimum(tl.maximum(many, 1), BLOCK).to(tl.float32)
    mean = tl.sum(kept.to(tl.float32), 0) / count
    spread = tl.sqrt(tl.sum(tl.where(i < many, (kept - mean) * (kept - mean), 0.0), 0) / count)
    # A guess as if they were normal, steps of Newton from there, then halving. Slightly too low a threshold only means
    # a few more candidates.
    found = tl.full((), 0, tl.int32)
    behind = tl.full((), 65536, tl.int32)
    guess = mean + quantile * spread
    tries = tl.full((), 0, tl.int32)
    while behind - found > 1:
        trial = tl.minimum(tl.maximum(guess.to(tl.int32), found + 1), behind - 1)
        enough = tl.sum((kept >= trial).to(tl.int32), 0)
        for offset in range(BLOCK, many, BLOCK):
            more = tl.load(best_ptr + offset + i, mask=offset + i < many, other=0).to(tl.int32)
            enough += tl.sum((more >= trial).to(tl.int32), 0)
        found = tl.where(enough >= k_eff, trial, found)
        behind = tl.where(enough >= k_eff, behind, trial)
        close = (enough >= k_eff) & (enough <= k_eff + k_eff // 64)
        behind = tl.where(close, found + 1, behind)
        tries += 1
        near = trial.to(tl.float32) + (enough - k_eff - k_eff // 128).to(tl.float32) * (slope * spread)
        near = tl.minimum(tl.maximum(near, 0.0), 65535.0)
        guess = tl.where(tries < 5, near, ((found + behind) >> 1).to(tl.float32))
    cut = found.to(tl.float32) - 2.0 * (error * units * 1.01 + 1.0) - 1.0
    # 0 also stands for keys without a score, and for too few of them: then every key may.
    return tl.where((units > 0.0) & (found > 0), cut, -1.0)


@jit
def compact_kernel(
    q_ptr, norm_ptr, residual_ptr, largest_scales_ptr, fast_ptr, best_ptr, position_ptr, count_ptr,
    heads, group, n, start, end, padded, span, many, k_eff, dim,
    quantile, slope, relative, split, stride_best,
    stride_qb, stride_qh, stride_qd,
    STRETCHES: tl.constexpr, MANY: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """The positions of one stretch of a row that reach the cut, in order; every stretch finds the cut for itself.

    Keys without a fast score always reach it.
    """
    row, stretch = row_and_block(STRETCHES)
    b = row // heads
    h = row % heads
    kv = b * (heads // group) + h // group
    d = tl.arange(0, DIM).to(tl.int64)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + d * stride_qd, mask=d < dim, other=0.0)
    cut = _cut(
        q, best_ptr + row * stride_best, norm_ptr + kv, residual_ptr + kv, largest_scales_ptr + kv * dim,
        dim, many, k_eff, quantile, slope, relative, split, MANY, DIM,
    )  # fmt: skip
    begin = stretch * span
    position_ptr += row * padded + begin
    place = tl.arange(0, LINES)[:, None] * LINE + tl.arange(0, LINE)[None, :]
    found = 0
    for offset in range(0, span, LINES * LINE):
        j = begin + offset + place
        # The start is no multiple of anything: in the load's mask it would break up its words.
        fast = tl.load(fast_ptr + row * padded + j, mask=j < end, other=65535).to(tl.float32)
        may = (((fast >= cut) | (j < start)) & (j < n)).to(tl.int32)
        # A line is within a warp, so that only the lines' totals have to cross warps.
        total = tl.sum(may, 1)
        before = found + tl.cumsum(total, 0) - total
        tl.store(position_ptr + (before[:, None] + tl.cumsum(may, 1) - 1), j, mask=may > 0)
        found += tl.sum(total, 0)
    tl.store(count_ptr + row * STRETCHES + stretch, found)


@jit
def rescore_kernel(
    q_ptr, position_ptr, count_ptr, flat_position_ptr, flat_key_ptr, heads, group, padded, span, dim, programs,
    stride_qb, stride_qh, stride_qd,
    rows, scales, first, newest, whole, sinks,
    rows_b, rows_h, rows_n, rows_d, scales_b, scales_h, scales_n, first_b, first_h, first_n,
    newest_b, newest_h, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    STRETCHES: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """Canonical scores of a row's candidates, as integers in the order of the scores, without the gaps."""
    row, program = row_and_block(programs)
    b = row // heads
    h = row % heads
    g = h // group
    d = tl.arange(0, DIM).to(tl.int64)
    wide = widen(tl.load(q_ptr + b * stride_qb + h * stride_qh + d * stride_qd, mask=d < dim, other=0.0))
    s = tl.arange(0, STRETCHES)
    counts = tl.load(count_ptr + row * STRETCHES + s)
    ends = tl.cumsum(counts, 0)
    total = tl.sum(counts, 0)
    shift = s * span - (ends - counts)
    for offset in range(program * BLOCK, total, programs * BLOCK):
        i = offset + tl.arange(0, BLOCK)
        inside = i < total
        # Where the i-th candidate of the row lies among the stretches: the first that ends behind it.
        before = ends[None, :] <= i[:, None]
        stretch = tl.sum(before.to(tl.int32), 1)
        place = i + tl.sum(tl.where(s[None, :] == stretch[:, None], shift[None, :], 0), 1)
        short = tl.load(position_ptr + row * padded + place, mask=inside, other=0)
        k = load_numbers(
            rows + b * rows_b + g * rows_h, scales + b * scales_b + g * scales_h,
            first + b * first_b + g * first_h, newest + b * newest_b + g * newest_h,
            short.to(tl.int64)[:, None], d[None, :], inside[:, None] & (d < dim)[None, :], whole, sinks,
            rows_n, rows_d, scales_n, first_n, newest_n, STORED, SHARING, WIDTH, PER_TOKEN,
        )  # fmt: skip
        bits = tree_last(wide[None, :] * k, BLOCK, DIM, LOG_DIM).to(tl.int32, bitcast=True)
        tl.store(flat_key_ptr + row * padded + i, score_of(bits), mask=inside)
        tl.store(flat_position_ptr + row * padded + i, short, mask=inside)


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
    position_ptr, key_ptr, count_ptr, index_ptr, score_ptr, top_ptr, padded, k_eff,
    STRETCHES: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Of one row's candidates, in order of position: the ``k_eff`` with the highest scores, lower positions first.

    The k_eff-th largest word is found by trials. BLOCK candidates stay in registers; more are read again.
    """
    row = tl.program_id(0).to(tl.int64)
    total = tl.sum(tl.load(count_ptr + row * STRETCHES + tl.arange(0, STRETCHES)), 0)
    key_ptr += row * padded
    position_ptr += row * padded
    i = tl.arange(0, BLOCK)
    # No score has the lowest word: it stands for none.
    word = tl.load(key_ptr + i, mask=i < total, other=-2147483648)
    top = tl.max(word, 0)
    low = tl.min(tl.where(i < total, word, 2147483647), 0)
    for offset in range(BLOCK, total, BLOCK):
        more = tl.load(key_ptr + offset + i, mask=offset + i < total, other=-2147483648)
        top = tl.maximum(top, tl.max(more, 0))
        low = tl.minimum(low, tl.min(tl.where(offset + i < total, more, 2147483647), 0))
    tl.store(top_ptr + row, score_of(top).to(tl.float32, bitcast=True))
    kth = _kth_largest(word, key_ptr, low, top, total, k_eff, i, BLOCK)
    above = _count_above(word, key_ptr, kth, total, i, BLOCK)

    o = tl.arange(0, OUT)
    higher = 0
    equal = 0
    for offset in range(0, total, OUT):
        inside = offset + o < total
        next = tl.load(key_ptr + offset + o, mask=inside, other=0)
        j = tl.load(position_ptr + offset + o, mask=inside, other=0)
        above_kth = (inside & (next > kth)).to(tl.int32)
        at_kth = (inside & (next == kth)).to(tl.int32)
        # Both counts in one sum: OUT is less than 2^16.
        before = tl.cumsum(above_kth + (at_kth << 16), 0)
        higher_before = higher + (before & 65535) - above_kth
        equal_before = equal + (before >> 16) - at_kth
        take = (above_kth > 0) | ((at_kth > 0) & (equal_before < k_eff - above))
        slot = higher_before + tl.minimum(equal_before, k_eff - above)
        tl.store(index_ptr + row * k_eff + slot, j.to(tl.int64), mask=take)
        tl.store(score_ptr + row * k_eff + slot, score_of(next).to(tl.float32, bitcast=True), mask=take)
        higher += tl.sum(above_kth, 0)
        equal += tl.sum(at_kth, 0)
