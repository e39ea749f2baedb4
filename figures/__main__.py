"""Redraw every figure from the accepted evidence."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from selfcheck.harness import evidence, surroundings
from selfcheck.harness.files import SelfcheckError, target

from . import drawn

FIGURES = ("selector", "entropy", "inversions", "retrieval", "formats", "memory", "stages", "survivors")


def main(output: Path | None) -> None:
    """Draw into ``figures``, there or below ``output``."""
    records = evidence.accepted(output=output)
    folder = target("figures", output=output)
    surroundings.check_writable(folder / "figures.json")
    # matplotlib looks for its folder when it is imported.
    surroundings.settle()
    import matplotlib.pyplot as plt

    from .style import RC, save

    plt.rcParams.update(RC)
    ledger = {}
    for name in FIGURES:
        watched = drawn.Watched(records)
        save(importlib.import_module(f".{name}", __package__).draw(watched), folder, name)
        ledger[name] = drawn.entry(name, watched, output=output)
        print(f"figures/{name}.pdf, figures/{name}.png")
    drawn.write(ledger, output=output)


if __name__ == "__main__":
    try:
        main(surroundings.output_option("figures", __doc__))
    except SelfcheckError as error:
        sys.exit(f"figures: {error}")
