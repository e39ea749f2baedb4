"""Entropy and effective support against context length, with the fit of Theorem 2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLUE, GREEN, GREY, ORANGE, WIDTH


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    record = evidence["entropy"]
    lengths, rows = record["data"]["lengths"], record["data"]["entropy"]
    alpha, beta = record["values"]["alpha"]["value"], record["values"]["beta"]["value"]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    longer = evidence["entropy-range"]["data"]
    beyond = [sum(column) / len(longer["entropy"]) for column in zip(*longer["entropy"], strict=True)]
    fit = [alpha * math.log(n) + beta for n in lengths]
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.7), layout="constrained")
    for axis, change in ((left, lambda h: h), (right, math.exp)):
        for i, row in enumerate(rows):
            label = "one article" if i == 0 else None
            axis.plot(lengths, [change(h) for h in row], color=GREY, linewidth=0.6, label=label)
        axis.plot(lengths, [change(h) for h in mean], "o", color=BLUE, markersize=4, label="mean")
        axis.plot(longer["lengths"], [change(h) for h in beyond], "s", color=GREEN, markersize=3,
                  markerfacecolor="none", label="mean, longer articles")  # fmt: skip
        axis.plot(lengths, [change(h) for h in fit], color=ORANGE, linewidth=1.4, label=rf"fit, $\alpha$ = {alpha:.3f}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(longer["lengths"], [str(n) for n in longer["lengths"]], fontsize=7)
        axis.minorticks_off()
        axis.set_xlabel("context length $N$ (tokens)")
    left.set_ylabel("mean entropy $H_N$ (nats)")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    right.set_ylabel("effective support $e^{H_N}$ (keys)")
    right.legend(loc="lower right", fontsize=7.5)
    return figure
