"""Prefill that attends to exactly the canonical top-k keys of every query, at the speed of matrix products.

Which keys are attended to is the reference's choice, bit for bit. How they are summed is the tensor cores' affair, as
in FlashAttention: for outputs that are canonical too, use :func:`qaxis.topk_attention`. No step looks at the result of
another on the host and no shape depends on data, so the whole can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import next_power_of_two
from ..arithmetic.triton import INTERPRETED, check_device, log2, triton
from ..budget import Budget, as_budget
from ..storage.lazy import tensor_of
from ..validation import check_flag, check_qkv_form, check_scale, require
from . import cuda
from .plan import (
    DEFAULT_TUNING,
    MOST_KEYS,
    WIDE_ROWS,
    Buffers,
    Chunk,
    Part,
    Plan,
    PrefillTuning,
    bit_words,
    cut_block,
    make_plan,
    tables,
)
from .triton import (
    prefill_attend_kernel,
    prefill_band_kernel,
    prefill_cut_kernel,
    prefill_scores_kernel,
    prefill_wide_band_kernel,
)

#: numbers of keys or of bits that are looked at together outside the kernels; bounds memory at some 20 bytes each
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
    selection: bool = False,
    backend: str = "auto",
    tuning: PrefillTuning = DEFAULT_TUNING,
) -> Prefill:
    """Softmax attention over the keys that :func:`qaxis.topk_indices` selects.

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16. Any strides and alignment, here and below.
        k: ``[B, Hkv, N, D]``, same dtype and device; H a multiple of Hkv (GQA); M and N at most 2^31 - 2^16.
        v: ``[B, Hkv, N, Dv]``, same dtype and device.
        budget: a :class:`~qaxis.Budget`, or an int in 1..N: then queries that see fewer keys attend to all.
        scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``.
        causal: if True the queries are the last M of the N positions, M at most N, and see no later key.
        selection: whether to return the bits, N/8 bytes a query.
        backend: what selects: ``"triton"`` kernels, or ``"cuda"``, select.cu where it runs (emulated on a CPU);
            ``"auto"`` is ``"cuda"`` on a GPU. Same selection.
        tuning: how the work is cut. Beside its result the call takes ``tuning.memory`` bytes (4 GiB) and a quarter at
            most, or what one query of a KV head's group needs; and a copy of k or v whose last stride is not 1.

    Only the form is checked: that q, k and v are finite, and that sums of products stay inside float32, is left to the
    caller, as looking waits for the device. k and v may be what the ``update`` of a quantised cache returns; they are
    dequantised.

    Raises:
        ValueError: naming the argument, on a type, layout, dtype, device, shape or value that is not allowed.
    """
    q, k, v = (tensor_of(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    check_qkv_form(q, k, v, causal=causal)
    check_flag("selection", selection)
    check_device("q", q, calls_library=True)
    for name, x in (("q", q), ("k", k)):
        require(x.shape[2] <= MOST_KEYS, f"{name}.shape[2]", x.shape[2], f"at most {MOST_KEYS} positions")
    require(backend in ("auto", "cuda", "triton"), "backend", backend, "'auto', 'cuda' or 'triton'")
    require(isinstance(tuning, PrefillTuning), "tuning", tuning, "a qaxis.prefill.PrefillTuning")
    budget, factor = as_budget(budget, k.shape[2]), check_scale(scale, q.shape[3])
    if backend == "auto":
        backend = "cuda" if q.is_cuda else "triton"
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    plan = make_plan(tuple(q.shape), k.shape[1], k.shape[2], causal=causal, tuning=tuning)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    bits = band = None
    if selection:
        bits = torch.zeros(*q.shape[:3], triton.cdiv(plan.n, 32), dtype=torch.int32, device=q.device)
        band = torch.zeros(q.shape[:3], dtype=torch.int32, device=q.device)
    result = Prefill(out, bits, band)
    fill(result, plan, q, k, v, budget, factor, backend)
    return result


def fill(
    result: Prefill, plan: Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: Budget, scale: float,
    backend: str,
) -> None:  # fmt: skip
    """Carry the plan out; k and v have a last stride of 1, and ``backend`` is one of two."""
    buffers, of_seen = Buffers(plan, q.device), tables(budget, plan.n, str(q.device))
    for b, h, kv in plan.parts(q.shape[0]):
        bits, band = (None if x is None else x[b, h] for x in result[1:])
        norm = _longest(k[b, kv])
        part = Part(plan, buffers, of_seen, q[b, h], k[b, kv], v[b, kv], norm, result.output[b, h], bits, band)
        for chunk in plan.chunks():
            _score(part, chunk)
            words = cuda.select(part, chunk) if backend == "cuda" else None
            if words is None:
                words = _select(part, chunk)
            _order_wide_bands(part, chunk, words)
            _attend(part, chunk, words, scale)
            _hand_over(part, chunk, words)


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


def _positions(rows: torch.Tensor) -> torch.Tensor:
    """As :func:`selected_positions`, of words ``[rows, W]``."""
    each = ((rows[..., None] >> torch.arange(32, device=rows.device, dtype=torch.int32)) & 1).flatten(-2).bool()
    n, k_eff = each.shape[-1], int(each.sum(-1).max())
    position = torch.where(each, torch.arange(n, device=rows.device), n).sort(dim=-1).values[..., :k_eff]
    return torch.where(position == n, -1, position)


def _longest(k: torch.Tensor) -> torch.Tensor:
    """Upper bound on the length of the keys of every head, float32 ``[B, Hkv]``; 0 where it is too small to be told."""
    # Widened, expanded keys too take memory: some at a time.
    some = k.split(max(1, _AT_ONCE // (k.numel() // k.shape[2])), dim=2)
    if k.dtype == torch.float32:
        return reduce(torch.maximum, map(fast_scores.largest_norm, some))
    norms = (torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(-1) for x in some)
    norm = reduce(torch.maximum, norms) * fast_scores.UPWARD
    # Squares below float32's smallest are lost: no matter beside a longer key.
    return torch.where(norm > 1e-15, norm, 0.0)


def _tile_dim(dim: int) -> int:
    """Width of the tile for vectors of ``dim`` numbers: tensor cores take no fewer than 16."""
    return max(16, next_power_of_two(dim))


def _score(part: Part, chunk: Chunk) -> None:
    """The 15-bit scores of a chunk."""
    plan, t = part.plan, part.plan.tuning
    key_tiles, query_tiles = triton.cdiv(chunk.visible, t.keys * t.loop), triton.cdiv(chunk.rows, t.queries)
    prefill_scores_kernel[(key_tiles * query_tiles * part.heads,)](
        part.q, part.k, part.norm, part.buffers.fast, *part.common(chunk), chunk.first, plan.n, plan.padded, plan.dim,
        key_tiles, query_tiles, *part.strides,
        CAUSAL=plan.causal, QUERIES=t.queries, KEYS=t.keys, LOOP=t.loop, STAGES=t.stages, DIM=_tile_dim(plan.dim),
        WIDE=INTERPRETED, num_warps=t.warps,
    )  # fmt: skip


def _select(part: Part, chunk: Chunk) -> int:
    """Write the bits of every row whose band fits its list, and tell how many words each has: in Triton."""
    plan, t, b, programs = part.plan, part.plan.tuning, part.buffers, (part.heads * chunk.rows,)
    block, tree = cut_block(chunk.visible, t), next_power_of_two(plan.dim)
    words = bit_words(chunk.visible, block)
    prefill_cut_kernel[programs](
        part.q, part.norm, b.fast, *part.tables, b.bits.view(torch.uint8), b.positions, b.band, b.missing, b.low,
        b.high, b.top, *part.common(chunk), chunk.first, plan.n, plan.padded, words, plan.dim, plan.error,
        *part.q.stride(),
        CAUSAL=plan.causal, BLOCK=block, SAMPLE=t.sample, SLACK=t.slack, CAPACITY=t.capacity, DIM=tree,
        num_warps=max(1, block // t.cut_elements),
    )  # fmt: skip
    prefill_band_kernel[programs](
        part.q, part.k, b.positions, b.listed, b.band, b.missing, b.bits, *part.common(chunk), words, plan.dim,
        *part.strides,
        CAPACITY=t.capacity, BLOCK=t.band, TREE=tree, LOG_TREE=log2(tree), enable_fp_fusion=False, num_warps=1,
    )  # fmt: skip
    return words


def _order_wide_bands(part: Part, chunk: Chunk, words: int) -> None:
    """The bits of those rows whose band outgrew its list."""
    plan, b, tree = part.plan, part.buffers, next_power_of_two(part.plan.dim)
    prefill_wide_band_kernel[(plan.wide_programs,)](
        part.q, part.k, b.fast, b.line, b.band, b.missing, b.low, b.high, b.bits,
        *part.common(chunk), chunk.first, plan.n, plan.padded, words, part.heads * chunk.rows, plan.dim, *part.strides,
        CAUSAL=plan.causal, CAPACITY=plan.tuning.capacity, ROWS=WIDE_ROWS, BLOCK=64, TREE=tree, LOG_TREE=log2(tree),
        enable_fp_fusion=False, num_warps=4,
    )  # fmt: skip


def _attend(part: Part, chunk: Chunk, words: int, scale: float) -> None:
    """Attention of a chunk over the keys whose bits are set."""
    plan, t, dim_v = part.plan, part.plan.tuning, part.v.shape[3]
    tiles = triton.cdiv(chunk.rows, t.attend_queries)
    prefill_attend_kernel[(tiles * part.heads,)](
        part.q, part.k, part.v, part.norm, part.buffers.bits, part.buffers.top, part.out, *part.common(chunk), plan.m,
        chunk.first, plan.n, words, plan.dim, dim_v, tiles, scale, plan.off, *part.strides, *part.v.stride()[:3],
        CAUSAL=plan.causal, QUERIES=t.attend_queries, KEYS=t.attend_keys, STAGES=t.attend_stages,
        DIM=_tile_dim(plan.dim), DIM_V=_tile_dim(dim_v), WIDE=INTERPRETED, num_warps=t.attend_warps,
    )  # fmt: skip


def _hand_over(part: Part, chunk: Chunk, words: int) -> None:
    """Copy the selection of a chunk to the result, if it was asked for."""
    if part.bits is None or part.band is None:
        return
    shape, here = (*part.q.shape[:2], chunk.rows), slice(chunk.start, chunk.start + chunk.rows)
    rows, columns = part.heads * chunk.rows, min(words, part.bits.shape[3])
    part.bits[:, :, here, :columns] = part.buffers.bits[: rows * words].view(*shape, words)[..., :columns]
    part.band[:, :, here] = part.buffers.band[:rows].view(shape)
