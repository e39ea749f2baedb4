"""What the PDF was typeset from, so that another text, other numbers or another PDF is noticed."""

from __future__ import annotations

import json
from pathlib import Path

from figures import drawn
from selfcheck.harness.files import ROOT, SelfcheckError, sha256, source, target, write_atomic
from selfcheck.harness.strict import parse

from . import numbers

#: {file: SHA-256}: the text, its numbers and figures, and the PDF
LEDGER = "paper/paper.json"
TEX, PDF = "paper/paper.tex", "paper/paper.pdf"


def inputs(root: Path = ROOT) -> list[str]:
    """The files that pdflatex reads."""
    text = (root / TEX).read_text("utf-8")
    return [TEX, numbers.TARGET, *(f"figures/{name}.pdf" for name in drawn.included(text))]


def write(root: Path = ROOT, output: Path | None = None) -> None:
    """Note what a PDF that was just written is of."""
    made = {name: sha256(source(name, root, output)) for name in [*inputs(root), PDF]}
    write_atomic(target(LEDGER, root, output), (json.dumps(made, indent=1, sort_keys=True) + "\n").encode())


def check(root: Path = ROOT, output: Path | None = None) -> None:
    """Refuse a PDF that is not of the text, the numbers and the figures that are there.

    Raises:
        SelfcheckError: naming what is another file.
    """
    path = source(LEDGER, root, output)
    try:
        said = parse(path)
    except FileNotFoundError:
        raise SelfcheckError(f"{LEDGER}: missing; run `nox -s paper`") from None
    names = [*inputs(root), PDF]
    if not isinstance(said, dict) or said.keys() != set(names):
        raise SelfcheckError(f"{LEDGER}: not of this text; run `nox -s paper`")
    found = {name: source(name, root, output) for name in names}
    if other := [n for n, file in found.items() if not file.is_file() or sha256(file) != said[n]]:
        raise SelfcheckError(f"the PDF was typeset with other files: {', '.join(other)}; run `nox -s paper`")
