"""Records into files of evidence: one after the other, and never at the cost of those that are there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from . import seal, versions
from .files import ROOT, SelfcheckError, source, target
from .records import Record, card, read, write
from .run import Options, destination, gpu_destination, names

#: beside local evidence, which git ignores: as writable as evidence, and the same for every process and host
LOCK = "selfcheck/local/evidence.lock"
#: seconds that another process may take to merge and write
PATIENCE = 60.0


def check_kept(options: Options, root: Path = ROOT) -> None:
    """Refuse, before anything is measured, what would stop a record from being kept.

    Raises:
        SelfcheckError: if there is evidence that cannot be read, or the lock cannot be taken.
    """
    with locked(options, root):
        for name in names(options):
            known(source(name, root, options.folder), root)


def known(path: Path, root: Path = ROOT) -> list[Record]:
    """Records that a file has already, none if there is no file.

    Raises:
        SelfcheckError: if it is there and cannot be read: nothing is merged into what might hold records.
    """
    try:
        return read(path, root, retired=True) if path.exists() else []
    except SelfcheckError as error:
        raise SelfcheckError(f"{error}. Nothing was written into it") from error


def merge(path: Path, fresh: list[Record], claims: list[dict[str, Any]], root: Path = ROOT) -> list[Record]:
    """Fresh records over those already in ``path``, in the order of the claims and of their cards.

    Raises as ``known``.
    """
    there, out = known(path, root), []
    for claim in claims:
        cards = claim.get("cards", [])
        of_card = {card(record, claim): record for record in [*there, *fresh] if record["claim"] == claim["id"]}
        out += [of_card[card] for card in sorted(of_card, key=lambda c: cards.index(c) if c in cards else len(cards))]
    return out


def keep(records: list[Record], options: Options, root: Path = ROOT) -> list[tuple[Path, str]]:
    """Merge records into the evidence they belong to; (file, root hash) of each file that was written.

    A GPU claim's record made with versions off its list would be stale at once: it stays beside the committed one.

    Raises:
        SelfcheckError: if a file cannot be read or written; it is then as it was before.
    """
    claims = seal.claims(root)
    on_gpu = {claim["id"] for claim in claims if claim.get("where") == "gpu"}
    gpu_name, folder = gpu_destination(options), options.folder
    of_gpu = [r for r in records if gpu_name and r["claim"] in on_gpu and not versions.outside(r, True, root)]
    written = []
    with locked(options, root):
        for name, made in ((destination(options), [r for r in records if r not in of_gpu]), (gpu_name, of_gpu)):
            if name and made:
                path, merged = target(name, root, folder), merge(source(name, root, folder), made, claims, root)
                written.append((path, write(path, merged)))
    return written


@dataclass
class Kept:
    """What one command has written so far, record by record."""

    claims: list[str] = field(default_factory=list)
    roots: dict[Path, str] = field(default_factory=dict)

    def keep(self, record: Record, options: Options, root: Path = ROOT) -> None:
        """Keep one record. Raises as ``keep``."""
        self.roots |= dict(keep([record], options, root))
        self.claims.append(record["claim"])

    def __str__(self) -> str:
        if not self.claims:
            return "the evidence is as it was before"
        files = ", ".join(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path) for path in self.roots)
        return f"kept: {', '.join(self.claims)}, in {files}; the rest is as it was before"


@contextmanager
def locked(options: Options, root: Path = ROOT) -> Iterator[None]:
    """No other process reads, merges and writes evidence meanwhile. A process that ends, however, lets go.

    Raises:
        SelfcheckError: if the lock's file cannot be made, or another process keeps it.
    """
    path = target(LOCK, root, options.folder)
    lock = filelock.FileLock(path, timeout=PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise SelfcheckError(f"{path}: held by another run for {PATIENCE:.0f} s; end that one first") from None
    except (OSError, NotImplementedError) as error:
        said = f"cannot lock {path}: {error}; nothing was written. `--output FOLDER` writes elsewhere"
        raise SelfcheckError(said) from error
    try:
        yield
    finally:
        lock.release()
