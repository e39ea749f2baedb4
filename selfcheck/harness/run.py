"""One run of claims: its options, the record of a claim, and where records go. Imports no torch."""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import evidence, seal, versions
from .files import ROOT, SEED, target
from .strict import shown


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Options:
    """What the user asked for; worker processes get it whole."""

    quick: bool = False
    device: str = "cpu"
    model: str | None = None
    corpus: str | None = None
    seed: int = SEED
    #: a folder to write below, laid out as the tree, instead of into the tree
    output: str | None = None
    #: who repeats the measurements, to compare them with the committed ones
    attest: str | None = None
    #: when the run began
    started: str = field(default_factory=now)
    command: str = field(default_factory=lambda: shown(" ".join(["python -m selfcheck", *sys.argv[1:]]), 2000))

    @property
    def folder(self) -> Path | None:
        return Path(self.output) if self.output else None

    def words(self) -> dict[str, Any]:
        return asdict(self)


#: what a check says that did not finish
UNFINISHED: dict[str, Any] = {"headline": "did not finish", "values": {}, "cases": 0, "data": {}, "checks": []}


def record(
    claim: dict[str, Any],
    result: dict[str, Any],
    options: Options,
    *,
    device: str,
    depends: dict[str, str],
    subjects: dict[str, str] | None,
    seconds: float,
) -> dict[str, Any]:
    """The record of one claim.

    Args:
        result: fields of a ``Result``.
        depends: digest of every file that the run depended on.
        subjects: digests of the model and the text if they were loaded.

    A result that the schema of evidence does not have makes a failed claim, which says so.
    """
    pinned = {kind: s["sha256"] for kind, s in seal.subjects().items()}
    names = {"model": options.model, "corpus": options.corpus}
    made = {
        "claim": claim["id"], "statement": claim["statement"], "status": claim["status"], "check": claim["check"],
        **result, "passed": bool(result["passed"]), "checks": sorted(set(result["checks"])) or [claim["id"]],
        "profile": "quick" if options.quick else "full", "names": names,
        "subjects": subjects or {k: (f"name:{names[k]}" if names[k] else pinned[k]) for k in pinned},
        "depends": depends, "device": device, "versions": versions.installed(), "machine": versions.machine(),
        "seed": options.seed, "seconds": round(seconds, 2),
        "time": now(), "run": options.started, "command": options.command, "verdict": shown(result["verdict"], 500),
    }  # fmt: skip
    if wrong := _unfit(made):
        made |= {**UNFINISHED, "checks": [claim["id"]], "passed": False}
        made["verdict"] = shown(f"its result cannot be kept: {wrong}", 500)
    return made


def _unfit(made: dict[str, Any]) -> str | None:
    """Why a record could not be read again; what is not finite or no JSON is found first."""
    try:
        return evidence.malformed(json.loads(json.dumps(made, allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)


def destination(options: Options) -> str:
    """Where the evidence goes: only a full run on the pinned subjects and the CPU reaches the paper's file."""
    if options.attest:
        return attested(options.attest)
    if options.quick:
        return "selfcheck/local/quick.json"
    if options.model or options.corpus or options.device != "cpu":
        key = json.dumps([options.model, options.corpus, options.device])
        return f"selfcheck/local/run-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    return evidence.DEFAULT


def gpu_destination(options: Options) -> str | None:
    """Where GPU claims go: the committed file, if this is a full run on the pinned subjects and a GPU."""
    special = options.attest or options.quick or options.model or options.corpus or options.device == "cpu"
    return None if special else evidence.GPU


def attested(name: str) -> str:
    """The file of a second party's evidence, for whichever device."""
    return f"selfcheck/evidence/attested/{name}.json"


def targets(options: Options, root: Path = ROOT) -> list[Path]:
    """Every file that a run may write."""
    return [target(name, root, options.folder) for name in names(options)]


def names(options: Options) -> list[str]:
    """Every file of evidence that a run may add to, by its name in the tree."""
    return [name for name in (destination(options), gpu_destination(options)) if name]
