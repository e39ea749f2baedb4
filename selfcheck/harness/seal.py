"""The lock: what is sealed, sealing it, and naming every byte-level difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomlkit

from .files import ROOT, SelfcheckError, sha256, write_atomic

LOCK = "selfcheck/checks.lock"
SEALED = (
    "src/qaxis/**/*.py", "src/qaxis/**/*.cu*", "src/qaxis/**/*.hpp",
    "selfcheck/**/*.py", "selfcheck/*.toml", "selfcheck/inputs/*.toml",
    "selfcheck/golden.json",
    "figures/*.py", "paper/*.py", "paper/paper.tex", "paper/proofs/*.v", "constraints*.txt",
    "pyproject.toml", "noxfile.py",
)  # fmt: skip


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


def differences(root: Path = ROOT) -> list[str]:
    """One sentence for every sealed file that is changed, missing or not in the lock."""
    try:
        locked = tomlkit.parse((root / LOCK).read_text("utf-8")).unwrap()
        files, pinned = locked["files"], locked["subjects"]
    except (OSError, KeyError, tomlkit.exceptions.TOMLKitError) as error:
        return [f"{LOCK}: unreadable ({error}); restore it, or seal again with `nox -s seal`"]
    found = []
    for name, digest in files.items():
        path = root / name
        if not path.is_file():
            found.append(f"{name}: missing, locked as {digest}")
        elif (actual := sha256(path)) != digest:
            found.append(f"{name}: locked as {digest}, is {actual}")
    found += [f"{n}: not in the lock" for n in expand(SEALED, root) if n not in files]
    if not found and pinned != {s["file"]: s["sha256"] for s in subjects(root).values()}:
        found.append("selfcheck/inputs/subjects.toml: its subjects differ from the lock's")
    return found


def verify(root: Path = ROOT) -> None:
    """Raises SelfcheckError naming every file that differs from the lock."""
    found = differences(root)
    if found:
        lines = "\n  ".join(found)
        raise SelfcheckError(
            f"the seal is broken, nothing was run:\n  {lines}\n"
            "If you meant the change, look at it and run `nox -s seal`."
        )
