"""Interleaved CUDA-graph replays, the L2 cache emptied before each in one of two ways; ratios with their interval."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

from qaxis.cuda.workspaces import own_workspaces

#: what is in the L2 cache when a replay begins: lines that have yet to be written back, which the replay pays for, as
#: after a kernel that wrote; or lines that can be dropped, as after one that read
WRITTEN, CLEAN = "written", "clean"
FLUSHED = 1 << 28
RESAMPLES = 9999


class Ratio(NamedTuple):
    """A ratio of medians and its 95 % interval."""

    value: float
    low: float
    high: float


def ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Ratio:
    """The median of ``above`` over that of ``below``, times of the same rounds, which are resampled together.

    The interval is of percentiles: medians of few rounds take few values, of which BCa's correction has no slope.

    Raises:
        ValueError: for other numbers of times, or none.
    """
    if len(above) != len(below) or not above:
        raise ValueError(f"below={len(below)} times: allowed are as many as above, {len(above)}, and one at least")
    x, y = np.asarray(above, float), np.asarray(below, float)
    middle = float(np.median(x) / np.median(y))
    if len(x) == 1:
        return Ratio(middle, middle, middle)

    def of(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(x, axis) / np.median(y, axis)

    found = stats.bootstrap(
        (x, y), of, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Ratio(middle, float(found.low), float(found.high))


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """The name with the smallest median."""
    return min(times, key=lambda name: statistics.median(times[name]))


def capture(f: Callable[[], object], warm: int = 2) -> torch.cuda.CUDAGraph:
    """One call of ``f`` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with own_workspaces(), torch.cuda.graph(graph):
        f()
    return graph


def flushes(device: str = "cuda", size: int = FLUSHED) -> dict[str, Callable[[], object]]:
    """What empties the cache, by what it leaves there. What is read was written long before, in a buffer of its own."""
    written, read = (torch.zeros(size // 4, dtype=torch.int32, device=device) for _ in range(2))
    return {WRITTEN: written.zero_, CLEAN: read.amax}


def microseconds(
    graphs: Mapping[str, torch.cuda.CUDAGraph], repeats: int, label: str, clean: Collection[str] = (), seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Times of every graph by what its replays found in the cache: all ``WRITTEN``, those named in ``clean`` ``CLEAN``.

    Each round replays each of them once, in a new random order: times at one place of all lists are of one round.
    """
    before = flushes()
    plan = [(WRITTEN, name) for name in graphs] + [(CLEAN, name) for name in graphs if name in clean]
    order = random.Random(seed)
    events: dict[tuple[str, str], list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {one: [] for one in plan}
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for kind, name in order.sample(plan, len(plan)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before[kind]()
            start.record()
            graphs[name].replay()
            end.record()
            events[kind, name].append((start, end))
        torch.cuda.synchronize()
    out: dict[str, dict[str, list[float]]] = {WRITTEN: {}, CLEAN: {}}
    for (kind, name), pairs in events.items():
        out[kind][name] = [1000 * a.elapsed_time(b) for a, b in pairs]
    return out


def bandwidth(repeats: int) -> float:
    """Bytes a second of the faster of two kernels: one copies 1 GiB, one only reads 2 GiB."""
    x = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    both = torch.zeros(1 << 29, dtype=torch.float32, device="cuda")
    graphs = {"copy": capture(lambda: torch.neg(x, out=y)), "read": capture(lambda: both.amax())}
    took = {name: statistics.median(t) for name, t in microseconds(graphs, repeats, "bandwidth")[WRITTEN].items()}
    return 1e6 * max((x.nbytes + y.nbytes) / took["copy"], both.nbytes / took["read"])
