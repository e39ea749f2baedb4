"""One decode step of exact top-k attention that reads few bytes twice: fast scores, a band, canonical attention.

No stage looks at the result of another on the host, and no shape or argument depends on data or on how many keys there
are: that is read from device memory. So a step that was captured in a CUDA graph serves a growing cache.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import next_power_of_two
from ..arithmetic.triton import INTERPRETED, check_device, log2, triton
from ..attention.always import NONE, Always
from ..attention.logits import Logits
from ..attention.triton import combined, factor_of, logit_arguments, partials
from ..storage.side import Stored
from ..storage.triton import side_arguments
from ..validation import require
from .asked import check_kept, check_rows, check_whole_groups, logits_of
from .form import MadeFor, Numbers, device_of, outline, readable_of
from .index import KeyIndex
from .rows import END, fixed_rows
from .triton import choose_kernel, compact_kernel, rescore_kernel, score_codes_kernel, score_product_kernel

#: keys whose places one warp counts together
LINE = 256
#: times as many neighbourhoods as keys are kept: the more, the closer their best ones lead to the k_eff-th best key,
#: and the longer it takes to find the cut among them; the fewer where more would not fit into a program's registers
NEIGHBOURHOODS, FEWER_NEIGHBOURHOODS = 4, 2
#: outlines of checked arguments that are remembered
MOST_OUTLINES = 256


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
    #: programs that look for candidates, of all queries: each finds the cut for itself, so more are not always quicker
    compact_programs: int = 256
    #: keys that a program looks through at least: fewer would not be worth the search for the cut
    stretch: int = 8192
    #: lines of keys at once: more mean fewer rounds and more registers
    lines: int = 32
    compact_warps: int = 8
    #: candidates that are rescored at once: more loads in flight, more registers
    rescore: int = 32
    rescore_warps: int = 1
    #: programs that rescore, of all queries: more share the work better, those that find none left cost their start
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
    #: int64 ``[B, H, 1, k_eff]``, ascending positions; rows that keep fewer end in -1
    indices: torch.Tensor
    #: int32 ``[B * H, stretches]``: keys scored canonically, of every stretch of a query; the next step overwrites it
    rescored: torch.Tensor


class TritonStep:
    """Work space for decode steps of one shape; the attention of every step has the bits of ``topk_attention``.

    Args:
        batch, heads, head_dim: sizes B, H, D.
        n: most keys there may be: the room. Work is bounded by the keys that there are, but how closely fast scores
            lead to the best ones is tuned for the room: less than half full, more keys are scored canonically.
        k_eff: most keys a query keeps, in 1..n.
        device: where it runs.
        tuning: how the work is cut.

    The work space is for one step at a time: threads that decode at once take one each.

    Raises:
        ValueError: naming the argument, on a size or device that is not allowed.
        RuntimeError: if TRITON_INTERPRET changed after Triton was imported.
    """

    def __init__(
        self, batch: int, heads: int, n: int, head_dim: int, k_eff: int, device: torch.device | str,
        tuning: Tuning = Tuning(),
    ) -> None:  # fmt: skip
        self.made_for = MadeFor(batch, heads, n, head_dim, k_eff, device_of(device))
        self.checked: set[Hashable] = set()
        self.n, self.k_eff, self.tuning = n, k_eff, tuning
        queries = batch * heads
        times = NEIGHBOURHOODS if NEIGHBOURHOODS * k_eff <= tuning.threshold else FEWER_NEIGHBOURHOODS
        self.sub = min(tuning.block, 1 << max(0, (n // (times * k_eff)).bit_length() - 1))
        most = next_power_of_two(triton.cdiv(n, tuning.stretch))
        programs = tuning.compact_programs if n // self.sub <= tuning.threshold // 2 else tuning.compact_programs // 2
        self.stretches = min(most, next_power_of_two(triton.cdiv(programs, queries)))
        self.lines = min(tuning.lines, next_power_of_two(triton.cdiv(triton.cdiv(n, self.stretches), LINE)))
        # Whole rounds of every stretch, and bests of neighbours that begin at a multiple of 16 for every query.
        unit = max(self.lines * LINE, 16 * self.sub)
        self.padded = triton.cdiv(triton.cdiv(n, self.stretches), unit) * unit * self.stretches

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.made_for.device)

        self.fast = empty(queries, self.padded, dtype=torch.uint16)
        check_device("q", self.fast, calls_library=True)
        self.best = empty(queries, self.padded // self.sub, dtype=torch.uint16)
        self.top = empty(queries, dtype=torch.float32)
        self.position, self.count = empty(queries, self.padded), empty(queries, self.stretches)
        self.flat_position, self.flat_key = empty(queries, self.padded), empty(queries, self.padded)
        #: rows of a full room, each of whose queries keeps ``k_eff`` keys
        self.full = fixed_rows(batch, n, k_eff, self.made_for.device)

    def __call__(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, scale: float | None = None,
        *, rows: torch.Tensor | None = None, always: Always = NONE, logits: Logits | None = None,
    ) -> Step:  # fmt: skip
        """Attend from ``q [B, H, 1, D]`` over keys ``[B, Hkv, N, D]`` and values ``[B, Hkv, N, Dv]``.

        Arguments, and what is refused, as :meth:`qaxis.decode.Decoder.__call__` has them.
        """
        k, v = readable_of(k, v, index)
        found = (outline(q, k, v, index), rows is None)
        if found not in self.checked:
            self._check(q, k, v, index, rows)
            if len(self.checked) >= MOST_OUTLINES:
                self.checked.clear()
            self.checked.add(found)
        if rows is not None:
            check_rows(rows, self.made_for)
        check_kept(always, self.made_for)
        logits = logits_of(logits, scale, self.made_for)
        return self.run(q, k, v, index, self.full if rows is None else rows, logits, always)

    def _check(self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, rows: torch.Tensor | None) -> None:
        n = k.shape[2] if rows is not None and len(getattr(k, "shape", ())) == 4 else self.n
        require(n <= self.n, "k.shape[2]", n, f"at most {self.n}, for which this was made")
        (self.made_for if n in (0, self.n) else replace(self.made_for, n=n, k_eff=1)).check(q, k, v, index)
        for name, x in (("k", k), ("v", v), ("index.codes", index.codes)):
            check_whole_groups(name, x)

    def run(
        self, q: torch.Tensor, k: Numbers, v: Numbers, index: KeyIndex, rows: torch.Tensor, logits: Logits,
        always: Always,
    ) -> Step:  # fmt: skip
        """The step itself, of arguments that were checked; ``rows`` are read on the device, when it runs."""
        with torch.cuda.device_of(q):
            indices, logit = self.select(q, k, index, rows, logits, always)
            output = self.attend(indices, logit, v, rows, logits)
        return Step(output.reshape(*q.shape[:3], -1).to(q.dtype), indices, self.count)

    def score(self, q: torch.Tensor, k: Numbers, index: KeyIndex, rows: torch.Tensor, always: Always = NONE) -> None:
        """Fast scores of what is visible and not kept always."""
        if index.codes is not None:
            self._score_codes(q, index, index.codes, rows, always)
            return
        assert isinstance(k, torch.Tensor)
        batch, heads, _, dim = q.shape
        t, kv_heads = self.tuning, k.shape[1]
        group, programs = heads // kv_heads, triton.cdiv(self.n, t.block * t.loop)
        score_product_kernel[(programs * batch * kv_heads,)](
            q, k, index.norm, rows, self.fast, self.best, heads, kv_heads, *always, self.padded, dim, programs,
            q.stride(0), q.stride(1), q.stride(3), *k.stride(),
            GROUP=group, HEADS=max(8, next_power_of_two(group)), BLOCK=t.block, LOOP=t.loop,
            DIM=max(16, next_power_of_two(dim)), STAGES=t.stages, SUB=self.sub, WIDE=INTERPRETED, num_warps=t.warps,
        )  # fmt: skip

    def _score_codes(self, q: torch.Tensor, index: KeyIndex, c: Stored, rows: torch.Tensor, always: Always) -> None:
        batch, heads, _, dim = q.shape
        t, kv_heads, size = self.tuning, c.shape[1], c.grid.group_size
        group, programs = heads // kv_heads, triton.cdiv(self.n // size, t.codes_loop)
        if programs:
            score_codes_kernel[(programs * batch * kv_heads,)](
                q, c.codes, c.scales, index.norm, index.largest_scales, rows, self.fast, self.best,
                heads, kv_heads, *always, c.first.shape[2], self.padded, dim, programs,
                q.stride(0), q.stride(1), q.stride(3), *c.codes.stride(), *c.scales.stride(),
                GROUP=group, HEADS=max(4, next_power_of_two(group)), BLOCK=size, LOOP=t.codes_loop,
                DIM=max(32, next_power_of_two(dim)), STAGES=t.stages, SUB=self.sub, num_warps=t.codes_warps,
            )  # fmt: skip

    def compact(
        self, q: torch.Tensor, kv_heads: int, index: KeyIndex, rows: torch.Tensor, always: Always = NONE
    ) -> None:
        """Positions that may be among the best, by stretches."""
        batch, heads, _, dim = q.shape
        t, c = self.tuning, index.codes
        in_full = 0 if c is None else c.first.shape[2]
        relative = fast_scores.rounding(dim) * (1 if c is None else 3)
        split = 0.0 if c is None else fast_scores.SPLIT * dim
        compact_kernel[(self.stretches * batch * heads,)](
            q, index.norm, index.residual, index.largest_scales, rows, self.fast, self.best, self.position, self.count,
            heads, heads // kv_heads, *always, in_full, self.padded, self.best.shape[1], dim,
            relative, split,
            q.stride(0), q.stride(1), q.stride(3),
            GROUP_SIZE=0 if c is None else c.grid.group_size, SUB=self.sub, STRETCHES=self.stretches,
            MANY=max(16, min(t.threshold, next_power_of_two(self.best.shape[1]))), LINES=self.lines,
            LINE=LINE, DIM=next_power_of_two(dim), num_warps=t.compact_warps // (2 if in_full else 1),
        )  # fmt: skip

    def rescore(self, q: torch.Tensor, k: Numbers, rows: torch.Tensor) -> None:
        """Canonical scores of the candidates."""
        batch, heads, _, dim = q.shape
        t, dim_padded = self.tuning, next_power_of_two(dim)
        pointers, sizes, constants = side_arguments(k)
        programs = min(triton.cdiv(t.rescore_programs, batch * heads), triton.cdiv(self.n, t.rescore))
        rescore_kernel[(programs * batch * heads,)](
            q, rows, self.position, self.count, self.flat_position, self.flat_key,
            heads, heads // k.shape[1], self.padded, dim, programs, q.stride(0), q.stride(1), q.stride(3),
            *pointers, *sizes[1:], **constants, STRETCHES=self.stretches, LINES=self.lines, LINE=LINE,
            BLOCK=t.rescore, DIM=dim_padded, LOG_DIM=log2(dim_padded),
            enable_fp_fusion=False, num_warps=t.rescore_warps * (2 if isinstance(k, Stored) else 1),
        )  # fmt: skip

    def choose(
        self, batch: int, heads: int, rows: torch.Tensor, logits: Logits, always: Always = NONE, *, coded: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The best of the candidates and what is always kept: indices and logits; ``coded``: codes left some open."""
        t, device = self.tuning, self.fast.device
        indices = torch.empty(batch, heads, 1, self.k_eff, dtype=torch.int64, device=device)
        logit = torch.empty(batch, heads, 1, self.k_eff, dtype=torch.float32, device=device)
        # Room for the band in registers: a fifth of k_eff as a rule, twice k_eff behind codes.
        room = next_power_of_two(3 * self.k_eff if coded else self.k_eff + self.k_eff // 5)
        block = min(t.choose, room, next_power_of_two(self.padded))
        numbers, constants = logit_arguments(logits)
        sink = self.top if logits.sink is None else logits.sink
        choose_kernel[(batch * heads,)](
            self.flat_position, self.flat_key, self.count, rows, sink, indices, logit, self.top,
            heads, *always, self.padded, self.k_eff, *numbers, sink.stride(0), **constants,
            SINK=logits.sink is not None, STRETCHES=self.stretches, BLOCK=block, OUT=min(block, t.choose_out),
            enable_fp_fusion=False, num_warps=min(32, max(t.choose_warps, block // 1024)),
        )  # fmt: skip
        return indices, logit

    def select(
        self, q: torch.Tensor, k: Numbers, index: KeyIndex, rows: torch.Tensor, logits: Logits, always: Always = NONE
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices int64 and logits float32 of the keys that are kept, both ``[B, H, 1, k_eff]``."""
        self.score(q, k, index, rows, always)
        self.compact(q, k.shape[1], index, rows, always)
        self.rescore(q, k, rows)
        coded = index.codes is not None and not isinstance(k, Stored)
        return self.choose(q.shape[0], q.shape[1], rows, logits, always, coded=coded)

    def attend(
        self, indices: torch.Tensor, logit: torch.Tensor, v: Numbers, rows: torch.Tensor, logits: Logits
    ) -> torch.Tensor:
        """Canonical attention over the chosen keys whose logits are known, float32 ``[B * H, Dv]``."""
        t, top = self.tuning, self.top.view(*indices.shape[:2], 1)
        parts = partials(
            logit, top, indices, v, factor_of(logits), rows[:, END], block=t.attend, num_warps=t.attend_warps,
            poison=False,
        )  # fmt: skip
        return combined(*parts, top, logits, poison=False)
