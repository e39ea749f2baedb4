"""The lock: what is sealed, sealing it, and naming every byte-level difference."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import tomlkit

from .. import isolated
from .files import CLOSED, ROOT, SelfcheckError, sha256, write_atomic

LOCK, LINE_ENDINGS = isolated.LOCK, isolated.LINE_ENDINGS
SEALED = (
    "src/qaxis/**/*.py", "src/qaxis/**/*.cu*", "src/qaxis/**/*.hpp",
    "selfcheck/**/*.py", "selfcheck/*.toml", "selfcheck/inputs/*.toml",
    "selfcheck/*.json",
    "figures/*.py", "paper/*.py", "paper/paper.tex", "paper/proofs/*.v", "paper/proofs/*.toml",
    "archive/**/*.py", "archive/schemas/*.json", "archive/*.toml", "archive/allowed_signers",
    "constraints*.txt", "requirements/*.txt", "requirements/*.py", "pyproject.toml", "noxfile.py", ".gitattributes",
)  # fmt: skip
#: what every claim says
NEEDED = {"id", "statement", "status", "check", "published", "must", "repeats"}
#: {pattern of files that are not sealed: why they may be there}; ``*`` is of one folder's names, ``**`` of any depth
EXPECTED = {
    "**/__pycache__/*.pyc": "byte code that Python keeps, and no command reads",
    "**/*.staging": "what a killed process was writing; removed by the next that writes there",
    "**/.DS_Store": "a desktop's own",
    "src/*.egg-info/*": "what an installation notes",
    "selfcheck/checks.lock": "the lock",
    "selfcheck/evidence/default.json": "records, in a chain of their own",
    "selfcheck/evidence/gpu.json": "records, in a chain of their own",
    "selfcheck/evidence/attested/*.json": "records of other parties",
    "selfcheck/local/**": "runs that no paper reads",
    "figures/*.pdf": "drawn from records", "figures/*.png": "drawn from records",
    "figures/figures.json": "which records each figure was drawn from",
    "paper/numbers.tex": "made from records", "paper/paper.pdf": "made from records",
    "paper/paper.json": "what the PDF was typeset from",
    "paper/build/**/*": "what pdflatex leaves, run by hand",
    "paper/proofs/*.vo*": "what coqc leaves", "paper/proofs/*.glob": "what coqc leaves",
    "paper/proofs/.*.aux": "what coqc leaves", "paper/proofs/.*.cache": "what coqc leaves",
    "archive/manifest.json": "what binds the outputs",
}  # fmt: skip


#: what would shape an installation from this folder, or a run of its tests, and is not there
SETUP = ("setup.py", "setup.cfg", "MANIFEST.in", "conftest.py", "tox.ini", "pytest.ini")
CLAIMS, SUBJECTS = "selfcheck/checks.toml", "selfcheck/inputs/subjects.toml"


@lru_cache(maxsize=8)
def _parsed(data: bytes) -> dict[str, Any]:
    return tomlkit.parse(data.decode()).unwrap()


def _table(root: Path, name: str, *keys: str) -> dict[str, Any]:
    """A sealed TOML file.

    Raises:
        SelfcheckError: if it cannot be read, or lacks one of its tables.
    """
    try:
        # A copy: whoever gets it may change it.
        found = copy.deepcopy(_parsed((root / name).read_bytes()))
    except (OSError, UnicodeDecodeError, tomlkit.exceptions.TOMLKitError) as error:
        raise SelfcheckError(f"{name}: unreadable ({error}); restore it with git") from None
    if missing := [key for key in keys if not found.get(key)]:
        raise SelfcheckError(f"{name}: has no {', '.join(missing)}; restore it with git")
    return found


def claims(root: Path = ROOT) -> list[dict[str, Any]]:
    """The claims of checks.toml, in order. Raises SelfcheckError if there are none."""
    found = _table(root, CLAIMS, "claim")["claim"]
    if not all(isinstance(claim, dict) and NEEDED <= claim.keys() for claim in found):
        raise SelfcheckError(f"{CLAIMS}: a claim lacks one of {', '.join(sorted(NEEDED))}")
    return found


def reported(root: Path = ROOT) -> list[dict[str, Any]]:
    """Published numbers that are not measured here."""
    return _table(root, CLAIMS, "reported")["reported"]


def subjects(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The pinned model and corpus of subjects.toml."""
    return _table(root, SUBJECTS, "model", "corpus")


def expand(patterns: tuple[str, ...] | list[str], root: Path = ROOT) -> list[str]:
    """Files under ``root`` that match, as sorted posix paths."""
    found = {p.relative_to(root).as_posix() for pattern in patterns for p in root.glob(pattern) if p.is_file()}
    return sorted(found)


def seal(root: Path = ROOT) -> int:
    """Write the lock over what is there now; returns the number of files."""
    # A lock over what no command can read would hold, and mean nothing.
    claims(root), reported(root)
    document = tomlkit.document()
    document.add(tomlkit.comment("SHA-256 of every sealed file and subject; made by `nox -s seal`."))
    document["files"] = {name: sha256(root / name) for name in expand(SEALED, root)}
    document["subjects"] = {s["file"]: s["sha256"] for s in subjects(root).values()}
    write_atomic(root / LOCK, tomlkit.dumps(document).encode())
    return len(document["files"])  # type: ignore[arg-type]


def locked(root: Path = ROOT) -> dict[str, str]:
    """Digests of the sealed files, as the lock has them."""
    return tomlkit.parse((root / LOCK).read_text("utf-8")).unwrap()["files"]


def _matches(name: str, pattern: str) -> bool:
    """Whether a file's posix path is one of a pattern's, which says each folder, or ``**`` for any number of them."""

    def fits(parts: list[str], wanted: list[str]) -> bool:
        if not wanted:
            return not parts
        if wanted[0] == "**":
            return any(fits(parts[i:], wanted[1:]) for i in range(len(parts) + 1))
        return bool(parts) and fnmatchcase(parts[0], wanted[0]) and fits(parts[1:], wanted[1:])

    return fits(name.split("/"), pattern.split("/"))


def _unexpected(root: Path, files: dict[str, str]) -> Iterator[str]:
    """One sentence for every link in a closed folder, and every file that is neither sealed nor expected."""
    for name in SETUP:
        if (root / name).exists():
            yield f"{name}: not sealed, and nothing that is expected here; remove it"
    for closed in CLOSED:
        if (root / closed).is_symlink():
            yield f"{closed}: a symbolic link; allowed is a folder of this tree"
        for folder, folders, names in os.walk(root / closed):
            for entry in sorted([*folders, *names]):
                path = Path(folder, entry)
                name = path.relative_to(root).as_posix()
                if path.is_symlink():
                    yield f"{name}: a symbolic link; allowed are files of this tree"
                elif entry in names and not (name in files or any(_matches(name, x) for x in (*EXPECTED, *SEALED))):
                    yield f"{name}: not sealed, and nothing that is expected here; remove it"


def differences(root: Path = ROOT) -> list[str]:
    """One sentence for every sealed file that is changed, missing or not in the lock, and for what does not belong."""
    try:
        data = (root / LOCK).read_bytes()
        converted = [f"{LOCK}: {LINE_ENDINGS}"] if b"\r\n" in data else []
        locked = tomlkit.parse(data.replace(b"\r\n", b"\n").decode()).unwrap()
        files, pinned = dict(locked["files"]), dict(locked["subjects"])
    except (OSError, KeyError, TypeError, ValueError, tomlkit.exceptions.TOMLKitError) as error:
        return [f"{LOCK}: unreadable ({error}); restore it, or seal again with `nox -s seal`"]
    found = converted + isolated.changed(files, root)
    found += [f"{n}: not in the lock" for n in expand(SEALED, root) if n not in files]
    found += _unexpected(root, files)
    here = isolated.finder()
    if root == ROOT and here is not None and here.lock not in ("", sha256(root / LOCK)):
        found.append(f"{LOCK}: written again since this process began")
    if not found and pinned != {s["file"]: s["sha256"] for s in subjects(root).values()}:
        found.append("selfcheck/inputs/subjects.toml: its subjects differ from the lock's")
    return found


def verify(root: Path = ROOT, consequence: str = "nothing was run") -> None:
    """Compare the tree with the lock, and the loaded modules with the tree.

    Args:
        consequence: what a difference means for what was asked, in words.

    Raises:
        SelfcheckError: naming every difference.
    """
    found = differences(root)
    try:
        found += isolated.foreign() if root == ROOT else []
    except isolated.Refused as error:
        found.append(str(error))
    if found:
        raise SelfcheckError(isolated.broken(found, consequence))
