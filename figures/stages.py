"""Where the time of a certified decode step goes, beside the fastest dense step of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import GREY, WIDTH

STAGES = ("score", "cut", "compact", "rescore", "choose", "attend")
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
WAYS = {"keys": "bfloat16 keys", "codes": "keys beside codes", "cache": "INT8 cache"}


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    shapes: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in evidence["certified-speed"]["data"]["rows"]:
        # Only of independent keys are stages measured.
        if row["keys"] != "independent":
            continue
        shapes.setdefault((row["batch"], row["n"], row["k_eff"]), []).append(row)
    figure, axes = plt.subplots(len(shapes), 1, figsize=(WIDTH, 6.4), layout="constrained")
    for axis, ((batch, n, k_eff), rows) in zip(axes, shapes.items(), strict=True):
        for y, row in enumerate(rows):
            left = 0.0
            # The Triton kernels find the cut while they compact.
            alone = [row["stages"].get(stage, 0.0) for stage in STAGES]
            # A stage by itself includes the start of a graph; the whole step says how much of the sum that is.
            shrink = row["stages"]["all"] / sum(alone)
            for stage, colour, took in zip(STAGES, COLOURS, alone, strict=True):
                axis.barh(y, took * shrink, left=left, color=colour, height=0.68, label=stage if y == 0 else None)
                left += took * shrink
            axis.plot([row["floor"]] * 2, [y - 0.36, y + 0.36], color="black", linewidth=1.3)
        axis.axvline(rows[0]["dense"], color=GREY, linewidth=1.2, linestyle=(0, (4, 2)))
        axis.set_yticks(range(len(rows)), [WAYS[r["way"]] for r in rows])
        axis.invert_yaxis()
        size, kept = (f"{x:,}".replace(",", "\u2009") for x in (n, k_eff))
        axis.set_title(f"B = {batch}, N = {size}, k = {kept}", fontsize=8.5, loc="left")
        axis.set_xlim(left=0)
    axes[-1].set_xlabel("microseconds a step (dashed: fastest dense step; black: bytes over bandwidth)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(STAGES))
    return figure
