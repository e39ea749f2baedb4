"""Which evidence each figure was drawn from, so that the paper refuses one of other evidence. Imports no matplotlib."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence
from selfcheck.harness.files import ROOT, SelfcheckError, sha256, source, target, write_atomic
from selfcheck.harness.strict import parse

#: {figure: {"records": {claim: digest of its record}, "code": digests, "files": digests}}
LEDGER = "figures/figures.json"
SUFFIXES = ("pdf", "png")


class Watched(Mapping[str, dict[str, Any]]):
    """Records by claim, which remembers which of them were looked at."""

    def __init__(self, records: dict[str, dict[str, Any]]) -> None:
        self.records, self.seen = records, set[str]()

    def __getitem__(self, claim: str) -> dict[str, Any]:
        self.seen.add(claim)
        return self.records[claim]

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)


def entry(name: str, watched: Watched, root: Path = ROOT, output: Path | None = None) -> dict[str, dict[str, str]]:
    """What the ledger says of a figure that was just drawn and saved."""
    return {
        "records": {claim: evidence.record_digest(watched.records[claim]) for claim in sorted(watched.seen)},
        "code": {path: sha256(root / path) for path in (f"figures/{name}.py", "figures/style.py")},
        "files": {suffix: sha256(target(f"figures/{name}.{suffix}", root, output)) for suffix in SUFFIXES},
    }


def write(ledger: dict[str, dict[str, dict[str, str]]], root: Path = ROOT, output: Path | None = None) -> None:
    write_atomic(target(LEDGER, root, output), (json.dumps(ledger, indent=1, sort_keys=True) + "\n").encode())


def included(tex: str) -> list[str]:
    """Names of the figures that a TeX source includes.

    Raises:
        SelfcheckError: for a graphic from elsewhere than figures/, which nothing could vouch for.
    """
    names = []
    for graphic in re.findall(r"\\includegraphics\s*(?:\[[^\]]*\])?\s*\{([^}]*)\}", re.sub(r"(?<!\\)%.*", "", tex)):
        found = re.fullmatch(r"\.\./figures/(\w+)\.pdf", graphic)
        if found is None:
            raise SelfcheckError(f"paper.tex includes {graphic}: allowed is ../figures/NAME.pdf, drawn from evidence")
        names.append(found[1])
    return names


def check(tex: str, records: dict[str, dict[str, Any]], root: Path = ROOT, output: Path | None = None) -> None:
    """Refuse figures that were not drawn from these records by the code that is there now.

    Raises:
        SelfcheckError: naming every such figure and why.
    """
    ledger, folder = read(root, output), target("figures", root, output)
    there = {path.stem for suffix in SUFFIXES for path in folder.glob(f"*.{suffix}")}
    names = dict.fromkeys([*included(tex), *ledger, *sorted(there)])
    found = [(name, why) for name in names for why in _wrong(name, ledger, records, root, output)]
    wrong = [f"figures/{name}{why}" for name, why in found]
    if wrong:
        raise SelfcheckError("figures are not of this evidence:\n  " + "\n  ".join(wrong) + "\nRun `nox -s figures`.")


def read(root: Path = ROOT, output: Path | None = None) -> dict[str, Any]:
    """The ledger.

    Raises:
        SelfcheckError: if it cannot be read, or has not its form.
    """
    path = source(LEDGER, root, output)
    try:
        ledger = parse(path)
    except (FileNotFoundError, SelfcheckError) as error:
        raise SelfcheckError(f"{LEDGER}: unreadable ({error}); run `nox -s figures` first") from None
    if not isinstance(ledger, dict) or not all(map(_formed, ledger.values())):
        raise SelfcheckError(f"{LEDGER}: not a ledger of figures; run `nox -s figures` first")
    return ledger


def _formed(entry: Any) -> bool:
    parts = [entry.get(name) for name in ("records", "code", "files")] if isinstance(entry, dict) else [None]
    return all(isinstance(x, dict) and all(isinstance(d, str) for d in x.values()) for x in parts)


def _wrong(
    name: str, ledger: dict[str, Any], records: dict[str, dict[str, Any]], root: Path, output: Path | None
) -> Iterator[str]:
    said = ledger.get(name)
    if said is None:
        yield f": not in {LEDGER}"
        return
    for suffix in SUFFIXES:
        path = source(f"figures/{name}.{suffix}", root, output)
        if not path.is_file():
            yield f".{suffix}: missing"
        elif sha256(path) != said["files"].get(suffix):
            yield f".{suffix}: not the file that was drawn"
    for claim, digest in said["records"].items():
        if claim not in records or evidence.record_digest(records[claim]) != digest:
            yield f".pdf: drawn from other evidence of {claim}"
    for code, digest in said["code"].items():
        if not (root / code).is_file() or sha256(root / code) != digest:
            yield f".pdf: drawn before {code} changed"
