"""The kernels that no claim times yet, on a GPU: the decode step in CUDA C++, by stages, and selection-exact prefill.

Beside the Triton step and the fastest dense one of the same run, as CUDA graphs replayed in random order, medians.
What was measured with it so far is in NOTES.md.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import qaxis
from qaxis import certified, native
from qaxis.prefill import prefill_attention
from selfcheck.checks.certified import DIM, HEADS, KV_HEADS, ways

#: the marks of choose.cu after which its stages end
MARKS = {"cut": 3, "compact": 5, "rescore": 6, "choose": 13, "attend": 15}


def decode(batch: int, n: int, wanted: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of one shape: keys, keys beside codes, 8-bit cache."""
    from selfcheck import dense_decoding
    from selfcheck.graph_timing import capture, microseconds

    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, m, DIM, dtype=torch.bfloat16, device="cuda", generator=generator)
        for heads, m in ((HEADS, 1), (KV_HEADS, n), (KV_HEADS, n))
    )
    graphs = {f"dense/{name}": capture(f) for name, f in dense_decoding.variants(q, k, v).items()}
    exact = qaxis.topk_attention(q, k, v, wanted)
    rows, alive = [], []
    for name, keys, values, index in ways(k, v):
        step, other = (c.Decoder(batch, HEADS, n, DIM, wanted, "cuda") for c in (native, certified))
        found = step(q, keys, values, index)
        same = torch.equal(found.indices, exact.indices) and torch.equal(found.output, exact.output)
        row: dict[str, Any] = {"B": batch, "N": n, "k": wanted, "way": name, "canonical": same or name == "cache"}
        graphs[f"{name}/triton"] = capture(partial(other, q, keys, values, index))
        fast = step.native(q, keys, values, index)
        if fast is not None:
            graphs[f"{name}/cuda"] = capture(partial(step, q, keys, values, index))
            graphs[f"{name}/score"] = capture(partial(fast.score, q, keys, index))
            row["stages"] = stages(q, keys, values, index, wanted)
        rows.append(row)
        alive.append((step, other, keys, values, index))
    times = {x: statistics.median(t) for x, t in microseconds(graphs, repeats, f"B={batch}, N={n}").items()}
    dense = min(t for x, t in times.items() if x.startswith("dense/"))
    for row in rows:
        row |= {"dense": dense, **{x: times.get(f"{row['way']}/{x}") for x in ("triton", "cuda", "score")}}
    return rows


def stages(q: torch.Tensor, keys: Any, values: Any, index: certified.KeyIndex, wanted: int) -> dict[str, float]:
    """Microseconds of the stages of the second kernel, mean over its programs, by its own clock."""
    step = native.step_for(q, keys, values, index, wanted, profile=True)
    assert step is not None
    for _ in range(3):
        step.score(q, keys, index)
        step.choose(q, keys, values, index, DIM**-0.5)
    took = step.marks.double().diff(dim=-1).flatten(0, 1).mean(0).tolist()
    return {s: sum(took[a:b]) / 1000 for s, (a, b) in zip(MARKS, itertools.pairwise([0, *MARKS.values()]), strict=True)}


def prefill(n: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a causal prefill."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from selfcheck.graph_timing import capture, microseconds

    q, k, v = (torch.randn(1, h, n, DIM, dtype=torch.bfloat16, device="cuda") for h in (HEADS, KV_HEADS, KV_HEADS))

    def dense(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    found: dict[str, Callable[[], object]] = {
        "FlashAttention-2": partial(dense, SDPBackend.FLASH_ATTENTION),
        "cuDNN": partial(dense, SDPBackend.CUDNN_ATTENTION),
    }
    for backend in ("triton", "cuda"):
        found[f"a tenth, {backend}"] = partial(prefill_attention, q, k, v, qaxis.Budget(), backend=backend)
        found[f"2048 keys, {backend}"] = partial(prefill_attention, q, k, v, qaxis.Budget(0, 2048), backend=backend)
    graphs = {name: capture(f) for name, f in found.items()}
    return {x: statistics.median(t) / 1000 for x, t in microseconds(graphs, repeats, "prefill").items()}


@click.command()
@click.option("--repeats", default=31, show_default=True)
@click.option("--shapes", default="1,131072,2048 4,32768,2048 1,32768,2048 1,1048576,2048", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the numbers to this JSON file as well.")
def main(repeats: int, shapes: str, out: Path | None) -> None:
    """Time the decode steps of SHAPES (B,N,k) and a prefill of 8192 tokens."""
    if not torch.cuda.is_available():
        raise click.ClickException("a GPU is needed: these are times under CUDA graphs")
    table = Table(title=f"Decode step, microseconds, {torch.cuda.get_device_name()}")
    names = ("B", "N", "k", "way", "dense", "triton", "cuda", "score", *MARKS, "ratio", "canonical")
    for name in names:
        table.add_column(name, justify="right")
    rows = []
    for shape in shapes.split():
        for row in decode(*map(int, shape.split(",")), repeats):
            row["ratio"] = row["dense"] / row["cuda"] if row["cuda"] else None
            cells = {**row, **row.get("stages", {})}
            table.add_row(*(f"{x:.2f}" if isinstance(x := cells.get(n), float) else str(x) for n in names))
            rows.append(row)
        torch.cuda.empty_cache()
    times = prefill(8192, repeats)
    console = Console(width=150)
    console.print(table)
    flash = times["FlashAttention-2"]
    for name, took in times.items():
        console.print(f"prefill of 8192 tokens, {name}: {took:.2f} ms, {took / flash:.2f} times FlashAttention-2")
    if out is not None:
        out.write_text(json.dumps({"decode": rows, "prefill": times}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
