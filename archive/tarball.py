"""A .tar.gz whose bytes depend on the files and a date only: not on the machine, Python's version or zlib's."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator

from selfcheck.harness.files import SelfcheckError

BLOCK = 0xFFFF


def tar(files: dict[str, bytes], executable: frozenset[str], folder: str, time: int) -> bytes:
    """A tar (POSIX ustar) of these files below one folder: sorted, of nobody, all of one time.

    Raises:
        SelfcheckError: for a name that ustar cannot hold.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as out:
        for name in sorted(files):
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size, member.mtime = len(files[name]), time
            member.mode = 0o755 if name in executable else 0o644
            try:
                out.addfile(member, io.BytesIO(files[name]))
            except ValueError as error:
                raise SelfcheckError(f"{name}: a tar file cannot hold this name ({error})") from error
    return stream.getvalue()


def gzipped(data: bytes) -> bytes:
    """``data`` as a gzip file, stored: what compresses best differs between versions of zlib, what stores does not."""
    return b"".join(
        (
            # RFC 1952: deflate, no name, no time, unknown system.
            b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff",
            *_stored(data),
            struct.pack("<LL", zlib.crc32(data), len(data) & 0xFFFFFFFF),
        )
    )


def _stored(data: bytes) -> Iterator[bytes]:
    """RFC 1951, 3.2.4: blocks of at most 65,535 bytes, each behind its length and the complement of that."""
    starts = range(0, len(data), BLOCK) or range(1)
    for start in starts:
        block = data[start : start + BLOCK]
        yield struct.pack("<BHH", start + BLOCK >= len(data), len(block), len(block) ^ BLOCK)
        yield block
