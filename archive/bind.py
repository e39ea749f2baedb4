"""Binding: what speaks of the evidence is written from it, and every output is put into the manifest."""

from __future__ import annotations

from pathlib import Path

from paper import tex
from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, source, target, write_atomic

from . import manifest, metadata, readme, roots


def bind(root: Path = ROOT, output: Path | None = None) -> Path:
    """Write README.md's numbers, the metadata and the manifest, into the tree or below ``output``.

    Raises:
        SelfcheckError: if the seal is broken, or the evidence does not carry what is written.
    """
    seal.verify(root)
    records = evidence.accepted(root, output)
    text = source(readme.README, root, output).read_text("utf-8")
    write_atomic(target(readme.README, root, output), readme.render(text, records, root).encode())
    metadata.write(root, output)
    return manifest.write({"pdflatex": tex.tex_identity()}, roots.content_root(root, output), root, output)
