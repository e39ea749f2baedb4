"""Evidence: one record a claim, chained into a root hash, written whole or not at all.

This module reads and checks evidence for the figures and the paper as well; it imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from . import seal
from .files import ROOT, SelfcheckError, write_atomic

DEFAULT = "selfcheck/evidence/default.json"
#: claims that need a GPU: measured on one, committed, stale when a file they depend on changes
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


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Records by claim.

    Raises:
        SelfcheckError: if the file is missing, unreadable, or its chain does not hold.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
        records, root, links = document["records"], document["root"], document["links"]
    except FileNotFoundError:
        raise SelfcheckError(f"{path}: no evidence; run `nox -s selfcheck` first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SelfcheckError(f"{path}: unreadable evidence ({error}); run `nox -s selfcheck` again") from error
    if chain(records) != (links, root):
        raise SelfcheckError(f"{path}: the hash chain does not hold, a record was edited; run `nox -s selfcheck` again")
    return {record["claim"]: record for record in records}


def accepted(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """The evidence that figures and paper may use.

    Raises:
        SelfcheckError: naming each claim that failed, is missing, stale, quick, or not of the default subjects.
    """
    here, gpu = load(root / DEFAULT), load(root / GPU)
    records = {}
    wrong = []
    pinned = {kind: subject["sha256"] for kind, subject in seal.subjects(root).items()}
    for claim in seal.claims(root):
        record = (gpu if claim.get("where") == "gpu" else here).get(claim["id"])
        if record is None:
            wrong.append(f"{claim['id']}: missing")
            continue
        records[claim["id"]] = record
        if record["profile"] != "full":
            wrong.append(f"{claim['id']}: made by a {record['profile']} run")
        if not record["passed"]:
            wrong.append(f"{claim['id']}: failed: {record['verdict']}")
        if record["subjects"] != pinned:
            wrong.append(f"{claim['id']}: measured on other subjects than the pinned ones")
        now = seal.digests_of(claim, root)
        changed = sorted(n for n in now.keys() | record["depends"].keys() if now.get(n) != record["depends"].get(n))
        if changed:
            wrong.append(f"{claim['id']}: stale, made before {', '.join(changed)} changed")
    if wrong:
        lines = "\n  ".join(wrong)
        raise SelfcheckError(
            f"the evidence does not carry the paper:\n  {lines}\n"
            "Run `nox -s selfcheck` (GPU claims: `-- --device cuda`)."
        )
    return records
