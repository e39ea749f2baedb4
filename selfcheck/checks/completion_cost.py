"""What top-k attention costs a model in perplexity, as it is and completed by what it left out."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

import qaxis

from ..harness.claim import Context, NotRunError, Result, value
from .changes import as_row, as_value, in_words

COMPLETIONS = ("none", "mean", "linear")


class Plan(NamedTuple):
    """What is measured: so many texts of so many tokens, under each budget."""

    texts: int
    tokens: int
    budgets: dict[str, qaxis.Budget]


#: short texts on a CPU: budgets without a minimum that would keep all of their keys
SHORT = {"c10": qaxis.Budget(0.1, 16), "c05": qaxis.Budget(0.05, 16)}
LONG = {"c10": qaxis.Budget(0.1, 64), "c05": qaxis.Budget(0.05, 64), "k256": qaxis.Budget(0, 256)}


def _plan(context: Context) -> Plan:
    if context.device == "cpu":
        return Plan(2, 384, {"c10": SHORT["c10"]}) if context.quick else Plan(4, 1024, SHORT)
    return Plan(3, 1024, LONG) if context.quick else Plan(40, 8192, LONG)


def perplexity(context: Context) -> Result:
    """Changes of perplexity against dense attention, paired by token, of every budget without and with completions."""
    plan = _plan(context)
    model, texts = context.subjects.model, context.texts(plan.texts, plan.tokens)
    # On a CPU no engine of a prompt is fast but the masked one.
    how: dict[str, Any] = {"exactness": "selection"} if context.device == "cpu" else {}
    ways = [("dense", "none"), *itertools.product(plan.budgets, COMPLETIONS)]
    lost: dict[tuple[str, str], list[torch.Tensor]] = {way: [] for way in ways}
    for ids, way in context.progress(list(itertools.product(texts, ways)), "forward passes"):
        name, completion = way
        sparse = name != "dense"
        with qaxis.sparse(model, plan.budgets[name], completion=completion, **how) if sparse else nullcontext():
            lost[way].append(qaxis.token_losses(model, ids))
    values: dict[str, Any] = {"texts": value(len(texts), "texts"), "tokens": value(plan.tokens, "tokens")}
    rows: list[dict[str, Any]] = []
    worse: list[str] = []
    for name in plan.budgets:
        changes = {
            kind: qaxis.paired_change(lost["dense", "none"], lost[name, kind], seed=context.seed)
            for kind in COMPLETIONS
        }
        plain = changes["none"]
        for kind, change in changes.items():
            values[f"{name}_{kind}"] = as_value(change)
            rows.append({"budget": name, "completion": kind, **as_row(change)})
            if kind != "none":
                # What a target is held to: the upper end of the interval.
                values[f"{name}_{kind}_upper"] = value(change.high, "%", n=change.texts)
                values[f"{name}_{kind}_left"] = value(change.percent / plain.percent, "of the cost")
                gained = qaxis.paired_change(lost[name, "none"], lost[name, kind], seed=context.seed)
                values[f"{name}_{kind}_gained"] = as_value(gained)
                if not gained.percent < 0:
                    worse.append(f"{name}, {kind}: {in_words(gained)} against none")
        if not plain.percent > 0:
            worse.append(f"{name}: top-k attention costs nothing, {in_words(plain)}")
    return Result(
        passed=not worse,
        verdict=worse[0] if worse else "top-k attention costs something, and less with each completion",
        headline="; ".join(
            f"{name}: " + ", ".join(f"{r['completion']} {r['change']:+.2f} %" for r in rows if r["budget"] == name)
            for name in plan.budgets
        ),
        values=values,
        cases=len(texts) * len(ways),
        data={"rows": rows},
        checks=[f"{name}, {completion}" for name, completion in ways],
    )


def perplexity_gpu(context: Context) -> Result:
    """The same at full length."""
    if context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")
    return perplexity(context)
