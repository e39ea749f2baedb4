"""statement.json: an in-toto statement of which commit, lock, evidence and outputs belong together."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, SelfcheckError, sha256

from . import metadata, roots
from .listing import MANIFEST, inside
from .tree import STATEMENT, Tree, revision

TYPE = "https://in-toto.io/Statement/v1"
#: a name, not an address: what the predicate below means is said here
PREDICATE = "tag:qaxis,2026:evidence/v1"
BOUND = (seal.LOCK, evidence.DEFAULT, evidence.GPU, "archive/manifest.json", "paper/paper.pdf")
ATTESTED = "selfcheck/evidence/attested/"
SAYS = (
    "Whoever signs this says that these files belong together and come from this commit. The list names every other "
    "file of the archive."
)
DOES_NOT_SAY = (
    "That a number was measured, or measured well: a signature says who vouches, and the self-check measures again."
)


def _subject(name: str, **digest: str) -> dict[str, Any]:
    return {"name": name, "digest": digest}


def _file(name: str, data: bytes) -> dict[str, Any]:
    return _subject(name, sha256=hashlib.sha256(data).hexdigest())


def render(tree: Tree, manifest: bytes, root: Path = ROOT) -> bytes:
    """The statement about a tree and the list of an archive's files.

    Raises:
        SelfcheckError: naming what it is about and is not there.
    """
    missing = [name for name in BOUND if name not in tree.files]
    if missing:
        raise SelfcheckError(f"no statement without {', '.join(missing)}")
    named = [*BOUND, *sorted(name for name in tree.files if name.startswith(ATTESTED))]
    swhid = tree.swhid
    document = {
        "_type": TYPE,
        "subject": [
            *(_file(name, tree.files[name]) for name in named),
            _file(MANIFEST, manifest),
            _subject("commit", gitCommit=tree.revision),
            _subject("source tree", gitTree=swhid.rpartition(":")[2]),
        ],
        "predicateType": PREDICATE,
        "predicate": {
            "version": metadata.load(root)["version"],
            "contentRoot": roots.content_root(root),
            "evidenceRoots": roots.chain_roots(root),
            "newestEvidence": roots.newest(root).isoformat(),
            "source": {"swhid": swhid, "commit": tree.commit, "executable": sorted(tree.executable)},
            "says": SAYS,
            "doesNotSay": DOES_NOT_SAY,
        },
    }
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def read(root: Path) -> dict[str, Any]:
    """The statement of an unpacked archive.

    Raises:
        SelfcheckError: if it cannot be read, or has not the form of ours.
    """
    path = root / STATEMENT
    try:
        said = json.loads(path.read_text("utf-8"))
        source = said["predicate"]["source"]
        formed = (
            (said["_type"], said["predicateType"]) == (TYPE, PREDICATE)
            and isinstance(source["commit"], str)
            and isinstance(source["executable"], list)
            and all(isinstance(name, str) for name in source["executable"])
            and all(isinstance(s["name"], str) and isinstance(s["digest"], dict) for s in said["subject"])
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SelfcheckError(f"{STATEMENT}: unreadable ({type(error).__name__}: {error})") from error
    if not formed:
        raise SelfcheckError(f"{STATEMENT}: not a statement of this project's ({TYPE}, {PREDICATE})")
    return said


def wrong(root: Path) -> list[str]:
    """In words, where the statement of an unpacked archive is not about the files beside it."""
    said = read(root)
    subjects, source = {s["name"]: s["digest"] for s in said["subject"]}, said["predicate"]["source"]
    out = [f"{STATEMENT}: says nothing of {name}" for name in (*BOUND, MANIFEST) if name not in subjects]
    for name, digest in subjects.items():
        if "sha256" in digest and not (inside(name) and _holds(root / name, digest["sha256"])):
            out.append(f"{name}: not the file that {STATEMENT} names")
    if subjects.get("commit") != {"gitCommit": revision(source["commit"])}:
        out.append(f"{STATEMENT}: its commit object is not the commit that it names")
    if subjects.get("source tree") != {"gitTree": str(source.get("swhid")).rpartition(":")[2]}:
        out.append(f"{STATEMENT}: its source tree is not the SWHID that it names")
    return out


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest
