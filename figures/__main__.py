"""Redraw every figure from the accepted evidence."""

from selfcheck import isolated

if __name__ == "__main__":
    isolated.enter("figures")

import contextlib
import importlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, leftovers, seal, surroundings
from selfcheck.harness.files import SelfcheckError, target

from . import drawn

FIGURES = (
    "selector", "entropy", "inversions", "retrieval", "formats", "memory", "stages", "survivors", "timeline",
    "completion",
)  # fmt: skip


@contextlib.contextmanager
def nobodys_settings() -> Iterator[None]:
    """matplotlib as it comes: no matplotlibrc, style or list of fonts of a user, a variable or a working directory."""
    before, here = os.environ.get("MPLCONFIGDIR"), Path.cwd()
    with tempfile.TemporaryDirectory(prefix="qaxis-figures-") as folder:
        os.environ["MPLCONFIGDIR"] = folder
        os.chdir(folder)  # It is looked at first, when matplotlib is imported.
        try:
            import matplotlib

            with matplotlib.rc_context():
                matplotlib.rcdefaults()
                yield
        finally:
            os.chdir(here)
            os.environ.pop("MPLCONFIGDIR")
            os.environ.update({"MPLCONFIGDIR": before} if before is not None else {})


def main(output: Path | None) -> None:
    """Draw into ``figures``, there or below ``output``."""
    seal.verify()
    records = evidence.accepted(output=output)
    folder = target("figures", output=output)
    surroundings.check_writable(folder / "figures.json")
    surroundings.settle()
    leftovers.remove(output=output)
    with nobodys_settings():
        ledger = draw(records, folder, output)
    seal.verify(consequence="the figures are not of the sealed files")
    drawn.write(ledger, output=output)


def draw(records: dict[str, dict[str, Any]], folder: Path, output: Path | None) -> dict[str, Any]:
    """Save every figure; what the ledger says of each."""
    import matplotlib

    from .style import RC, save

    matplotlib.rcParams.update(RC)
    ledger = {}
    for name in FIGURES:
        watched = drawn.Watched(records)
        with evidence.understood(f"figures/{name}.pdf"):
            figure = importlib.import_module(f".{name}", __package__).draw(watched)
        save(figure, folder, name)
        ledger[name] = drawn.entry(name, watched, output=output)
        print(f"figures/{name}.pdf, figures/{name}.png")
    return ledger


if __name__ == "__main__":
    try:
        main(surroundings.output_option("figures", __doc__))
    except SelfcheckError as error:
        sys.exit(f"figures: {error}")
