"""CPU selection: a matrix product and canonical scores in the band only, against canonical scores of every key.

Both are linear in the number of queries, so blocks of them are timed, interleaved in random order; the sets must agree.

    python -m benchmarks.selection --n 8192
"""

from __future__ import annotations

import random
import statistics
import time

import click
import torch
from tqdm import tqdm

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.attention.selection import allowed_keys


def everything(q: torch.Tensor, k: torch.Tensor, budget: qaxis.Budget, allowed: torch.Tensor) -> torch.Tensor:
    """The same selection from the canonical score of every key, as a mask."""
    score = canonical.scores(q, k)
    n = k.shape[2]
    word = (canonical.sort_key(score).long() << 32) | (n - 1 - torch.arange(n))
    word = word.masked_fill(~allowed, torch.iinfo(torch.int64).min)
    k_eff = budget.table(n, q.device)[allowed.sum(-1)].expand(word.shape[:3])
    kth = word.topk(int(k_eff.max()), dim=-1).values.gather(-1, k_eff[..., None] - 1)
    return word >= kth


@click.command()
@click.option("--n", default=8192, show_default=True, help="Keys, and queries of the prefill.")
@click.option("--heads", default=9, show_default=True)
@click.option("--block", default=128, show_default=True, help="Queries timed at once.")
@click.option("--repeats", default=5, show_default=True)
def main(n: int, heads: int, block: int, repeats: int) -> None:
    """Time blocks of a causal prefill at the default budget, head_dim 64, 3 KV heads."""
    torch.manual_seed(0)
    q, k = torch.randn(1, heads, n, 64), torch.randn(1, 3, n, 64)
    budget = qaxis.Budget()
    times: dict[str, list[float]] = {"certified": [], "everything": []}
    differ = 0
    for i in tqdm(range(repeats), desc="blocks"):
        # The last query of the block decides how many keys there are; blocks are spread over the prefill.
        end = n - i * (n // repeats // block * block)
        part, keys = q[:, :, end - block : end], k[:, :, :end]
        allowed = allowed_keys(part, keys, True)
        found = {}
        for name in random.sample(list(times), 2):
            begun = time.perf_counter()
            if name == "certified":
                found[name] = qaxis.topk_indices(part, keys, budget, backend="reference")
            else:
                found[name] = everything(part, keys, budget, allowed)
            times[name].append(time.perf_counter() - begun)
        mask = torch.zeros(1, heads, block, end + 1, dtype=torch.bool)
        mask.scatter_(3, torch.where(found["certified"] < 0, end, found["certified"]), True)
        differ += int((mask[..., :end] != found["everything"]).any(-1).sum())
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    per = {name: statistics.median(t) / block * 1000 for name, t in times.items()}
    print(f"{differ} of {repeats * block * heads} sets differ; everything / certified = {ratio:.1f}")
    print(", ".join(f"{name} {ms:.1f} ms a query of {heads} heads" for name, ms in per.items()))


if __name__ == "__main__":
    main()
