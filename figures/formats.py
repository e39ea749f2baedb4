"""Perplexity cost against bytes, every cache format measured, with the published point."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from selfcheck.harness import seal

from .style import BLUE, GREEN, GREY, ORANGE, WIDTH

OWN = ("int8", "int6", "int4")
#: where a label stands beside its point: offset in points, alignment
BESIDE = {
    "8 bits, float16 scale per token": (2, 9, "center"),
    "8-bit keys, 4-bit values, per token": (5, 3, "left"),
    "8-bit keys, 4-bit values, own grids": (5, -10, "left"),
    "4 bits, per token": (6, -2, "left"),
    "4 bits, per token, rotated": (6, -2, "left"),
    "4 bits, keys per channel before RoPE": (-3, -16, "right"),
    "KIVI, 4 bits, groups of 32": (6, -3, "left"),
    "KIVI, 2 bits, groups of 32": (6, -2, "left"),
    "2 bits, per token": (7, -3, "left"),
}


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    every = evidence["kv-formats"]["data"]["rows"]
    rows = [r for r in every if r["protocol"] == "decoding"]
    claim = next(c for c in seal.claims() if c["id"] == "kv-formats")
    ratio, cost = (float(x) for x in re.findall(r"[\d.]+", claim["published"])[:2])
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    axis.axhline(0, color=GREY, linewidth=0.6)
    groups = (((), GREEN, "s", "other formats"), (OWN, BLUE, "o", "this cache"))
    for names, colour, mark, label in groups:
        shown = [r for r in rows if (r["format"] in OWN) == bool(names)]
        ends = [[r["change"] - r["low"] for r in shown], [r["high"] - r["change"] for r in shown]]
        axis.errorbar([r["ratio"] for r in shown], [r["change"] for r in shown], yerr=ends, fmt=mark, color=colour,
                      label=label, markersize=4.5, linewidth=0.9)  # fmt: skip
    whole = [r for r in every if r["protocol"] != "decoding"]
    ends = [[r["change"] - r["low"] for r in whole], [r["high"] - r["change"] for r in whole]]
    axis.errorbar([r["ratio"] for r in whole], [r["change"] for r in whole], yerr=ends, fmt="o", color=BLUE,
                  markerfacecolor="none", label="this cache, whole windows", markersize=4.5, linewidth=0.9)  # fmt: skip
    axis.plot([ratio], [cost], "*", color=ORANGE, markersize=11, label="published")
    for r in rows:
        name, place = r["format"], (r["ratio"], r["change"])
        if name in OWN:
            text = name.replace("int", "INT")
            axis.annotate(text, place, (-6, 3), textcoords="offset points", ha="right", color=BLUE)
        elif name in BESIDE:
            dx, dy, align = BESIDE[name]
            text = name.replace("channel before", "channel\nbefore")
            axis.annotate(text, place, (dx, dy), textcoords="offset points", ha=align, fontsize=6.5)
    axis.set_yscale("symlog", linthresh=0.1, linscale=0.8)
    axis.set_yticks([-0.1, 0, 0.1, 1, 10, 100, 1000, 10000])
    axis.yaxis.set_major_formatter(lambda y, _: f"{y:+,g}".replace(",", "\u2009") if y else "0")
    axis.minorticks_off()
    axis.set_xlim(0.1, 0.61)
    axis.set_xlabel("bytes of the cache, share of bfloat16")
    axis.set_ylabel("perplexity change (%)")
    axis.legend(loc="upper right")
    return figure
