"""Checking an archive from itself: unpacked into an empty folder, verified, redrawn, compared, measured again.

What decides before any of its code is run (list, statement, signature, seal) is decided by the code here. The rest
runs the archive's own code, as its reader would: an archive of unknown origin is untrusted code, and is said to be so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from selfcheck.harness import seal
from selfcheck.harness.files import SelfcheckError, sha256

from . import listing, signing, statement, tree
from .unpack import unpack

UNTRUSTED = (
    "From here on the archive's own code runs, with your rights, as if you had unpacked and started it: "
    "it is as trustworthy as whoever made it."
)
#: what a child may know of its surroundings: where programs and temporary files are
KEPT = ("PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "NUMBER_OF_PROCESSORS")


@dataclass
class Step:
    """One row of the table."""

    name: str
    ok: bool
    #: what was found, or everything that is wrong
    said: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Asked:
    """What to check beside what is always checked."""

    allowed_signers: Path
    selfcheck: bool = True
    #: claims of the self-check; none for all
    only: tuple[str, ...] = ()


def check(file: Path, asked: Asked, say: Callable[[str], None] = lambda line: None) -> list[Step]:
    """Every step, in order; after the first of the archive's integrity that fails, none of its code is run.

    Raises:
        SelfcheckError: if the file cannot be unpacked.
    """
    with tempfile.TemporaryDirectory(prefix="qaxis-archive-") as folder:
        root, away = unpack(file, Path(folder) / "unpacked"), Path(folder)
        steps = list(_intact(root, asked))
        if all(step.ok for step in steps):
            say(UNTRUSTED)
            steps += _rerun(root, file, away, asked, say)
        else:
            steps.append(Step("the archive's code", False, ["not run: what is above is wrong"]))
    return steps


def _step(name: str, work: Callable[[], list[str]], good: str = "") -> Step:
    """A step that finds nothing wrong, or says all that is."""
    try:
        wrong = work()
    except SelfcheckError as error:
        wrong = [str(error)]
    return Step(name, not wrong, wrong or [good])


def _intact(root: Path, asked: Asked) -> Iterator[Step]:
    """What the code here finds out about the files."""

    def listed() -> list[str]:
        names = listing.read(root)
        return [*listing.wrong(root, names), *listing.unlisted(root, names, (tree.STATEMENT, tree.SIGNATURE))]

    yield _step(listing.MANIFEST, listed, "every file is as listed, and no other is there")
    yield _step(tree.STATEMENT, lambda: statement.wrong(root), "is about these files")

    def from_commit() -> list[str]:
        found = tree.from_archive(root)
        said.append(f"{found.swhid}, commit {found.revision}")
        return []

    said: list[str] = []
    step = _step("source tree", from_commit)
    yield Step(step.name, step.ok, said or step.said)
    try:
        yield Step("signature", True, [signing.verify(root, asked.allowed_signers)])
    except SelfcheckError as error:
        yield Step("signature", False, [str(error)])
    yield _step("seal", lambda: seal.differences(root), "every sealed file is as locked")


def _rerun(root: Path, file: Path, away: Path, asked: Asked, say: Callable[[str], None]) -> Iterator[Step]:
    """What the archive's own code says, draws, builds and measures."""
    drawn, measured, packed = away / "drawn", away / "measured", away / "packed"

    def run(*words: str) -> list[str]:
        say(f"python -m {' '.join(words)}")
        return _run(root, away, *words)

    yield _step("archive verify", lambda: run("archive", "verify"), "every output is what its manifest says")
    figures = _step("figures", lambda: run("figures", "--output", str(drawn)))
    yield _compared(figures, root, drawn) if figures.ok else figures
    # It reads the figures that were just drawn, not those that came with the archive.
    paper = _step("paper", lambda: run("paper", "--output", str(drawn)))
    yield _compared(paper, root, drawn) if paper.ok else paper
    again = _step("packed again", lambda: run("archive", "pack", "--output", str(packed)))
    yield _same_file(again, file, packed) if again.ok else again
    if asked.selfcheck:
        only = [word for claim in asked.only for word in ("--only", claim)]
        words = ("selfcheck", "run", "--quick", "--output", str(measured), *only)
        yield _step("self-check, quick", lambda: run(*words), "every claim that was run passed")


def _compared(step: Step, root: Path, drawn: Path) -> Step:
    """What a step redrew into its folder, byte for byte against what came with the archive."""
    made = sorted(p.relative_to(drawn).as_posix() for p in (drawn / step.name).rglob("*") if p.is_file())
    wrong = [f"{name}: redrawn, it is not the file of the archive" for name in made if not _equal(root, drawn, name)]
    if not made:
        wrong = ["nothing was made"]
    return Step(step.name, not wrong, wrong or [f"{len(made)} files redrawn, byte for byte those of the archive"])


def _equal(root: Path, drawn: Path, name: str) -> bool:
    return (root / name).is_file() and sha256(root / name) == sha256(drawn / name)


def _same_file(step: Step, file: Path, packed: Path) -> Step:
    made = list(packed.glob("*.tar.gz"))
    same = len(made) == 1 and sha256(made[0]) == sha256(file)
    return Step(step.name, same, ["byte for byte the same file" if same else "its own code packs another file"])


def _run(root: Path, away: Path, *words: str) -> list[str]:
    """Run a module of the archive where it was unpacked, knowing of nothing else; its last words if it fails."""
    home = away / "home"
    home.mkdir(exist_ok=True)
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    env |= {"HOME": str(home), "USERPROFILE": str(home), "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(root / "src"), "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=root, env=env, capture_output=True, text=True, encoding="utf-8",
        errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if not done.returncode:
        return []
    return [f"exit {done.returncode}", *(done.stdout + done.stderr).strip().splitlines()[-25:]]
