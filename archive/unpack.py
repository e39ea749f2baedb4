"""Unpacking an archive that somebody else may have made: plain files below one folder, of bounded size, or nothing."""

from __future__ import annotations

import gzip
import re
import tarfile
import tempfile
import unicodedata
import zlib
from pathlib import Path
from typing import IO

from selfcheck.harness.files import SelfcheckError

from .listing import inside

#: bounds that are far above any archive of this package
PACKED, UNPACKED, MEMBERS, NAME = 256 << 20, 256 << 20, 20_000, 250
CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def unpack(file: Path, folder: Path) -> Path:
    """Unpack ``file`` into ``folder``, which must be empty; returns the folder of the tree in it.

    Nothing is written before every member was looked at.

    Raises:
        SelfcheckError: naming the first member that is not a plain file below one folder with a name of its own, or
            the bound that the archive breaks.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SelfcheckError(f"{folder}: not empty; an archive is unpacked into an empty folder")
    try:
        if file.stat().st_size > PACKED:
            raise SelfcheckError(f"{file}: {file.stat().st_size} bytes; allowed are {PACKED}")
        with tempfile.TemporaryFile() as plain:
            _inflate(file, plain)
            with tarfile.open(fileobj=plain, mode="r:") as tar:
                members = _members(tar, file)
                _write(tar, members, folder)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError, UnicodeError) as error:
        raise SelfcheckError(
            f"{file}: not an archive that can be unpacked ({type(error).__name__}: {error})"
        ) from error
    return folder / members[0].name.split("/")[0]


def _inflate(file: Path, out: IO[bytes]) -> None:
    """Decompress, up to the bound: a small file can say that it is a huge one."""
    with gzip.open(file) as stream:
        size = 0
        while block := stream.read(1 << 20):
            size += len(block)
            if size > UNPACKED:
                raise SelfcheckError(f"{file}: more than {UNPACKED} bytes when unpacked; allowed are {UNPACKED}")
            out.write(block)
    out.seek(0)


def _members(tar: tarfile.TarFile, file: Path) -> list[tarfile.TarInfo]:
    """Every member, each one allowed."""
    members: list[tarfile.TarInfo] = []
    seen: dict[str, str] = {}
    for member in tar:
        if len(members) >= MEMBERS:
            raise SelfcheckError(f"{file}: more than {MEMBERS} files; allowed are {MEMBERS}")
        if why := _refusal(member, seen):
            raise SelfcheckError(f"{file}: {member.name[:NAME]!r}: {why}; nothing was unpacked")
        if members and member.name.split("/")[0] != members[0].name.split("/")[0]:
            raise SelfcheckError(f"{file}: {member.name!r}: outside of the one folder; nothing was unpacked")
        seen[_same(member.name)] = "file"
        for parent in list(Path(member.name).parents)[:-1]:
            seen[_same(parent.as_posix())] = "folder"
        members.append(member)
    if not members:
        raise SelfcheckError(f"{file}: empty")
    return members


def _same(name: str) -> str:
    """Names that are one file where case or accents are not told apart."""
    return unicodedata.normalize("NFC", name).casefold()


def _refusal(member: tarfile.TarInfo, seen: dict[str, str]) -> str | None:
    """Why a member is not unpacked, or None."""
    name = member.name
    if member.type != tarfile.REGTYPE or member.issparse():
        return "not a plain file (a link, a device, a folder or a sparse one)"
    if len(name) > NAME or CONTROL.search(name) or not inside(name) or "/" not in name:
        return "not the name of a file below the one folder"
    if any(part != part.rstrip(" .") for part in name.split("/")):
        return "a name that some systems shorten"
    if ".git" in _same(name).split("/"):
        return "part of a git repository, whose settings git would obey"
    if _same(name) in seen or any(seen.get(_same(p.as_posix())) == "file" for p in Path(name).parents):
        return "there twice"
    if not 0 <= member.size <= UNPACKED:
        return f"{member.size} bytes; allowed are {UNPACKED}"
    return None


def _write(tar: tarfile.TarFile, members: list[tarfile.TarInfo], folder: Path) -> None:
    """Write the members ourselves: no owners, no modes but whether a file may be executed, nothing overwritten."""
    for member in members:
        data = tar.extractfile(member)
        assert data is not None, "a plain file has data"
        content = data.read()
        if len(content) != member.size:
            raise EOFError(f"{member.name} ends after {len(content)} of {member.size} bytes")
        path = folder / member.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as out:
            out.write(content)
        path.chmod(0o755 if member.mode & 0o100 else 0o644)
