"""Prompts from which the hidden text is retrieved, by budget and prompt length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLUE, GREEN, ORANGE, WIDTH

MARKS = ("o", "s", "^")


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    rows = evidence["retrieval"]["data"]["rows"]
    tasks, lengths = (list(dict.fromkeys(r[x] for r in rows)) for x in ("task", "tokens"))
    budgets = [b for b in dict.fromkeys(r["budget"] for r in rows) if b != "dense"] + ["dense"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(WIDTH, 2.6), layout="constrained", sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for j, (n, colour, mark) in enumerate(zip(lengths, (BLUE, ORANGE, GREEN), MARKS, strict=True)):
            cells = {r["budget"]: r for r in rows if r["task"] == task and r["tokens"] == n}
            x = [i + 0.16 * (j - 1) for i in range(len(budgets))]
            share = [100 * cells[b]["found"] / cells[b]["prompts"] for b in budgets]
            ends = [
                [s - 100 * cells[b]["low"], 100 * cells[b]["high"] - s] for s, b in zip(share, budgets, strict=True)
            ]
            axis.errorbar(
                x, share, yerr=[[max(0.0, e) for e in column] for column in zip(*ends, strict=True)], color=colour,
                fmt=mark, markersize=4, linewidth=0.8, label=f"N = {n:,}".replace(",", "\u2009"),
            )  # fmt: skip
        axis.set_xticks(range(len(budgets)), budgets)
        axis.set_title(task, fontsize=8.5)
        axis.set_xlabel("keys kept")
        axis.set_ylim(0, 104)
    axes[0].set_ylabel("prompts answered (%)")
    axes[-1].legend(loc="lower center", ncols=3, handletextpad=0.2, columnspacing=1.0)
    return figure
