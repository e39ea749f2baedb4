"""MANIFEST.sha256: the digest of every file of an archive but the statement about it, as `sha256sum -c` reads it."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from pathlib import Path, PurePosixPath

from selfcheck.harness.files import SelfcheckError, sha256

MANIFEST = "MANIFEST.sha256"
#: what a name may not hold: backslashes, control characters, ends of lines for some readers, halves of characters
CONTROL = "\\\\\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\ud800-\\udfff"
LINE = re.compile(rf"([0-9a-f]{{64}})  ([^{CONTROL}]+)")
#: bytes that a name may have: far above any name of this package, and below what file systems take
LONGEST = 250
#: names that Windows keeps for devices, whatever follows a dot in them
DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])( *)(\..*)?")
BYTE_CODE = re.compile(r"(.*/)?(__pycache__(/.*)?|[^/]*\.py[co])")


def render(files: dict[str, bytes]) -> bytes:
    """The list of these files.

    Raises:
        SelfcheckError: for a name that sha256sum would write with escapes.
    """
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}" for name in sorted(files)]
    for line in lines:
        if not LINE.fullmatch(line):
            raise SelfcheckError(
                f"{line[66:]!r}: allowed are names without backslashes, control characters and ends of lines"
            )
    return "".join(f"{line}\n" for line in lines).encode()


def read(root: Path) -> dict[str, str]:
    """Digests by name.

    Raises:
        SelfcheckError: naming the first line that has not its form, leads out of the folder or comes twice.
    """
    try:
        # Not splitlines, nor read as text: both know of ends of lines that sha256sum does not.
        lines = (root / MANIFEST).read_bytes().decode().removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SelfcheckError(f"{MANIFEST}: unreadable ({error})") from error
    out: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        match = LINE.fullmatch(line)
        if match is None or match[2] in out or refusal(match[2]):
            raise SelfcheckError(f"{MANIFEST}, line {number}: {line[:120]!r} is not a digest and one name below, once")
        out[match[2]] = match[1]
    return out


def inside(name: str) -> bool:
    """Whether a name is a plain one below the folder, on every system."""
    parts = name.split("/")
    return not PurePosixPath(name).is_absolute() and ":" not in name and not {"", ".", ".."} & set(parts)


def same(name: str) -> str:
    """Equal for names that are one file where case or accents are not told apart."""
    return unicodedata.normalize("NFC", name).casefold()


def refusal(name: str) -> str | None:
    """Why no archive of ours has a file of this name, or None: asked of what is packed and of what is unpacked."""
    if re.search(f"[{CONTROL}]", name) or len(name.encode()) > LONGEST or not inside(name):
        return "not the name of a file below the one folder"
    parts = same(name).split("/")
    if any(part != part.rstrip(" .") for part in parts):
        return "a name that some systems shorten"
    if any(DEVICE.fullmatch(part) for part in parts):
        return "a name that Windows keeps for a device"
    if ".git" in parts:
        return "part of a git repository, whose settings git would obey"
    if BYTE_CODE.fullmatch(same(name)):
        return "byte code, which Python can take in the place of the source"
    return None


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
