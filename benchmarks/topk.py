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
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import qaxis
from selfcheck.harness.timing import capture

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
#: how often a rival is asked for the same
AGAIN = 20
Way = Callable[[torch.Tensor], Any]


def hard_rows(rows: int, n: int, device: str) -> torch.Tensor:
    """``[rows, n]`` of kinds that take turns."""
    g = torch.Generator(device).manual_seed(n)
    i = torch.arange(n, device=device)
    kinds: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x,
        lambda x: torch.relu(x),
        lambda x: (x * 8).round() / 8,
        lambda x: torch.where(i % 3 == 0, -0.0, 0.0),
        lambda x: torch.where(i < n // 100, x, -math.inf),
        lambda x: i.float(),
        lambda x: -i.float(),
        lambda x: x + 9.0 * (i > 0.99 * n),
        lambda x: torch.where(i % 7 == 0, math.nan, x),
        lambda x: torch.where(i % 2 == 0, math.nan, -math.inf),
        lambda x: torch.where(i % 9 == 0, math.inf, x),
        lambda x: 1 + (x * 4).round() * 2.0**-23,
        lambda x: x * 2.0**-140,
        lambda x: torch.relu(x - 2.5),
        lambda x: torch.full_like(x, math.nan),
        lambda x: (i % 64).float(),
    ]
    out = torch.randn(rows, n, device=device, generator=g)
    for row in range(rows):
        # Of a single row, the ties.
        out[row] = kinds[(row + (rows == 1)) % len(kinds)](out[row])
    return out


def stable(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The first k indices of torch's stable sort, NaN put behind all."""
    missing = torch.isnan(scores)
    first = torch.sort(scores.masked_fill(missing, -math.inf), dim=-1, descending=True, stable=True).indices
    if not bool(missing.any()):
        return first[:, :k]
    last = torch.sort(missing.gather(-1, first).to(torch.int8), dim=-1, stable=True).indices
    return first.gather(-1, last)[:, :k]


def tied_rows(rows: int, n: int, k: int, device: str) -> torch.Tensor:
    """``[rows, n]`` of which about half of the k best are above zero, and all others are zero."""
    scores = torch.randn(rows, n, device=device, generator=torch.Generator(device).manual_seed(2))
    return torch.relu(scores + float(torch.special.ndtri(torch.tensor(k / (2 * n), dtype=torch.float64))))


def wrong_rows(scores: torch.Tensor, k: int) -> int:
    """Rows of which topk gives another set, order or bit than the stable sort."""
    expected = stable(scores, k)
    differ = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    for order, indices in (("rank", expected), ("position", expected.sort(-1).values)):
        got = qaxis.topk(scores, k, order=order, nan="last")
        values = scores.gather(-1, indices)
        differ |= (got.indices != indices).any(-1)
        differ |= (got.values.view(torch.int32) != values.view(torch.int32)).any(-1)
    return int(differ.sum())


def flashinfer_ways(k: int) -> dict[str, Way]:
    """FlashInfer's top-k as it comes, and told to be deterministic, with ties to the lower position if it knows how."""
    import flashinfer

    ways: dict[str, Way] = {"flashinfer": lambda x: flashinfer.top_k(x, k)[1]}
    ways["flashinfer deterministic"] = lambda x: flashinfer.top_k(x, k, deterministic=True)[1]
    try:
        from flashinfer.topk import TopKTieBreak
    except ImportError:
        return ways
    small = TopKTieBreak.SMALL
    ways["flashinfer lower first"] = lambda x: flashinfer.top_k(x, k, deterministic=True, tie_break=small)[1]
    return ways


def sglang_ways(scores: torch.Tensor, k: int) -> dict[str, Way]:
    """SGLang's top-k, which is for 2048 of each row."""
    import sgl_kernel

    lengths = torch.full((len(scores),), scores.shape[1], dtype=torch.int32, device=scores.device)
    return {"sglang": lambda x: sgl_kernel.fast_topk_v2(x, lengths, k)} if k == 2048 else {}


def ways_of(scores: torch.Tensor, k: int, console: Console) -> dict[str, Way]:
    """All that select, by name; each returns indices. Rivals that cannot be run here are said and left out."""
    ways: dict[str, Way] = {
        "qaxis": lambda x: qaxis.topk(x, k, nan="last").indices,
        "qaxis by rank": lambda x: qaxis.topk(x, k, order="rank", nan="last").indices,
        "torch.topk": lambda x: torch.topk(x, k).indices,
        "torch.topk unsorted": lambda x: torch.topk(x, k, sorted=False).indices,
        "torch.sort stable": lambda x: torch.sort(x, descending=True, stable=True).indices[:, :k],
    }
    rivals: dict[str, Way] = {}
    if scores.is_cuda:
        for name, make in (("flashinfer", partial(flashinfer_ways, k)), ("sglang", partial(sglang_ways, scores, k))):
            try:
                rivals |= make()
            except Exception as error:
                console.print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}")
    for name, way in rivals.items():
        try:
            way(scores)
            ways[name] = way
        except Exception as error:
            console.print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[:1]}")
    return ways


def judged(way: Way, ties: torch.Tensor, right: torch.Tensor) -> str:
    """Whether a way gives the stable sort's sets of rows full of ties, and the same sets and order each time."""
    first = way(ties).long()
    sets = bool(torch.equal(first.sort(-1).values, right.sort(-1).values))
    repeats = all(torch.equal(way(ties).long(), first) for _ in range(AGAIN))
    return ("stable" if sets else "other ties") + ("" if repeats else ", varies")


def runnable(way: Way, scores: torch.Tensor) -> tuple[Callable[[], object], bool]:
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
    hard = hard_rows(rows, n, device)
    record: dict[str, Any] = {"rows": rows, "n": n, "k": k, "wrong_rows": wrong_rows(hard, k), "ways": {}}
    scores = torch.randn(rows, n, device=device, generator=torch.Generator(device).manual_seed(1))
    record["wrong_rows"] += wrong_rows(scores, k)
    some = min(rows, 32)
    ties = tied_rows(some, n, k, device)
    right, calls = stable(ties, k), dict[str, Callable[[], object]]()
    for name, way in ways_of(scores, k, console).items():
        # Ours is what was just checked.
        judge = ways_of(ties, k, console)[name] if name == "sglang" and some != rows else way
        calls[name], is_graph = runnable(way, scores)
        record["ways"][name] = {"ties": judged(judge, ties, right), "graph": is_graph}
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
