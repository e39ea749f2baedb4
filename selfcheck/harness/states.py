"""Which evidence may be believed: every claim's record is fresh, failed, stale or missing, and why.

A record is stale when a file that its run depended on says something else now, when it was made with versions off its
list, or when no run of the self-check would have written it. Figures and paper read evidence through here; no torch.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import seal, versions
from .digests import digest
from .files import ROOT, SEED, SelfcheckError, source
from .records import DEFAULT, FILES, GPU, MEND, Record, by_claim, read

#: devices as torch and the self-check name them, by where a claim is measured
GPUS = r"(?!.*CPU)(NVIDIA|Tesla|Quadro|GeForce|TITAN|AMD) [\w .()/+-]+"
CPUS = r"[A-Z][A-Za-z]+ [\w.-]+ CPU(, [1-9][0-9]* threads?)?"
COMMANDS = r"python -m selfcheck (run|evidence)(?= |$)"
#: before it nothing was measured
FIRST = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)


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
    claims = seal.claims(root)
    of_file = {claim["id"]: GPU if claim.get("where") == "gpu" else DEFAULT for claim in claims}
    known: dict[str, list[Record]] = {name: [] for name in FILES}
    for name in known:
        path = source(name, root, output)
        known[name] = read(path, root) if path.exists() else []
        for record in known[name]:
            if of_file[record["claim"]] != name:
                raise SelfcheckError(f"{path}: {record['claim']} is a claim of {of_file[record['claim']]}; {MEND}")
    pinned, out = _pinned(root), []
    for claim in claims:
        records = [r for r in known[of_file[claim["id"]]] if r["claim"] == claim["id"]]
        for card in claim.get("cards", [""]):
            state = State(claim, card, next((r for r in records if card in r["device"]), None))
            judge(state, root, pinned)
            out.append(state)
    return out


def _pinned(root: Path) -> dict[str, str]:
    """Digests of the pinned model and text."""
    return {kind: subject["sha256"] for kind, subject in seal.subjects(root).items()}


def judge(state: State, root: Path = ROOT, pinned: dict[str, str] | None = None) -> None:
    """Find the word for a record, and every reason why it is not fresh.

    Args:
        pinned: digests of the subjects, if they are at hand.
    """
    record = state.record
    if record is None:
        state.word, state.reasons = "missing", ["missing"]
        return
    stale = []
    if record["profile"] != "full":
        stale.append(f"made by a {record['profile']} run")
    if record["subjects"] != (pinned or _pinned(root)):
        stale.append("measured on other subjects than the pinned ones")
    changed = stale_files(record, state.claim, root)
    if changed:
        stale.append(f"stale, made before {_some(changed)} changed")
    outside = versions.outside(record, state.on_gpu, root)
    if outside:
        stale.append(f"stale, made with {', '.join(outside)}")
    if record["statement"] != state.claim["statement"] or record["status"] != state.claim["status"]:
        stale.append("stale, made when checks.toml stated the claim otherwise")
    stale += [f"not believed: {what}" for what in unbelievable(record, state.claim)]
    failed = [] if record["passed"] else [f"failed: {record['verdict']}"]
    state.reasons = failed + stale
    state.word = "failed" if failed else "stale" if stale else "fresh"


def unbelievable(record: Record, claim: dict[str, Any]) -> list[str]:
    """What no run of the self-check would have written, in words."""
    said, on_gpu = [], claim.get("where") == "gpu"
    if not re.fullmatch(GPUS if on_gpu else CPUS, record["device"]):
        said.append(f"a claim of {'a GPU' if on_gpu else 'a CPU'}, measured on {record['device']!r}")
    if record.get("check", claim["check"]) != claim["check"]:
        said.append(f"measured by {record['check']}, checks.toml has {claim['check']}")
    if any(name is not None for name in record["names"].values()):
        said.append(f"a run on other subjects by name, {record['names']}")
    if record["seed"] != SEED:
        said.append(f"seed {record['seed']}, allowed is {SEED}")
    if not re.match(COMMANDS, record["command"]):
        said.append(f"command {record['command'][:60]!r}, allowed is `python -m selfcheck run` or `evidence`")
    for name in ("time", "run"):
        if name in record and (wrong := _wrong_time(record[name])):
            said.append(f"{name} {record[name]}, which is {wrong}")
    if record.get("run", record["time"]) > record["time"]:
        said.append("its run began after it was measured")
    return said


def _wrong_time(said: str) -> str:
    """Why a record cannot be of this time; empty if it can."""
    try:
        time = datetime.datetime.fromisoformat(said)
    except ValueError:
        return "no date"
    if time < FIRST:
        return "before the first version"
    # A day's grace for clocks that go wrong.
    latest = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=1)
    return "in the future" if time > latest else ""


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


def fresh(root: Path = ROOT, output: Path | None = None) -> list[Record]:
    """Every record that may be believed, of each card. Raises as ``states``."""
    return [s.record for s in states(root, output) if s.word == "fresh" and s.record is not None]


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Say in a sentence that records lack what is made of them, whatever it was that they lack."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise SelfcheckError(
            f"{what}: a record has not what is shown of it ({type(error).__name__}: {error}); measure the claim again"
        ) from error


def _another_card_speaks(state: State, found: list[State]) -> bool:
    """Whether a claim is fresh on another of its cards while nothing is known of this one; a failure is known."""
    others = [s for s in found if s.claim["id"] == state.claim["id"] and s is not state]
    return state.word in ("stale", "missing") and any(s.word == "fresh" for s in others)


def left_out(state: State) -> bool:
    """Whether a claim needs a subject that not everyone installs, and was not run: it stops nothing."""
    return state.word == "missing" and bool(state.claim.get("optional", False))


def accepted(root: Path = ROOT, output: Path | None = None) -> dict[str, dict[str, Any]]:
    """The evidence that figures and paper may use, by claim; further cards' records lie under ``other_cards``.

    Of a claim that names several cards one must be fresh, and none may have failed: whoever has one kind of card can
    renew the paper, which then speaks of that kind.

    Raises:
        SelfcheckError: naming each claim that failed, is missing, stale, quick, or not of the default subjects, and
            each table of several cards.
    """
    for name in FILES:
        read(source(name, root, output), root)
    every = states(root, output)
    found = [state for state in every if not _another_card_speaks(state, every) and not left_out(state)]
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
    return by_claim(state.record for state in found if state.record is not None)
