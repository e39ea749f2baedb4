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
    "exact": (BLUE, "o"), "Quest": (ORANGE, "s"), "SparQ": (GREEN, "^"), "Loki": ("#CC79A7", "D"),
    "Double Sparsity": ("#E69F00", "v"), "dense": (GREY, "o"), "Loki by groups": ("#CC79A7", "d"),
    "Double Sparsity by groups": ("#E69F00", "<"),
}  # fmt: skip
#: (what selects, completion, whether by a tolerance)
Key = tuple[str, str, bool]
#: what is not completed by the line, or not by a budget: what is said of it in the legend, line and mark
NAMED: dict[Key, tuple[str, Any, str]] = {
    ("exact", "mean", False): ("mean", (0, (1, 1.5)), "X"),
    ("exact", "block 64", False): ("blocks of 64", (0, (4, 2)), "s"),
    ("SparQ", "SparQ", False): ("its own", (0, (4, 2)), ">"),
    ("exact", "linear", True): ("by tolerance", (0, (4, 1, 1, 1)), "P"),
}
#: how dense attention is called, which is drawn of 8 bits
WHITE = "dense; white: 8 bits"
TITLES = ("without a completion", "completed, by the line unless named")


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    curves: dict[tuple[Key, bool], list[dict[str, Any]]] = {}
    for row in evidence["completion-curve"]["data"]["rows"]:
        key = (row["selection"], row["completion"], row["budget"] == "tolerance")
        curves.setdefault((key, row["stored"]), []).append(row)
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.9), layout="constrained", sharex=True, sharey=True)
    for axis, title in zip(axes, TITLES, strict=True):
        axis.axhline(0, color=GREY, linewidth=0.6)
        axis.axvline(1, color=GREY, linewidth=0.6)
        axis.set_title(title, fontsize=8.5)
    for (key, stored), rows in curves.items():
        _curve(axes[int(key[1] != "none")], key, stored, rows)
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
    # A line a way, whatever its panel and storage; dense attention, of 8 bits alone, says what white marks are.
    every: list[Any] = [bars for axis in axes for bars in axis.containers]
    found = {bars.get_label(): bars.lines[0] for bars in every if not bars.get_label().startswith("_")}
    found[WHITE] = found.pop(WHITE)
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=7, handlelength=2.6)
    return figure


def _curve(axis: Axes, key: Key, stored: bool, rows: list[dict[str, Any]]) -> None:
    """One way at all its budgets, from few bytes to many, with intervals; of 8 bits with white marks."""
    colour, mark = SELECTIONS[key[0]]
    said, line, mark = NAMED.get(key, ("", "-", mark))
    label = WHITE if key[0] == "dense" else ", ".join(filter(None, ("_" * stored + key[0], said)))
    rows = sorted(rows, key=lambda row: row["share"])
    ends = [[r["change"] - r["low"] for r in rows], [r["high"] - r["change"] for r in rows]]
    axis.errorbar(
        [r["share"] for r in rows], [r["change"] for r in rows], yerr=ends, color=colour, label=label, linestyle=line,
        marker=mark, markerfacecolor="white" if stored else colour, markersize=4.5, linewidth=1.0, elinewidth=0.8,
    )  # fmt: skip
