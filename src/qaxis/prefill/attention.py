"""Prefill that attends to exactly the canonical top-k keys of every query, at the speed of matrix products.

Which keys are attended to is the reference's choice, bit for bit. How they are summed is the tensor cores' affair, as
in FlashAttention: for outputs that are canonical too, use :func:`qaxis.topk_attention`. No step looks at the result of
another on the host and no shape depends on data, so the whole can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import next_power_of_two
from ..arithmetic.triton import INTERPRETED, triton
from ..budget import Budget, as_budget
from ..cuda.compiler import in_16_bytes, units
from ..validation import check_form, check_scale, require
from . import cuda
from .triton import (
    prefill_attend_kernel,
    prefill_band_kernel,
    prefill_cut_kernel,
    prefill_scores_kernel,
    prefill_wide_band_kernel,
)


@dataclass(frozen=True)
class PrefillTuning:
    """How the work is cut; no value changes which keys are selected."""

    chunk: int = 2048
    queries: int = 128
    keys: int = 64
    loop: int = 32
    stages: int = 4
    warps: int = 8
    cut: int = 8192
    cut_elements: int = 1024
    sample: int = 256
    slack: int = 16
    listed: int = 100
    capacity: int = 128
    band: int = 32
    wide_programs: int = 512
    attend_queries: int = 64
    attend_keys: int = 64
    attend_stages: int = 3
    attend_warps: int = 4


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
    tuning: PrefillTuning = PrefillTuning(),
) -> Prefill:
    """Softmax attention over the keys that :func:`qaxis.topk_indices` selects.

    Args:
        q: ``[B, H, M, D]``; float32, float16 or bfloat16.
        k: ``[B, Hkv, N, D]``. v: ``[B, Hkv, N, Dv]``. Same dtype and device; the last dimension contiguous.
        budget: a :class:`~qaxis.Budget`, or an int in 1..N: then queries that see fewer keys attend to all.
        scale: softmax scale, positive; ``None`` is ``1/sqrt(D)``.
        causal: if True the queries are the last M of the N positions and see no later key.
        selection: whether to return the bits, N/8 bytes a query.
        backend: what selects: ``"triton"`` kernels, or ``"cuda"``, select.cu where it runs (emulated on a CPU);
            ``"auto"`` is ``"cuda"`` on a GPU. Same selection.

    Numbers are not looked at: the caller checks for NaN and Inf.

    Raises:
        ValueError: naming the argument, on a form that is not allowed.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_form(name, x, 4)
    batch, heads, m, dim = q.shape
    kv_heads, n = k.shape[1], k.shape[2]
    require(heads % kv_heads == 0, "q.shape[1]", heads, f"a multiple of k's {kv_heads} heads (GQA)")
    require(not causal or m <= n, "q.shape[2]", m, f"at most the {n} keys, as the queries are the last positions")
    require(batch * heads < 1 << 16, "q.shape[:2]", (batch, heads), "B * H below 2^16")
    require(backend in ("auto", "cuda", "triton"), "backend", backend, "'auto', 'cuda' or 'triton'")
    if backend == "auto":
        backend = "cuda" if q.is_cuda else "triton"
    factor = check_scale(scale, dim)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    group, t = heads // kv_heads, tuning
    tables = _tables(as_budget(budget, n), n, str(q.device))
    norm = _longest(k)
    chunk = min(t.chunk, m)
    dim_padded, tree = max(16, next_power_of_two(dim)), next_power_of_two(dim)
    out = torch.empty(batch, heads, m, v.shape[3], dtype=q.dtype, device=q.device)
    all_bits = (
        torch.zeros(batch, heads, m, triton.cdiv(n, 32), dtype=torch.int32, device=q.device) if selection else None
    )
    all_band = torch.zeros(batch, heads, m, dtype=torch.int32, device=q.device) if selection else None
    room = batch * heads * chunk
    # Steps of the 15-bit score between the fast score and the canonical, either way: half a step is rounding.
    off = fast_scores.UNITS / 2 * fast_scores.rounding(dim) * 1.02 + 0.51
    error = math.ceil(2 * off)
    padded = triton.cdiv(n, 256) * 256

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    fast = empty(room * padded, dtype=torch.uint16)
    positions, listed = empty(room * t.capacity), empty(room * t.capacity)
    band, missing, low, high, top = (empty(room) for _ in range(5))
    line = empty(t.wide_programs, padded)
    bits = empty(room * (max(1024, next_power_of_two(padded)) // 32))
    for start in range(0, m, t.chunk):
        rows = min(chunk, m - start)
        first = n - m + start
        visible = min(n, first + rows) if causal else n
        block = max(128, min(t.cut, next_power_of_two(visible)))
        words = triton.cdiv(visible, block) * block // 32
        strides = (*q.stride(), *k.stride()[:3])
        common = (heads, group, start, rows)
        prefill_scores_kernel[
            (triton.cdiv(visible, t.keys * t.loop), triton.cdiv(rows, t.queries), batch * heads)
        ](
            q, k, norm, fast, *common, first, n, padded, dim, *strides,
            CAUSAL=causal, QUERIES=t.queries, KEYS=t.keys, LOOP=t.loop, STAGES=t.stages, DIM=dim_padded,
            WIDE=INTERPRETED, num_warps=t.warps,
        )  # fmt: skip
        fast_way = None if backend == "triton" else cuda.row_selector(q, k, visible, t.capacity, t.listed)
        if fast_way is not None:
            kernel, thousands, warps, shared = fast_way
            each, words = in_16_bytes(q), thousands * 32
            kernel((triton.cdiv(rows, warps), batch * heads, 1), (32 * warps, 1, 1), [
                q, k, norm, fast, *tables, bits, band, missing, low, high, top,
                heads, start, rows, first, n, padded, error, int(causal), thousands,
                *units(q, each), *units(k, each),
            ], shared_mem=shared)  # fmt: skip
        else:
            prefill_cut_kernel[(batch * heads * rows,)](
                q, norm, fast, *tables, bits.view(torch.uint8), positions, band, missing, low, high, top,
                *common, first, n, padded, words, dim, error, *q.stride(),
                CAUSAL=causal, BLOCK=block, SAMPLE=t.sample, SLACK=t.slack, CAPACITY=t.capacity, DIM=tree,
                num_warps=max(1, block // t.cut_elements),
            )  # fmt: skip
            prefill_band_kernel[(batch * heads * rows,)](
                q, k, positions, listed, band, missing, bits, *common, words, dim, *strides,
                CAPACITY=t.capacity, BLOCK=t.band, TREE=tree, LOG_TREE=tree.bit_length() - 1,
                enable_fp_fusion=False, num_warps=1,
            )  # fmt: skip
        prefill_wide_band_kernel[(t.wide_programs,)](
            q, k, fast, line, band, missing, low, high, bits,
            *common, first, n, padded, words, batch * heads * rows, dim, *strides,
            CAUSAL=causal, CAPACITY=t.capacity, ROWS=64, BLOCK=64, TREE=tree, LOG_TREE=tree.bit_length() - 1,
            enable_fp_fusion=False, num_warps=4,
        )  # fmt: skip
        prefill_attend_kernel[(triton.cdiv(rows, t.attend_queries), batch * heads)](
            q, k, v, norm, bits, top, out, *common, m, first, n, words, dim, v.shape[3], factor, off,
            *strides, *v.stride()[:3],
            CAUSAL=causal, QUERIES=t.attend_queries, KEYS=t.attend_keys, STAGES=t.attend_stages,
            DIM=dim_padded, DIM_V=max(16, next_power_of_two(v.shape[3])), WIDE=INTERPRETED, num_warps=t.attend_warps,
        )  # fmt: skip
        if all_bits is not None and all_band is not None:
            width = min(words, all_bits.shape[3])
            mine = bits[: batch * heads * rows * words].view(batch, heads, rows, words)
            all_bits[:, :, start : start + rows, :width] = mine[..., :width]
            all_band[:, :, start : start + rows] = band[: batch * heads * rows].view(batch, heads, rows)
    return Prefill(out, all_bits, all_band)


def selected_positions(bits: torch.Tensor) -> torch.Tensor:
    """Positions of the set bits ``[B, H, M, W]``: int64 ``[B, H, M, k]``, ascending, padded with -1."""
    each = ((bits[..., None] >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1).flatten(-2).bool()
    n = each.shape[-1]
    width = int(each.sum(-1).max())
    position = torch.where(each, torch.arange(n, device=bits.device), n).sort(dim=-1).values[..., :width]
    return torch.where(position == n, -1, position)


def _longest(k: torch.Tensor) -> torch.Tensor:
    """Upper bound on the length of the keys of every head, float32 ``[B, Hkv]``; 0 where it is too small to be told."""
    if k.dtype == torch.float32:
        return fast_scores.largest_norm(k)
    norm = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32).amax(-1) * fast_scores.UPWARD
    # Squares below float32's smallest are lost: no matter beside a longer key.
    return torch.where(norm > 1e-15, norm, 0.0)


@lru_cache(maxsize=64)
def _tables(budget: Budget, n: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of every number of visible keys: the budget; where normal scores put the cut; what one key more moves it."""
    wanted = budget.table(n)
    seen = torch.arange(n + 1).clamp(min=1)
    share = (1 - wanted / seen).clamp(1e-4, 1 - 1e-4).double()
    quantile = torch.special.ndtri(share)
    density = torch.exp(-quantile * quantile / 2) / (2 * torch.pi) ** 0.5
    return wanted.int().to(device), quantile.float().to(device), (1 / (seen * density)).float().to(device)
