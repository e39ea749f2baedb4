"""Files of evidence: records, their form, and the chain that holds them together. Imports no torch.

One record a claim; of a claim that names cards, one a card. What a record has to be to carry the paper is asked in
``states``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from . import seal
from .files import ROOT, SelfcheckError, source, write_atomic
from .strict import parse, shown

Record = dict[str, Any]
DEFAULT = "selfcheck/evidence/default.json"
#: claims that need a GPU: measured on one and committed
GPU = "selfcheck/evidence/gpu.json"
FILES = (DEFAULT, GPU)
SCHEMA = "selfcheck/evidence.schema.json"
FORMAT = 1
MEND = "restore it with git, or move it away and run `nox -s selfcheck` again"
#: digests of records whose form was found right by this process
_KNOWN: set[str] = set()


def record_digest(record: Record) -> str:
    """SHA-256 of a record as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def chain(records: list[Record]) -> tuple[list[str], str]:
    """Link of every record, and the root: link_i = SHA-256(link_{i-1} || digest_i)."""
    link, links = "0" * 64, []
    for record in records:
        link = hashlib.sha256((link + record_digest(record)).encode()).hexdigest()
        links.append(link)
    return links, link


def write(path: Path, records: list[Record]) -> str:
    """Write records and their chain atomically; returns the root hash."""
    links, root = chain(records)
    document = {"format": FORMAT, "root": root, "links": links, "records": records}
    write_atomic(path, (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    return root


def read(path: Path, root: Path = ROOT, *, retired: bool = False) -> list[Record]:
    """Every record, in order; a claim of several cards has several.

    Args:
        retired: leave out records of claims that checks.toml no longer has, instead of refusing them.

    Raises:
        SelfcheckError: in a sentence with file, record and key, if the file is missing or unreadable, not of its
            schema, its chain does not hold, or a claim is unknown or there twice.
    """
    try:
        document = parse(path)
    except FileNotFoundError:
        raise SelfcheckError(f"{path}: no evidence; run `nox -s selfcheck` first") from None
    except SelfcheckError as error:
        raise SelfcheckError(f"{error}; {MEND}") from None
    wrong = _wrong(document)
    if wrong:
        raise SelfcheckError(f"{path}: {wrong}; {MEND}")
    records: list[Record] = document["records"]
    if chain(records) != (document["links"], document["root"]):
        raise SelfcheckError(f"{path}: the hash chain does not hold, a record was edited; {MEND}")
    return _of_claims(path, records, {claim["id"]: claim for claim in seal.claims(root)}, retired)


def committed(root: Path = ROOT) -> list[Record]:
    """The records of the tree. Raises as ``read``."""
    return [record for name in FILES for record in read(source(name, root), root)]


def load(path: Path) -> dict[str, Record]:
    """Records by claim; of several cards the first, with the others under ``other_cards``. Raises as ``read``."""
    return by_claim(read(path))


def by_claim(records: Iterable[Record]) -> dict[str, Record]:
    """Records by claim; of several cards the first, with the others under ``other_cards``."""
    out: dict[str, Record] = {}
    for record in records:
        if record["claim"] in out:
            out[record["claim"]].setdefault("other_cards", []).append(record)
        else:
            out[record["claim"]] = dict(record)
    return out


def every(records: dict[str, Record]) -> list[Record]:
    """What ``by_claim`` put in order, as a list again."""
    return [one for record in records.values() for one in (record, *record.get("other_cards", []))]


def family(device: str, claim: dict[str, Any]) -> str:
    """Which of a claim's cards a device is; for another device, or a claim that names none, its own name."""
    return next((card for card in claim.get("cards", []) if card in device), device)


def card(record: Record, claim: dict[str, Any]) -> str:
    """What tells the records of one claim apart: the card, where the claim names any."""
    return family(record["device"], claim) if claim.get("cards") else ""


def malformed(record: Any) -> str | None:
    """In words, what of a record is not as the schema has it."""
    return _first(_validator("record"), record)


@lru_cache(maxsize=2)
def _validator(part: str) -> Any:
    """Checks a whole document, or one of the schema's parts."""
    try:
        schema = json.loads((ROOT / SCHEMA).read_text("utf-8"))
        schema["$defs"]["record"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SelfcheckError(f"{SCHEMA}: unreadable ({error}); restore it with git") from None
    if part:
        schema = {"$schema": schema["$schema"], "$defs": schema["$defs"], "$ref": f"#/$defs/{part}"}
    return jsonschema.Draft202012Validator(schema)


def _first(validator: Any, made: Any) -> str | None:
    # The first, not the best of all: a file of a million wrong numbers is refused at its length.
    first = next(validator.iter_errors(made), None)
    if first is None:
        return None
    error = best_match([first])
    key = ".".join(map(str, error.absolute_path))
    return f"{shown(f'key {key}') + ': ' if key else ''}{shown(error.message)}"


def _wrong(document: Any) -> str | None:
    """In words, the first thing in a document that is not of the schema; records that are known are not asked twice."""
    records = document.get("records") if isinstance(document, dict) else None
    if not isinstance(records, list):
        return _first(_validator(""), document)
    # Its records are asked one by one.
    if said := _first(_validator(""), {**document, "records": records[:0]}):
        return said
    if len(records) != len(document["links"]):
        return f"{len(records)} records and {len(document['links'])} links"
    for i, record in enumerate(records):
        digest = record_digest(record)
        if digest in _KNOWN:
            continue
        if said := malformed(record):
            name = record.get("claim") if isinstance(record, dict) else None
            return f"record {i}{f' ({shown(name, 40)})' if isinstance(name, str) else ''}, {said}"
        _KNOWN.add(digest)
    return None


def _of_claims(path: Path, records: list[Record], claims: dict[str, dict[str, Any]], retired: bool) -> list[Record]:
    """The records whose claims exist, each once."""
    seen, out = set[tuple[str, str]](), []
    for i, record in enumerate(records):
        claim = claims.get(record["claim"])
        if claim is None:
            if retired:
                continue
            raise SelfcheckError(f"{path}: record {i}: no claim {record['claim']!r} in selfcheck/checks.toml; {MEND}")
        key = (record["claim"], card(record, claim))
        if key in seen:
            raise SelfcheckError(f"{path}: record {i}: {' on '.join(filter(None, key))} is there twice; {MEND}")
        seen.add(key)
        out.append(record)
    return out
