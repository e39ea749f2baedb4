"""An inference engineer: exact sparse attention and the INT8 cache in generate().

python -m examples.engineer --prompt "The lighthouse keeper"
"""

from __future__ import annotations

import click
import torch
from transformers import DynamicCache

import qaxis
from selfcheck.inputs.subjects import load_model

PROMPT = "In 1969 two people walked on the Moon for the first time. Their names were"


@click.command()
@click.option("--model", "name", default=None, help="Directory, .gguf file or hub name; the pinned model by default.")
@click.option("--prompt", default=PROMPT, show_default=True)
@click.option("--new", default=24, show_default=True, help="Tokens to generate.")
@click.option("--coverage", default=0.25, show_default=True)
@click.option("--minimum", default=8, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(name: str | None, prompt: str, new: int, coverage: float, minimum: int, device: str) -> None:
    """Dense, sparse, and sparse on the INT8 cache, with what each layer kept."""
    # A model of your own: AutoModelForCausalLM.from_pretrained(NAME, attn_implementation="qaxis") does both steps.
    model, tokenizer, _ = load_model(name, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}

    dense_cache = DynamicCache(config=model.config)
    dense = model.generate(**inputs, past_key_values=dense_cache, **options)
    click.echo(f"dense:       {tokenizer.decode(dense[0])}")

    # One line: every layer now attends to its exact top-k keys. strict: anything else would be an error.
    qaxis.enable(model, qaxis.Budget(coverage, minimum), strict=True)
    with qaxis.record(model) as recording:
        sparse = model.generate(**inputs, **options)
    click.echo(f"sparse:      {tokenizer.decode(sparse[0])}")

    cache = qaxis.Int8Cache(model.config)
    both = model.generate(**inputs, past_key_values=cache, **options)
    click.echo(f"sparse INT8: {tokenizer.decode(both[0])}")
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense_cache.layers)
    click.echo(f"\ncache: {stored:,} bytes in {model.dtype}, {cache.stored_bytes():,} bytes as INT8")
    click.echo("\nwhat attention kept (mass: share of the dense attention weight):")
    click.echo(recording.summary())

    # The first layers dense, sinks and a recent window kept inside the budget.
    qaxis.enable(model, {0: "dense", "default": qaxis.Budget(coverage, minimum)}, sinks=2, recent=4)
    tuned = model.generate(**inputs, **options)
    click.echo(f"\nlayer 0 dense, 2 sinks, 4 recent: {tokenizer.decode(tuned[0])}")

    qaxis.disable(model)
    again = model.generate(**inputs, **options)
    click.echo(f"off again, equal to dense: {torch.equal(dense, again)}")
    if not torch.equal(dense, again):
        raise click.ClickException("switching off left a trace")


if __name__ == "__main__":
    main()
