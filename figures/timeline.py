"""What the GPU does for one token of a generation, and what it waits for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLUE, GREEN, GREY, ORANGE, WIDTH

KINDS = {"weights": GREY, "attention": BLUE, "append": GREEN, "other": ORANGE}


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    token = evidence["generation-speed"]["data"]["timeline"]
    figure, (whole, part) = plt.subplots(2, 1, figsize=(WIDTH, 2.6), layout="constrained")
    took = {kind: f"{t:,.0f} µs".replace(",", "\u2009") for kind, t in token["took"].items()}
    for kind, colour in KINDS.items():
        mine = [(start, end - start) for name, start, end in token["pieces"] if name == kind]
        label = f"{kind}, {took.get(kind, 'none')}"
        for axis in (whole, part):
            axis.broken_barh(mine, (0, 1), color=colour, linewidth=0, label=label if axis is whole else None)
    whole.plot([], [], " ", label=f"gaps, {took['gap']}")
    whole.set_xlim(0, token["whole"])
    # The middle of the token, as long as an eighth of it: a layer or two.
    part.set_xlim(0.4375 * token["whole"], 0.5625 * token["whole"])
    for axis in (whole, part):
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    part.set_xlabel("microseconds since the token before (below: an eighth of it)")
    figure.legend(*whole.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize=7)
    return figure
