"""The lock: what is sealed, sealing it, and naming every byte-level difference."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import tomlkit

from .files import ROOT, SelfcheckError, sha256, write_atomic

LOCK = "selfcheck/checks.lock"
SEALED = (
    "src/qaxis/**/*.py", "src/qaxis/**/*.cu*", "src/qaxis/**/*.hpp",
    "selfcheck/**/*.py", "selfcheck/*.toml", "selfcheck/inputs/*.toml",
    "selfcheck/golden.json",
    "figures/*.py", "paper/*.py", "paper/paper.tex", "paper/proofs/*.v", "paper/proofs/*.toml", "constraints*.txt",
    "pyproject.toml", "noxfile.py",
)  # fmt: skip

#: what is said of a file that git, an archive or an editor converted, and what to do
LINE_ENDINGS = "only its line endings differ from the lock's"
MEND_LINES = (
    "commit your own changes, if any, and run `git config core.autocrlf false`, "
    "`git rm -rq --cached .`, `git reset -q --hard`; or clone again with `git clone -c core.autocrlf=false`."
)


def claims(root: Path = ROOT) -> list[dict[str, Any]]:
    """The claims of checks.toml, in order."""
    return tomlkit.parse((root / "selfcheck/checks.toml").read_text("utf-8")).unwrap()["claim"]


def reported(root: Path = ROOT) -> list[dict[str, Any]]:
    """Published numbers that are not measured here."""
    return tomlkit.parse((root / "selfcheck/checks.toml").read_text("utf-8")).unwrap()["reported"]


def subjects(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """The pinned model and corpus of subjects.toml."""
    return tomlkit.parse((root / "selfcheck/inputs/subjects.toml").read_text("utf-8")).unwrap()


def expand(patterns: tuple[str, ...] | list[str], root: Path = ROOT) -> list[str]:
    """Files under ``root`` that match, as sorted posix paths."""
    found = {p.relative_to(root).as_posix() for pattern in patterns for p in root.glob(pattern) if p.is_file()}
    return sorted(found)


def seal(root: Path = ROOT) -> int:
    """Write the lock over what is there now; returns the number of files."""
    document = tomlkit.document()
    document.add(tomlkit.comment("SHA-256 of every sealed file and subject; made by `nox -s seal`."))
    document["files"] = {name: sha256(root / name) for name in expand(SEALED, root)}
    document["subjects"] = {s["file"]: s["sha256"] for s in subjects(root).values()}
    write_atomic(root / LOCK, tomlkit.dumps(document).encode())
    return len(document["files"])  # type: ignore[arg-type]


def locked(root: Path = ROOT) -> dict[str, str]:
    """Digests of the sealed files, as the lock has them."""
    return tomlkit.parse((root / LOCK).read_text("utf-8")).unwrap()["files"]


def only_line_endings(data: bytes, digest: str) -> bool:
    """Whether these bytes have this SHA-256 once lines end otherwise: an editor, an archive or git converted them."""
    bare = data.replace(b"\r\n", b"\n")
    return digest in (hashlib.sha256(x).hexdigest() for x in (bare, bare.replace(b"\n", b"\r\n")))


def _changed(path: Path, name: str, digest: str) -> str | None:
    """In words, how a sealed file is not what the lock says."""
    if not path.is_file():
        return f"{name}: missing, locked as {digest}"
    actual = sha256(path)
    if actual == digest:
        return None
    if only_line_endings(path.read_bytes(), digest):
        return f"{name}: {LINE_ENDINGS}"
    return f"{name}: locked as {digest}, is {actual}"


def differences(root: Path = ROOT) -> list[str]:
    """One sentence for every sealed file that is changed, missing or not in the lock."""
    try:
        locked = tomlkit.parse((root / LOCK).read_text("utf-8")).unwrap()
        files, pinned = locked["files"], locked["subjects"]
    except (OSError, KeyError, tomlkit.exceptions.TOMLKitError) as error:
        return [f"{LOCK}: unreadable ({error}); restore it, or seal again with `nox -s seal`"]
    found = [x for name, digest in files.items() if (x := _changed(root / name, name, digest))]
    found += [f"{n}: not in the lock" for n in expand(SEALED, root) if n not in files]
    if not found and pinned != {s["file"]: s["sha256"] for s in subjects(root).values()}:
        found.append("selfcheck/inputs/subjects.toml: its subjects differ from the lock's")
    return found


def verify(root: Path = ROOT) -> None:
    """Raises SelfcheckError naming every file that differs from the lock."""
    found = differences(root)
    if not found:
        return
    converted = [x for x in found if x.endswith(LINE_ENDINGS)]
    lines, mend = "\n  ".join(found), ["If you meant the change, look at it and run `nox -s seal`."]
    if converted:
        mend = [f"Where line endings differ ({len(converted)} of {len(found)}), something rewrote them: {MEND_LINES}"]
        mend += ["For the others, if you meant the change, look at it and run `nox -s seal`."] * (found != converted)
    raise SelfcheckError(f"the seal is broken, nothing was run:\n  {lines}\n" + "\n".join(mend))
