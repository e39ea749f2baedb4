"""What of a record is the same wherever the claim is measured, and one hash over it, so that laboratories can compare.

How much of a measurement repeats is said by its claim in checks.toml: ``repeats = "bits"`` (every value and datum but
those that ``varies`` names), ``"interval"`` (values differ in their last bits, as a model's forward passes do between
processors: their names, units and counts are kept) or ``"timed"`` (time and memory of a machine: names and units).
Times, hosts, durations, devices, versions and commands are never content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import seal
from .files import ROOT, SelfcheckError
from .records import Record, card

KEPT = (
    "claim", "check", "statement", "status", "profile", "passed", "subjects", "depends", "seed", "checks", "cases",
)  # fmt: skip
#: what is kept of each value
OF_VALUES = {"bits": ("value", "unit", "n", "low", "high"), "interval": ("unit", "n"), "timed": ("unit",)}


def claim_of(record: Record, root: Path = ROOT) -> dict[str, Any]:
    """The entry of checks.toml that a record is of.

    Raises:
        SelfcheckError: if there is none.
    """
    found = next((claim for claim in seal.claims(root) if claim["id"] == record["claim"]), None)
    if found is None:
        raise SelfcheckError(f"no claim {record['claim']!r} in {seal.CLAIMS}")
    return found


def content(record: Record, root: Path = ROOT) -> dict[str, Any]:
    """What of a record does not depend on where and when it was made."""
    claim = claim_of(record, root)
    repeats, varies = claim["repeats"], claim.get("varies", [])
    kept = {name: record[name] for name in KEPT if name in record}
    kept["values"] = {
        name: {part: value[part] for part in OF_VALUES[repeats]} for name, value in record["values"].items()
    }
    if repeats == "bits":
        kept["data"] = record["data"]
    return _without(kept, varies)


def content_digest(record: Record, root: Path = ROOT) -> str:
    """SHA-256 of a record's content as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content(record, root), sort_keys=True, allow_nan=False).encode()).hexdigest()


def content_root(records: Sequence[Record], root: Path = ROOT) -> str:
    """One hash over what repeats of what was measured: equal for sets of records that agree in content, in any order.

    SHA-256 over the sorted lines ``record CLAIM CARD DIGEST`` and ``subject KIND DIGEST``.
    """
    lines = {f"record {r['claim']} {card(r, claim_of(r, root))} {content_digest(r, root)}" for r in records}
    lines |= {f"subject {kind} {digest}" for r in records for kind, digest in r["subjects"].items()}
    return hashlib.sha256("".join(f"{line}\n" for line in sorted(lines)).encode()).hexdigest()


def _without(made: Any, patterns: Sequence[str], path: str = "") -> Any:
    """Without the keys whose dotted path matches a pattern."""
    if isinstance(made, list):
        return [_without(x, patterns, f"{path}.{i}") for i, x in enumerate(made)] if patterns else made
    if not isinstance(made, dict):
        return made
    paths = {key: f"{path}.{key}".lstrip(".") for key in made}
    return {
        key: _without(x, patterns, paths[key])
        for key, x in made.items()
        if not any(fnmatchcase(paths[key], pattern) for pattern in patterns)
    }
