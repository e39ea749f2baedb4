"""The selector on real keys: only the coordinate along the query axis decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLUE, GREY, ORANGE, WIDTH


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    points = evidence["selection"]["data"]["schematic"]
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    chosen = [bool(s) for s in points["selected"]]
    pairs = list(zip(points["along"], points["away"], chosen, strict=True))
    for state, colour, size in ((False, GREY, 5), (True, BLUE, 8)):
        xs = [x for x, _, c in pairs if c == state]
        ys = [y for _, y, c in pairs if c == state]
        label = f"{'selected' if state else 'left out'} ({len(xs)} keys)"
        axis.scatter(xs, ys, s=size, color=colour, linewidths=0, label=label)
    threshold = min(x for x, _, c in pairs if c)
    axis.axvline(threshold, color=ORANGE, linewidth=1.2, label="threshold of the top-k set")
    axis.set_ylim(bottom=0)
    axis.set_xlabel(r"coordinate along the query axis, $\langle u_Q, K_i\rangle$")
    axis.set_ylabel(r"distance from the axis")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, markerscale=1.6)
    return figure
