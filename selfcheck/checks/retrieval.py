"""Pass keys and needles in long prompts: found by sparse attention whenever dense attention finds them?"""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import torch
from scipy import stats
from transformers import DynamicCache

import qaxis

from ..harness.claim import Context, Result, value

LENGTHS = (512, 2048, 8000)
#: prompts a cell, each with another needle
PROMPTS = 12
BUDGETS = {
    "dense": None, "2 %": qaxis.Budget(0.02, 16), "5 %": qaxis.Budget(0.05, 16), "10 %": qaxis.Budget(0.1, 16),
    "25 %": qaxis.Budget(0.25, 16),
}  # fmt: skip
NEEDLES = (
    ("Lisbon", "ride the yellow tram"), ("Oslo", "swim in the cold fjord"), ("Quito", "climb the old bell tower"),
    ("Hanoi", "drink egg coffee at dawn"), ("Cairo", "sail a felucca at sunset"), ("Perth", "feed the black swans"),
    ("Turin", "taste bitter chocolate"), ("Busan", "walk the night market"), ("Accra", "dance on the beach"),
    ("Riga", "listen to the organ"), ("Lima", "eat fresh ceviche"), ("Bern", "watch the brown bears"),
)  # fmt: skip


def _passkey(i: int) -> tuple[str, str, str]:
    key = str(random.Random(1000 + i).randrange(10000, 100000))
    return (
        f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        "\nWhat is the pass key? The pass key is",
        f" {key}",
    )


def _needle(i: int) -> tuple[str, str, str]:
    city, thing = NEEDLES[i % len(NEEDLES)]
    return (
        f"\nThe best thing to do in {city} is to {thing}.\n",
        f"\nQuestion: What is the best thing to do in {city}?\nAnswer: The best thing to do in {city} is to",
        f" {thing}",
    )


TASKS = {"pass key": _passkey, "needle": _needle}


def _prompt(tokenizer: Any, hay: torch.Tensor, i: int, depth: float, n: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """(text with every task's hidden sentence in it, {task: (question, answer)}), token ids ``[1, length]`` each.

    A text and its longest question are ``n`` tokens; the sentences lie behind each other at ``depth``.
    """

    def ids(text: str) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(hay.device)

    parts = {task: tuple(ids(text) for text in make(i)) for task, make in TASKS.items()}
    hidden = torch.cat([hide for hide, _, _ in parts.values()], 1)
    asked = max(question.shape[1] + answer.shape[1] for _, question, answer in parts.values())
    room = n - hidden.shape[1] - asked
    cut = int(depth * room)
    text = torch.cat([hay[:, :cut], hidden, hay[:, cut:room]], 1)
    return text, {task: (question, answer) for task, (_, question, answer) in parts.items()}


def _answers(model: Any, text: torch.Tensor, tasks: dict[str, Any]) -> dict[str, bool]:
    """Whether greedy decoding gives the whole answer of each task.

    The text is read once and every question asked after it: an answer counts if each of its tokens is the argmax
    after the true ones before.
    """
    cache, decoder, head = DynamicCache(config=model.config), model.get_decoder(), model.get_output_embeddings()
    decoder(input_ids=text, past_key_values=cache, use_cache=True)
    found = {}
    for task, (question, answer) in tasks.items():
        ids, length = torch.cat([question, answer], 1), answer.shape[1]
        states = decoder(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        found[task] = bool((head(states[:, -length - 1 : -1]).argmax(-1) == answer).all())
        cache.crop(-ids.shape[1])
    return found


def _cell(task: str, n: int, name: str, hits: list[bool], dense: list[bool]) -> dict[str, Any]:
    """One row: prompts answered, with a Wilson interval, and what changed against dense attention."""
    lost, won = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((dense, hits), (hits, dense)))
    interval = stats.binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return {
        "task": task, "tokens": n, "budget": name, "found": sum(hits), "prompts": len(hits),
        "low": float(interval.low), "high": float(interval.high), "lost": lost, "won": won,
    }  # fmt: skip


def _changed(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sparse answers lost and won, in all and by task.

    Only what dense attention answers can be lost, and only what it does not can be won: those are counted against.
    """
    values = {}
    for name, some in {
        "": rows,
        **{f"{x.replace(' ', '')}_": [r for r in rows if r["task"] == x] for x in TASKS},
    }.items():
        dense = {(r["task"], r["tokens"]): r["found"] for r in some if r["budget"] == "dense"}
        sparse = [r for r in some if r["budget"] != "dense"]
        known = sum(dense[r["task"], r["tokens"]] for r in sparse)
        for what, n in (("lost", known), ("won", sum(r["prompts"] for r in sparse) - known)):
            values[f"{name}{what}"] = value(sum(r[what] for r in sparse), "answers", n=n)
    return values


@torch.inference_mode()
def retrieval(context: Context) -> Result:
    """Pass keys and needles found, by budget and prompt length, paired per prompt."""
    model, tokenizer = context.subjects.model, context.subjects.tokenizer
    count, lengths = (2, LENGTHS[:1]) if context.quick else (PROMPTS, LENGTHS)
    hays = context.texts(count, max(lengths))
    found: dict[tuple[str, int, str], list[bool]] = {(t, n, b): [] for t in TASKS for n in lengths for b in BUDGETS}
    for n, i in context.progress([(n, i) for n in lengths for i in range(count)], "prompts"):
        text, tasks = _prompt(tokenizer, hays[i], i, (i + 0.5) / count, n)
        for name, budget in BUDGETS.items():
            sparse = qaxis.sparse(model, budget, exactness="selection", strict=True) if budget else nullcontext()
            with sparse:
                answered = _answers(model, text, tasks)
            for task, hit in answered.items():
                found[task, n, name].append(hit)
    rows = [_cell(*key, hits, found[(*key[:2], "dense")]) for key, hits in found.items()]
    pairs = sum(r["prompts"] for r in rows if r["budget"] != "dense")
    dense, asked = (sum(r[x] for r in rows if r["budget"] == "dense") for x in ("found", "prompts"))
    values = {"prompts": value(count, "prompts a cell"), "dense": value(dense, "prompts", n=asked), **_changed(rows)}
    return Result(
        # A task that the dense model never solves says nothing about sparse attention.
        passed=dense > 0,
        verdict=f"dense attention answers {dense} of {asked} prompts",
        headline="; ".join(
            f"{task} N={n}: " + ", ".join(f"{name} {sum(found[task, n, name])}/{count}" for name in BUDGETS)
            for task in TASKS
            for n in lengths
        ),
        values=values,
        cases=pairs,
        data={"rows": rows},
        checks=[f"{r['task']}, N={r['tokens']}, {r['budget']}" for r in rows],
    )
