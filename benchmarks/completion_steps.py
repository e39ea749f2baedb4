"""What the scores of 16 bits, by which a step over codes weighs what it leaves out, cost in perplexity.

    python -m benchmarks.completion_steps --out benchmarks/completion-steps.json

The newest tokens of every article are decoded one by one by ``generate``, after the others as a prompt, float32: by the
step over 8-bit codes and by the step over the keys themselves, which find the same keys and differ in those scores
alone; and densely. Losses are paired per token. A run that was stopped goes on where it was with the same command.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import click
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import qaxis
from benchmarks.completion import WINDOWS, Clock, Store, about_of, load, say, subject_options, texts_of
from benchmarks.completion_report import Paired, interval, paired
from qaxis.validation import require

COVERAGES = (0.1, 0.02)
INDEXES = ("codes", "bounds")
KINDS = ("none", "mean", "linear")
#: index of the cache, completion, coverage
Way = tuple[str, str, float]


def ways() -> dict[str, Way | None]:
    """By name, dense attention first; without a completion one index is enough, as outputs have the same bits."""
    every = [x for x in itertools.product(INDEXES, KINDS, COVERAGES) if x[1] != "none" or x[0] == INDEXES[0]]
    return {"dense": None, **{f"{index}, {kind}, {c:g}": (index, kind, c) for index, kind, c in every}}


class Told(LogitsProcessor):
    """Leaves ``generate`` no choice but the next token of a text, int64 ``[N]``."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        one = torch.full_like(scores, -torch.inf)
        one[:, self.text[input_ids.shape[1]]] = 0.0
        return one


@torch.inference_mode()
def losses_of_steps(model: Any, ids: torch.Tensor, steps: int, cache: Any) -> torch.Tensor:
    """Losses in nats of the last ``steps`` tokens of ``ids [1, N]``, decoded one by one, float64 ``[steps]``."""
    first = ids.shape[1] - steps
    require(1 <= steps < ids.shape[1], "steps", steps, f"from 1 to {ids.shape[1] - 1}")
    done = model.generate(
        ids[:, :first], attention_mask=torch.ones_like(ids[:, :first]), past_key_values=cache, max_new_tokens=steps,
        min_new_tokens=steps, do_sample=False, logits_processor=LogitsProcessorList([Told(ids[0])]),
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    require(torch.equal(done.sequences, ids), "generate", "other tokens", "those of the text")
    logits = torch.cat(done.logits).float()
    return torch.nn.functional.cross_entropy(logits, ids[0, first:], reduction="none").double().cpu()


def losses_of(model: Any, ids: torch.Tensor, steps: int, way: Way | None) -> torch.Tensor:
    """The same of one way; None is dense attention."""
    if way is None:
        return losses_of_steps(model, ids, steps, DynamicCache(config=model.config))
    index, kind, coverage = way
    with qaxis.sparse(model, qaxis.Budget(coverage, 64), completion=kind, strict=True):
        return losses_of_steps(model, ids, steps, qaxis.Cache(model.config, index=index))


def measure(model: Any, texts: list[torch.Tensor], steps: int, store: Store, clock: Clock) -> bool:
    """Every way of every article that is missing; False if time ran out."""
    for i, text in enumerate(texts):
        record = store.article(i, text)["ways"]
        for name, way in ways().items():
            if name in record:
                continue
            if not clock.allows():
                return False
            with clock.timed():
                record[name] = {"loss": float(losses_of(model, text.to(model.device), steps, way).sum())}
            store.write()
            say(f"article {i}: {name}")
    return True


def change(store: Store, steps: int, base: str, way: str) -> Paired | None:
    """Over all articles that have both; None if none has."""
    both = [x["ways"] for x in store.document["articles"].values() if {base, way} <= {*x["ways"]}]
    sums = torch.tensor([[x[name]["loss"] for x in both] for name in (base, way)], dtype=torch.float64)
    return paired(*(sums / steps)) if both else None


def report_of(store: Store, steps: int) -> str:
    """Table in Markdown: cost of every way against dense attention, and of codes against keys."""

    def said(base: str, way: str) -> str:
        found = change(store, steps, base, way)
        return "" if found is None else f"{found.percent:+.4f} {interval(found.low, found.high)}"

    lines = ["| completion, coverage | keys, % of dense | codes, % of dense | codes, % of keys |", "|---|---|---|---|"]
    for kind, coverage in itertools.product(KINDS, COVERAGES):
        codes, keys = (f"{index}, {kind}, {coverage:g}" for index in INDEXES)
        cells = (said("dense", keys), said("dense", codes), said(keys, codes))
        lines.append(f"| {kind}, {coverage:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@subject_options
@click.option("--steps", default=512, show_default=True, help="So many tokens, the newest, are decoded one by one.")
@click.option("--seconds", type=float, help="Begin nothing that would end later.")
@click.option("--device", default=None, help="cuda where there is one.")
def main(
    model: str, subject: Path | None, corpus: str | None, articles: int | None, length: int | None, out: Path,
    steps: int, seconds: float | None, device: str | None,
) -> None:  # fmt: skip
    """Measure what is missing in --out, and print the table of what is there."""
    clock = Clock(seconds)
    count, tokens = (given or usual for given, usual in zip((articles, length), WINDOWS[model], strict=True))
    loaded, tokenizer, digest = load(model, subject, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    texts = texts_of(tokenizer, None, corpus, count, tokens)
    store = Store(out, {**about_of(model, loaded, digest, tokens), "steps": steps})
    done = measure(loaded, texts, steps, store, clock)
    say("everything is measured" if done else "time ran out: the same command goes on")
    click.echo(report_of(store, steps))


if __name__ == "__main__":
    main()
