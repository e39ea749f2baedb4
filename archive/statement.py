"""statement.json: an in-toto statement of which commit, lock, evidence and outputs belong together."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, SelfcheckError, sha256

from . import metadata, roots
from .listing import LONGEST, MANIFEST, refusal
from .tree import STATEMENT, Tree, revision

TYPE = "https://in-toto.io/Statement/v1"
#: a name, not an address: what the predicate below means is said here
PREDICATE = "tag:qaxis,2026:evidence/v1"
BOUND = (seal.LOCK, *evidence.FILES, "archive/manifest.json", "paper/paper.pdf")
ATTESTED = "selfcheck/evidence/attested/"
SAYS = (
    "Whoever signs this says that these files belong together and come from this commit. The list names every other "
    "file of the archive."
)
DOES_NOT_SAY = (
    "That a number was measured, or measured well: a signature says who vouches, and the self-check measures again."
)


#: the object of a commit is UTF-8, or, where its message is not and this is said, text byte by byte
UTF8, BYTES = "utf-8", "latin-1"


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
            **{name: ask() for name, ask in _about_evidence(root).items()},
            "source": {"swhid": swhid, **_commit_text(tree.commit), "executable": sorted(tree.executable)},
            "says": SAYS,
            "doesNotSay": DOES_NOT_SAY,
        },
    }
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def _commit_text(commit: bytes) -> dict[str, str]:
    """The object as text that gives it back exactly."""
    try:
        return {"commit": commit.decode(UTF8)}
    except UnicodeDecodeError:
        return {"commit": commit.decode(BYTES), "encoding": BYTES}


def commit_object(source: dict[str, Any]) -> bytes:
    """The object of the commit that a statement is about, as git has it.

    Raises:
        SelfcheckError: if its text is not of the encoding that is said.
    """
    encoding = source.get("encoding", UTF8)
    try:
        return bytes(source["commit"].encode(encoding))
    except UnicodeEncodeError as error:
        raise SelfcheckError(f"{STATEMENT}: commit: not {encoding}, as it says ({error.reason})") from error


def read(root: Path) -> dict[str, Any]:
    """The statement of an unpacked archive.

    Raises:
        SelfcheckError: if it cannot be read, or has not the form of ours.
    """
    path = root / STATEMENT
    try:
        said = json.loads(path.read_text("utf-8"))
        # JSON can spell halves of characters, which are no text: nothing here could write, hash or print them.
        json.dumps(said, ensure_ascii=False).encode()
        source = said["predicate"]["source"]
        formed = (
            (said["_type"], said["predicateType"]) == (TYPE, PREDICATE)
            and isinstance(source["commit"], str)
            and source.get("encoding", UTF8) in (UTF8, BYTES)
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
    named, source = Counter(s["name"] for s in said["subject"]), said["predicate"]["source"]
    subjects = {s["name"]: s["digest"] for s in said["subject"]}
    out = [f"{STATEMENT}: names {name[:LONGEST]} {n} times" for name, n in named.items() if n > 1]
    out += [
        f"{STATEMENT}: says nothing of {name}" for name in (*BOUND, MANIFEST) if "sha256" not in subjects.get(name, {})
    ]
    for name, digest in subjects.items():
        if "sha256" in digest and (refusal(name) or not _holds(root / name, digest["sha256"])):
            out.append(f"{name[:LONGEST]}: not the file that {STATEMENT} names")
    if subjects.get("commit") != {"gitCommit": revision(commit_object(source))}:
        out.append(f"{STATEMENT}: its commit object is not the commit that it names")
    if subjects.get("source tree") != {"gitTree": str(source.get("swhid")).rpartition(":")[2]}:
        out.append(f"{STATEMENT}: its source tree is not the SWHID that it names")
    return [*out, *_otherwise(root, said["predicate"])]


def _about_evidence(root: Path) -> dict[str, Callable[[], Any]]:
    """What the predicate repeats of the files, and how it is found in them."""
    return {
        "version": lambda: metadata.load(root)["version"],
        "contentRoot": lambda: roots.content_root(root),
        "evidenceRoots": lambda: roots.chain_roots(root),
        "newestEvidence": lambda: roots.newest(root).isoformat(),
    }


def _otherwise(root: Path, predicate: dict[str, Any]) -> list[str]:
    """In words, what the predicate says otherwise than the files beside it."""
    out = []
    for name, ask in _about_evidence(root).items():
        try:
            found = ask()
        except SelfcheckError as error:
            out.append(f"{STATEMENT}: {name} cannot be compared: {error}")
            continue
        if predicate.get(name) != found:
            out.append(f"{STATEMENT}: {name} is {str(predicate.get(name))[:200]!r}, but its files give {str(found)!r}")
    return out


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest
