"""``qaxis.topk`` beside torch's top-k and stable sort, and FlashInfer's and SGLang's top-k where they are installed.

    python -m benchmarks.topk --out topk.json

First every case is checked on rows that are hard to rank: ties, zeros of both signs, infinities, NaN, masks, scores in
order. On such rows each rival is asked, twenty times, whether it gives the stable sort's set, and the same each time.
Then replays of CUDA graphs (calls, of what cannot be captured) are timed in random order, the L2 cache overwritten
before each; medians of microseconds, with a 95 % interval by ranks.
"""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import qaxis
from selfcheck.harness.timing import capture
from selfcheck.inputs.score_rows import KINDS, hard_rows, stable, tied_rows
from selfcheck.rivals import selecting

#: rows, scores of a row, how many are kept
CASES = [
    (32, 131072, 2048),
    (1024, 131072, 2048),
    (32, 32768, 2048),
    (1, 1048576, 2048),
    (64, 8192, 512),
    (128, 262144, 256),
]
ON_A_CPU = [(4, 8192, 512), (2, 131072, 2048)]


def wrong_rows(scores: torch.Tensor, k: int) -> int:
    """Rows of which topk gives another set, order or bit than the stable sort."""
    expected = stable(scores)[:, :k]
    differ = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for order, indices in (("rank", expected), ("position", expected.sort(-1).values)):
        got = qaxis.topk(scores, k, order=order, nan="last")
        values = scores.gather(-1, indices)
        differ |= (got.indices != indices).any(-1)
        differ |= (got.values.view(torch.int32) != values.view(torch.int32)).any(-1)
    return int(differ.sum())


def runnable(way: selecting.Way, scores: torch.Tensor) -> tuple[Callable[[], object], bool]:
    """What is timed, and whether that is a replay."""
    if scores.is_cuda:
        try:
            graph = capture(lambda: way(scores))

            def replay(read: torch.Tensor = scores) -> None:
                # The scores live as long as the graph that reads them.
                graph.replay()

            return replay, True
        except Exception:
            torch.cuda.synchronize()
    return lambda: way(scores), False


def times(calls: dict[str, Callable[[], object]], repeats: int, cuda: bool) -> dict[str, list[float]]:
    """Microseconds of every call; each round has all of them in a new random order."""
    order, found = random.Random(0), {name: list[float]() for name in calls}
    flush = torch.empty(1 << 26, dtype=torch.int32, device="cuda") if cuda else None
    for _ in range(repeats):
        for name in order.sample(list(calls), len(calls)):
            if flush is None:
                begun = time.perf_counter()
                calls[name]()
                found[name].append(1e6 * (time.perf_counter() - begun))
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            found[name].append(1000 * start.elapsed_time(end))
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Of the median, 95 %, by ranks."""
    ordered, many = sorted(values), len(values)
    reach = 0.98 * math.sqrt(many)
    return ordered[max(0, math.floor(many / 2 - reach))], ordered[min(many - 1, math.ceil(many / 2 + reach))]


def measured(rows: int, n: int, k: int, device: str, repeats: int, console: Console) -> dict[str, Any]:
    """One case: checked, judged, timed."""
    hard = hard_rows(n, device, -(-rows // len(KINDS)))
    # Of a single row, the ties.
    hard = hard[list(KINDS).index("half zeros")][None] if rows == 1 else hard[:rows]
    record: dict[str, Any] = {"rows": rows, "n": n, "k": k, "wrong_rows": wrong_rows(hard, k), "ways": {}}
    scores = torch.randn(rows, n, device=device, generator=torch.Generator(device).manual_seed(1))
    record["wrong_rows"] += wrong_rows(scores, k)
    some = min(rows, 32)
    ties = tied_rows(some, n, k, device)
    right, calls = stable(ties)[:, :k], dict[str, Callable[[], object]]()
    ways, left_out = selecting.ways(scores, k)
    for name, said in left_out.items():
        console.print(f"{name} is left out: {said}")
    for name, way in ways.items():
        # SGLang's is made for so many rows.
        judge = selecting.ways(ties, k)[0][name] if name == "sglang" and some != rows else way
        calls[name], is_graph = runnable(way, scores)
        record["ways"][name] = {"ties": selecting.judged(judge, ties, right), "graph": is_graph}
        if name.startswith("qaxis"):
            # Ties at the cut, and a mask: what takes a second look.
            for kind, x in (("tied", tied_rows(rows, n, k, device)), ("masked", scores.clone())):
                if kind == "masked":
                    x[:, k // 2 :] = -math.inf
                calls[f"{name}, {kind}"], is_graph = runnable(way, x)
                record["ways"][f"{name}, {kind}"] = {"ties": "stable", "graph": is_graph}
    for name, found in times(calls, repeats, device != "cpu").items():
        low, high = interval(found)
        record["ways"][name] |= {"median_us": statistics.median(found), "low_us": low, "high_us": high}
    return record


def shown(record: dict[str, Any]) -> Table:
    """A case as a table."""
    table = Table(
        "way", "us", "95 %", "over qaxis", "ties", title=f"{record['rows']} x {record['n']}, k = {record['k']}"
    )
    ours = record["ways"]["qaxis"]["median_us"]
    for name, way in record["ways"].items():
        ratio, spread = f"{way['median_us'] / ours:.2f}", f"{way['low_us']:.1f} to {way['high_us']:.1f}"
        label = name if way["graph"] else f"{name} (no graph)"
        table.add_row(label, f"{way['median_us']:.1f}", spread, ratio, way["ties"])
    return table


@click.command()
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--repeats", default=41, show_default=True)
@click.option("--seconds", default=80.0, show_default=True, help="No case is begun later.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON of all numbers.")
def main(device: str, repeats: int, seconds: float, out: Path | None) -> None:
    """Check and time every case; exit with 1 if a row was wrong."""
    begun, console, cases = time.monotonic(), Console(width=110), CASES if device != "cpu" else ON_A_CPU
    card = torch.cuda.get_device_name() if device != "cpu" else "CPU"
    result: dict[str, Any] = {"card": card, "torch": torch.__version__, "repeats": repeats, "cases": []}
    for rows, n, k in cases:
        if time.monotonic() - begun > seconds:
            console.print(f"{rows} x {n}, k = {k}: no time left")
            continue
        record = measured(rows, n, k, device, repeats, console)
        result["cases"].append(record)
        console.print(shown(record))
        console.print(f"{record['wrong_rows']} of {2 * rows} rows differ from the stable sort")
        if out is not None:
            out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    raise SystemExit(any(record["wrong_rows"] for record in result["cases"]))


if __name__ == "__main__":
    main()
