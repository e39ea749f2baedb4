"""Medians of interleaved CUDA-graph replays, each after the L2 cache was overwritten."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from tqdm import tqdm

from qaxis.cuda.workspaces import own_workspaces


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


def microseconds(
    graphs: dict[str, torch.cuda.CUDAGraph], repeats: int, label: str, seed: int = 0
) -> dict[str, list[float]]:
    """Times of every graph; each round replays all of them in a new random order."""
    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda")
    order = random.Random(seed)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for name in order.sample(list(graphs), len(graphs)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            graphs[name].replay()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [1000 * a.elapsed_time(b) for a, b in pairs] for name, pairs in events.items()}
