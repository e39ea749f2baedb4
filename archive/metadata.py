"""Bibliographic metadata: one source (metadata.toml), and the files that indexes and citation tools read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tomlkit

from selfcheck.harness.files import ROOT, SelfcheckError, write_atomic

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


def rendered(root: Path = ROOT) -> dict[str, bytes]:
    """The files made from metadata.toml and the evidence, by name."""
    # Imported here: only what writes or compares these files needs a writer of YAML.
    from . import citation

    said = load(root)
    return {
        "CITATION.cff": citation.cff(said, root),
        "codemeta.json": citation.codemeta(said, root),
        ".zenodo.json": citation.zenodo(said, root),
    }


def write(root: Path = ROOT) -> list[str]:
    """Write what differs; returns the names of all."""
    files = rendered(root)
    for name, data in files.items():
        write_atomic(root / name, data)
    return list(files)


def differences(root: Path = ROOT) -> list[str]:
    """The generated files that are not what metadata.toml and the evidence give, in words."""
    return [
        f"{name}: not what {SOURCE} and the evidence give; `python -m archive metadata` writes it"
        for name, data in rendered(root).items()
        if not (root / name).is_file() or (root / name).read_bytes() != data
    ]
