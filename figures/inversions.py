"""How often rounding loses the order of two keys, against the gap of their exact scores (Theorem 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLUE, GREEN, ORANGE, WIDTH

SHOWN = ((16, BLUE), (64, ORANGE), (256, GREEN))


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    curves = {c["dim"]: c for c in evidence["fp-order"]["data"]["curves"]}
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.8), layout="constrained", sharey=True)
    for axis, query, title in zip(axes, ("raw", "unit"), ("raw query (the library)", "normalised query"), strict=True):
        for dim, colour in SHOWN:
            rows = curves[dim]["rows"]
            shown = [(row["gap"], 100 * row[query]) for row in rows if row[query] > 0]
            axis.plot(*zip(*shown, strict=True), "o-", color=colour, markersize=2.5, linewidth=1, label=f"D = {dim}")
            # Every measured pair to the right of this line has a gap above its bound.
            axis.axvline(curves[dim]["bound_high"], color=colour, linewidth=0.9, linestyle=(0, (4, 2)))
        axis.axvspan(max(curves[d]["bound_high"] for d, _ in SHOWN), 180, color="0.94", linewidth=0)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlim(2.0**-4, 180)
        axis.set_xticks([2.0**e for e in range(-4, 8, 2)], ["1/16", "1/4", "1", "4", "16", "64"])
        axis.minorticks_off()
        axis.set_title(title, fontsize=8.5)
        axis.set_xlabel(r"exact gap (ulp of $\sum_d |q_d k_d|$)")
    axes[0].set_ylabel("pairs whose order is lost (%)")
    axes[0].yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes[0].legend(loc="lower left")
    return figure
