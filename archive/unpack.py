"""Unpacking an archive that somebody else may have made: plain files below one folder, of bounded size, or nothing."""

from __future__ import annotations

import gzip
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import IO, cast

from selfcheck.harness.files import SelfcheckError

from . import listing

#: bounds that are far above any archive of this package
PACKED, UNPACKED, MEMBERS = 256 << 20, 256 << 20, 20_000
#: what the standard library raises for files that are no archive, or that were made to break it
BROKEN = (
    tarfile.TarError, zlib.error, EOFError, OSError, ValueError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip


def unpack(file: Path, folder: Path) -> Path:
    """Unpack ``file`` into ``folder``, which must be empty; returns the folder of the tree in it.

    Nothing is written before every member was looked at.

    Raises:
        SelfcheckError: naming the first member that is not a plain file below one folder with a name of its own, or
            the bound that the archive breaks.
    """
    _check_paths(file, folder)
    try:
        if file.stat().st_size > PACKED:
            raise SelfcheckError(f"{file}: {file.stat().st_size} bytes; allowed are {PACKED}")
        with tempfile.TemporaryFile() as plain:
            _inflate(file, plain)
            with tarfile.open(fileobj=plain, mode="r:") as tar:
                members = _members(tar, file)
                _write(tar, members, folder)
    except BROKEN as error:
        raise SelfcheckError(
            f"{file}: not an archive that can be unpacked ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return folder / members[0].name.split("/")[0]


def _check_paths(file: Path, folder: Path) -> None:
    """Raises SelfcheckError unless there is a file, and an empty folder or a name for one."""
    try:
        if not file.exists():
            raise SelfcheckError(f"{file}: no such file; allowed is an archive (.tar.gz)")
        if not file.is_file():
            raise SelfcheckError(f"{file}: not a file; allowed is an archive (.tar.gz)")
        if folder.exists() and not folder.is_dir():
            raise SelfcheckError(f"{folder}: not a folder; an archive is unpacked into an empty folder")
        if folder.exists() and any(folder.iterdir()):
            raise SelfcheckError(f"{folder}: not empty; an archive is unpacked into an empty folder")
    except (OSError, ValueError) as error:
        raise SelfcheckError(f"{str(file)[:200]} or {str(folder)[:200]} cannot be looked at ({error})") from error


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
            raise SelfcheckError(f"{file}: {member.name[: listing.LONGEST]!r}: {why}; nothing was unpacked")
        if members and member.name.split("/")[0] != members[0].name.split("/")[0]:
            raise SelfcheckError(f"{file}: {member.name!r}: outside of the one folder; nothing was unpacked")
        seen[listing.same(member.name)] = "file"
        for parent in list(Path(member.name).parents)[:-1]:
            seen[listing.same(parent.as_posix())] = "folder"
        members.append(member)
    if not members:
        raise SelfcheckError(f"{file}: empty")
    return members


def _refusal(member: tarfile.TarInfo, seen: dict[str, str]) -> str | None:
    """Why a member is not unpacked, or None."""
    name = member.name
    if member.type != tarfile.REGTYPE or member.issparse():
        return "not a plain file (a link, a device, a folder or a sparse one)"
    if why := listing.refusal(name):
        return why
    if "/" not in name:
        return "not the name of a file below the one folder"
    if listing.same(name) in seen or any(seen.get(listing.same(p.as_posix())) == "file" for p in Path(name).parents):
        return "there twice"
    if not 0 <= member.size <= UNPACKED:
        return f"{member.size} bytes; allowed are {UNPACKED}"
    return None


def _write(tar: tarfile.TarFile, members: list[tarfile.TarInfo], folder: Path) -> None:
    """Write the members ourselves: no owners, no modes but whether a file may be executed, nothing overwritten."""
    for member in members:
        content = cast(IO[bytes], tar.extractfile(member)).read()
        if len(content) != member.size:
            raise EOFError(f"{member.name} ends after {len(content)} of {member.size} bytes")
        path = folder / member.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as out:
                out.write(content)
            path.chmod(0o755 if member.mode & 0o100 else 0o644)
        except OSError as error:
            raise SelfcheckError(f"cannot write {path}: {error.strerror}; what is in {folder} is incomplete") from error
