"""Bibliographic metadata: one source (metadata.toml), and the files that indexes and citation tools read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

from selfcheck.harness.files import ROOT, SelfcheckError, target, write_atomic

from .listing import refusal

SOURCE = "archive/metadata.toml"
#: DOIs of Zenodo, the archive that .zenodo.json is for
DOI = re.compile(r"10\.5281/zenodo\.[1-9][0-9]{0,11}")
ORCID = re.compile(r"([0-9]{4}-){3}[0-9]{3}[0-9X]")
#: of a version, which becomes the name of a file and of a folder: digits and dots, as Python's packages write it
VERSION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9}){0,5}((a|b|rc)[0-9]{1,9})?(\.(post|dev)[0-9]{1,9}){0,2}")
#: licences that the metadata give to single files
LICENCES = ("MIT", "CC-BY-4.0")


@dataclass(frozen=True)
class Value:
    """What a key may say."""

    allowed: str
    holds: Callable[[Any], bool]
    optional: bool = False


def _matches(pattern: str | re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _whole(least: int, most: int) -> Value:
    # True is a whole number for Python, and no month.
    return Value(f"a whole number from {least} to {most}", lambda x: type(x) is int and least <= x <= most)


TEXT = Value("text in one line", _matches(r"(?=.*\S)[^\x00-\x1f\x7f-\x9f\u2028\u2029]+"))
#: every key of metadata.toml; a list stands for tables of its one form, of which there is at least one
FORM: dict[str, Any] = {
    "title": TEXT,
    "version": Value("digits and dots, as in 1.0 or 1.0rc1", _matches(VERSION)),
    "description": TEXT,
    "keywords": Value("a list of texts", lambda x: isinstance(x, list) and x != [] and all(map(TEXT.holds, x))),
    "doi": Value('"" or 10.5281/zenodo.NUMBER', lambda x: x == "" or _matches(DOI)(x)),
    "repository": Value('"" or an https address', _matches(r"(https://[!-~]+)?")),
    "author": [
        {
            "family": TEXT,
            "given": TEXT,
            "orcid": Value("an ORCID whose check digit holds", lambda x: _is_orcid(x), optional=True),
        }
    ],
    "preprint": {"title": TEXT, "year": _whole(1900, 9999), "month": _whole(1, 12)},
    "companion": {"title": TEXT, "doi": Value("10.5281/zenodo.NUMBER", _matches(DOI))},
    "licence": [
        {
            "id": Value("an SPDX identifier", _matches(r"[A-Za-z0-9.+-]{1,64}")),
            "file": Value("the name of a file of the tree", lambda x: isinstance(x, str) and refusal(x) is None),
            "covers": TEXT,
        }
    ],
}


def load(root: Path = ROOT) -> dict[str, Any]:
    """What metadata.toml says.

    Raises:
        SelfcheckError: if it cannot be read, or naming the first key that is missing, unknown or says what is not
            allowed.
    """
    try:
        said = tomlkit.parse((root / SOURCE).read_text("utf-8")).unwrap()
    except (OSError, UnicodeDecodeError, tomlkit.exceptions.TOMLKitError) as error:
        raise SelfcheckError(f"{SOURCE}: unreadable ({error})") from error
    _check_table(said, FORM)
    if missing := set(LICENCES) - {licence["id"] for licence in said["licence"]}:
        raise SelfcheckError(
            f"{SOURCE}: licence.id: {', '.join(sorted(missing))} missing, which the archive's files have"
        )
    return said


def _check_table(table: Any, form: dict[str, Any], where: str = "") -> None:
    """Raises SelfcheckError unless a table has the keys of its form and they say what is allowed."""
    if not isinstance(table, dict):
        raise _refused(where.rstrip("."), table, f"a table of {', '.join(form)}")
    for key in table:
        if key not in form:
            raise _refused(f"{where}{key}", table[key], f"no such key; allowed are {', '.join(form)}")
    for key, allowed in form.items():
        if key not in table:
            if not getattr(allowed, "optional", False):
                raise SelfcheckError(f"{SOURCE}: {where}{key} missing; allowed is {_words(allowed)}")
        elif isinstance(allowed, dict):
            _check_table(table[key], allowed, f"{where}{key}.")
        elif isinstance(allowed, list):
            if not isinstance(table[key], list) or not table[key]:
                raise _refused(f"{where}{key}", table[key], _words(allowed))
            for entry in table[key]:
                _check_table(entry, allowed[0], f"{where}{key}.")
        elif not allowed.holds(table[key]):
            raise _refused(f"{where}{key}", table[key], allowed.allowed)


def _words(allowed: Any) -> str:
    if isinstance(allowed, Value):
        return allowed.allowed
    tables, form = ("tables", allowed[0]) if isinstance(allowed, list) else ("a table", allowed)
    return f"{tables} of {', '.join(form)}"


def _refused(key: str, value: Any, allowed: str) -> SelfcheckError:
    return SelfcheckError(f"{SOURCE}: {key} = {str(value)[:200]!r}: allowed is {allowed}")


def _is_orcid(value: Any) -> bool:
    return _matches(ORCID)(value) and _orcid_digit(value) == value[-1]


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
    # Everything is made before anything is written, and the source last: what stops this leaves it as it was.
    files = {**_made({**said, "doi": minted}, root), SOURCE: tomlkit.dumps(document).encode()}
    for name, data in files.items():
        write_atomic(root / name, data)
    return list(files)


def rendered(root: Path = ROOT, output: Path | None = None) -> dict[str, bytes]:
    """The files made from metadata.toml and the evidence, by name. Evidence below ``output`` stands for the tree's."""
    return _made(load(root), root, output)


def _made(said: dict[str, Any], root: Path, output: Path | None = None) -> dict[str, bytes]:
    # Imported here: only what writes or compares these files needs a writer of YAML.
    from . import citation, roots

    basis = roots.basis(root, output)
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
