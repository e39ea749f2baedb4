"""What top-k attention costs a model in perplexity against the bytes that it reads, beside what others select.

Every way is one of ``rivals/bytes_read.py``, which has the formulas: keys, values, scales, what a selection scans and
what a completion keeps, of one decode step, mean over all positions. All of it is matrix products in float32. A rival's
line has the masses of its own approximate scores, as the exact ones would cost it the bytes of all keys. Rivals choose
as their authors do, SparQ once for the heads of a group; what that would gain Loki and Double Sparsity is measured.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch

import qaxis

from ..harness.claim import Context, NotRunError, Result, value
from ..rivals.bytes_read import DENSE, Plan, Shape, mean_bytes, shape_of
from ..rivals.choosing_keys import AUTHORED, BY_GROUPS
from ..rivals.completing import attending_by
from .changes import as_row, as_value, in_words

COVERAGES = (0.01, 0.02, 0.05, 0.1, 0.2)
#: as many keys as the bytes of exact keys of that coverage with a line pay for, both in 16 or both in 8 bits
EQUAL = 0.1
TOLERANCES = (0.1, 0.02)
HEADLINE = ("c10_none", "c10_linear", "sparq_equal_own", "int8_dense", "int8_c10_linear", "int8_sparq_equal_own")


def plans() -> list[Plan]:
    """All that is measured beside dense attention: of each only budgets at which it is a point of its own."""
    exact = [("coverage", x) for x in COVERAGES]
    usual = [("coverage", x) for x in (0.05, 0.1)]
    equal = ("bytes", EQUAL)
    few, more = ("coverage", 0.05), ("coverage", 0.2)
    rivals = [(rival, kind) for rival in AUTHORED for kind in ("none", "own mass")] + [("SparQ", "SparQ")]
    return [
        *(Plan(budget) for budget in exact),
        *(Plan(budget, kind) for kind in ("mean", "block 64") for budget in usual),
        # A fifth of the keys leaves the line nothing to mend.
        *(Plan(budget, "linear") for budget in exact[:-1]),
        *(Plan(("tolerance", x), "linear") for x in TOLERANCES),
        *(Plan(budget, kind, rival) for rival, kind in rivals for budget in (few, equal)),
        *(Plan(more, kind, rival) for rival, kind in rivals if kind != "own mass"),
        *(Plan(equal, kind, rival) for rival in BY_GROUPS for kind in ("none", "own mass")),
        # What a user would pick first: all keys, of half the bytes.
        Plan(("all", 0), stored=True),
        *(Plan(("coverage", x), kind, stored=True) for kind in ("none", "linear") for x in (0.02, 0.1)),
        *(Plan(equal, kind, rival, stored=True) for rival, kind in rivals),
    ]


def name_of(plan: Plan) -> str:
    """A way's name among the values: selection, budget, completion."""
    what, x = plan.budget
    if what == "all":
        return "int8_dense" if plan.stored else "dense"
    budget = {"coverage": "c", "tolerance": "t", "bytes": "equal"}[what]
    number = "" if what == "bytes" else f"{100 * x:02.0f}"
    kind = {"own mass": "linear", "block 64": "block", "SparQ": "own"}.get(plan.complete, plan.complete)
    return "_".join(filter(None, ("int8" * plan.stored, plan.rival.lower().replace(" ", "_"), budget + number, kind)))


def _kept(plan: Plan, shape: Shape, length: int, found: list[float]) -> float:
    """The mean k of a way: of the selection where only that knows it, else of the budget."""
    if found:
        return statistics.fmean(found)
    if plan.budget[0] == "all":
        return (length + 1) / 2
    counts = plan.counts(shape, length)
    if counts is None:
        raise ValueError(f"budget={plan.budget}: allowed is one of a number of keys, or a selection that counted them")
    return float(counts(torch.arange(1, length + 1)).double().mean())


def row(plan: Plan, shape: Shape, length: int, kept: float, change: qaxis.PerplexityChange) -> dict[str, Any]:
    """A way in the record: mean k, bytes a token, layer and KV head, their share of dense attention's, the cost."""
    read, dense = mean_bytes(plan, shape, length, kept), mean_bytes(DENSE, shape, length, None)
    return {
        "way": name_of(plan), "selection": plan.rival or ("dense" if plan.budget[0] == "all" else "exact"),
        "completion": plan.complete, "stored": plan.stored, "budget": plan.budget[0], "at": plan.budget[1],
        "kept": kept, "bytes": read / shape.kv_heads, "share": read / dense, **as_row(change),
    }  # fmt: skip


def measured(model: Any, texts: list[torch.Tensor], context: Context) -> Result:
    """Every way on every text ``[1, N]``, against dense attention, paired by token."""
    shape, length, every = shape_of(model), texts[0].shape[1], plans()
    lost: dict[Plan, list[torch.Tensor]] = {plan: [] for plan in (DENSE, *every)}
    kept: dict[Plan, list[float]] = {plan: [] for plan in every}
    for ids, plan in context.progress(list(itertools.product(texts, lost)), "forward passes"):
        with attending_by(model, plan.way(shape, length)) as tally:
            lost[plan].append(qaxis.token_losses(model, ids))
        if tally.mean is not None:
            kept[plan].append(tally.mean)
    values = {"texts": value(len(texts), "texts"), "tokens": value(length, "tokens")}
    values["dense_bytes"] = value(
        round(mean_bytes(DENSE, shape, length, None) / shape.kv_heads), "bytes a token, layer and KV head"
    )
    rows: list[dict[str, Any]] = []
    changes: dict[str, qaxis.PerplexityChange] = {}
    for plan in every:
        name, k = name_of(plan), _kept(plan, shape, length, kept[plan])
        changes[name] = change = qaxis.paired_change(lost[DENSE], lost[plan], seed=context.seed)
        rows.append(row(plan, shape, length, k, change))
        values[name] = as_value(change)
        values[f"{name}_share"] = value(rows[-1]["share"], "of the bytes of dense attention")
    worse = _worse(changes)
    return Result(
        passed=not worse,
        verdict=worse[0] if worse else "exact top-k attention costs something at every budget, and less with the line",
        headline="; ".join(
            f"{name}: {values[f'{name}_share']['value']:.2f} of the bytes, {in_words(changes[name], 2)}"
            for name in HEADLINE
        ),
        values=values,
        cases=len(texts) * len(lost),
        data={"rows": rows},
        checks=[plan.name for plan in lost],
    )


def _worse(changes: dict[str, qaxis.PerplexityChange]) -> list[str]:
    """In words, where exact top-k costs nothing, or its line as much as what it completes."""
    found = []
    for x in COVERAGES:
        plain, line = (changes.get(name_of(Plan(("coverage", x), kind))) for kind in ("none", "linear"))
        if plain is not None and not plain.percent > 0:
            found.append(f"coverage {x:g}: top-k attention costs nothing, {in_words(plain)}")
        if plain is not None and line is not None and not line.percent < plain.percent:
            found.append(f"coverage {x:g}: {in_words(line)} with the line, {in_words(plain)} without")
    return found


def curve(context: Context) -> Result:
    """Six articles at full length."""
    if context.device == "cpu":
        raise NotRunError("this claim needs a GPU (--device cuda)")
    count, tokens = (2, 1024) if context.quick else (6, 8192)
    return measured(context.subjects.model, context.texts(count, tokens), context)
