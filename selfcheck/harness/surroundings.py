"""What a command needs of the machine, asked before minutes are spent: files it can write, a home, folders for caches.

Standard library only.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import getpass
import os
import shutil
import tempfile
from pathlib import Path

from .files import CLOSED, ROOT, SelfcheckError

OUTPUT_HELP = "Write below FOLDER, laid out as this tree is, instead of into the tree."


def output_option(program: str, description: str | None) -> Path | None:
    """FOLDER of ``--output FOLDER`` on the command line of a program that has no other option."""
    parser = argparse.ArgumentParser(f"python -m {program}", description=description)
    parser.add_argument("--output", metavar="FOLDER", help=OUTPUT_HELP)
    return absolute(parser.parse_args().output)


def absolute(folder: str | Path | None) -> Path | None:
    """The same folder, whatever the working directory is later.

    Raises:
        SelfcheckError: for an empty name, which a variable that is not set gives; for a folder of the sealed tree, in
            which nothing else may lie; for what can be no folder.
    """
    if folder is None:
        return None
    if str(folder) in ("", "."):
        raise SelfcheckError(f"--output={str(folder)!r}: allowed is a folder apart from the working directory")
    try:
        found = Path(folder).resolve()
        found.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise SelfcheckError(f"--output={str(folder)!r}: no folder can have this name ({error})") from None
    within = found.relative_to(ROOT).parts if found.is_relative_to(ROOT) else ("elsewhere",)
    if not within or (within[0] in CLOSED and within[:2] != ("selfcheck", "local")):
        raise SelfcheckError(f"--output={str(folder)!r}: allowed is a folder apart from the sealed ones of this tree")
    return found


def check_writable(*paths: Path) -> None:
    """Check that ``write_atomic`` can write each of these files, by trying in its folder, which is made.

    Raises:
        SelfcheckError: naming the first that it cannot, why, and what to do.
    """
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".staging"):
                pass
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        except OSError as error:
            raise SelfcheckError(
                f"cannot write {path}: {error.strerror}; nothing was run. `--output FOLDER` writes elsewhere"
            ) from error


def settle() -> None:
    """Give libraries a home and a name for their caches, in this process and those it starts, where the user has none.

    Triton, torch, matplotlib, Hugging Face's packages and TeX each look for a folder of the user's and fail, or warn,
    in ways of their own.

    Raises:
        SelfcheckError: if there is no folder for temporary files either.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise SelfcheckError("no folder for temporary files can be written; set TMPDIR to one that can") from error
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = "user"
    home = _home()
    if home is not None and home.is_dir() and os.access(home, os.W_OK | os.X_OK):
        return
    if home is not None and os.access(downloaded := home / ".cache/huggingface", os.R_OK | os.X_OK):
        # What was downloaded before can still be read there.
        os.environ.setdefault("HF_HOME", str(downloaded))
    own = tempfile.mkdtemp(prefix="qaxis-home-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ.update(HOME=own, USERPROFILE=own)
    for name in [name for name in os.environ if name in CACHES and not _usable(Path(os.environ[name]))]:
        del os.environ[name]


#: variables that name a folder of caches; one that cannot be written is worse than none
CACHES = (
    "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "TRITON_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR",
)  # fmt: skip


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # A user that no database knows.
        return None


def _usable(folder: Path) -> bool:
    """Whether the folder, or the nearest one above it that exists, can be written."""
    there = next((x for x in (folder, *folder.parents) if x.exists()), folder)
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)
