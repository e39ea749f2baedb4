"""Prefill on a GPU, stage by stage: scores, selection, wide bands, attention; for lengths and ways of tuning.

    python -m benchmarks.prefill --lengths 8192,16384 --output benchmarks/local

What bounds a stage, for H heads, N causal queries, head_dim D (bfloat16), on an H100 (3.0 TB/s, 600 TFLOP/s):

* score: H N^2 D operations and N^2 H bytes written: 1.8 and 2.9 ms at N = 16384, H = 32, D = 128; so the bytes.
* select: the same bytes read; about 110 instructions of a warp for 256 keys and 1600 a row: at 16384 some 4.3e9, at one
  a cycle of each of 528 schedulers 4.6 ms. Issue slots are full with some 12 warps a multiprocessor (``select_warps``):
  rows of more than 12288 keys leave too few of them to one warp each.
* attend: 2 H N^2 D operations, 3.7 ms: FlashAttention's work, which the bits (N/8 bytes a query) make no smaller.

Each stage is timed by events around its launches, the whole by replays of a CUDA graph; medians.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

import qaxis
from qaxis.attention.logits import Logits
from qaxis.cuda.workspaces import own_workspaces
from qaxis.prefill import Prefill, PrefillTuning, prefill_attention, selected_positions, tuning_for
from qaxis.prefill import attention as stages
from qaxis.prefill.plan import make_plan

HEADS, KV_HEADS, DIM = 32, 8, 128
STAGES = ("ranges", "score", "select", "wide", "attend")
#: changes of the tuning that are compared; those of the first list at every length
VARIANTS: list[tuple[str, dict[str, int]]] = [
    ("as it is", {}),
    ("select_warps=8", {"select_warps": 8}),
    ("select_warps=16", {"select_warps": 16}),
    ("select_warps=24", {"select_warps": 24}),
    ("memory=1G", {"memory": 1 << 30}),
    ("attend 128x64, 8 warps", {"attend_queries": 128, "attend_warps": 8}),
]
MORE: list[tuple[str, dict[str, int]]] = [
    ("chunk=1024", {"chunk": 1024}),
    ("chunk=4096", {"chunk": 4096}),
    ("listed=64", {"listed": 64}),
    ("attend_skip=2", {"attend_skip": 2}),
    ("attend 64x128", {"attend_keys": 128, "attend_stages": 2}),
    ("attend 128x128, 8 warps", {"attend_queries": 128, "attend_keys": 128, "attend_warps": 8, "attend_stages": 2}),
    ("attend_stages=2", {"attend_stages": 2}),
    ("score 128x128", {"keys": 128, "stages": 3, "loop": 16}),
    ("score loop=16", {"loop": 16}),
    ("score stages=3", {"stages": 3}),
]
#: kinds of keys beside normal ones, and the tuning that each is for
KINDS: list[tuple[str, dict[str, int]]] = [
    ("one key 30x", {}), ("one key 1000x", {}), ("a long key in 64", {}), ("graded lengths", {}), ("clustered", {}),
    ("clustered", {"attend_skip": 2}),
]  # fmt: skip


@dataclass
class Inputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def inputs(n: int, kind: str = "normal", heads: int = HEADS, kv_heads: int = KV_HEADS) -> Inputs:
    """Normal queries, keys and values; keys of which some are longer, or of which the same are high for all queries."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, h, n, DIM, device="cuda", generator=generator) for h in (heads, kv_heads, kv_heads))
    if kind.startswith("one key"):
        k[:, :, n // 3] *= float(kind.split()[-1][:-1])
    elif kind == "a long key in 64":
        k[:, :, ::64] *= 30
    elif kind == "graded lengths":
        k *= torch.exp(torch.randn(n, device="cuda", generator=generator))[:, None]
    elif kind == "clustered":
        # A tenth of the keys, in runs of 64, lies towards all queries.
        q[..., 0] += 8
        k[..., 0] += 8.0 * (torch.rand(n // 64 + 1, device="cuda", generator=generator) < 0.1).repeat_interleave(64)[:n]
    return Inputs(*(x.bfloat16() for x in (q, k, v)))


class Clock:
    """Milliseconds of the device, by stage."""

    def __init__(self) -> None:
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, name: str, f: Callable[[], Any]) -> Any:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = f()
        end.record()
        self.events.append((name, begin, end))
        return out

    def milliseconds(self) -> dict[str, float]:
        torch.cuda.synchronize()
        out = dict.fromkeys(STAGES, 0.0)
        for name, begin, end in self.events:
            out[name] += begin.elapsed_time(end)
        return out


def staged(x: Inputs, budget: qaxis.Budget, tuning: PrefillTuning) -> dict[str, float]:
    """One prefill, each stage by the clock of the device."""
    clock = Clock()
    plan = make_plan(tuple(x.q.shape), x.k.shape[1], x.k.shape[2], tuning=tuning)
    result = Prefill(torch.empty_like(x.q), None, None)
    parts: Iterator[Any] = stages.parts_of(result, plan, x.q, x.k, x.v, budget, Logits(DIM**-0.5))
    while (part := clock.run("ranges", partial(next, parts, None))) is not None:
        for stretch in plan.stretches():
            for chunk in plan.chunks(stretch):
                clock.run("score", partial(stages.score, part, stretch, chunk))
                capacity = clock.run("select", partial(stages.select, part, stretch, chunk, "cuda"))
                clock.run("wide", partial(stages.order_wide_bands, part, stretch, chunk, capacity))
            clock.run("attend", partial(stages.attend, part, stretch))
    return clock.milliseconds()


def replayed(f: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of a replay of ``f`` as a CUDA graph."""
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with own_workspaces(), torch.cuda.graph(graph):
        f()
    times = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def sets_that_differ(x: Inputs, budget: qaxis.Budget, tuning: PrefillTuning) -> int:
    """Of the last 32 queries, and of 32 in the middle."""
    bits = cast(torch.Tensor, prefill_attention(x.q, x.k, x.v, budget, selection=True, tuning=tuning).bits)
    wrong, n = 0, x.q.shape[2]
    for end in (n // 2 + 7, n):
        some = slice(end - 32, end)
        exact = qaxis.topk_indices(x.q[:, :, some].contiguous(), x.k[:, :, :end], budget)
        found = selected_positions(bits[:, :, some].contiguous())
        wrong += int((found != exact).any(-1).sum()) if found.shape == exact.shape else 32 * x.q.shape[1]
    return wrong


def measured(x: Inputs, budget: qaxis.Budget, tuning: PrefillTuning, repeats: int, check: bool) -> dict[str, Any]:
    """The whole, its stages, the memory that it takes, and whether its sets are right."""
    torch.cuda.empty_cache()
    staged(x, budget, tuning)
    runs = [staged(x, budget, tuning) for _ in range(max(1, repeats // 2))]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    prefill_attention(x.q, x.k, x.v, budget, tuning=tuning)
    taken = torch.cuda.max_memory_allocated() - before - x.q.numel() * x.q.element_size()
    out: dict[str, Any] = {name: statistics.median(r[name] for r in runs) for name in STAGES}
    out["whole"] = replayed(partial(prefill_attention, x.q, x.k, x.v, budget, tuning=tuning), repeats)
    return out | {"MiB": taken / 2**20, "differ": sets_that_differ(x, budget, tuning) if check else None}


def dense(x: Inputs, repeats: int) -> dict[str, float]:
    """Milliseconds of FlashAttention-2 and cuDNN through SDPA."""
    out = {}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            f = partial(
                torch.nn.functional.scaled_dot_product_attention, x.q, x.k, x.v, is_causal=True, enable_gqa=True
            )
            out[name] = replayed(f, repeats)
    return out


def plans(n: int, shortest: int, longest: int) -> Iterator[tuple[str, str, PrefillTuning]]:
    """(kind of keys, name, tuning) of what is timed at length n."""
    base = PrefillTuning()
    for name, fields in VARIANTS + (MORE if n in (shortest, min(longest, 16384)) else []):
        yield "normal", name, replace(base, **fields)
    yield "normal", "tuning_for", tuning_for(1, HEADS, n, n)
    if n == shortest:
        for kind, fields in KINDS:
            yield kind, ", ".join(f"{a}={b}" for a, b in fields.items()) or "as it is", replace(base, **fields)


@click.command()
@click.option("--lengths", default="8192,16384,32768", show_default=True, help="Queries and keys N.")
@click.option("--coverage", default=0.1, show_default=True)
@click.option("--repeats", default=4, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), help="Folder that gets prefill.json.")
def main(lengths: str, coverage: float, repeats: int, output: Path | None) -> None:
    """Time every stage, B=1, H=32, Hkv=8, D=128, bfloat16, and print one table."""
    budget, all_n = qaxis.Budget(coverage), sorted(map(int, lengths.split(",")))
    table = Table("N", "keys", "tuning", *STAGES, "whole", "x flash", "MiB", "differ", box=None)
    rows: list[dict[str, Any]] = []
    for n in all_n:
        normal = inputs(n)
        rival = dense(normal, repeats)
        table.add_row(str(n), "", "dense", *[""] * 5, f"{rival['flash']:.2f}, cuDNN {rival['cudnn']:.2f}")
        rows.append({"n": n, "tuning": "dense"} | rival)
        for kind, name, tuning in plans(n, all_n[0], all_n[-1]):
            x = normal if kind == "normal" else inputs(n, kind)
            try:
                got = measured(x, budget, tuning, repeats, name in ("as it is", "tuning_for", "select_warps=24"))
            except Exception as error:  # what one variant cannot do must not hide the others
                got = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
            rows.append({"n": n, "keys": kind, "tuning": name} | got)
            ms = [f"{got[s]:.2f}" if s in got else "" for s in (*STAGES, "whole")]
            ratio = f"{got['whole'] / rival['flash']:.2f}" if "whole" in got else got["error"]
            table.add_row(str(n), kind, name, *ms, ratio, f"{got.get('MiB', 0):.0f}", str(got.get("differ") or 0))
    Console(width=150).print(table)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "coverage": coverage, "rows": rows}
        (output / "prefill.json").write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
