"""What requirements/*.txt say: of each package its version, where it is wanted, and the digests of its files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from packaging.requirements import InvalidRequirement, Requirement

from selfcheck.harness.files import ROOT, SelfcheckError

FOLDER = "requirements"


class Locked(NamedTuple):
    """One line of a list."""

    requirement: Requirement
    hashes: tuple[str, ...]  #: SHA-256, hexadecimal: of every wheel, and of the source if it is built from that

    @property
    def name(self) -> str:
        return self.requirement.name

    @property
    def version(self) -> str:
        return next(iter(self.requirement.specifier)).version


def environments(root: Path = ROOT) -> dict[str, list[Locked]]:
    """The lists, by the name of the environment that is installed from them.

    Raises:
        SelfcheckError: naming the file and the line that has no one version or no digest.
    """
    return {path.stem: read(path) for path in sorted((root / FOLDER).glob("*.txt"))}


def read(path: Path) -> list[Locked]:
    """The lines of one list; comments and pip's options (``--only-binary``) are passed over.

    Raises:
        SelfcheckError: as ``environments``.
    """
    lines = [line.partition("#")[0] for line in path.read_text("utf-8").splitlines()]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [_locked(path, line) for line in joined if line.strip() and not line.startswith("-")]


def _locked(path: Path, line: str) -> Locked:
    asked, *hashes = line.split(" --hash=sha256:")
    where = f"{FOLDER}/{path.name}: {asked.strip()!r}"
    try:
        requirement = Requirement(asked.strip())
    except InvalidRequirement as error:
        raise SelfcheckError(f"{where} is not a requirement: {error}") from None
    if [specifier.operator for specifier in requirement.specifier] != ["=="]:
        raise SelfcheckError(f"{where} has not one version (NAME==VERSION)")
    digests = [digest.strip() for digest in hashes]
    if not digests or any(len(x) != 64 or set(x) - set("0123456789abcdef") for x in digests):
        raise SelfcheckError(f"{where} needs --hash=sha256: with 64 hexadecimal digits, at least once")
    return Locked(requirement, tuple(digests))
