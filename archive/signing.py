"""Signing a statement with an SSH key, and verifying that offline: OpenSSH's ssh-keygen does both."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from selfcheck.harness.files import SelfcheckError

from .tree import SIGNATURE, STATEMENT

#: what a signature is for: one made for another purpose does not count here
NAMESPACE = "qaxis-evidence"
ALLOWED = "archive/allowed_signers"
UNSIGNED = "unsigned: no signature; whoever made this archive is not known"


def _ssh_keygen(*words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("ssh-keygen")
    if program is None:
        raise SelfcheckError(
            "no ssh-keygen on the PATH, which signs and verifies; it comes with OpenSSH (8.1 or newer)"
        )
    return subprocess.run([program, *words], input=data, capture_output=True)


def _said(done: subprocess.CompletedProcess[bytes]) -> str:
    return " ".join((done.stderr + done.stdout).decode(errors="replace").split())


def check_key(key: Path) -> None:
    """Raises SelfcheckError if there is no such file."""
    if not key.is_file():
        raise SelfcheckError(f"--sign={str(key)!r}: allowed is the file of a private SSH key")


def signature(key: Path, statement: bytes) -> bytes:
    """The signature of a statement.

    Raises:
        SelfcheckError: if there is no such key, or ssh-keygen refuses it.
    """
    check_key(key)
    # ssh-keygen asks before it overwrites; the data come by its input, so that it writes nothing itself.
    done = _ssh_keygen("-Y", "sign", "-f", str(key), "-n", NAMESPACE, data=statement)
    if done.returncode:
        raise SelfcheckError(f"--sign={str(key)!r}: ssh-keygen refused: {_said(done)}")
    return done.stdout


def verify(root: Path, allowed: Path) -> str:
    """Who signed the statement under ``root``, in a sentence that says so when nobody did.

    Args:
        allowed: who may sign, in ssh-keygen's form; a list that comes with an archive proves nothing about it.

    Raises:
        SelfcheckError: if there is a signature and it is not a good one of a key in the list.
    """
    made = root / SIGNATURE
    if not made.exists():
        return UNSIGNED
    found = _ssh_keygen("-Y", "find-principals", "-s", str(made), "-f", str(allowed))
    principals = found.stdout.decode(errors="replace").splitlines()
    if found.returncode or not principals or not principals[0]:
        raise SelfcheckError(f"{SIGNATURE}: its key is not in {allowed}, so it shows nothing ({_said(found)})")
    who, data = principals[0], (root / STATEMENT).read_bytes()
    done = _ssh_keygen(
        "-Y", "verify", "-f", str(allowed), "-I", who, "-n", NAMESPACE, "-s", str(made), data=data
    )  # fmt: skip
    if done.returncode:
        raise SelfcheckError(f"{SIGNATURE}: not a good signature of {STATEMENT} by {who} ({_said(done)})")
    return f"signed by {who}, whose key is in {allowed}"


def described(root: Path, allowed: Path) -> str:
    """As ``verify``, for whoever packs: a signature that this list does not vouch for is packed, and said to be so."""
    try:
        return verify(root, allowed)
    except SelfcheckError as error:
        return f"signed, but nobody can see by whom: {error}"
