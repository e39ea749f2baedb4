"""Perplexity cost of top-k attention against the bytes it reads, by what selects, left out and completed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLUE, GREEN, GREY, ORANGE, WIDTH

#: what selects: its colour and mark
SELECTIONS = {
    "exact": (BLUE, "o"), "INT8": ("#56B4E9", "o"), "Quest": (ORANGE, "s"), "SparQ": (GREEN, "^"),
    "Loki": ("#CC79A7", "D"), "Double Sparsity": ("#E69F00", "v"),
}  # fmt: skip
#: (what selects, completion, whether by a tolerance)
Key = tuple[str, str, bool]
#: what is not completed by the line, or not at budgets of its own: words of the legend, line and mark
NAMED: dict[Key, tuple[str, Any, str]] = {
    ("exact", "mean", False): ("exact, mean", (0, (1, 1.5)), "o"),
    ("exact", "block 64", False): ("exact, blocks of 64", (0, (4, 2)), "s"),
    ("SparQ", "SparQ", False): ("SparQ, its own", (0, (4, 2)), "^"),
    ("exact", "linear", True): ("exact, by tolerance", (0, (4, 1, 1, 1)), "P"),
}
TITLES = ("without a completion", "completed, by the line unless named")


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    curves: dict[Key, list[dict[str, Any]]] = {}
    for row in evidence["completion-curve"]["data"]["rows"]:
        curves.setdefault((row["selection"], row["completion"], row["budget"] == "tolerance"), []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.7), layout="constrained", sharex=True, sharey=True)
    for axis, title in zip(axes, TITLES, strict=True):
        axis.axhline(0, color=GREY, linewidth=0.6)
        axis.axvline(1, color=GREY, linewidth=0.6)
        axis.set_title(title, fontsize=8.5)
    for key, rows in curves.items():
        _curve(axes[int(key[1] != "none")], key, rows)
    axes[0].set_yscale("symlog", linthresh=0.1, linscale=0.8)
    axes[0].set_yticks([-0.1, 0, 0.1, 1, 10, 100])
    axes[0].yaxis.set_major_formatter(lambda y, _: f"{y:+g}" if y else "0")
    axes[0].set_xscale("log")
    ticks = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1)
    for axis in axes:
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.set_xlabel("bytes read, share of dense attention")
    axes[0].set_ylabel("perplexity change (%)")
    found = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=7, handlelength=2.6)
    return figure


def _curve(axis: Axes, key: Key, rows: list[dict[str, Any]]) -> None:
    """One way at all its budgets, from few bytes to many, with intervals."""
    selection = key[0]
    colour, mark = SELECTIONS[selection]
    name = "exact, INT8 cache" if selection == "INT8" else selection
    label, line, mark = NAMED.get(key, (name, "-", mark))
    rows = sorted(rows, key=lambda row: row["share"])
    ends = [[r["change"] - r["low"] for r in rows], [r["high"] - r["change"] for r in rows]]
    axis.errorbar(
        [r["share"] for r in rows], [r["change"] for r in rows], yerr=ends, color=colour, label=label, linestyle=line,
        marker=mark, markerfacecolor="white" if key in NAMED else colour, markersize=4.5,
        linewidth=1.0, elinewidth=0.8,
    )  # fmt: skip
