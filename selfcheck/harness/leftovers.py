"""What killed runs left behind: files that were being written, folders for temporary files. Standard library only."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from .files import ROOT

#: seconds since anything in it changed, after which no run can be using it any more
OLD = 24 * 3600
#: what `tempfile` and the project call them: `write_atomic` stages beside its target, in any of these folders
STAGED = "tmp*.staging"
WRITTEN = ("selfcheck", "selfcheck/evidence", "selfcheck/evidence/attested", "selfcheck/local", "figures", "paper",
           "archive", "tests", ".")  # fmt: skip
TEMPORARY = "qaxis-*"


def remove(root: Path = ROOT, output: Path | None = None) -> list[Path]:
    """Remove what this user's killed runs left in the tree, below ``output`` and in the folder for temporary files.

    Only what is older than a day, and never what a link points to; what cannot be removed stays. Returns what is gone.
    """
    gone = []
    for path in _found(root, output):
        # Whatever happens here is no reason for a run to fail: another run removes the same, a disk is read-only.
        with contextlib.suppress(OSError):
            if _is_ours(path) and _age(path) > OLD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                gone.append(path)
    return gone


def _found(root: Path, output: Path | None) -> list[Path]:
    """Files and folders of these names; a link is neither."""
    tops = [top / name for top in (root, output) if top for name in WRITTEN]
    files = [path for top in tops for path in top.glob(STAGED) if path.is_file()]
    folders = [path for path in Path(tempfile.gettempdir()).glob(TEMPORARY) if path.is_dir()]
    return [path for path in files + folders if not path.is_symlink()]


def _is_ours(path: Path) -> bool:
    """In a folder that all users share, a folder of this name may be another's."""
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()


def _age(path: Path) -> float:
    """Seconds since anything in it was changed."""
    inside = path.rglob("*") if path.is_dir() else ()
    return time.time() - max(x.lstat().st_mtime for x in (path, *inside))
