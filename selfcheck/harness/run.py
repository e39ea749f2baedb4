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
from .files import ROOT, source, target

SEED = 20260601


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
    command: str = field(default_factory=lambda: " ".join(["python -m selfcheck", *sys.argv[1:]]))

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
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
    }  # fmt: skip
    try:
        json.dumps(made, allow_nan=False)
    except (TypeError, ValueError) as error:
        return {**made, **UNFINISHED, "passed": False, "verdict": f"its result cannot be kept: {error}"}
    return made


def destination(options: Options) -> str:
    """Where the evidence goes: only a full run on the pinned subjects and the CPU reaches the paper's file."""
    if options.quick:
        return "selfcheck/local/quick.json"
    if options.model or options.corpus or options.device != "cpu":
        key = json.dumps([options.model, options.corpus, options.device])
        return f"selfcheck/local/run-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"
    return evidence.DEFAULT


def gpu_destination(options: Options) -> str | None:
    """Where GPU claims go: the committed file, if this is a full run on the pinned subjects and a GPU."""
    special = options.quick or options.model or options.corpus or options.device == "cpu"
    return None if special else evidence.GPU


def targets(options: Options, root: Path = ROOT) -> list[Path]:
    """Every file that a run may write."""
    names = (destination(options), gpu_destination(options))
    return [target(name, root, options.folder) for name in names if name]


def keep(records: list[dict[str, Any]], options: Options, root: Path = ROOT) -> list[tuple[Path, str]]:
    """Merge records into the evidence they belong to; (file, root hash) of each file that was written.

    A GPU claim's record made with versions off its list would be stale at once: it stays beside the committed one.
    """
    claims = seal.claims(root)
    on_gpu = {claim["id"] for claim in claims if claim.get("where") == "gpu"}
    gpu_name, folder = gpu_destination(options), options.folder
    of_gpu = [r for r in records if gpu_name and r["claim"] in on_gpu and not versions.outside(r, True, root)]
    written = []
    for name, made in ((destination(options), [r for r in records if r not in of_gpu]), (gpu_name, of_gpu)):
        if name and made:
            path, merged = target(name, root, folder), evidence.merge(source(name, root, folder), made, claims)
            written.append((path, evidence.write(path, merged)))
    return written
