"""Tables and checks of targets, from what ``benchmarks.completion measure`` wrote."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

import qaxis
from benchmarks.completion_plans import MAIN, MODES, bounds, parts
from qaxis.validation import require
from selfcheck.rivals.bytes_read import DENSE, Plan, Shape, mean_bytes
from selfcheck.rivals.standing_in import EVERY

#: upper end of the 95 % interval of the perplexity change in per cent, at those lengths
TARGETS = {
    ("smollm2", 8192): {"coverage 0.1, linear": 0.5, "coverage 0.05, linear": 1.0, "k = 256, linear": 2.0},
    ("gemma", 16384): {"coverage 0.1, linear": 0.06, "coverage 0.02, linear": 0.3},
}


class Changed(NamedTuple):
    """Relative change of perplexity in per cent; intervals over articles: bootstrap, and t of the mean difference."""

    articles: int
    percent: float
    low: float
    high: float
    t_low: float
    t_high: float
    kl: float
    agree: float


def merged(documents: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Documents by model and length; of what several have, the last."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for document in documents:
        about = document["about"]
        of = found.setdefault((about["model"], about["length"]), {"about": about, "articles": {}, "tasks": {}})
        require(of["about"]["digest"] == about["digest"], "digest", about["digest"], "one file of the model")
        for digest, article in document["articles"].items():
            one = of["articles"].setdefault(digest, {"index": article["index"], "ways": {}})
            one["ways"] |= article["ways"]
        for prompt, contexts in document["tasks"].items():
            for context, ways in contexts.items():
                of["tasks"].setdefault(prompt, {}).setdefault(context, {}).update(ways)
    return found


class Paired(NamedTuple):
    """Relative change of perplexity in per cent, with a bootstrap interval over articles: NaN if there is one."""

    percent: float
    low: float
    high: float


def paired(base: torch.Tensor, other: torch.Tensor) -> Paired:
    """Of mean losses, float64 ``[articles]``, each of equally many tokens."""
    percent = 100 * float(torch.expm1((other - base).mean()))
    if len(base) == 1:
        return Paired(percent, float("nan"), float("nan"))
    boot = qaxis.paired_change(list(base.split(1)), list(other.split(1)))
    return Paired(percent, boot.low, boot.high)


def changed(document: dict[str, Any], name: str, tokens: int) -> Changed | None:
    """Of a way over the first ``tokens`` tokens, on the articles that have it; None if none has."""
    at = bounds(document["about"]["length"]).index(tokens)
    pairs = [
        (article["ways"]["dense"], article["ways"][name])
        for article in document["articles"].values()
        if "dense" in article["ways"] and name in article["ways"]
    ]
    if not pairs:
        return None
    base, other = (torch.tensor([p[i]["loss"][at] for p in pairs], dtype=torch.float64) / (tokens - 1) for i in (0, 1))
    kl, agree = (statistics.fmean(p[1][x][at] for p in pairs) / (tokens - 1) for x in ("kl", "agree"))
    boot, delta, half = paired(base, other), (other - base).numpy(), float("nan")
    if len(pairs) > 1:
        half = float(stats.t.ppf(0.975, len(pairs) - 1)) * float(delta.std(ddof=1)) / len(pairs) ** 0.5
    low, high = (100 * float(np.expm1(delta.mean() + x)) for x in (-half, half))
    return Changed(len(pairs), *boot, low, high, kl, agree)


def interval(low: float, high: float) -> str:
    """In brackets; of one article there is none."""
    return "" if low != low else f"[{low:+.3f}, {high:+.3f}]"


def row_of(document: dict[str, Any], plan: Plan, tokens: int) -> str | None:
    """One line of a table of ways."""
    found = changed(document, plan.name, tokens)
    if found is None:
        return None
    about = document["about"]
    kept = [a["ways"][plan.name].get("kept") for a in document["articles"].values() if plan.name in a["ways"]]
    known = [x for x in kept if x is not None]
    mean = statistics.fmean(known) if known else None
    read = mean_bytes(plan, Shape(*about["shape"]), about["length"], mean) / 1000
    return (
        f"| {plan.name} | {found.articles} | {found.percent:+.3f} {interval(found.low, found.high)} | "
        f"{interval(found.t_low, found.t_high)} | {1000 * found.kl:.2f} | {100 * found.agree:.2f} | {read:.0f} | "
        f"{'' if mean is None else f'{mean:.0f}'} |"
    )


def grid(document: dict[str, Any], tokens: int) -> list[str]:
    """Completions down, budgets across."""
    lines = ["| completion | " + " | ".join(Plan(b).name.removesuffix(", none") for b in MAIN) + " |"]
    lines.append("|---" * (len(MAIN) + 1) + "|")
    for complete in EVERY:
        found = [changed(document, Plan(b, complete).name, tokens) for b in MAIN]
        if any(found):
            cells = ["" if x is None else f"{x.percent:+.3f} {interval(x.low, x.high)}" for x in found]
            lines.append(f"| {complete} | " + " | ".join(cells) + " |")
    return lines


def task_rows(document: dict[str, Any]) -> list[str]:
    """Answers found by task, mode and way, with a Wilson interval, against dense attention on the same prompts."""
    found: dict[tuple[int, str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for prompt, contexts in document["tasks"].items():
        for ways in contexts.values():
            dense = ways.get("decode: dense", {})
            for name, by_task in ways.items():
                for task, one in by_task.items():
                    if task in dense:
                        found.setdefault((int(prompt.split()[0]), task, name), []).append((dense[task], one))
    lines = []
    for (n, task, name), pairs in sorted(found.items()):
        hits = sum(x["found"] for _, x in pairs)
        ends = stats.binomtest(hits, len(pairs)).proportion_ci(method="wilson")
        lost, won = (sum(a["found"] > b["found"] for a, b in some) for some in (pairs, [x[::-1] for x in pairs]))
        loss = statistics.fmean(b["loss"] - a["loss"] for a, b in pairs)
        lines.append(
            f"| {task} | {n} | {name} | {hits}/{len(pairs)} [{ends.low:.2f}, {ends.high:.2f}] | {lost} | "
            f"{won} | {loss:+.3f} |"
        )
    return lines


def targets(key: tuple[str, int], document: dict[str, Any]) -> list[str]:
    """Each target, whether it is met, and by how much it is missed; the larger upper end of both intervals counts."""
    lines = []
    for name, limit in TARGETS.get(key, {}).items():
        found = changed(document, name, key[1])
        if found is None or found.articles < 2:
            lines.append(f"* {name} <= {limit:+g} %: not measured on two articles")
            continue
        high = max(found.high, found.t_high)
        state = "met" if high <= limit else f"MISSED by {high - limit:.3f}"
        lines.append(f"* {name} <= {limit:+g} %: {high:+.3f} % on {found.articles} articles: {state}")
    hits: dict[str, list[bool]] = {}
    for contexts in document["tasks"].values():
        for name, tasks in contexts.get("article", {}).items():
            if "pass key" in tasks:
                hits.setdefault(name, []).append(tasks["pass key"]["found"])
    dense = hits.get("decode: dense", [])
    for mode in MODES:
        some = hits.get(f"{mode}: coverage 0.1, linear", [])
        if dense and some:
            high = stats.binomtest(sum(some), len(some)).proportion_ci(method="wilson").high
            state = "met" if high >= sum(dense) / len(dense) else "MISSED"
            both = f"{sum(some)}/{len(some)}, dense {sum(dense)}/{len(dense)}"
            lines.append(f"* pass key, {mode}, coverage 0.1, linear: {both}: {state}")
    return lines


def report_of(documents: list[dict[str, Any]], tokens: int | None) -> str:
    """Markdown: targets, the table, every way of every part, tasks."""
    lines: list[str] = []
    head = ["| way | articles | change, % [95 %, bootstrap] | [95 %, t] | KL, mnats | top-1, % | KB read | k |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for key, document in sorted(merged(documents).items()):
        about, n = document["about"], tokens or key[1]
        require(n in bounds(key[1]), "--tokens", n, f"one of {bounds(key[1])}")
        dense = [a["ways"]["dense"]["loss"][bounds(key[1]).index(n)] for a in document["articles"].values()
                 if "dense" in a["ways"]]  # fmt: skip
        lines += [f"## {key[0]}, first {n} of {key[1]} tokens, {len(dense)} articles", ""]
        if dense:
            read = mean_bytes(DENSE, Shape(*about["shape"]), key[1], None) / 1000
            perplexity = np.exp(statistics.fmean(dense) / (n - 1))
            lines += [f"Dense perplexity {perplexity:.3f}, {read:.0f} KB read; {about['device']}.", ""]
        lines += [*targets(key, document), "", *grid(document, n), ""]
        for part, plans in parts().items():
            found = [row_of(document, plan, n) for plan in plans]
            if any(found):
                lines += [f"### {part}", "", *head, *(x for x in found if x), ""]
        if rows := task_rows(document):
            lines += ["### tasks", "", "| task | tokens | way | found [95 %] | lost | won | loss |", "|---" * 7 + "|"]
            lines += [*rows, ""]
    return "\n".join(lines)
