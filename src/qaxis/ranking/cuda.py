"""The kernels of topk.cu: how rows are shared out, and launching them."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..arithmetic.reference import next_power_of_two, rounded_up
from ..cuda.compiler import MOST_STRIDE, SHARED_LIMIT, compiled, runs_on
from .reference import words

SOURCE = Path(__file__).with_name("topk.cu")
CAPABILITY = (9, 0)
#: multiprocessors that the emulator stands for: few, so that small examples are shared by clusters
EMULATED_MULTIPROCESSORS = 8
#: threads of a program, and of one whose rows are short and many
THREADS, FEW_THREADS = 512, 128
MOST_SHORT = 4096
#: scores that are worth a program of their own
LEAST_SHARE = 4096
#: as in topk.cu: bins of a look, scores of the sample that a thread loads, words of a bitmap that are counted together
BINS, SAMPLED, GROUP = 2048, 8, 8
#: shorter rows are listed whole
LEAST_SAMPLED = 16384
ALL_LISTED, BEST_LISTED, READ = 0, 1, 2
#: by so many deviations a sample may be off before a row is read again
DEVIATIONS = 5
#: scores that are ranked in shared memory; more of them are sorted by torch
MOST_RANKED = 16384


class Plan(NamedTuple):
    """How ``select_rows`` is launched."""

    #: programs of a row, and threads of a program
    cluster: int
    threads: int
    #: loads of 16 bytes that a program has to read
    span: int
    #: what becomes of a row first: ALL_LISTED, BEST_LISTED, READ
    how: int
    #: scores that a list has room for
    capacity: int
    #: the place in the sample from which on scores are listed
    rank: int
    #: bytes of shared memory
    shared: int


def fixed_bytes(threads: int) -> int:
    """Bytes of ``Shared``."""
    return 4 * (BINS + threads // 32 + 4 + 6)


def _beside(threads: int, span: int) -> int:
    """Bytes beside the lists: what programs tell each other, a bitmap, its counts."""
    bitmap = span // 8
    return rounded_up(fixed_bytes(threads), 16) + 4 * (bitmap + -(-bitmap // GROUP))


def _sample(n: int, k: int, threads: int) -> tuple[int, int]:
    """The rank in the sample to list from, and how many of the row that may be."""
    size = SAMPLED * threads
    among = k * size / n
    rank = math.ceil(among + DEVIATIONS * math.sqrt(among)) + 8
    most = (rank + DEVIATIONS * math.sqrt(rank) + 4) * n / size
    return rank, rounded_up(math.ceil(most), 32)


def _most_programs(cluster: int, multiprocessors: int) -> int:
    """So many are at work at once: two share a multiprocessor, but those of a cluster of eight; not all find room."""
    return multiprocessors if cluster == 8 else 3 * multiprocessors // 2


@lru_cache(maxsize=1024)
def plan_of(rows: int, n: int, k: int, multiprocessors: int) -> Plan:
    """How ``rows`` of ``n`` scores are shared out."""
    cluster = 8
    while cluster > 1 and (rows * cluster > _most_programs(cluster, multiprocessors) or n < cluster * LEAST_SHARE):
        cluster //= 2
    few = cluster == 1 and n <= MOST_SHORT and rows > 4 * multiprocessors
    threads = FEW_THREADS if few else THREADS
    while True:
        # A row may begin up to three scores after 16 bytes.
        span = rounded_up(-(-((n + 6) // 4) // cluster), 8)
        left = (SHARED_LIMIT - _beside(threads, span)) // 8
        rank, capacity = _sample(n, k, threads)
        listed = min(capacity, 4 * span)
        if LEAST_SAMPLED <= n and capacity < 4 * span and listed <= left and 2 * rank <= SAMPLED * threads:
            return Plan(cluster, threads, span, BEST_LISTED, listed, rank, _beside(threads, span) + 8 * listed)
        if 4 * span <= left:
            return Plan(cluster, threads, span, ALL_LISTED, 4 * span, 0, _beside(threads, span) + 32 * span)
        if cluster == 8:
            return Plan(cluster, threads, span, READ, 0, 0, rounded_up(fixed_bytes(threads), 16))
        # The whole bitmap of a long row does not fit, or its list: more programs.
        cluster *= 2


def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return EMULATED_MULTIPROCESSORS


def _kernel(name: str, device: torch.device, cluster: int, threads: int) -> Any:
    return compiled(
        SOURCE, name, SHARED_LIMIT, device, elem=0, cluster=cluster, threads=threads, shared=fixed_bytes(threads)
    )


class Selector:
    """The kernels for one shape on one device."""

    def __init__(self, plan: Plan, k: int, by_rank: bool, select: Any, rank: Any) -> None:
        self.plan, self.k, self.by_rank = plan, k, by_rank
        self.select, self.rank = select, rank

    def __call__(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values and positions ``[rows, k]`` of float32 ``scores [rows, N]``, and int32 ``[rows]``: 0 without NaN."""
        rows, n = scores.shape
        stride = scores.stride(0) if rows > 1 else 0
        if (n > 1 and scores.stride(1) != 1) or not 0 <= stride < MOST_STRIDE or scores.data_ptr() % 4:
            scores, stride = scores.clone(memory_format=torch.contiguous_format), n
        plan, k = self.plan, self.k
        values = torch.empty(rows, k, dtype=torch.float32, device=scores.device)
        indices = torch.empty(rows, k, dtype=torch.int64, device=scores.device)
        missing = torch.empty(rows, dtype=torch.int32, device=scores.device)
        self.select(
            (rows * plan.cluster, 1, 1), (plan.threads, 1, 1),
            [scores, values, indices, missing, n, k, stride, plan.span, plan.how, plan.capacity, plan.rank],
            shared_mem=plan.shared,
        )  # fmt: skip
        if self.by_rank and k > 1:
            values, indices = self._ranked(values, indices)
        return values, indices, missing

    def _ranked(self, values: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rank is None:
            order = torch.sort(words(values), dim=-1, descending=True, stable=True).indices
            return values.gather(-1, order), indices.gather(-1, order)
        room = next_power_of_two(self.k)
        ranked = torch.empty_like(values), torch.empty_like(indices)
        self.rank(
            (values.shape[0], 1, 1), (THREADS, 1, 1), [values, indices, *ranked, self.k, room], shared_mem=8 * room
        )
        return ranked


def selector_of(rows: int, n: int, k: int, by_rank: bool, device: torch.device) -> Selector | None:
    """What selects from ``rows`` of ``n`` scores, or None where topk.cu does not run."""
    if not runs_on(device, CAPABILITY):
        return None
    plan = plan_of(rows, n, k, _multiprocessors(device))
    if rows * plan.cluster >= 1 << 31:
        return None
    select, rank = _kernel("select_rows", device, plan.cluster, plan.threads), None
    if by_rank and 1 < k <= MOST_RANKED:
        rank = _kernel("rank_rows", device, 1, THREADS)
        if rank is None:
            return None
    return None if select is None else Selector(plan, k, by_rank, select, rank)
