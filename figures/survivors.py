"""How many of a model's own keys a proven bound cannot rule out, against context length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLUE, GREEN, GREY, ORANGE, WIDTH

LINES = (
    ("keys", BLUE, "o", "bfloat16 keys, rescored by the kernels"),
    ("codes", ORANGE, "s", "8-bit codes, rescored by the kernels"),
    ("eight", GREEN, "^", "8-bit codes, one bound a key"),
    ("four", GREY, "D", "4-bit codes, one bound a key"),
)


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    rows = evidence["certified-real"]["data"]["rows"]
    lengths = [r["n"] for r in rows]
    figure, axis = plt.subplots(figsize=(WIDTH, 2.7), layout="constrained")
    for column, colour, mark, label in LINES:
        axis.plot(lengths, [r[column] for r in rows], mark, color=colour, linestyle="-", markersize=4, label=label)
    axis.plot(lengths, [100 * r["k_eff"] / r["n"] for r in rows], color="black", linewidth=1, linestyle=(0, (3, 2)),
              label="kept (k / N)")  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n:,}".replace(",", "\u2009") for n in lengths])
    axis.set_ylim(0, 100)
    axis.set_xlabel("context length N")
    axis.set_ylabel("keys not ruled out (%)")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
