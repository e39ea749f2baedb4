"""Binding: what speaks of the evidence is written from it, and every output is put into the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from figures import drawn
from paper import ledger, tex
from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, SelfcheckError, target, write_atomic

from . import manifest, metadata, readme, roots


class Bound(NamedTuple):
    """Where the manifest lies, and the content root that it has."""

    path: Path
    content_root: str
    #: whether that is the one of the manifest before
    said: str


def bind(root: Path = ROOT, output: Path | None = None) -> Bound:
    """Write README.md's numbers, the metadata and the manifest, into the tree or below ``output``.

    Raises:
        SelfcheckError: if the seal is broken, or the evidence does not carry what is written.
    """
    seal.verify(root)
    records = evidence.accepted(root, output)
    drawn.check((root / ledger.TEX).read_text("utf-8"), records, root, output)
    ledger.check(root, output)
    written = readme.render(readme.text_of(root), records, root)
    write_atomic(target(readme.README, root, output), written.encode())
    metadata.write(root, output)
    before, found = _before(root), roots.content_root(root, output)
    said = "as before" if before == found else f"before: {before or 'none'}"
    return Bound(manifest.write({"pdflatex": tex.tex_identity()}, found, root, output), found, said)


def _before(root: Path) -> str:
    try:
        return manifest.read(root)["content_root"]
    except SelfcheckError:
        return ""
