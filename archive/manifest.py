"""The manifest: the SHA-256 of every output and of what is read beside the sealed files, so that none can be exchanged.

The lock is over what measures and prints; evidence is a chain of its own. This is over what they give: figures,
numbers.tex, the PDF, the pages and examples that a reader meets. Written with the paper, read by ``verify``.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, SelfcheckError, sha256, source, target, write_atomic
from selfcheck.harness.strict import parse

MANIFEST = "archive/manifest.json"
FORMAT = 1
#: what is bound, beside the two files of evidence and the lock
BOUND = (
    "figures/*.pdf", "figures/*.png", "figures/figures.json", "paper/numbers.tex", "paper/paper.pdf",
    "README.md", "CONTRIBUTING.md", "THREATS.md", "examples/*.py", "benchmarks/*.md", "tests/*.md",
    "LICENSE-*.txt", "CITATION.cff", "codemeta.json", ".zenodo.json",
    "benchmarks/*.json", "paper/paper.json", ".ci/run",
)  # fmt: skip
#: what has to be there to be bound
NEEDED = (
    "README.md", "CONTRIBUTING.md", "THREATS.md", "LICENSE-CODE.txt", "LICENSE-TEXT-DATA.txt", "CITATION.cff",
    "codemeta.json", ".zenodo.json", "figures/figures.json", "paper/numbers.tex", "paper/paper.json", "paper/paper.pdf",
)  # fmt: skip
SEALS = (seal.LOCK, *evidence.FILES)


def names(root: Path = ROOT, output: Path | None = None) -> list[str]:
    """The files that are bound, those written below ``output`` included, sorted."""
    found = set(seal.expand(BOUND, root)) | set(SEALS)
    return sorted(found | set(seal.expand(BOUND, output) if output else ()))


def render(tools: dict[str, Any], content_root: str, root: Path = ROOT, output: Path | None = None) -> bytes:
    """The manifest over the files as they are.

    Args:
        tools: what typeset and drew them, by name.
        content_root: of the evidence that they are of.
    """
    if missing := [name for name in NEEDED if not source(name, root, output).is_file()]:
        raise SelfcheckError(f"{', '.join(missing)}: missing, and has to be bound; restore it with git, or make it")
    files = {name: sha256(source(name, root, output)) for name in names(root, output)}
    document = {"format": FORMAT, "content_root": content_root, "tools": tools, "files": files}
    document["digest"] = _digest(document)
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _digest(document: dict[str, Any]) -> str:
    """SHA-256 of a manifest without this digest, so that an edit of any part of it is noticed."""
    rest = {name: part for name, part in document.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(tools: dict[str, Any], content_root: str, root: Path = ROOT, output: Path | None = None) -> Path:
    """Write the manifest into the tree, or below ``output``; returns where."""
    path = target(MANIFEST, root, output)
    write_atomic(path, render(tools, content_root, root, output))
    return path


def read(root: Path = ROOT) -> dict[str, Any]:
    """The manifest.

    Raises:
        SelfcheckError: if it is missing, unreadable, or has not its form.
    """
    try:
        said = parse(root / MANIFEST)
    except FileNotFoundError:
        raise SelfcheckError(f"{MANIFEST}: missing; `nox -s paper` writes it") from None
    formed = (
        isinstance(said, dict)
        and said.get("format") == FORMAT
        and isinstance(said.get("content_root"), str)
        and isinstance(said.get("tools"), dict)
        and isinstance(said.get("files"), dict)
        and all(isinstance(digest, str) for digest in said["files"].values())
    )
    if formed and said.get("digest") != _digest(said):
        raise SelfcheckError(f"{MANIFEST}: edited, its own digest does not hold; `nox -s paper` writes it anew")
    if not formed:
        raise SelfcheckError(f"{MANIFEST}: not a manifest of this project's; `nox -s paper` writes it anew")
    return said


def bound(root: Path = ROOT) -> dict[str, str]:
    """Digests by name, as the manifest has them. Raises as ``read``."""
    return read(root)["files"]
