"""MANIFEST.sha256: the digest of every file of an archive but the statement about it, as `sha256sum -c` reads it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

from selfcheck.harness.files import SelfcheckError, sha256

MANIFEST = "MANIFEST.sha256"
LINE = re.compile(r"([0-9a-f]{64})  ([^\\\x00-\x1f\x7f]+)")


def render(files: dict[str, bytes]) -> bytes:
    """The list of these files.

    Raises:
        SelfcheckError: for a name that sha256sum would write with escapes.
    """
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}" for name in sorted(files)]
    for line in lines:
        if not LINE.fullmatch(line):
            raise SelfcheckError(f"{line[66:]!r}: allowed are names without backslashes and control characters")
    return "".join(f"{line}\n" for line in lines).encode()


def read(root: Path) -> dict[str, str]:
    """Digests by name.

    Raises:
        SelfcheckError: naming the first line that has not its form, leads out of the folder or comes twice.
    """
    try:
        lines = (root / MANIFEST).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SelfcheckError(f"{MANIFEST}: unreadable ({error})") from error
    out: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None or match[2] in out or not inside(match[2]):
            raise SelfcheckError(f"{MANIFEST}, line {number}: {line[:120]!r} is not a digest and one name below, once")
        out[match[2]] = match[1]
    return out


def inside(name: str) -> bool:
    """Whether a name is a plain one below the folder, on every system."""
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and ":" not in name and not {"", ".", ".."} & set(parts)


def wrong(root: Path, listed: dict[str, str]) -> list[str]:
    """In words, every listed file that is missing or another one."""
    out = []
    for name, digest in listed.items():
        path = root / name
        if path.is_symlink() or not path.is_file():
            out.append(f"{name}: missing, or not a plain file")
        elif (found := sha256(path)) != digest:
            out.append(f"{name}: listed as {digest}, is {found}")
    return out


def unlisted(root: Path, listed: dict[str, str], apart: tuple[str, ...]) -> list[str]:
    """In words, every file below ``root`` that the list does not name, other than those set ``apart``."""
    known = {*listed, MANIFEST, *apart}
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted(f"{name}: not in {MANIFEST}" for name in found if name not in known)
