"""A reviewer who doubts a number: recompute it with a few lines of NumPy that share nothing with the library.

python -m examples.reviewer
"""

from __future__ import annotations

import click
import numpy as np
import torch

import qaxis
from selfcheck.harness import evidence
from selfcheck.harness.files import ROOT
from selfcheck.inputs.capture import Capture
from selfcheck.inputs.subjects import documents, load_model, texts_of


@click.command()
@click.option("--tokens", default=1024, show_default=True, help="Length of the text.")
@click.option("--layer", default=15, show_default=True, help="Layer whose queries and keys are ranked.")
def main(tokens: int, layer: int) -> None:
    """Three doubts about the paper, each settled on the pinned model and text, beside the committed evidence."""
    model, tokenizer, _ = load_model(None, "cpu")
    (ids,) = texts_of(tokenizer, documents(None)[0], "cpu", 1, tokens)
    records = evidence.load(ROOT / evidence.DEFAULT)
    seen = Capture([layer], queries=32)
    with torch.inference_mode(), qaxis.observe_attention(model, seen):
        stock = model(ids).logits

    click.echo(f"1. Are the selected keys the top ones? Layer {layer}, the last 32 queries, {tokens} keys, budget 64.")
    (_, q, k, _) = seen.found[0]
    indices = qaxis.topk_indices(q, k, 64)[0].numpy()
    wrong = 0
    for head in range(q.shape[1]):
        queries, keys = q[0, head].double().numpy(), k[0, head // (q.shape[1] // k.shape[1])].double().numpy()
        for i, query in enumerate(queries):
            visible = tokens - 32 + i + 1
            along_axis = keys[:visible] @ (query / np.linalg.norm(query))
            wrong += set(np.argsort(-along_axis, kind="stable")[:64]) != set(indices[head, i])
    click.echo(f"   NumPy in float64, along the query axis: {wrong} of {q.shape[1] * 32} sets differ.")
    click.echo(f"   Evidence: {records['selection']['headline']}.")

    click.echo("2. Does switching it off leave the stock model?")
    with torch.inference_mode():
        with qaxis.sparse(model, 64):
            on = model(ids).logits
        off = model(ids).logits
    click.echo(f"   max|dlogit| = {float((off - stock).abs().max()):g} off, {float((on - stock).abs().max()):.2f} on.")
    click.echo(f"   Evidence: {records['flag-off']['headline']}.")

    click.echo("3. Does the INT8 cache take half the bytes?")
    cache = qaxis.Int8Cache(model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens
    click.echo(
        f"   {cache.stored_bytes():,} bytes for {numbers:,} numbers: {cache.stored_bytes() / (2 * numbers):.4f}."
    )
    click.echo(f"   Evidence (2048 tokens): {records['int8-bytes']['headline']}.")
    if wrong or not torch.equal(off, stock):
        raise click.ClickException("a doubt was justified")


if __name__ == "__main__":
    main()
