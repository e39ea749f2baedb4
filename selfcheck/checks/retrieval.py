"""Pass keys and needles in long prompts: found by sparse attention whenever dense attention finds them?"""

from __future__ import annotations

import random
from typing import Any

import torch
from scipy import stats

import qaxis

from ..harness.claim import Context, Result, value

LENGTHS = (512, 2048, 8000)
#: prompts a cell
PROMPTS = 15
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


def _retrieved(
    model: Any, tokenizer: Any, hay: torch.Tensor, parts: tuple[str, str, str], depth: float, n: int
) -> bool:
    """Whether greedy decoding gives the whole answer: every answer token is the argmax after the true ones before."""
    hidden, question, answer = (
        tokenizer(x, return_tensors="pt", add_special_tokens=False).input_ids.to(hay.device) for x in parts
    )
    room = n - hidden.shape[1] - question.shape[1] - answer.shape[1]
    cut = int(depth * room)
    ids = torch.cat([hay[:, :cut], hidden, hay[:, cut:room], question, answer], 1)
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    length = answer.shape[1]
    logits = model.get_output_embeddings()(states[:, -length - 1 : -1])
    return bool((logits.argmax(-1) == answer).all())


@torch.inference_mode()
def retrieval(context: Context) -> Result:
    """Pass keys and needles found, by budget and prompt length, paired per prompt."""
    model, tokenizer = context.subjects.model, context.subjects.tokenizer
    count, lengths = (2, LENGTHS[:1]) if context.quick else (PROMPTS, LENGTHS)
    hays = context.texts(count, max(lengths))
    rows: list[list[Any]] = []
    plan = [(task, n, i) for task in TASKS for n in lengths for i in range(count)]
    found: dict[tuple[str, int, str], list[bool]] = {}
    for task, n, i in context.progress(plan, "prompts"):
        depth = (i + 0.5) / count
        for name, budget in BUDGETS.items():
            arguments = (model, tokenizer, hays[i], TASKS[task](i), depth, n)
            if budget is None:
                got = _retrieved(*arguments)
            else:
                with qaxis.sparse(model, budget, exactness="selection", strict=True):
                    got = _retrieved(*arguments)
            found.setdefault((task, n, name), []).append(got)
    for (task, n, name), hits in found.items():
        dense = found[(task, n, "dense")]
        lost, won = (sum(a and not b for a, b in zip(*pair, strict=True)) for pair in ((dense, hits), (hits, dense)))
        interval = stats.binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
        rows.append([task, n, name, sum(hits), len(hits), float(interval.low), float(interval.high), lost, won])
    changed = sum(r[7] + r[8] for r in rows)
    pairs = sum(r[4] for r in rows if r[2] != "dense")
    values = {
        "changed": value(changed, "prompts", n=pairs), "lost": value(sum(r[7] for r in rows), "prompts", n=pairs),
        "won": value(sum(r[8] for r in rows), "prompts", n=pairs), "prompts": value(count, "prompts a cell"),
        "dense": value(sum(r[3] for r in rows if r[2] == "dense"), "prompts", n=len(plan)),
    }  # fmt: skip
    by_task = "; ".join(
        f"{task} N={n}: " + ", ".join(f"{name} {sum(found[(task, n, name)])}/{count}" for name in BUDGETS)
        for task in TASKS
        for n in lengths
    )
    # A task that the dense model never solves says nothing about sparse attention.
    solvable = values["dense"]["value"] > 0
    return Result(
        solvable, "dense attention solves some prompts", by_task, values, pairs, {"rows": rows},
        [f"{r[0]}, N={r[1]}, {r[2]}" for r in rows],
    )  # fmt: skip
