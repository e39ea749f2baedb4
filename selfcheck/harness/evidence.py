"""Evidence: one record a claim (one a card, where a claim names cards), chained into a root hash, written whole.

A record is stale when a file that its run depended on says something else now, or when it was made with versions off
its list. This module reads and judges evidence for the figures and the paper as well; it imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import seal, versions
from .digests import digest
from .files import ROOT, SelfcheckError, source, write_atomic

DEFAULT = "selfcheck/evidence/default.json"
#: claims that need a GPU: measured on one and committed
GPU = "selfcheck/evidence/gpu.json"


def record_digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True, allow_nan=False).encode()).hexdigest()


def chain(records: list[dict[str, Any]]) -> tuple[list[str], str]:
    """Link of every record, and the root: link_i = SHA-256(link_{i-1} || digest_i)."""
    link, links = "0" * 64, []
    for record in records:
        link = hashlib.sha256((link + record_digest(record)).encode()).hexdigest()
        links.append(link)
    return links, link


def write(path: Path, records: list[dict[str, Any]]) -> str:
    """Write records and their chain atomically; returns the root hash."""
    links, root = chain(records)
    document = {"format": 1, "root": root, "links": links, "records": records}
    write_atomic(path, (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())
    return root


def read(path: Path) -> list[dict[str, Any]]:
    """Every record, in order; a claim of several cards has several.

    Raises:
        SelfcheckError: if the file is missing, unreadable, or its chain does not hold.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        records, root, links = document["records"], document["root"], document["links"]
        holds = chain(records) == (links, root) and all("claim" in record for record in records)
    except FileNotFoundError:
        raise SelfcheckError(f"{path}: no evidence; run `nox -s selfcheck` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SelfcheckError(f"{path}: unreadable evidence ({error}); run `nox -s selfcheck` again") from error
    if not holds:
        raise SelfcheckError(f"{path}: the hash chain does not hold, a record was edited; run `nox -s selfcheck` again")
    return records


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Records by claim; of several cards the first, with the others under ``other_cards``. Raises as ``read``."""
    out: dict[str, dict[str, Any]] = {}
    for record in read(path):
        if record["claim"] in out:
            out[record["claim"]].setdefault("other_cards", []).append(record)
        else:
            out[record["claim"]] = dict(record)
    return out


def family(device: str, claim: dict[str, Any]) -> str:
    """Which of a claim's cards a device is; for another device, or a claim that names none, its own name."""
    return next((card for card in claim.get("cards", []) if card in device), device)


def merge(path: Path, fresh: list[dict[str, Any]], claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fresh records over those already in ``path``, in the order of the claims and of their cards."""
    try:
        known = read(path)
    except SelfcheckError:
        known = []
    out = []
    for claim in claims:
        cards = claim.get("cards", [])
        of_card: dict[str, dict[str, Any]] = {}
        for record in (r for r in [*known, *fresh] if r["claim"] == claim["id"]):
            of_card[family(record["device"], claim) if cards else ""] = record
        out += [of_card[card] for card in sorted(of_card, key=lambda c: cards.index(c) if c in cards else len(cards))]
    return out


# ---- What may be believed ------------------------------------------------------------------------------------------


@dataclass
class State:
    """Where one claim stands, on one of its cards if it names any."""

    claim: dict[str, Any]
    #: one of the claim's cards, or "" for any device
    card: str
    record: dict[str, Any] | None
    #: "fresh", "failed", "stale" or "missing", and every reason why it is not fresh
    word: str = "fresh"
    reasons: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.claim['id']} on {self.card}" if self.card else self.claim["id"]

    @property
    def on_gpu(self) -> bool:
        return self.claim.get("where") == "gpu"

    @property
    def device(self) -> str:
        return self.record.get("device", "") if self.record else ""


def states(root: Path = ROOT, output: Path | None = None) -> list[State]:
    """The state of every claim, in order. A file of evidence that cannot be read raises, a missing one does not.

    Args:
        output: a folder whose evidence stands for the tree's.
    """
    files = {name: source(name, root, output) for name in (DEFAULT, GPU)}
    found = {name: read(path) if path.exists() else [] for name, path in files.items()}
    pinned = {kind: subject["sha256"] for kind, subject in seal.subjects(root).items()}
    out = []
    for claim in seal.claims(root):
        records = [r for r in found[GPU if claim.get("where") == "gpu" else DEFAULT] if r["claim"] == claim["id"]]
        for card in claim.get("cards", [""]):
            state = State(claim, card, next((r for r in records if card in r["device"]), None))
            _judge(state, pinned, root)
            out.append(state)
    return out


def _judge(state: State, pinned: dict[str, str], root: Path) -> None:
    record = state.record
    if record is None:
        state.word, state.reasons = "missing", ["missing"]
        return
    stale = []
    if record["profile"] != "full":
        stale.append(f"made by a {record['profile']} run")
    if record["subjects"] != pinned:
        stale.append("measured on other subjects than the pinned ones")
    changed = stale_files(record, state.claim, root)
    if changed:
        stale.append(f"stale, made before {_some(changed)} changed")
    outside = versions.outside(record, state.on_gpu, root)
    if outside:
        stale.append(f"stale, made with {', '.join(outside)}")
    failed = [] if record["passed"] else [f"failed: {record['verdict']}"]
    state.reasons = failed + stale
    state.word = "failed" if failed else "stale" if stale else "fresh"


def _some(names: list[str], shown: int = 4) -> str:
    """The first names of a list."""
    more = [f"{len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])


def stale_files(record: dict[str, Any], claim: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Files that a record depends on and that say something else now, or are gone."""
    depends = record["depends"]
    changed = sorted(name for name, was in depends.items() if digest(root, name) != was)
    check = check_file(claim)
    # The check's own module: without it nobody noted what ran, or another check measures this claim now.
    return changed if check in depends else [check, *changed]


def check_file(claim: dict[str, Any]) -> str:
    """The module of a claim's check."""
    return f"selfcheck/checks/{claim['check'].split(':')[0]}.py"


def renewal(state: State) -> str:
    """The command that makes a claim's evidence again."""
    return f"nox -s evidence -- {'--device cuda ' if state.on_gpu else ''}--only {state.claim['id']}"


def mixed_tables(found: list[State]) -> dict[str, dict[str, list[str]]]:
    """Tables whose timing claims were measured on several cards: table -> device -> claims."""
    out: dict[str, dict[str, list[str]]] = {}
    for state in found:
        if "table" in state.claim and state.record is not None:
            out.setdefault(state.claim["table"], {}).setdefault(state.device, []).append(state.claim["id"])
    return {table: devices for table, devices in out.items() if len(devices) > 1}


def _another_card_speaks(state: State, found: list[State]) -> bool:
    """Whether a claim is fresh on another of its cards while nothing is known of this one; a failure is known."""
    others = [s for s in found if s.claim["id"] == state.claim["id"] and s is not state]
    return state.word in ("stale", "missing") and any(s.word == "fresh" for s in others)


def accepted(root: Path = ROOT, output: Path | None = None) -> dict[str, dict[str, Any]]:
    """The evidence that figures and paper may use, by claim; further cards' records lie under ``other_cards``.

    Of a claim that names several cards one must be fresh, and none may have failed: whoever has one kind of card can
    renew the paper, which then speaks of that kind.

    Raises:
        SelfcheckError: naming each claim that failed, is missing, stale, quick, or not of the default subjects, and
            each table of several cards.
    """
    for name in (DEFAULT, GPU):
        read(source(name, root, output))
    every = states(root, output)
    found = [state for state in every if not _another_card_speaks(state, every)]
    wrong = [f"{state.name}: {reason}" for state in found for reason in state.reasons]
    for table, devices in mixed_tables(found).items():
        where = "; ".join(f"{', '.join(ids)} on {device}" for device, ids in devices.items())
        wrong.append(f"table {table}: its claims are from several cards: {where}")
    if wrong:
        lines = "\n  ".join(wrong)
        raise SelfcheckError(
            f"the evidence does not carry the paper:\n  {lines}\n"
            "`nox -s status` says which command renews each; `nox -s evidence` (GPU claims: `-- --device cuda`) all."
        )
    records: dict[str, dict[str, Any]] = {}
    for state in found:
        assert state.record is not None
        if state.claim["id"] in records:
            records[state.claim["id"]].setdefault("other_cards", []).append(state.record)
        else:
            records[state.claim["id"]] = dict(state.record)
    return records
