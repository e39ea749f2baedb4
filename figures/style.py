"""What the figures share: size, type, colours that survive grey printing, and deterministic saving."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from selfcheck.harness.files import write_atomic

matplotlib.use("Agg")
#: Okabe and Ito's palette, distinguishable with colour-vision deficiency
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#9A9A9A"
WIDTH = 6.3
RC: Any = {
    "font.family": "serif", "font.serif": ["DejaVu Serif"], "mathtext.fontset": "dejavuserif", "font.size": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "pdf.fonttype": 42, "svg.hashsalt": "qaxis",
}  # fmt: skip


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write NAME.pdf and .png into a folder; the same evidence gives the same bytes."""
    for suffix, metadata in (("pdf", {"CreationDate": None, "Producer": None}), ("png", {"Software": None})):
        buffer = BytesIO()
        figure.savefig(buffer, format=suffix, dpi=200, metadata=metadata)
        write_atomic(folder / f"{name}.{suffix}", buffer.getvalue())
