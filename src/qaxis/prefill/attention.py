"""Prefill that attends to exactly the canonical top-k keys of every query, at the speed of matrix products.

Which keys are attended to is the reference's choice, bit for bit. How they are summed is the tensor cores' affair, as
in FlashAttention: for outputs that are canonical too, use :func:`qaxis.topk_attention`. No step looks at the result of
another on the host and no shape depends on data, so the whole can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import LOG2_E, next_power_of_two
from ..arithmetic.triton import INTERPRETED, check_device, log2, triton
from ..attention.always import NONE, Always, check_always
from ..attention.logits import Logits, checked_logits
from ..budget import Budget, as_budget
from ..storage.lazy import tensor_of
from ..storage.moments import GROUP
from ..validation import check_flag, check_no_gradient, check_qkv_form, require
from . import cuda
from .form import as_pads, completion_of, window_of
from .plan import (
    DEFAULT_TUNING,
    MOST_KEYS,
    WIDE_ROWS,
    Buffers,
    Frame,
    Part,
    Plan,
    PrefillTuning,
    Ranges,
    cut_warps,
    make_plan,
    tables,
)
from .triton import (
    prefill_band_kernel,
    prefill_cut_kernel,
    prefill_lengths_kernel,
    prefill_long_kernel,
    prefill_scores_kernel,
    prefill_wide_band_kernel,
)
from .triton_attend import prefill_attend_kernel
from .triton_completed import prefill_completed_kernel

#: a key is long if it is so many times as long as the keys are on average
_LONG = 2.0
#: bits that are looked at together outside the kernels; bounds memory at some 20 bytes each
_AT_ONCE = 1 << 26


class Prefill(NamedTuple):
    """Result of :func:`prefill_attention`."""

    #: ``[B, H, M, Dv]`` in the dtype of the queries
    output: torch.Tensor
    #: int32 ``[B, H, M, W]``: bit ``j % 32`` of word ``j // 32`` tells whether key j was selected; if asked for
    bits: torch.Tensor | None
    #: int32 ``[B, H, M]``: keys that were ordered by their canonical scores; if asked for
    band: torch.Tensor | None


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    budget: Budget | int,
    *,
    scale: float | None = None,
    causal: bool = True,
    pads: torch.Tensor | Sequence[int] | None = None,
    window: int | None = None,
    logits: Logits | None = None,
    always: Always = NONE,
    selection: bool = False,
    backend: str = "auto",
    tuning: PrefillTuning = DEFAULT_TUNING,
    completion: str = "none",
    offset: int = 0,
) -> Prefill:
    """Softmax attention over the keys that :func:`qaxis.topk_indices` selects.

    With ``pads``, ``window`` and ``always`` it is what ``attention.backend.select`` selects of the keys that a query
    sees then, its budget that of their number. A query that sees no key gets 0.

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16. Any strides and alignment, here and below.
        k: ``[B, Hkv, N, D]``, same dtype and device; H a multiple of Hkv (GQA); M and N at most 2^31 - 2^16.
        v: ``[B, Hkv, N, Dv]``, same dtype and device.
        budget: a :class:`~qaxis.Budget` without a tolerance, or an int in 1..N: then queries that see fewer keys attend
            to all.
        scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``.
        causal: if True the queries are the last M of the N positions, M at most N, and see no later key.
        pads: how many of the first keys no query of a batch sees: int32 or int64 ``[B]`` on q's device, or B integers.
        window: a query sees no more than so many of the last keys up to its own; a tile of keys outside costs nothing.
        logits: what becomes of a score before the softmax, instead of ``scale``.
        always: how many of the first and of the newest keys that a query sees it keeps in any case; they count towards
            the budget, whose ``minimum`` has room for them.
        selection: whether to return the bits, N/8 bytes a query.
        backend: what selects: ``"triton"`` kernels, or ``"cuda"``, select.cu where it runs (emulated on a CPU);
            ``"auto"`` is ``"cuda"`` on a GPU. Same selection.
        tuning: how the work is cut. Beside its result the call takes ``tuning.memory`` bytes (4 GiB) and an eighth
            at most, or what one query of a KV head's group needs; and a copy of k or v whose last stride is not 1.
        completion: ``"mean"`` or ``"linear"``, which ``"block"`` is too: what is left out is put back, as
            :func:`qaxis.topk_attention` says; the selection is the same. Every tile of keys is then scored twice, and
            its values read, whatever is selected; it takes no more memory. ``always`` leaves room for one key of the
            budget that is kept by its score.
        offset: tokens before the first key, which a window dropped: complete groups count from the first token.

    A completed output is not canonical either. Its mass, mean and spread are float32 sums of scores as matrix products
    give them, tile after tile, and in float16 and bfloat16 the weights of all values are rounded: for scores as normal
    numbers give them it is within 2^-17 (float32), 2^-10 or 2^-7 of what ``topk_attention`` returns, of the largest
    value. Where the spread of the scores that a query leaves out is at the least that has a slope
    (``completion.LEAST_SPREAD``), the one may find a slope and the other none.

    Only the form is checked: that q, k and v are finite, and that sums of products stay inside float32, is left to the
    caller, as looking waits for the device; the numbers of a tensor of pads are cut off at 0 and N. k and v may be
    what the ``update`` of a quantised cache returns; they are dequantised.

    Raises:
        ValueError: naming the argument, on a type, layout, dtype, device, shape or value that is not allowed; for
            tensors that ask for gradients.
    """
    q, k, v = (tensor_of(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    check_no_gradient(q, k, v)
    check_qkv_form(q, k, v, causal=causal)
    check_flag("selection", selection)
    check_device("q", q, calls_library=True)
    for name, x in (("q", q), ("k", k)):
        require(x.shape[2] <= MOST_KEYS, f"{name}.shape[2]", x.shape[2], f"at most {MOST_KEYS} positions")
    require(backend in ("auto", "cuda", "triton"), "backend", backend, "'auto', 'cuda' or 'triton'")
    require(isinstance(tuning, PrefillTuning), "tuning", tuning, "a qaxis.prefill.PrefillTuning")
    budget = as_budget(budget, k.shape[2])
    # How many keys a row needs is known here before it is scored.
    tolerance = budget.tolerance
    require(tolerance is None, "budget.tolerance", tolerance, "None: topk_attention keeps keys by a tolerance")
    check_always(always, budget.minimum, "the budget's minimum")
    logits = checked_logits(logits, scale, q.shape[1], q.shape[3], q.device)
    window, kind = window_of(window), completion_of(completion, offset, budget, always)
    pads = as_pads(pads, q, k.shape[2])
    if backend == "auto":
        backend = "cuda" if q.is_cuda else "triton"
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    plan = make_plan(
        tuple(q.shape), k.shape[1], k.shape[2], causal=causal, tuning=tuning, window=window, always=always,
        completion=kind, offset=offset,
    )  # fmt: skip
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    bits = band = None
    if selection:
        bits = torch.zeros(*q.shape[:3], triton.cdiv(plan.n, 32), dtype=torch.int32, device=q.device)
        band = torch.zeros(q.shape[:3], dtype=torch.int32, device=q.device)
    result = Prefill(out, bits, band)
    fill(result, plan, q, k, v, budget, logits, backend, pads)
    return result


def fill(
    result: Prefill, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: Budget, logits: Logits,
    backend: str, pads: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Carry the plan out; arguments as :func:`parts_of`, and ``backend`` is one of two."""
    for part in parts_of(result, plan, q, k, v, budget, logits, pads):
        for stretch in plan.stretches():
            for chunk in plan.chunks(stretch):
                score(part, stretch, chunk)
                capacity = select(part, stretch, chunk, backend)
                order_wide_bands(part, stretch, chunk, capacity)
                hand_over_band(part, chunk)
            attend(part, stretch)
            hand_over_bits(part, stretch)


def parts_of(
    result: Prefill, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: Budget, logits: Logits,
    pads: torch.Tensor | None = None,
) -> Iterator[Part]:  # fmt: skip
    """The heads in flight, in turn, in the same buffers; k and v have a last stride of 1, pads are int32."""
    buffers, of_seen = Buffers(plan, q.device), tables(budget, plan.n, str(q.device), plan.always)
    for b, h, kv in plan.parts(q.shape[0]):
        bits, band = (None if x is None else x[b, h] for x in result[1:])
        sink = None if logits.sink is None else logits.sink[h].contiguous()
        yield Part(
            plan, buffers, of_seen, q[b, h], k[b, kv], v[b, kv], ranges_of(plan, k[b, kv]),
            None if pads is None else pads[b], replace(logits, sink=sink), result.output[b, h], bits, band,
        )  # fmt: skip


def selected_positions(bits: torch.Tensor) -> torch.Tensor:
    """Positions of the set bits ``[B, H, M, W]`` of a :class:`Prefill`: int64 ``[B, H, M, k_eff]``.

    They ascend and are padded with -1. The most bits of a query are counted, which on a GPU waits for the device.

    Raises:
        ValueError: naming what is not allowed, for other than int32 of four dimensions, each at least 1.
    """
    require(isinstance(bits, torch.Tensor), "bits", type(bits).__name__, "a torch.Tensor")
    require(bits.layout == torch.strided, "bits.layout", bits.layout, "torch.strided")
    require(bits.dtype == torch.int32, "bits.dtype", bits.dtype, "int32")
    require(bits.ndim == 4 and bits.numel() > 0, "bits.shape", tuple(bits.shape), "4 dimensions, each at least 1")
    rows = bits.flatten(0, 2)
    found = [_positions(some) for some in rows.split(max(1, _AT_ONCE // (32 * rows.shape[1])))]
    k_eff = max(x.shape[1] for x in found)
    padded = [torch.nn.functional.pad(x, (0, k_eff - x.shape[1]), value=-1) for x in found]
    return torch.cat(padded).view(*bits.shape[:3], k_eff)


def selected_mask(bits: torch.Tensor, n: int) -> torch.Tensor:
    """The set bits of words int32 ``[..., W]`` as bool ``[..., n]``."""
    each = (bits[..., None] >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1
    return each.flatten(-2)[..., :n].bool()


def _positions(rows: torch.Tensor) -> torch.Tensor:
    """As :func:`selected_positions`, of words ``[rows, W]``."""
    each = selected_mask(rows, 32 * rows.shape[1])
    n, k_eff = each.shape[-1], int(each.sum(-1).max())
    position = torch.where(each, torch.arange(n, device=rows.device), n).sort(dim=-1).values[..., :k_eff]
    return torch.where(position == n, -1, position)


def ranges_of(plan: Plan, k: torch.Tensor) -> Ranges:
    """What the range of scores comes from: keys are long that are longer than _LONG times the mean.

    No more than ``plan.long`` of them: else the range is that of the longest but these.
    """
    batch, kv_heads, n, dim = k.shape
    norms = torch.empty(batch, kv_heads, n, dtype=torch.float32, device=k.device)
    keys = 128 if INTERPRETED else 64
    tiles = triton.cdiv(n, keys)
    prefill_lengths_kernel[(batch * kv_heads * tiles,)](
        k, norms, kv_heads, n, dim, tiles, *k.stride()[:3], KEYS=keys, DIM=next_power_of_two(dim)
    )
    longest = norms.topk(plan.long + 1, dim=-1)
    long = (longest.values[..., :-1] > _LONG * norms.mean(-1, keepdim=True)).sum(-1, keepdim=True)
    bounds = longest.values * fast_scores.UPWARD
    norm = bounds.gather(-1, long)[..., 0]
    # Squares below float32's smallest are lost: no matter beside a longer key.
    norm = torch.where(norm > 1e-15, norm, 0.0)
    return Ranges(norm, bounds[..., 0].contiguous(), longest.indices, long[..., 0].int())


def _tile_dim(dim: int) -> int:
    """Width of the tile for vectors of ``dim`` numbers: tensor cores take no fewer than 16."""
    return max(16, next_power_of_two(dim))


def _of_bits(part: Part, stretch: Frame, chunk: Frame) -> tuple[int, ...]:
    """What Triton kernels are told of the keys always kept, and of the rows of bits."""
    return (*part.plan.always, stretch.rows, chunk.start - stretch.start)


def score(part: Part, stretch: Frame, chunk: Frame) -> None:
    """The 15-bit scores of a chunk."""
    plan, t, b, k = part.plan, part.plan.tuning, part.buffers, part.keys(chunk)
    key_tiles, query_tiles = triton.cdiv(chunk.visible, t.keys * t.loop), triton.cdiv(chunk.rows, t.queries)
    flags = {"CAUSAL": plan.causal, "PADDED": part.pads is not None}
    prefill_scores_kernel[(key_tiles * query_tiles * part.heads,)](
        part.q, k, part.ranges.norm, b.fast, *part.common(chunk), *part.seen(chunk), chunk.padded, plan.dim,
        key_tiles, query_tiles, *part.strides,
        **flags, QUERIES=t.queries, KEYS=t.keys, LOOP=t.loop, STAGES=t.stages, DIM=_tile_dim(plan.dim),
        WIDE=INTERPRETED, num_warps=t.warps,
    )  # fmt: skip
    tiles, tree = triton.cdiv(chunk.rows, t.long_rows), next_power_of_two(plan.dim)
    prefill_long_kernel[(tiles * part.heads,)](
        part.q, k, part.ranges.norm, *part.ranges[2:], part.tables.k_eff, b.fast, b.long_top,
        *part.common(chunk), *part.seen(chunk), *_of_bits(part, stretch, chunk), chunk.padded, plan.dim,
        part.ranges.longest.shape[-1], tiles, *part.strides,
        **flags, ROWS=t.long_rows, TREE=tree, LOG_TREE=log2(tree), enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip


def select(part: Part, stretch: Frame, chunk: Frame, backend: str) -> int:
    """The bits of every row of a chunk whose band fits its list; returns what that has room for."""
    capacity = cuda.select(part, stretch, chunk) if backend == "cuda" else None
    if capacity is not None:
        return capacity
    _select(part, stretch, chunk)
    return part.plan.tuning.capacity


def _select(part: Part, stretch: Frame, chunk: Frame) -> None:
    """The same in Triton."""
    plan, t, b, programs = part.plan, part.plan.tuning, part.buffers, (part.heads * chunk.rows,)
    warps, tree = cut_warps(min(chunk.visible, plan.window + 128), t), next_power_of_two(plan.dim)
    bits = b.bits[: part.heads * stretch.rows * stretch.words].view(part.heads, stretch.rows, stretch.words)
    bits.narrow(1, chunk.start - stretch.start, chunk.rows).zero_()
    of_bits = _of_bits(part, stretch, chunk)
    prefill_cut_kernel[programs](
        part.q, part.ranges.norm, b.fast, *part.tables, b.bits.view(torch.uint8), b.bits, b.positions, b.band,
        b.missing, b.low, b.high, b.top, *part.common(chunk), *part.seen(chunk), *of_bits, chunk.padded,
        stretch.words, plan.dim, plan.error, *part.q.stride(),
        CAUSAL=plan.causal, PADDED=part.pads is not None, BLOCK=t.cut * warps, SAMPLE=t.sample, SLACK=t.slack,
        CAPACITY=t.capacity, DIM=tree, num_warps=warps,
    )  # fmt: skip
    prefill_band_kernel[programs](
        part.q, part.keys(chunk), b.positions, b.listed, b.band, b.missing, b.bits, *part.common(chunk), *of_bits[2:],
        stretch.words, plan.dim, *part.strides,
        CAPACITY=t.capacity, BLOCK=t.band, TREE=tree, LOG_TREE=log2(tree), enable_fp_fusion=False, num_warps=1,
    )  # fmt: skip


def order_wide_bands(part: Part, stretch: Frame, chunk: Frame, capacity: int) -> None:
    """The bits of those rows whose band outgrew its list of ``capacity``."""
    plan, b, tree = part.plan, part.buffers, next_power_of_two(part.plan.dim)
    prefill_wide_band_kernel[(min(plan.wide_programs, triton.cdiv(part.heads * chunk.rows, WIDE_ROWS)),)](
        part.q, part.keys(chunk), b.fast, b.line, b.band, b.missing, b.low, b.high, b.bits,
        *part.common(chunk), *part.seen(chunk), *_of_bits(part, stretch, chunk), chunk.padded, b.line.shape[2],
        stretch.words, part.heads * chunk.rows, plan.dim, *part.strides,
        CAUSAL=plan.causal, PADDED=part.pads is not None, CAPACITY=capacity, ROWS=WIDE_ROWS,
        BLOCK=min(1024, next_power_of_two(chunk.visible)), KEYS=32, TREE=tree, LOG_TREE=log2(tree),
        enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip


def attend(part: Part, stretch: Frame) -> None:
    """Attention of a stretch over the keys whose bits are set, completed if the plan says so."""
    plan, t, b, dim_v, logits = part.plan, part.plan.tuning, part.buffers, part.v.shape[3], part.logits
    tiles, cap = triton.cdiv(stretch.rows, t.attend_queries), logits.soft_cap
    factor = logits.scale * LOG2_E if cap is None else logits.scale / cap
    arguments = (
        part.q, part.keys(stretch), part.v[:, :, stretch.origin :], *part.ranges[:2], b.bits, b.top, b.long_top,
        part.ranges.norm if logits.sink is None else logits.sink, part.out, *part.common(stretch), plan.m,
        *part.seen(stretch), stretch.words, plan.dim, dim_v, tiles, logits.scale * LOG2_E, factor,
        0.0 if cap is None else cap * LOG2_E, plan.off, plan.of_product, *part.strides, *part.v.stride()[:3],
    )  # fmt: skip
    options = {
        "CAUSAL": plan.causal, "PADDED": part.pads is not None, "CAP": cap is not None, "SINK": logits.sink is not None,
        "QUERIES": t.attend_queries, "KEYS": t.attend_keys, "STAGES": t.attend_stages, "DIM": _tile_dim(plan.dim),
        "DIM_V": _tile_dim(dim_v), "WIDE": INTERPRETED, "num_warps": t.attend_warps,
    }  # fmt: skip
    if plan.completion == "none":
        prefill_attend_kernel[(tiles * part.heads,)](*arguments, SKIP=t.attend_skip > 1, **options)
    else:
        # Groups count from the first token, the keys of a stretch from its origin.
        shift, linear = (plan.offset + stretch.origin) % GROUP, plan.completion == "linear"
        prefill_completed_kernel[(tiles * part.heads,)](*arguments, shift, LINEAR=linear, **options)


def _by_head(part: Part, frame: Frame, x: torch.Tensor) -> torch.Tensor:
    """Rows of a buffer ``[rows, ...]`` as ``[B, H, rows of a head, ...]``."""
    return x[: part.heads * frame.rows].view(*part.q.shape[:2], frame.rows, *x.shape[1:])


def hand_over_band(part: Part, chunk: Frame) -> None:
    """Copy how many keys were in the bands of a chunk to the result, if it was asked for."""
    if part.band is not None:
        part.band[:, :, chunk.start : chunk.start + chunk.rows] = _by_head(part, chunk, part.buffers.band)


def hand_over_bits(part: Part, stretch: Frame) -> None:
    """Copy the bits of a stretch to the result, if they were asked for."""
    if part.bits is None:
        return
    here, first = slice(stretch.start, stretch.start + stretch.rows), stretch.origin // 32
    columns = min(stretch.words, part.bits.shape[3] - first)
    words = part.buffers.bits[: part.heads * stretch.rows * stretch.words].view(-1, stretch.words)
    part.bits[:, :, here, first : first + columns] = _by_head(part, stretch, words)[..., :columns]
