"""One decode step of exact top-k attention that reads few bytes twice: fast scores, a band, canonical attention.

No step looks at the result of another on the host and no shape depends on data, so the whole step can be captured
in a CUDA graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import next_power_of_two
from ..arithmetic.triton import INTERPRETED, triton
from ..attention.triton import combined, partials
from ..storage.side import Stored
from ..storage.triton import side_arguments
from ..validation import check_form, require
from .index import KeyIndex
from .triton import choose_kernel, compact_kernel, rescore_kernel, score_codes_kernel, score_product_kernel

#: keys whose places one warp counts together
LINE = 256


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; no value changes a bit of the result."""

    block: int = 64
    loop: int = 2
    stages: int = 3
    warps: int = 4
    codes_loop: int = 1
    codes_warps: int = 2
    threshold: int = 32768
    compact_programs: int = 256
    stretch: int = 8192
    lines: int = 32
    compact_warps: int = 8
    rescore: int = 32
    rescore_warps: int = 1
    rescore_programs: int = 1024
    choose: int = 32768
    choose_out: int = 4096
    choose_warps: int = 8
    attend: int = 32
    attend_warps: int = 1


class Step(NamedTuple):
    """Result of :meth:`Decoder.__call__`."""

    #: ``[B, H, 1, Dv]`` in the dtype of the queries
    output: torch.Tensor
    #: int64 ``[B, H, 1, k]``, ascending positions
    indices: torch.Tensor
    #: int32 ``[B * H, stretches]``: keys scored canonically, of every stretch of a row
    rescored: torch.Tensor


class Decoder:
    """Work space for decode steps of one shape; the attention of every step has the bits of ``topk_attention``.

    Args:
        batch, heads, n, dim: sizes B, H, N, D.
        k: keys every query keeps, in 1..N.
        device: where it runs.

    Raises:
        ValueError: naming the argument, on a size that is not allowed.
        RuntimeError: without a GPU, if Triton was loaded before its interpreter was chosen.
    """

    def __init__(
        self, batch: int, heads: int, n: int, dim: int, k: int, device: torch.device | str, tuning: Tuning = Tuning()
    ) -> None:
        require(1 <= n < 1 << 31, "n", n, "1..2^31 - 1")
        require(1 <= k <= n, "k", k, f"1..{n}, the number of keys")
        self.n, self.k, self.dim, self.tuning = n, k, dim, tuning
        rows = batch * heads
        # Four times as many neighbourhoods as keys are kept: then their best ones lead close to the k-th best key. Half
        # of that where they would not fit into a program's registers.
        times = 4 if 4 * k <= tuning.threshold else 2
        self.sub = min(tuning.block, 1 << max(0, (n // (times * k)).bit_length() - 1))
        most = next_power_of_two(triton.cdiv(n, tuning.stretch))
        programs = tuning.compact_programs if n // self.sub <= tuning.threshold // 2 else tuning.compact_programs // 2
        self.stretches = min(most, next_power_of_two(triton.cdiv(programs, rows)))
        self.lines = min(tuning.lines, next_power_of_two(triton.cdiv(triton.cdiv(n, self.stretches), LINE)))
        self.span = triton.cdiv(triton.cdiv(n, self.stretches), self.lines * LINE) * self.lines * LINE
        self.padded = self.span * self.stretches

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.fast = empty(rows, self.padded, dtype=torch.uint16)
        self.best = empty(rows, self.padded // self.sub, dtype=torch.uint16)
        self.coded = False
        self.top = empty(rows, dtype=torch.float32)
        self.position, self.count = empty(rows, self.padded), empty(rows, self.stretches)
        self.flat_position, self.flat_key = empty(rows, self.padded), empty(rows, self.padded)

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, index: KeyIndex,
        scale: float | None = None,
    ) -> Step:  # fmt: skip
        """Attend from ``q [B, H, 1, D]`` over keys and values ``[B, Hkv, N, D]``, tensors or 8-bit caches.

        ``index`` must be of these keys. Numbers are not looked at: the caller checks for NaN and Inf.
        """
        check_form("q", q, 4)
        batch, heads, m, dim = q.shape
        require(m == 1, "q.shape[2]", m, "1: one query a head, as in decoding")
        require(k.shape[2] == self.n, "k.shape[2]", k.shape[2], f"{self.n}, for which this was made")
        indices, score = self.select(q, k, index)
        factor = 1 / math.sqrt(dim) if scale is None else scale
        output = self.attend(indices, score, v, factor)
        return Step(output.reshape(batch, heads, 1, -1).to(q.dtype), indices, self.count)

    def score(self, q: torch.Tensor, k: torch.Tensor | Stored, index: KeyIndex) -> tuple[int, int]:
        """Fast scores; returns the positions [start, end) that have one."""
        batch, heads, _, dim = q.shape
        t, kv_heads = self.tuning, k.shape[1]
        group = heads // kv_heads
        shape = {"GROUP": group, "DIM": max(16, next_power_of_two(dim))}
        strides = (q.stride(0), q.stride(1), q.stride(3))
        if index.codes is not None:
            c = index.codes
            groups, step = c.scales.shape[2], c.grid.group_size
            if groups:
                score_codes_kernel[(triton.cdiv(groups, t.codes_loop), batch * kv_heads)](
                    q, c.codes, c.scales, index.norm, index.steps, self.fast, self.best,
                    heads, kv_heads, groups, c.first.shape[2], self.padded, dim,
                    *strides, *c.codes.stride()[:3], *c.scales.stride()[:3],
                    **shape, ROWS=max(4, next_power_of_two(group)), BLOCK=step, LOOP=t.codes_loop,
                    STAGES=t.stages, SUB=self.sub, num_warps=t.codes_warps,
                )  # fmt: skip
            return c.first.shape[2], c.codes.shape[2]
        assert isinstance(k, torch.Tensor)
        score_product_kernel[(triton.cdiv(self.n, t.block * t.loop), batch * kv_heads)](
            q, k, index.norm, self.fast, self.best, heads, kv_heads, self.n, self.padded, dim,
            *strides, *k.stride()[:3],
            **shape, ROWS=max(8, next_power_of_two(group)), BLOCK=t.block, LOOP=t.loop,
                    STAGES=t.stages, SUB=self.sub, WIDE=INTERPRETED, num_warps=t.warps,
        )  # fmt: skip
        return 0, self.n

    def compact(self, q: torch.Tensor, kv_heads: int, index: KeyIndex, start: int, end: int) -> None:
        """Positions that may be among the k best, by stretches."""
        batch, heads, _, dim = q.shape
        t = self.tuning
        relative = fast_scores.rounding(dim) * (1 if index.codes is None else 3)
        split = 0.0 if index.codes is None else fast_scores.SPLIT * dim
        many = triton.cdiv(end, self.sub)
        # Where the k best of so many begin if they are normal, and how much further one more of them lies.
        normal = NormalDist()
        quantile = normal.inv_cdf(min(max(1 - self.k / max(many, 1), 1e-6), 1 - 1e-6))
        slope = 1 / (max(many, 1) * normal.pdf(quantile))
        compact_kernel[(self.stretches, batch * heads)](
            q, index.norm, index.residual, index.steps, self.fast, self.best, self.position, self.count,
            heads, heads // kv_heads, self.n, start, end, self.padded, self.span, many, self.k,
            dim, quantile, slope, relative, split, self.best.shape[1], q.stride(0), q.stride(1), q.stride(3),
            MANY=min(t.threshold, next_power_of_two(self.best.shape[1])), LINES=self.lines, LINE=LINE,
            DIM=next_power_of_two(dim), num_warps=t.compact_warps // (2 if start else 1),
        )  # fmt: skip

    def rescore(self, q: torch.Tensor, k: torch.Tensor | Stored) -> None:
        """Canonical scores of the candidates."""
        batch, heads, _, dim = q.shape
        t, dim_padded = self.tuning, next_power_of_two(dim)
        pointers, sizes, constants = side_arguments(k)
        chunks = min(triton.cdiv(t.rescore_programs, batch * heads), triton.cdiv(self.n, t.rescore))
        rescore_kernel[(chunks, batch * heads)](
            q, self.position, self.count, self.flat_position, self.flat_key,
            heads, heads // k.shape[1], self.padded, self.span, dim, q.stride(0), q.stride(1), q.stride(3),
            *pointers, *sizes, **constants, STRETCHES=self.stretches,
            BLOCK=t.rescore, DIM=dim_padded, LOG_DIM=dim_padded.bit_length() - 1,
            enable_fp_fusion=False, num_warps=t.rescore_warps * (2 if isinstance(k, Stored) else 1),
        )  # fmt: skip

    def choose(self, batch: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best of the candidates: indices and canonical scores."""
        t, device = self.tuning, self.fast.device
        indices = torch.empty(batch, heads, 1, self.k, dtype=torch.int64, device=device)
        score = torch.empty(batch, heads, 1, self.k, dtype=torch.float32, device=device)
        # Room for the band in registers: a fifth of k as a rule, twice k behind codes.
        room = next_power_of_two(3 * self.k if self.coded else self.k + self.k // 5)
        block = min(t.choose, room, next_power_of_two(self.padded))
        choose_kernel[(batch * heads,)](
            self.flat_position, self.flat_key, self.count, indices, score, self.top, self.padded, self.k,
            STRETCHES=self.stretches, BLOCK=block, OUT=min(block, t.choose_out),
            num_warps=min(32, max(t.choose_warps, block // 1024)),
        )  # fmt: skip
        return indices, score

    def select(self, q: torch.Tensor, k: torch.Tensor | Stored, index: KeyIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices int64 and canonical scores float32 of the k best keys, both ``[B, H, 1, k]``."""
        self.coded = index.codes is not None and index.codes is not k
        start, end = self.score(q, k, index)
        self.compact(q, k.shape[1], index, start, end)
        self.rescore(q, k)
        return self.choose(q.shape[0], q.shape[1])

    def attend(
        self, indices: torch.Tensor, score: torch.Tensor, v: torch.Tensor | Stored, scale: float
    ) -> torch.Tensor:
        """Canonical attention over the chosen keys whose scores are known, float32 ``[rows, Dv]``."""
        t = self.tuning
        top = self.top.view(*indices.shape[:2], 1)
        parts = partials(score, top, indices, v, scale, block=t.attend, num_warps=t.attend_warps, poison=False)
        return combined(*parts, poison=False)
