"""What the archive says of the evidence: its roots, and when it was made."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from selfcheck.harness import evidence
from selfcheck.harness.files import ROOT, SelfcheckError


@dataclass(frozen=True)
class Basis:
    """What everything that is made from the evidence says of it."""

    content_root: str
    #: when the newest record was made
    date: datetime.date

    @property
    def identifier(self) -> str:
        return f"sha256:{self.content_root}"


def basis(root: Path = ROOT, output: Path | None = None) -> Basis:
    """Root and date of the evidence that may be believed.

    Raises:
        SelfcheckError: if there is none, or a file of evidence cannot be read.
    """
    return Basis(content_root(root, output), newest(root, output).date())


def content_root(root: Path = ROOT, output: Path | None = None) -> str:
    """The root of what the evidence that may be believed says, without when, where and how fast it was made."""
    return evidence.content_root(evidence.fresh(root, output), root)


def chain_roots(root: Path = ROOT) -> dict[str, str]:
    """The root of the chain of each file of evidence, which is over times and hosts too."""
    return {name: evidence.chain(evidence.read(root / name, root))[1] for name in evidence.FILES}


def newest(root: Path = ROOT, output: Path | None = None) -> datetime.datetime:
    """When the newest record was made, in UTC: the date of everything that is made from the evidence."""
    times = [record["time"] for record in evidence.fresh(root, output)]
    if not times:
        raise SelfcheckError(f"{root}: no evidence, so nothing to date the archive by; run `nox -s selfcheck` first")
    return max(datetime.datetime.fromisoformat(time).astimezone(datetime.timezone.utc) for time in times)
