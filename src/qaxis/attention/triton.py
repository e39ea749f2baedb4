"""Selection and canonical attention in Triton, on a GPU or through the interpreter: the bits of the reference.

Keys and values are tensors or 8-bit caches, told apart by a constant: what differs is the load alone.
"""

from __future__ import annotations

import torch

from ..arithmetic.reference import CHUNK_ELEMENTS, check_scores, exponent_factor, next_power_of_two, sort_key
from ..arithmetic.triton import INTERPRETED, check_device, exp2, jit, log2, row_and_block, tl, tree_sum, triton, widen
from ..storage.side import Stored
from ..storage.triton import load_numbers, side_arguments
from .logits import Logits

#: keys a program handles; any powers of two give the same bits. More keys mean fewer programs, which the interpreter
#: likes, and larger trees in registers, which a GPU does not.
SCORE_BLOCK = 4096 if INTERPRETED else 128
ATTEND_BLOCK = 1024 if INTERPRETED else 64
#: block partials that one program of the combining kernel adds; more of them save rounds and cost registers
COMBINE_BLOCK = 64
#: scores that a program turns into logits
LOGIT_BLOCK = 65536 if INTERPRETED else 1024
#: numbers of the partial sums that are held at once; more of them mean fewer launches
PARTIAL_ELEMENTS = 1 << 28

_TO_BASE_TWO = tl.constexpr(exponent_factor(-2.0))


@jit
def logit_of(score, scale, cap, PLAIN: tl.constexpr, CAPPED: tl.constexpr):
    """What the softmax takes of scores ``[N]``, as the reference computes it; launch with enable_fp_fusion=False.

    PLAIN logits are scaled scores whose scale is in the change of base. CAPPED: ``cap * tanh(logit / cap)``.
    """
    if PLAIN:
        return score
    else:
        logit = score * scale
        if CAPPED:
            y = tl.div_rn(logit, tl.full(logit.shape, cap, tl.float32))
            e = exp2(tl.abs(y) * _TO_BASE_TWO)
            bits = tl.div_rn(1.0 - e, 1.0 + e).to(tl.int32, bitcast=True)
            sign = y.to(tl.int32, bitcast=True) & -2147483648
            logit = ((bits & 2147483647) | sign).to(tl.float32, bitcast=True) * cap
        return logit


@jit
def coded_of(end, SHARING: tl.constexpr, PER_TOKEN: tl.constexpr):
    """How many of a cache's ``end`` tokens have codes: all, or those of whole groups."""
    if PER_TOKEN:
        return end
    else:
        return end - end % SHARING


@jit
def _logits_kernel(
    score_ptr, out_ptr, many, scale, cap, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of all scores."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(score_ptr + i, mask=i < many, other=0.0)
    tl.store(out_ptr + i, logit_of(score, scale, cap, PLAIN, CAPPED), mask=i < many)


@jit
def _scores_kernel(
    q_ptr, indices_ptr, out_ptr, heads, group, m, n_out, dim, blocks,
    stride_qb, stride_qh, stride_qm, stride_qd,
    numbers, scales, first, newest, whole, sinks,
    numbers_b, numbers_h, numbers_n, numbers_d, scales_b, scales_h, scales_n, first_b, first_h, first_n,
    newest_b, newest_h, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    GATHER: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, LOG_DIM: tl.constexpr,
):  # fmt: skip
    """Raw scores of one query against BLOCK keys: consecutive ones, or those that indices name."""
    query, block = row_and_block(blocks)
    b = query // (heads * m)
    h = (query // m) % heads
    i = query % m
    j = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = j < n_out
    if GATHER:
        position = tl.maximum(tl.load(indices_ptr + query * n_out + j, mask=inside, other=0), 0)
    else:
        position = j
    d = tl.arange(0, DIM).to(tl.int64)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + i * stride_qm + d * stride_qd, mask=d < dim, other=0.0)
    g = h // group
    k = load_numbers(
        numbers + b * numbers_b + g * numbers_h, scales + b * scales_b + g * scales_h,
        first + b * first_b + g * first_h, newest + b * newest_b + g * newest_h,
        position[:, None], d[None, :], inside[:, None] & (d < dim)[None, :], whole, sinks,
        numbers_n, numbers_d, scales_n, first_n, newest_n, STORED, SHARING, WIDTH, PER_TOKEN,
    )  # fmt: skip
    score = tree_sum(widen(q)[None, :] * k, BLOCK, DIM, LOG_DIM)
    tl.store(out_ptr + query * n_out + j, score, mask=inside)


@jit
def _partials_kernel(
    logit_ptr, top_ptr, indices_ptr, end_ptr, numerator_ptr, denominator_ptr,
    heads, group, m, width, dim, blocks, factor, end_stride,
    numbers, scales, first, newest, whole, sinks,
    numbers_b, numbers_h, numbers_n, numbers_d, scales_b, scales_h, scales_n, first_b, first_h, first_n,
    newest_b, newest_h, newest_n,
    STORED: tl.constexpr, SHARING: tl.constexpr, WIDTH: tl.constexpr, PER_TOKEN: tl.constexpr,
    GROWING: tl.constexpr, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Numerator and denominator of the softmax over BLOCK selected keys of one query.

    GROWING: how many tokens a cache holds is read from the device, a number for every row of the batch.
    """
    query, block = row_and_block(blocks)
    b = query // (heads * m)
    h = (query // m) % heads
    j = block * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(indices_ptr + query * width + j, mask=j < width, other=-1)
    live = position >= 0
    logit = tl.load(logit_ptr + query * width + j, mask=live, other=0.0)
    top = tl.load(top_ptr + query)
    t = tl.where(live, (logit - top) * factor, 0.0)
    p = tl.where(live, exp2(t), 0.0)
    d = tl.arange(0, DIM).to(tl.int64)
    if GROWING:
        whole = coded_of(tl.load(end_ptr + b * end_stride), SHARING, PER_TOKEN)
    g = h // group
    v = load_numbers(
        numbers + b * numbers_b + g * numbers_h, scales + b * scales_b + g * scales_h,
        first + b * first_b + g * first_h, newest + b * newest_b + g * newest_h,
        tl.maximum(position, 0)[None, :], d[:, None], live[None, :] & (d < dim)[:, None], whole, sinks,
        numbers_n, numbers_d, scales_n, first_n, newest_n, STORED, SHARING, WIDTH, PER_TOKEN,
    )  # fmt: skip
    numerator = tree_sum(p[None, :] * v, DIM, BLOCK, LOG_BLOCK)
    denominator = tree_sum(tl.reshape(p, (1, BLOCK)), 1, BLOCK, LOG_BLOCK)
    tl.store(numerator_ptr + (query * blocks + block) * dim + d, numerator, mask=d < dim)
    tl.store(denominator_ptr + query * blocks + block + tl.arange(0, 1), denominator)


@jit
def _combine_kernel(
    numerator_ptr, denominator_ptr, top_ptr, sink_ptr, out_ptr, out_denominator_ptr,
    blocks, out_blocks, dim, heads, m, factor, sink_stride,
    LAST: tl.constexpr, SINK: tl.constexpr, BLOCK: tl.constexpr, LOG_BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Add BLOCK neighbouring partials; the last round adds the weight of the SINK and divides."""
    query, part = row_and_block(out_blocks)
    j = part * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    inside = (j < blocks)[None, :] & (d < dim)[:, None]
    tile = tl.load(numerator_ptr + (query * blocks + j)[None, :] * dim + d[:, None], mask=inside, other=0.0)
    numerator = tree_sum(tile, DIM, BLOCK, LOG_BLOCK)
    weights = tl.load(denominator_ptr + query * blocks + j, mask=j < blocks, other=0.0)
    denominator = tree_sum(tl.reshape(weights, (1, BLOCK)), 1, BLOCK, LOG_BLOCK)
    if LAST:
        if SINK:
            sink = widen(tl.load(sink_ptr + (query // m) % heads * sink_stride + tl.arange(0, 1)))
            denominator += exp2((sink - tl.load(top_ptr + query)) * factor)
        # A query that sees no key has weight 0 and output 0.
        safe = tl.where(denominator > 0, denominator, 1.0)
        tl.store(out_ptr + query * dim + d, tl.div_rn(numerator, tl.broadcast_to(safe, (DIM,))), mask=d < dim)
    else:
        tl.store(out_ptr + (query * out_blocks + part) * dim + d, numerator, mask=d < dim)
        tl.store(out_denominator_ptr + query * out_blocks + part + tl.arange(0, 1), denominator)


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
        queries = slice(start, start + at_once)
        score = scores(q[:, :, queries], keys)
        check_scores(score)
        word = (sort_key(score).to(torch.int64) << 32) | lowest_first
        word = torch.where(allowed[:, :, queries], word, torch.iinfo(torch.int64).min)
        best = torch.topk(word, width, dim=-1, sorted=True).values
        keep = torch.arange(width, device=q.device) < k_eff[:, :, queries, None]
        chosen = torch.where(keep, n - 1 - (best & 0xFFFFFFFF), n).sort(dim=-1).values
        out[:, :, queries] = torch.where(chosen == n, -1, chosen)
    return out


def attend(
    q: torch.Tensor, keys: torch.Tensor | Stored, values: torch.Tensor | Stored, indices: torch.Tensor, logits: Logits,
    *, block: int = ATTEND_BLOCK, combine_block: int = COMBINE_BLOCK, num_warps: int = 4,
) -> torch.Tensor:  # fmt: skip
    """Canonical attention over given ``indices``, ``[B, H, M, Dv]`` in q's dtype."""
    batch, heads, m, _ = q.shape
    width, dim = indices.shape[-1], values.shape[3]
    out = torch.empty(batch, heads, m, dim, dtype=q.dtype, device=q.device)
    per_query = batch * heads * triton.cdiv(width, min(block, next_power_of_two(width))) * dim
    at_once = max(1, PARTIAL_ELEMENTS // per_query)
    for start in range(0, m, at_once):
        queries = slice(start, start + at_once)
        some = indices[:, :, queries].contiguous()
        score = scores(q[:, :, queries], keys, some)
        check_scores(score)
        logit = score if logits.plain else _logits(score, logits)
        top = torch.where(some >= 0, logit, -torch.inf).amax(-1).clamp(min=torch.finfo(torch.float32).min)
        if logits.sink is not None:
            top = torch.maximum(top, logits.sink.float()[None, :, None])
        parts = partials(logit, top, some, values, factor_of(logits), block=block, num_warps=num_warps)
        whole = combined(*parts, top, logits, block=combine_block, num_warps=num_warps)
        out[:, :, queries] = whole.reshape(*some.shape[:3], dim).to(q.dtype)
    return out


def factor_of(logits: Logits) -> float:
    """What turns logits as :func:`logit_of` has them into exponents of two."""
    return exponent_factor(logits.scale if logits.plain else 1.0)


def logit_arguments(logits: Logits) -> tuple[tuple[float, float], dict[str, bool]]:
    """The numbers and the constants that :func:`logit_of` takes."""
    cap = 1.0 if logits.soft_cap is None else logits.soft_cap
    return (logits.scale, cap), {"PLAIN": logits.plain, "CAPPED": logits.soft_cap is not None}


def _logits(score: torch.Tensor, logits: Logits) -> torch.Tensor:
    """Logits of canonical scores, float32, of the same shape."""
    out, (numbers, constants) = _buffer(score, *score.shape), logit_arguments(logits)
    grid = (triton.cdiv(score.numel(), LOGIT_BLOCK),)
    _logits_kernel[grid](
        score, out, score.numel(), *numbers, **constants, BLOCK=LOGIT_BLOCK, enable_fp_fusion=False
    )  # fmt: skip
    return out


def partials(
    logit: torch.Tensor, top: torch.Tensor, indices: torch.Tensor, values: torch.Tensor | Stored, factor: float,
    ends: torch.Tensor | None = None, *, block: int = ATTEND_BLOCK, num_warps: int = 4, poison: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Numerators ``[B * H * M, blocks, Dv]`` and denominators ``[B * H * M, blocks]`` over blocks of chosen keys.

    Args:
        logit: of the chosen keys, float32 ``[B, H, M, K]``. top: the highest of every query, float32 ``[B, H, M]``.
        indices: int64 ``[B, H, M, K]``, contiguous, padded with -1.
        factor: turns differences of logits into exponents of two.
        ends: int32 ``[B]`` on the device, how many tokens a cache of values holds; None: as many as it says itself.
    """
    batch, heads, m, width = indices.shape
    queries, dim, block = batch * heads * m, values.shape[3], min(block, next_power_of_two(width))
    blocks = triton.cdiv(width, block)
    numerator = _buffer(logit, queries, blocks, dim, poison=poison)
    denominator = _buffer(logit, queries, blocks, poison=poison)
    pointers, sizes, constants = side_arguments(values)
    # A length of the host is not told to kernels that read it from the device.
    sizes = sizes if ends is None else (0, *sizes[1:])
    _partials_kernel[(blocks * queries,)](
        logit, top, indices, indices if ends is None else ends, numerator, denominator,
        heads, heads // values.shape[1], m, width, dim, blocks, factor, 0 if ends is None else ends.stride(0),
        *pointers, *sizes, **constants, GROWING=ends is not None and isinstance(values, Stored),
        BLOCK=block, LOG_BLOCK=log2(block), DIM=next_power_of_two(dim), enable_fp_fusion=False, num_warps=num_warps,
    )  # fmt: skip
    return numerator, denominator


def combined(
    numerator: torch.Tensor, denominator: torch.Tensor, top: torch.Tensor, logits: Logits,
    *, block: int = COMBINE_BLOCK, num_warps: int = 4, poison: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Add all partials, and the weight of a sink logit, and divide.

    Args:
        numerator, denominator, top: as for, and of, :func:`partials`.
        logits: of which the sink, if there is one, has to be in ``top``.

    Returns:
        float32 ``[B * H * M, Dv]``.
    """
    queries, blocks, dim = numerator.shape
    sink = top if logits.sink is None else logits.sink
    while True:
        block = min(block, next_power_of_two(blocks))
        left = triton.cdiv(blocks, block)
        out = _buffer(numerator, queries, left, dim, poison=poison)
        weight = _buffer(numerator, queries, left, poison=poison)
        _combine_kernel[(left * queries,)](
            numerator, denominator, top, sink, out, weight,
            blocks, left, dim, *top.shape[1:], factor_of(logits), 0 if logits.sink is None else sink.stride(0),
            LAST=left == 1, SINK=logits.sink is not None, BLOCK=block, LOG_BLOCK=log2(block),
            DIM=next_power_of_two(dim), enable_fp_fusion=False, num_warps=num_warps,
        )  # fmt: skip
        if left == 1:
            return out[:, 0]
        numerator, denominator, blocks = out, weight, left
