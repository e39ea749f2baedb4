"""Bibliographic metadata: one source (metadata.toml), and the files that indexes and citation tools read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tomlkit

from selfcheck.harness.files import ROOT, SelfcheckError, target, write_atomic

SOURCE = "archive/metadata.toml"
#: DOIs of Zenodo, the archive that .zenodo.json is for
DOI = re.compile(r"10\.5281/zenodo\.[1-9][0-9]{0,11}")
ORCID = re.compile(r"(\d{4}-){3}\d{3}[\dX]")
NEEDED = (
    "title",
    "version",
    "description",
    "keywords",
    "doi",
    "repository",
    "author",
    "preprint",
    "companion",
    "licence",
)


def load(root: Path = ROOT) -> dict[str, Any]:
    """What metadata.toml says.

    Raises:
        SelfcheckError: if it cannot be read, lacks something, or an identifier in it has not its form.
    """
    try:
        said = tomlkit.parse((root / SOURCE).read_text("utf-8")).unwrap()
    except (OSError, UnicodeDecodeError, tomlkit.exceptions.TOMLKitError) as error:
        raise SelfcheckError(f"{SOURCE}: unreadable ({error})") from error
    missing = [name for name in NEEDED if name not in said]
    if missing:
        raise SelfcheckError(f"{SOURCE}: {', '.join(missing)} missing")
    if said["doi"] and not DOI.fullmatch(said["doi"]):
        raise SelfcheckError(f'{SOURCE}: doi = {said["doi"]!r}: allowed is "" or 10.5281/zenodo.NUMBER')
    if said["repository"] and not said["repository"].startswith("https://"):
        raise SelfcheckError(f'{SOURCE}: repository = {said["repository"]!r}: allowed is "" or an https address')
    for orcid in (author["orcid"] for author in said["author"] if "orcid" in author):
        if not ORCID.fullmatch(orcid) or _orcid_digit(orcid) != orcid[-1]:
            raise SelfcheckError(f"{SOURCE}: orcid = {orcid!r}: allowed is an ORCID whose check digit holds")
    return said


def _orcid_digit(orcid: str) -> str:
    """The check digit (ISO 7064, MOD 11-2) of an ORCID."""
    total = 0
    for digit in orcid.replace("-", "")[:-1]:
        total = (total + int(digit)) * 2
    return "0123456789X"[(12 - total % 11) % 11]


def doi(root: Path = ROOT) -> str | None:
    """The DOI of the archive, None as long as none is minted."""
    return load(root)["doi"] or None


def set_doi(minted: str, root: Path = ROOT) -> list[str]:
    """Write a DOI that was minted into metadata.toml, and every file made from it; returns their names.

    Raises:
        SelfcheckError: if it is not a DOI of Zenodo, or is the companion record's.
    """
    said = load(root)
    if not DOI.fullmatch(minted):
        raise SelfcheckError(f"DOI {minted!r}: allowed is 10.5281/zenodo.NUMBER, without https://doi.org/")
    if minted == said["companion"]["doi"]:
        raise SelfcheckError(f"DOI {minted!r} is the companion record's; this package gets one of its own")
    document = tomlkit.parse((root / SOURCE).read_text("utf-8"))
    document["doi"] = minted
    write_atomic(root / SOURCE, tomlkit.dumps(document).encode())
    return [SOURCE, *write(root)]


def rendered(root: Path = ROOT, output: Path | None = None) -> dict[str, bytes]:
    """The files made from metadata.toml and the evidence, by name. Evidence below ``output`` stands for the tree's."""
    # Imported here: only what writes or compares these files needs a writer of YAML.
    from . import citation, roots

    said, basis = load(root), roots.basis(root, output)
    return {
        "CITATION.cff": citation.cff(said, basis),
        "codemeta.json": citation.codemeta(said, basis),
        ".zenodo.json": citation.zenodo(said, basis),
    }


def write(root: Path = ROOT, output: Path | None = None) -> list[str]:
    """Write them into the tree, or below ``output``; returns their names."""
    files = rendered(root, output)
    for name, data in files.items():
        write_atomic(target(name, root, output), data)
    return list(files)


def differences(root: Path = ROOT) -> list[str]:
    """The generated files that are not what metadata.toml and the evidence give, in words."""
    return [
        f"{name}: not what {SOURCE} and the evidence give; `python -m archive metadata` writes it"
        for name, data in rendered(root).items()
        if not (root / name).is_file() or (root / name).read_bytes() != data
    ]
