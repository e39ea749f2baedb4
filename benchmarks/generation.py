"""Milliseconds a token of ``generate``: transformers' dense ways, dense ones under a CUDA graph, qaxis; on a GPU.

    python -m benchmarks.generation --layers 8 --lengths 8192,32768 --ways compiled,graph-cudnn,codes-2048

It is what the claim generation-speed times, in pieces. Caches are filled directly. Each length is written to
``--output`` as soon as it is there.
"""

from __future__ import annotations

import json
import time
import traceback
from pathlib import Path
from typing import Any

import click
import torch

from selfcheck.checks import ways
from selfcheck.inputs import random_llama

DEFAULT = (*ways.TRANSFORMERS, *ways.IDEAL, ways.FLOOR, "codes-2048", "codes-0.02")


def model_of(layers: int, device: str) -> Any:
    """The Llama shape with so many layers, random weights; 0 is SmolLM2-135M."""
    if layers:
        return random_llama.build(device, layers=layers, hidden=4096, head_dim=128, intermediate=14336)
    from selfcheck.inputs.subjects import load_model

    return load_model(None, device)[0].to(torch.bfloat16)


def profiled(model: Any, name: str, tokens: int, folder: Path, seed: int) -> str:
    """A trace of five tokens for chrome://tracing, and the kernels of them by time."""
    from torch.profiler import ProfilerActivity, profile

    running = ways.Running(ways.way(name, model), tokens, seed)
    running.generate(4)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        running.generate(5)
        torch.cuda.synchronize()
    seen.export_chrome_trace(str(folder / f"{name}-{model.config.num_hidden_layers}-{tokens}.json"))
    return str(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))


def short(rows: list[dict[str, Any]]) -> str:
    """A table: ways down, lengths across; ms a token, and times as fast as the fastest dense way of either kind."""
    lines = []
    for layers in dict.fromkeys(r["layers"] for r in rows):
        mine = [r for r in rows if r["layers"] == layers]
        lengths = list(dict.fromkeys(r["tokens"] for r in mine))
        lines.append(f"{layers} layers".ljust(14) + "".join(f"{n:>40}" for n in lengths))
        for name in dict.fromkeys(r["way"] for r in mine):
            lines.append(name.ljust(14) + "".join(cell(mine, name, n).rjust(40) for n in lengths))
    return "\n".join(lines)


def cell(rows: list[dict[str, Any]], name: str, tokens: int) -> str:
    took = {r["way"]: r for r in rows if r["tokens"] == tokens}
    if name not in took:
        return "-"
    one, out = took[name], f"{took[name]['ms']:.2f}"
    for kind in (ways.TRANSFORMERS, ways.IDEAL):
        dense = [took[x]["ms"] for x in kind if x in took]
        if name not in (*ways.TRANSFORMERS, *ways.IDEAL, ways.FLOOR) and dense:
            out += f" {min(dense) / one['ms']:.2f}x"
    return out + f" [{one['low']:.2f} {one['high']:.2f}] {one['slowest']:.1f}"


@click.command()
@click.option("--layers", default="8", show_default=True, help="Numbers of layers; 0 is SmolLM2-135M.")
@click.option("--lengths", default="8192,32768,131072", show_default=True, help="Tokens in the cache.")
@click.option("--ways", "names", default=",".join(DEFAULT), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--new", default=20, show_default=True, help="Tokens timed, a way and round.")
@click.option("--alone", is_flag=True, help="One cache at a time (32 layers of 131072 tokens need it).")
@click.option("--profile", is_flag=True, help="Also a trace and a table of kernels of each way.")
@click.option(
    "--output", "--out", "out", default="benchmarks/local", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--device", default="cuda", show_default=True)
def main(
    layers: str, lengths: str, names: str, rounds: int, new: int, alone: bool, profile: bool, out: Path, device: str
) -> None:
    """Time ways to generate."""
    out.mkdir(parents=True, exist_ok=True)
    chosen, rows = names.split(","), list[dict[str, Any]]()
    faults: list[str] = []

    def failed(name: str, error: Exception) -> None:
        traceback.print_exception(error, limit=-6)
        faults.append(f"{name}: {type(error).__name__}: {error}"[:300])

    with torch.no_grad():
        for many in map(int, layers.split(",")):
            model = model_of(many, device)
            for tokens in map(int, lengths.split(",")):
                begun = time.perf_counter()
                rows += ways.measured(model, chosen, tokens, rounds=rounds, new=new, seed=1, alone=alone, failed=failed)
                (out / "generation.json").write_text(json.dumps({"rows": rows, "faults": faults}, indent=1) + "\n")
                print(f"{many} layers, {tokens} tokens: {time.perf_counter() - begun:.0f} s", flush=True)
                for name in chosen if profile else ():
                    table = profiled(model, name, tokens, out, 1)
                    (out / f"{name}-{many}-{tokens}.txt").write_text(table + "\n")
                if device != "cpu":
                    torch.cuda.empty_cache()
            del model
    for r in rows:
        mib = [f"{r[x] / 2**20:.0f}" for x in ("needed", "held", "peak")]
        print(f"{r['layers']} {r['tokens']} {r['way']}: ready {r['ready']:.1f} s, MiB needed/held/peak {mib}")
    print("\n".join(faults))
    print("ms a token, times transformers' and the ideal dense [95 %] slowest")
    print(short(rows))


if __name__ == "__main__":
    main()
