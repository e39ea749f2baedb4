"""What is packed: the files that git tracks, or, in an unpacked archive, those its list names."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfcheck.harness.files import SelfcheckError

from . import listing

#: what is made beside the tracked files, in the order in which each can name those before it
SBOM, CRATE, STATEMENT, SIGNATURE = "sbom.cdx.json", "ro-crate-metadata.json", "statement.json", "statement.json.sig"
#: of the RO-Crate format: the one whose terms come with the library, so that a validator needs no network
CRATE_VERSION = "1.3"
MADE = (SBOM, CRATE, listing.MANIFEST, STATEMENT, SIGNATURE)
COMMIT = re.compile(rb"tree ([0-9a-f]{40})\n")


@dataclass(frozen=True)
class Tree:
    """The tracked files of one commit."""

    files: dict[str, bytes]
    #: those that may be executed
    executable: frozenset[str]
    #: git's object of the commit, which names the tree; its SHA-1 is the commit
    commit: bytes

    @property
    def revision(self) -> str:
        """The commit."""
        return revision(self.commit)

    @property
    def swhid(self) -> str:
        """Software Heritage's identifier of the files: the one that git has for them too."""
        return swhid(self.files, self.executable)


def revision(commit: bytes) -> str:
    """The name that git gives an object of a commit."""
    return hashlib.sha1(b"commit %d\0" % len(commit) + commit, usedforsecurity=False).hexdigest()


def swhid(files: dict[str, bytes], executable: frozenset[str]) -> str:
    """Software Heritage's identifier (swh:1:dir:...) of a directory of files."""
    from swh.model.from_disk import Content, Directory

    top = Directory()
    for name, data in files.items():
        *folders, last = name.encode().split(b"/")
        folder = top
        for part in folders:
            if part not in folder:
                folder[part] = Directory()
            folder = folder[part]
        folder[last] = Content.from_bytes(mode=0o100755 if name in executable else 0o100644, data=data)
    return str(top.swhid())


def read(root: Path) -> Tree:
    """The tracked files under ``root``, from git where it is a repository, else as an unpacked archive.

    Raises:
        SelfcheckError: if it is neither, or the files are not those of the commit.
    """
    return from_git(root) if (root / ".git").exists() else from_archive(root)


def check_commit(tree: Tree) -> None:
    """Raises SelfcheckError unless the files are exactly those of the commit."""
    named = COMMIT.match(tree.commit)
    if named is None:
        raise SelfcheckError("the commit of this tree cannot be read: it names no tree")
    if tree.swhid != f"swh:1:dir:{named[1].decode()}":
        raise SelfcheckError(
            f"the files are {tree.swhid}, but commit {tree.revision} has tree {named[1].decode()}: "
            "a file is not as it was committed, though git may not see it (line endings, assume-unchanged)"
        )


def _git(root: Path, *words: str) -> bytes:
    try:
        return subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True).stdout
    except FileNotFoundError:
        raise SelfcheckError(f"{root} is a git repository, but there is no git on the PATH") from None
    except subprocess.CalledProcessError as error:
        raise SelfcheckError(f"git {words[0]} stopped: {error.stderr.decode(errors='replace').strip()}") from error


def _listed(root: Path, *words: str) -> list[str]:
    """What a command of git lists, each entry behind a NUL.

    Raises:
        SelfcheckError: naming an entry that is not UTF-8, and so no name on every system.
    """
    entries = _git(root, *words).split(b"\0")[:-1]
    for entry in entries:
        try:
            entry.decode()
        except UnicodeDecodeError:
            raise SelfcheckError(f"{entry!r}, says git {words[0]}: allowed are names in UTF-8; rename it") from None
    return [entry.decode() for entry in entries]


def _contents(root: Path, names: list[str]) -> dict[str, bytes]:
    """The bytes of tracked files.

    Raises:
        SelfcheckError: naming those that cannot be read.
    """
    files, absent = {}, []
    for name in names:
        try:
            files[name] = (root / name).read_bytes()
        except OSError as error:
            absent.append(f"{name} ({error.strerror})")
    if absent:
        raise SelfcheckError(
            f"tracked by git, but not there to be read: {', '.join(absent)}; an archive has every tracked file "
            "(after a sparse checkout: `git sparse-checkout disable`)"
        )
    return files


def from_git(root: Path) -> Tree:
    """The tracked files of a git repository.

    Raises:
        SelfcheckError: naming those that are not as committed, are no plain files, or have a name that is made.
    """
    changed = _listed(root, "status", "--porcelain", "-z", "--untracked-files=no")
    if changed:
        names = [entry[3:] for entry in changed if entry[2:3] == " "]
        raise SelfcheckError(f"changed since the last commit: {', '.join(names)}; commit or undo that first")
    modes = {}
    for entry in _listed(root, "ls-files", "--stage", "-z"):
        about, _, name = entry.partition("\t")
        modes[name] = about.split()[0]
    odd = sorted(name for name, mode in modes.items() if mode not in ("100644", "100755"))
    if odd:
        raise SelfcheckError(f"{', '.join(odd)}: not a plain file; allowed are files only, no links and no submodules")
    if taken := sorted(set(MADE) & set(modes)):
        raise SelfcheckError(f"{', '.join(taken)}: tracked by git, but made for each archive; allowed is another name")
    if refused := [f"{name!r}: {why}" for name in sorted(modes) if (why := listing.refusal(name))]:
        raise SelfcheckError("tracked by git, but nothing for an archive:\n  " + "\n  ".join(refused))
    executable = frozenset(name for name, mode in modes.items() if mode == "100755")
    found = Tree(_contents(root, sorted(modes)), executable, _git(root, "cat-file", "commit", "HEAD"))
    check_commit(found)
    return found


def from_archive(root: Path) -> Tree:
    """The tracked files of an unpacked archive, by its list and its statement.

    Raises:
        SelfcheckError: if it is none, or naming the files that are not as they were unpacked.
    """
    if not (root / listing.MANIFEST).is_file():
        raise SelfcheckError(
            f"{root}: neither a git repository nor an unpacked archive ({listing.MANIFEST} is missing)"
        )
    # The statement is about a tree: imported here, as it imports this module.
    from . import statement

    listed = listing.read(root)
    if wrong := listing.wrong(root, listed):
        raise SelfcheckError("not as it was unpacked:\n  " + "\n  ".join(wrong))
    said: dict[str, Any] = statement.read(root)["predicate"]["source"]
    files = {name: (root / name).read_bytes() for name in sorted(listed) if name not in MADE}
    found = Tree(files, frozenset(said["executable"]), statement.commit_object(said))
    check_commit(found)
    return found
