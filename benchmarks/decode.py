"""``topk_attention`` for one query a head: dense SDPA against it, as ratios in one run, with the floor beside them.

It scores every key canonically. The certified step, which ``enable`` decodes with, is timed by ``generation.py`` and by
the claim certified-speed.

Pairs are interleaved in random order and the median is reported. The floor is the time one read of the
keys and of the selected keys and values takes at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import qaxis

sdpa = torch.nn.functional.scaled_dot_product_attention


def seconds(f: Callable[[], object], cuda: bool) -> float:
    """Wall time of one call, device work included."""
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(variants: dict[str, Callable[[], object]], repeats: int, cuda: bool, label: str) -> dict[str, float]:
    """Median seconds of every variant; each round runs all of them in a new random order."""
    for f in variants.values():
        f()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in tqdm(range(repeats), desc=label, leave=False):
        for name in random.sample(list(variants), len(variants)):
            times[name].append(seconds(variants[name], cuda))
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


@click.command()
@click.option("--device", default="cpu", show_default=True)
@click.option("--repeats", default=21, show_default=True)
@click.option("--lengths", default="2048,8192,32768", show_default=True, help="Context lengths N.")
def main(device: str, repeats: int, lengths: str) -> None:
    """Time topk_attention for one query a head, B=1, H=8, Hkv=2, D=64, coverage 0.1."""
    cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    table = Table("N", "dense ms", "topk ms", "topk / dense", "selection ms", "floor ms")
    for n in map(int, lengths.split(",")):
        q = torch.randn(1, 8, 1, 64, device=device, dtype=dtype)
        k, v = torch.randn(2, 1, 2, n, 64, device=device, dtype=dtype)
        big = torch.empty(1 << 26, dtype=torch.uint8, device=device)
        budget = qaxis.Budget()
        out = medians(
            {
                "dense": lambda q=q, k=k, v=v: sdpa(q, k, v, enable_gqa=True),
                "qaxis": lambda q=q, k=k, v=v, b=budget: qaxis.topk_attention(q, k, v, b),
                "select": lambda q=q, k=k, b=budget: qaxis.topk_indices(q, k, b),
                "copy": lambda big=big: big.clone(),
            },
            repeats, cuda, f"N={n}",
        )  # fmt: skip
        bandwidth = 2 * big.numel() / out["copy"]
        selected = 8 * budget.k_eff(n) * 2 * 64 * q.element_size()
        floor = (k.numel() * k.element_size() + selected) / bandwidth
        ms = [f"{1e3 * x:.3f}" for x in (out["dense"], out["qaxis"], out["select"], floor)]
        table.add_row(str(n), ms[0], ms[1], f"{out['qaxis'] / out['dense']:.2f}", ms[2], ms[3])
    Console().print(table)


if __name__ == "__main__":
    main()
