"""Device memory through a generation: what each cache holds, and the most that a step needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .style import BLUE, GREEN, GREY, ORANGE, WIDTH

CACHES = {"bfloat16": GREY, "int8": BLUE, "int6": ORANGE, "int4": GREEN}


def draw(evidence: Mapping[str, dict[str, Any]]) -> Figure:
    data, values = evidence["kv-memory"]["data"], evidence["kv-memory"]["values"]
    figure, axis = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    for name, colour in CACHES.items():
        peaks = [x / 2**20 for x in data[name]["peaks"]]
        label = name.replace("int", "INT")
        axis.plot(range(len(peaks)), peaks, color=colour, linewidth=1.4, label=f"{label}, peak of the step")
        axis.axhline(values[f"{name}_kept"]["value"] / 2**20, color=colour, linewidth=0.9, linestyle=(0, (3, 2)))
    axis.plot([], [], color="black", linewidth=0.9, linestyle=(0, (3, 2)), label="kept at the end")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, len(peaks) - 1)
    axis.set_xlabel("step (0: the prompt)")
    axis.set_ylabel("device memory (MiB)")
    axis.legend(loc="upper right", ncols=2)
    return figure
