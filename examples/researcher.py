"""A researcher with another model, corpus or budget: what does sparsity cost there?

python -m examples.researcher --model PATH_OR_NAME --corpus PATH_OR_NAME --coverage 0.05 --coverage 0.1 --out cost
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import qaxis
from selfcheck.harness.files import write_atomic
from selfcheck.inputs.subjects import load


@click.command()
@click.option("--model", "name", default=None, help="Directory, .gguf file or hub name; the pinned model by default.")
@click.option("--corpus", default=None, help=".bz2 dump, .txt, .json, .parquet or dataset; the pinned text by default.")
@click.option("--coverage", multiple=True, type=float, default=(0.05, 0.1, 0.25), show_default=True)
@click.option("--minimum", default=64, show_default=True, help="Keys always kept.")
@click.option("--tokens", default=1024, show_default=True, help="Length of each text.")
@click.option("--texts", default=4, show_default=True, help="Number of texts, at least 2.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", type=Path, default=None, help="Also write OUT.csv and OUT.png.")
def main(
    name: str | None,
    corpus: str | None,
    coverage: tuple[float, ...],
    minimum: int,
    tokens: int,
    texts: int,
    device: str,
    out: Path | None,
) -> None:
    """Perplexity change by budget, paired per token, with 95 % bootstrap intervals over texts."""
    subjects = load(name, corpus, device, texts, tokens)
    budgets = {f"{c:g}": qaxis.Budget(c, minimum) for c in coverage}
    losses: dict[str, list[torch.Tensor]] = {"dense": [], **{b: [] for b in budgets}}
    for ids, (way, into) in tqdm([(t, x) for t in subjects.texts for x in losses.items()], desc="forward passes"):
        if way == "dense":
            into.append(qaxis.token_losses(subjects.model, ids))
            continue
        with qaxis.sparse(subjects.model, budgets[way], exactness="selection"):
            into.append(qaxis.token_losses(subjects.model, ids))
    rows = []
    for way, budget in budgets.items():
        change = qaxis.paired_change(losses["dense"], losses[way])
        rows.append((budget.coverage, budget.k_eff(tokens), change.changed, change.percent, change.low, change.high))
    header = ("coverage", f"k_eff({tokens})", "perplexity", "change %", "low", "high")
    table = Table(*header, title=f"dense perplexity {change.base:.3f}, {texts} texts of {tokens} tokens")
    for row in rows:
        table.add_row(f"{row[0]:g}", str(row[1]), f"{row[2]:.3f}", *(f"{x:+.3f}" for x in row[3:]))
    Console().print(table)
    for kind, digest in subjects.digests.items():
        click.echo(f"{kind}: SHA-256 {digest}")
    click.echo(f"qaxis {qaxis.__version__}; to cite: the preprint entry of CITATION.cff, with the digests above.")
    if out is not None:
        text = io.StringIO()
        csv.writer(text).writerows([header, *rows])
        write_atomic(out.with_suffix(".csv"), text.getvalue().encode())
        draw(rows, out.with_suffix(".png"))
        click.echo(f"wrote {out.with_suffix('.csv')} and {out.with_suffix('.png')}")


def draw(rows: list[tuple[float, ...]], path: Path) -> None:
    """Perplexity change against coverage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    coverage, _, _, percent, low, high = zip(*rows, strict=True)
    figure, axis = plt.subplots(figsize=(4.5, 3), layout="constrained")
    errors = [[p - x for p, x in zip(percent, low, strict=True)], [x - p for p, x in zip(percent, high, strict=True)]]
    axis.errorbar(coverage, percent, yerr=errors, fmt="o", capsize=2)
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.set_xlabel("coverage")
    axis.set_ylabel("perplexity change (%)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())


if __name__ == "__main__":
    main()
