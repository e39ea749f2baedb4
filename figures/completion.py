"""Perplexity cost of top-k attention against the bytes it reads, by what selects, left out and completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

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
    _legend(figure, axes)
    return figure


def _curve(axis: Axes, key: Key, stored: bool, rows: list[dict[str, Any]]) -> None:
    """One way at all its budgets, from few bytes to many, with intervals; of 8 bits with white marks."""
    colour, mark = SELECTIONS[key[0]]
    said, line, mark = NAMED.get(key, ("", "-", mark))
    rows = sorted(rows, key=lambda row: row["share"])
    ends = [[r["change"] - r["low"] for r in rows], [r["high"] - r["change"] for r in rows]]
    axis.errorbar(
        [r["share"] for r in rows], [r["change"] for r in rows], yerr=ends, color=colour,
        label=", ".join(filter(None, (key[0], said))), linestyle=line, marker=mark,
        markerfacecolor="white" if stored else colour, markersize=4.5, linewidth=1.0, elinewidth=0.8,
    )  # fmt: skip


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """A line a way, whatever its panel and storage; and what white marks are."""
    found: dict[str, Line2D] = {}
    for axis in axes:
        handles: tuple[list[Any], list[str]] = axis.get_legend_handles_labels()
        for bars, label in zip(*handles, strict=True):
            line = bars.lines[0]
            found[label] = Line2D(
                [],
                [],
                color=line.get_color(),
                linestyle=line.get_linestyle(),
                marker=line.get_marker(),
                markersize=4.5,
                linewidth=1.0,
            )
    found.pop("dense", None)
    found["dense; white: 8 bits"] = Line2D(
        [], [], color=GREY, linestyle="", marker="o", markerfacecolor="white", markersize=4.5
    )
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize=7, handlelength=2.6)
