"""The decode step in CUDA C++: two kernels where the Triton kernels are seven, with the same indices and bits.

It needs clusters of programs, so compute capability 9.0; on a CPU it is emulated, thread by thread, to be checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..arithmetic import fast_scores
from ..arithmetic.reference import exponent_factor, next_power_of_two
from ..cuda.compiler import ELEMENTS, SHARED_LIMIT, compiled, in_16_bytes, readable, runs_on, units
from ..storage.side import Stored
from .index import KeyIndex

SCORE_KEYS, SCORE_CODES, CHOOSE = (
    Path(__file__).with_name(f"{name}.cu") for name in ("score_keys", "score_codes", "choose")
)
#: as in choose.cu
BLOCK, BINS, NEAR = 512, 1024, 112
#: multiprocessors that the emulator pretends to have, as many as an H200
EMULATED_MULTIPROCESSORS = 132


def fixed_bytes(dim_v: int, cluster: int, threads: int) -> int:
    """Size of ``Shared`` in choose.cu."""
    warps = threads // 32
    return 4 * (2 * BINS + 2 * NEAR * (cluster + 1) + warps + 4 + 8 + warps * (dim_v + 1) + cluster * (dim_v + 1))


class NativeStep:
    """Work space and kernels for decode steps of one shape.

    Args:
        q, k, v: as they will be passed, ``[B, H, 1, D]`` and ``[B, Hkv, N, D]``, tensors or 8-bit caches.
        index: of these keys.
        wanted: keys every query keeps.
        profile: write the time of each phase to ``marks``, int64 ``[B * H, cluster, 16]``, nanoseconds.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, index: KeyIndex, wanted: int,
        profile: bool = False,
    ) -> None:  # fmt: skip
        batch, heads, _, dim = q.shape
        n, rows, kv_heads = k.shape[2], batch * heads, k.shape[1]
        multiprocessors = EMULATED_MULTIPROCESSORS
        if q.is_cuda:
            multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
        self.coded, self.stored = index.codes is not None, isinstance(k, Stored)
        each = self.each = in_16_bytes(q)
        self.n, self.wanted, self.batch, self.heads, self.kv_heads = n, wanted, batch, heads, kv_heads
        self.padded = -(-n // BLOCK) * BLOCK
        blocks = self.padded // BLOCK
        # Four times as many neighbourhoods as keys are kept: then their best ones lead close to the k-th best key.
        self.sub = min(32, 1 << max(0, (n // (4 * wanted)).bit_length() - 1))
        # One program a multiprocessor.
        self.cluster = min(8, 1 << max(0, (multiprocessors // rows).bit_length() - 1))
        own = -(-blocks // self.cluster)
        # Two smaller programs a multiprocessor, as clusters of large ones do not fit on all of them.
        self.threads = 1024 if self.cluster == 1 else 512
        warps = self.threads // 32
        dim_v = v.shape[3]
        teams = self.threads // (dim_v // each)
        share = max(1, next_power_of_two(wanted) // self.cluster // teams)
        ranks = min(8, share)
        self.span = max(1, share // ranks) * ranks * teams
        # Candidates of one program; what is staged before there are any shares its bytes with what is chosen after.
        room = 4 * wanted // self.cluster + 1024
        if room > 4096 and self.cluster > 1:
            # Less, so that two programs fit on a multiprocessor: more are candidates only if bests are far apart.
            room = max(4096, (6 if self.coded else 3) * wanted // (2 * self.cluster) + 1024)
        self.room = max(own * 8, min(own * BLOCK, room, 20480))
        staged = 2 * warps * -(-own // warps) * (BLOCK // self.sub)
        fixed = fixed_bytes(dim_v, self.cluster, self.threads)
        self.shared = -(-fixed // 16) * 16 + 4 * (2 * self.room + own + blocks + 16 * own) + max(8 * self.span, staged)
        self.fits = self.shared <= SHARED_LIMIT and -(-own // warps) * warps * (BLOCK // self.sub) <= 1 << 16
        self.fits &= self.span * self.cluster >= wanted
        # Clusters of programs that fill a multiprocessor each do not all fit at once, and the last would wait for the
        # first: no matter where the scores take much longer than the rest.
        self.fits &= self.cluster == 1 or 2 * (self.shared + 1024) <= SHARED_LIMIT + 1024 or n >= 1 << 19
        if not self.fits:
            return
        shape = {"elem": ELEMENTS[q.dtype], "dim": dim, "group": heads // kv_heads, "sub": self.sub}
        self.score_kernel = (
            compiled(SCORE_CODES, "score_codes", 0, q.device, **shape)
            if self.coded
            else compiled(SCORE_KEYS, "score_keys", 0, q.device, **shape)
        )
        self.choose_kernel = compiled(
            CHOOSE, "choose_and_attend", self.shared, q.device, **shape, dim_v=dim_v, cluster=self.cluster,
            threads=self.threads, ranks=ranks, levels=(share // ranks).bit_length() - 1, coded=int(self.coded),
            stored=int(self.stored), profile=int(profile), shared=fixed,
        )  # fmt: skip
        self.fits = self.score_kernel is not None and self.choose_kernel is not None
        # Programs of a score kernel that run at the same time, fewer where as many rounds of work take no longer.
        at_once = max(1, (4 if self.coded else 3) * multiprocessors // (batch * kv_heads))
        columns = 32 * each // dim
        loads = {1: 8, 2: 8, 4: 4}.get(next_power_of_two(heads // kv_heads), 2)
        work = -(-n // 128) if self.coded else self.padded // max(32, loads * columns)
        self.score_programs = -(-work // (4 * -(-work // (4 * at_once))))

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=q.device)

        self.word = empty(rows, self.padded)
        self.fast = empty(rows, self.padded, dtype=torch.uint16) if self.coded else self.word
        self.best = empty(rows, self.padded // self.sub, dtype=self.fast.dtype)
        self.limits = empty(rows, 2, dtype=torch.float32)
        self.count = empty(rows, self.cluster)
        self.marks = empty(rows, self.cluster, 16, dtype=torch.int64) if profile else self.count

    def score(self, q: torch.Tensor, k: torch.Tensor | Stored, index: KeyIndex) -> None:
        """Scores of every key, canonical ones or fast ones by codes."""
        grid, block = (self.score_programs, self.batch * self.kv_heads, 1), (128, 1, 1)
        heads, strides = (self.heads, self.kv_heads), (q.stride(0), q.stride(1))
        if index.codes is not None:
            c = index.codes
            if c.scales.shape[2]:
                self.score_kernel(grid, block, [
                    q, c.codes, c.scales, index.norm, index.residual, index.steps, self.fast, self.best, self.limits,
                    *heads, c.scales.shape[2], c.first.shape[2], self.padded, *strides,
                    *units(c.codes, self.each), *units(c.scales, self.each),
                    fast_scores.rounding(q.shape[3]) * 3, fast_scores.SPLIT * q.shape[3],
                ])  # fmt: skip
            return
        assert isinstance(k, torch.Tensor)
        self.score_kernel(grid, block, [
            q, k, self.word, self.best, *heads, self.n, self.padded, *strides, *units(k, self.each),
        ])  # fmt: skip

    def choose(
        self, q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, index: KeyIndex, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[B, H, 1, Dv]`` in q's dtype and indices int64 ``[B, H, 1, k]``, once keys are scored."""
        indices = torch.empty(self.batch, self.heads, 1, self.wanted, dtype=torch.int64, device=q.device)
        out = torch.empty(self.batch, self.heads, 1, v.shape[3], dtype=q.dtype, device=q.device)
        start, end, whole, sinks = 0, self.n, 0, 0
        if index.codes is not None:
            start, end = index.codes.first.shape[2], index.codes.codes.shape[2]
        if isinstance(k, Stored):
            whole, sinks = k.codes.shape[2], k.first.shape[2]
        self.choose_kernel((self.cluster, self.batch * self.heads, 1), (self.threads, 1, 1), [
            q, *self._side(k, q), *self._side(v, q), self.fast, self.best, self.word,
            self.limits, out, indices, self.count, self.marks,
            self.heads, self.n, self.padded, start, end, whole, sinks, self.wanted, self.room, self.span,
            q.stride(0), q.stride(1), exponent_factor(scale),
        ], shared_mem=self.shared)  # fmt: skip
        return out, indices

    def _side(self, x: torch.Tensor | Stored, none: torch.Tensor) -> list[Any]:
        if not isinstance(x, Stored):
            return [x, none, none, none, *units(x, self.each), *[0] * 9]
        parts = [x.codes, x.scales, x.first, x.first if x.newest is None else x.newest]
        return [*parts, *(s for part in parts for s in units(part, self.each))]


def step_for(
    q: torch.Tensor, k: torch.Tensor | Stored, v: torch.Tensor | Stored, index: KeyIndex, wanted: int,
    profile: bool = False,
) -> NativeStep | None:  # fmt: skip
    """What runs this shape, or None where the CUDA kernels cannot."""
    ok = (
        runs_on(q.device, (9, 0))
        and k.shape[2] < 1 << 31
        and q.shape[1] // k.shape[1] <= 8
        and isinstance(k, Stored) == isinstance(v, Stored)
    )
    if index.codes is not None:
        ok = ok and q.shape[3] in (64, 128) and index.codes.grid.group_size == 128
    parts: list[torch.Tensor | None] = [] if index.codes is None else [index.codes.codes, index.codes.scales]
    for x in (k, v):
        parts += [x.codes, x.scales, x.first, x.newest] if isinstance(x, Stored) else [x]
        if isinstance(x, Stored):
            ok = ok and x.grid.bits == 8 and x.grid.per == "channel" and x.dtype == q.dtype == torch.bfloat16
    ok = ok and readable(in_16_bytes(q), (q.shape[3], v.shape[3]), q, *parts)
    if not ok:
        return None
    step = NativeStep(q, k, v, index, wanted, profile)
    return step if step.fits else None
