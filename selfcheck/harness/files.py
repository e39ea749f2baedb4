"""Digests, atomic writes and the repository's root. Standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: folders of the tree in which nothing lies but what is sealed and what is expected there
CLOSED = ("src", "selfcheck", "figures", "paper", "archive", "requirements")
#: of every random number that is drawn in a run
SEED = 20260601


class SelfcheckError(Exception):
    """A message for the person who ran the command; the command exits non-zero without a traceback."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def target(name: str, root: Path = ROOT, output: Path | None = None) -> Path:
    """Where the project's file ``name`` is written: in the tree, or below another folder in its place."""
    return (output or root) / name


def source(name: str, root: Path = ROOT, output: Path | None = None) -> Path:
    """Where ``name`` is read: what was written below ``output`` stands for the tree's."""
    written = target(name, root, output)
    return written if written.exists() else root / name


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all.

    Raises:
        SelfcheckError: if the directory cannot be written or has no space; ``path`` is unchanged.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".staging", delete=False) as stream:
            temporary = stream.name
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise SelfcheckError(f"cannot write {path}: {error.strerror}; the file is as it was before") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
