"""What the archive says of the evidence: its roots, and when it was made."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence
from selfcheck.harness.files import SelfcheckError

FILES = (evidence.DEFAULT, evidence.GPU)


def records(root: Path) -> list[dict[str, Any]]:
    """Every committed record. Raises SelfcheckError if a file of evidence cannot be read."""
    return [record for name in FILES for record in evidence.read(root / name)]


def content_root(root: Path) -> str:
    """The root of what the evidence says, without when, where and how fast it was made."""
    made = getattr(evidence, "content_root", _without_circumstances)
    return made(records(root))


def _without_circumstances(found: list[dict[str, Any]]) -> str:
    """Stands in for evidence.content_root where there is none."""
    apart = ("time", "seconds", "host", "command", "versions", "machine", "run")
    return evidence.chain([{k: v for k, v in record.items() if k not in apart} for record in found])[1]


def chain_roots(root: Path) -> dict[str, str]:
    """The root of the chain of each file of evidence, which is over times and hosts too."""
    return {name: evidence.chain(evidence.read(root / name))[1] for name in FILES}


def newest(root: Path) -> datetime.datetime:
    """When the newest record was made, in UTC: the date of everything that is made from the evidence."""
    times = [record["time"] for record in records(root)]
    if not times:
        raise SelfcheckError(f"{root}: no evidence, so nothing to date the archive by; run `nox -s selfcheck` first")
    return max(datetime.datetime.fromisoformat(time).astimezone(datetime.timezone.utc) for time in times)
