"""One decode step of exact top-k attention that reads few bytes twice: fast scores, a band, canonical attention.

No step looks at the result of another on the host and no shape depends on data, so the whole step can be captured
in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import next_power_of_two
from ..arithmetic.triton import INTERPRETED, check_device, log2, triton
from ..attention.triton import combined, partials
from ..storage.side import Stored
from ..storage.triton import side_arguments
from ..validation import check_scale
from .form import MadeFor, Numbers, device_of, outline, readable_of
from .index import KeyIndex
from .triton import choose_kernel, compact_kernel, rescore_kernel, score_codes_kernel, score_product_kernel

#: keys whose places one warp counts together
LINE = 256
#: times as many neighbourhoods as keys are kept: the more, the closer their best ones lead to the k_eff-th best key,
#: and the longer it takes to find the cut among them; the fewer where more would not fit into a program's registers
NEIGHBOURHOODS, FEWER_NEIGHBOURHOODS = 4, 2


@dataclass(frozen=True)
class Tuning:
    """How the work is cut; no value changes a bit of the result. These were chosen by timing on one H200.

    benchmarks/NOTES.md tells what was tried.
    """

    #: keys of a matrix product, and at most of a neighbourhood: more reuse the query longer and take more registers
    block: int = 64
    #: products a program does one after the other: more hide their loads, fewer leave work for every multiprocessor
    loop: int = 2
    #: loads in flight, against shared memory
    stages: int = 3
    #: warps of a program: more hide what they wait for, fewer have more registers each
    warps: int = 4
    #: as loop and warps, where codes are read
    codes_loop: int = 1
    codes_warps: int = 2
    #: bests of neighbours that a program keeps in registers; the others it reads again at every trial
    threshold: int = 32768
    #: programs that look for candidates, of all rows: each finds the cut for itself, so more are not always quicker
    compact_programs: int = 256
    #: keys that a program looks through at least: fewer would not be worth the search for the cut
    stretch: int = 8192
    #: lines of keys at once: more mean fewer rounds and more registers
    lines: int = 32
    compact_warps: int = 8
    #: candidates that are rescored at once: more loads in flight, more registers
    rescore: int = 32
    rescore_warps: int = 1
    #: programs that rescore, of all rows: more share the work better, those that find none left cost their start
    rescore_programs: int = 1024
    #: candidates that a program keeps in registers while it looks for the last chosen score; the others are read again
    choose: int = 32768
    #: candidates that are written at once: more mean fewer rounds and more registers
    choose_out: int = 4096
    choose_warps: int = 8
    #: chosen keys that a program attends to: fewer spread over more multiprocessors, more leave less to combine
    attend: int = 32
    attend_warps: int = 1


class Step(NamedTuple):
    """Result of a decode step."""

    #: ``[B, H, 1, Dv]`` in the dtype of the queries
    output: torch.Tensor
    #: int64 ``[B, H, 1, k_eff]``, ascending positions
    indices: torch.Tensor
    #: int32 ``[B * H, stretches]``: keys scored canonically, of every stretch of a row; the next step overwrites it
    rescored: torch.Tensor


class TritonStep:
    """Work space for decode steps of one shape; the attention of every step has the bits of ``topk_attention``.

    Args:
        batch, heads, n, head_dim: sizes B, H, N, D.
        k_eff: keys every query keeps, in 1..N.
        device: where it runs.
        tuning: how the work is cut.

    The work space is for one step at a time: threads that decode at once take one each.

    Raises:
        ValueError: naming the argument, on a size or device that is not allowed.
        RuntimeError: without a GPU, if Triton was loaded before its interpreter was chosen.
    """

    def __init__(
        self, batch: int, heads: int, n: int, head_dim: int, k_eff: int, device: torch.device | str,
        tuning: Tuning = Tuning(),
    ) -> None:  # fmt: skip
        self.made_for = MadeFor(batch, heads, n, head_dim, k_eff, device_of(device))
        self.checked: set[Hashable] = set()
        self.n, self.k_eff, self.tuning = n, k_eff, tuning
        rows = batch * heads
        times = NEIGHBOURHOODS if NEIGHBOURHOODS * k_eff <= tuning.threshold else FEWER_NEIGHBOURHOODS
        self.sub = min(tuning.block, 1 << max(0, (n // (times * k_eff)).bit_length() - 1))
        most = next_power_of_two(triton.cdiv(n, tuning.stretch))
        programs = tuning.compact_programs if n // self.sub <= tuning.threshold // 2 else tuning.compact_programs // 2
        self.stretches = min(most, next_power_of_two(triton.cdiv(programs, rows)))
        self.lines = min(tuning.lines, next_power_of_two(triton.cdiv(triton.cdiv(n, self.stretches), LINE)))
        self.span = triton.cdiv(triton.cdiv(n, self.stretches), self.lines * LINE) * self.lines * LINE
        self.padded = self.span * self.stretches

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.made_for.device)

        self.fast = empty(rows, self.padded, dtype=torch.uint16)
        check_device("q", self.fast, calls_library=True)
        self.best = empty(rows, self.padded // self.sub, dtype=torch.uint16)
        self.coded = False
        self.top = empty(rows, dtype=torch.float32)
        self.position, self.count = empty(rows, self.padded), empty(rows, self.stretches)
        self.flat_position, self.flat_key = empty(rows, self.padded), empty(rows, self.padded)

    def __call__(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, scale: float | None = None) -> Step:
        """Attend from ``q [B, H, 1, D]`` over keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]``.

        Arguments, and what is refused, as :meth:`qaxis.decode.Decoder.__call__` has them.
        """
        k, v = readable_of(k, v, index)
        found = outline(q, k, v, index)
        if found not in self.checked:
            self.made_for.check(q, k, v, index)
            self.checked.add(found)
        return self.run(q, k, v, index, check_scale(scale, self.made_for.head_dim))

    def run(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, scale: float) -> Step:
        """The step itself, of arguments that were checked."""
        with torch.cuda.device_of(q):
            indices, score = self.select(q, k, index)
            output = self.attend(indices, score, v, scale)
        return Step(output.reshape(*q.shape[:3], -1).to(q.dtype), indices, self.count)

    def score(self, q: torch.Tensor, k: Numbers, index: KeyIndex) -> tuple[int, int]:
        """Fast scores; returns the positions [start, end) that have one."""
        if index.codes is not None:
            return self._score_codes(q, index, index.codes)
        assert isinstance(k, torch.Tensor)
        batch, heads, _, dim = q.shape
        t, kv_heads = self.tuning, k.shape[1]
        group, programs = heads // kv_heads, triton.cdiv(self.n, t.block * t.loop)
        score_product_kernel[(programs * batch * kv_heads,)](
            q, k, index.norm, self.fast, self.best, heads, kv_heads, self.n, self.padded, dim, programs,
            q.stride(0), q.stride(1), q.stride(3), *k.stride(),
            GROUP=group, ROWS=max(8, next_power_of_two(group)), BLOCK=t.block, LOOP=t.loop,
            DIM=max(16, next_power_of_two(dim)), STAGES=t.stages, SUB=self.sub, WIDE=INTERPRETED, num_warps=t.warps,
        )  # fmt: skip
        return 0, self.n

    def _score_codes(self, q: torch.Tensor, index: KeyIndex, c: Stored) -> tuple[int, int]:
        batch, heads, _, dim = q.shape
        t, kv_heads, blocks = self.tuning, c.shape[1], c.scales.shape[2]
        group, programs = heads // kv_heads, triton.cdiv(blocks, t.codes_loop)
        if blocks:
            score_codes_kernel[(programs * batch * kv_heads,)](
                q, c.codes, c.scales, index.norm, index.largest_scales, self.fast, self.best,
                heads, kv_heads, blocks, c.first.shape[2], self.padded, dim, programs,
                q.stride(0), q.stride(1), q.stride(3), *c.codes.stride(), *c.scales.stride(),
                GROUP=group, ROWS=max(4, next_power_of_two(group)), BLOCK=c.grid.group_size, LOOP=t.codes_loop,
                DIM=max(32, next_power_of_two(dim)), STAGES=t.stages, SUB=self.sub, num_warps=t.codes_warps,
            )  # fmt: skip
        return c.first.shape[2], c.codes.shape[2]

    def compact(self, q: torch.Tensor, kv_heads: int, index: KeyIndex, start: int, end: int) -> None:
        """Positions that may be among the k_eff best, by stretches."""
        batch, heads, _, dim = q.shape
        t = self.tuning
        relative = fast_scores.rounding(dim) * (1 if index.codes is None else 3)
        split = 0.0 if index.codes is None else fast_scores.SPLIT * dim
        many = triton.cdiv(end, self.sub)
        # Where the k_eff best of so many begin if they are normal, and how much further one more of them lies.
        normal = NormalDist()
        quantile = normal.inv_cdf(min(max(1 - self.k_eff / max(many, 1), 1e-6), 1 - 1e-6))
        slope = 1 / (max(many, 1) * normal.pdf(quantile))
        compact_kernel[(self.stretches * batch * heads,)](
            q, index.norm, index.residual, index.largest_scales, self.fast, self.best, self.position, self.count,
            heads, heads // kv_heads, self.n, start, end, self.padded, self.span, many, self.k_eff,
            dim, quantile, slope, relative, split, self.best.shape[1], q.stride(0), q.stride(1), q.stride(3),
            STRETCHES=self.stretches, MANY=min(t.threshold, next_power_of_two(self.best.shape[1])), LINES=self.lines,
            LINE=LINE, DIM=next_power_of_two(dim), num_warps=t.compact_warps // (2 if start else 1),
        )  # fmt: skip

    def rescore(self, q: torch.Tensor, k: Numbers) -> None:
        """Canonical scores of the candidates."""
        batch, heads, _, dim = q.shape
        t, dim_padded = self.tuning, next_power_of_two(dim)
        pointers, sizes, constants = side_arguments(k)
        programs = min(triton.cdiv(t.rescore_programs, batch * heads), triton.cdiv(self.n, t.rescore))
        rescore_kernel[(programs * batch * heads,)](
            q, self.position, self.count, self.flat_position, self.flat_key,
            heads, heads // k.shape[1], self.padded, self.span, dim, programs, q.stride(0), q.stride(1), q.stride(3),
            *pointers, *sizes, **constants, STRETCHES=self.stretches,
            BLOCK=t.rescore, DIM=dim_padded, LOG_DIM=log2(dim_padded),
            enable_fp_fusion=False, num_warps=t.rescore_warps * (2 if isinstance(k, Stored) else 1),
        )  # fmt: skip

    def choose(self, batch: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k_eff best of the candidates: indices and canonical scores."""
        t, device = self.tuning, self.fast.device
        indices = torch.empty(batch, heads, 1, self.k_eff, dtype=torch.int64, device=device)
        score = torch.empty(batch, heads, 1, self.k_eff, dtype=torch.float32, device=device)
        # Room for the band in registers: a fifth of k_eff as a rule, twice k_eff behind codes.
        room = next_power_of_two(3 * self.k_eff if self.coded else self.k_eff + self.k_eff // 5)
        block = min(t.choose, room, next_power_of_two(self.padded))
        choose_kernel[(batch * heads,)](
            self.flat_position, self.flat_key, self.count, indices, score, self.top, self.padded, self.k_eff,
            STRETCHES=self.stretches, BLOCK=block, OUT=min(block, t.choose_out),
            num_warps=min(32, max(t.choose_warps, block // 1024)),
        )  # fmt: skip
        return indices, score

    def select(self, q: torch.Tensor, k: Numbers, index: KeyIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices int64 and canonical scores float32 of the k_eff best keys, both ``[B, H, 1, k_eff]``."""
        self.coded = index.codes is not None and index.codes is not k
        start, end = self.score(q, k, index)
        self.compact(q, k.shape[1], index, start, end)
        self.rescore(q, k)
        return self.choose(q.shape[0], q.shape[1])

    def attend(self, indices: torch.Tensor, score: torch.Tensor, v: Numbers, scale: float) -> torch.Tensor:
        """Canonical attention over the chosen keys whose scores are known, float32 ``[rows, Dv]``."""
        t = self.tuning
        top = self.top.view(*indices.shape[:2], 1)
        parts = partials(score, top, indices, v, scale, block=t.attend, num_warps=t.attend_warps, poison=False)
        return combined(*parts, poison=False)
