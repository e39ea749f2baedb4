"""Redraw every figure from the accepted evidence."""

from __future__ import annotations

import sys

import matplotlib.pyplot as plt

from selfcheck.harness import evidence
from selfcheck.harness.files import SelfcheckError

from . import drawn, entropy, formats, inversions, memory, retrieval, selector, stages, survivors
from .style import RC, save

FIGURES = {
    "selector": selector,
    "entropy": entropy,
    "inversions": inversions,
    "retrieval": retrieval,
    "formats": formats,
    "memory": memory,
    "stages": stages,
    "survivors": survivors,
}


def main() -> None:
    records = evidence.accepted()
    plt.rcParams.update(RC)
    ledger = {}
    for name, module in FIGURES.items():
        watched = drawn.Watched(records)
        save(module.draw(watched), name)
        ledger[name] = drawn.entry(name, watched)
        print(f"figures/{name}.pdf, figures/{name}.png")
    drawn.write(ledger)


if __name__ == "__main__":
    try:
        main()
    except SelfcheckError as error:
        sys.exit(f"figures: {error}")
