"""Checking an archive from itself: unpacked into an empty folder, verified, redrawn, compared, measured again.

What decides before any of its code is run (list, statement, signature, seal) is decided by the code here. The rest
runs the archive's own code, as its reader would: an archive of unknown origin is untrusted code, and is said to be so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from selfcheck.harness import evidence, seal
from selfcheck.harness.files import SelfcheckError, sha256

from . import listing, signing, statement, tree
from .unpack import unpack

UNTRUSTED = (
    "From here on the archive's own code runs, with your rights, as if you had unpacked and started it: "
    "it is as trustworthy as whoever made it."
)
#: what a child may know of its surroundings: where programs and temporary files are
KEPT = (
    "PATH", "SYSTEMROOT", "TMPDIR", "TEMP", "TMP", "LD_LIBRARY_PATH", "NUMBER_OF_PROCESSORS", "PROCESSOR_ARCHITECTURE",
)  # fmt: skip
#: as the archive's own commands start: no byte code, no working directory and no settings of Python have a say
ISOLATED = ("-I", "-S", "-X", "utf8", "selfcheck/isolated.py")
#: what files that were made to break a step can raise in it
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError)


@dataclass(frozen=True)
class Step:
    """One row of the table."""

    name: str
    ok: bool
    #: what was found, or everything that is wrong
    said: str


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
        steps = integrity(root, asked.allowed_signers)
        if not all(step.ok for step in steps):
            return [*steps, Step("the archive's code", False, "not run: what is above is wrong")]
        say(UNTRUSTED)
        return [*steps, *_rerun(root, file, away, asked, say)]


def _step(name: str, work: Callable[[], str]) -> Step:
    """A step that says what it found, or what is wrong."""
    try:
        return Step(name, True, work())
    except SelfcheckError as error:
        return Step(name, False, str(error))
    except BROKEN as error:
        return Step(name, False, f"cannot be read as what it should be ({type(error).__name__}: {str(error)[:200]})")


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise SelfcheckError("\n".join(wrong))


def integrity(root: Path, allowed: Path) -> list[Step]:
    """What the code here finds out about an unpacked archive, without running any of its own."""

    def listed() -> str:
        names = listing.read(root)
        _refuse([*listing.wrong(root, names), *listing.unlisted(root, names, (tree.STATEMENT, tree.SIGNATURE))])
        return f"{len(names)} files as listed, and no other"

    def stated() -> str:
        _refuse(statement.wrong(root))
        return "about these files"

    def committed() -> str:
        found = tree.from_archive(root)
        return f"{found.swhid}, of commit {found.revision}"

    def sealed() -> str:
        seal.verify(root)
        return "every sealed file is as locked"

    return [
        _step(listing.MANIFEST, listed),
        _step(tree.STATEMENT, stated),
        _step("source tree", committed),
        _step("signature", lambda: signing.verify(root, allowed)),
        _step("seal", sealed),
    ]


def _rerun(root: Path, file: Path, away: Path, asked: Asked, say: Callable[[str], None]) -> list[Step]:
    """What the archive's own code says, draws, builds, packs and measures."""
    drawn, measured, packed = away / "drawn", away / "measured", away / "packed"

    def run(*words: str) -> None:
        say(f"python {' '.join((*ISOLATED, *words))}")
        _run(root, away, *words)

    def verified() -> str:
        run("archive", "verify")
        return "every output is what its manifest says"

    def redrawn(program: str) -> str:
        run(program, "--output", str(drawn))
        return _compared(root, drawn, program)

    def packed_again() -> str:
        run("archive", "pack", "--output", str(packed))
        _refuse([] if _same(file, packed) else ["its own code packs another file"])
        return "byte for byte the same file"

    def measured_again() -> str:
        only = [word for claim in asked.only for word in ("--only", claim)]
        run("selfcheck", "run", "--quick", "--output", str(measured), *only)
        made = {record["claim"] for record in evidence.read(measured / "selfcheck/local/quick.json", root)}
        cpu = [claim["id"] for claim in seal.claims(root) if claim.get("where") != "gpu"]
        left_out = [name for name in (asked.only or cpu) if name not in made]
        return f"{len(made)} claims passed" + (f"; not run here: {', '.join(left_out)}" if left_out else "")

    steps = [_step("archive verify", verified), _step("figures", lambda: redrawn("figures"))]
    # The paper reads the figures that were just drawn, not those that came with the archive.
    steps += [_step("paper", lambda: redrawn("paper")), _step("packed again", packed_again)]
    return [*steps, _step("self-check, quick", measured_again)] if asked.selfcheck else steps


def _compared(root: Path, drawn: Path, program: str) -> str:
    """What was redrawn, byte for byte against what came with the archive."""
    made = sorted(p.relative_to(drawn).as_posix() for p in (drawn / program).rglob("*") if p.is_file())
    _refuse([] if made else ["nothing was made"])
    _refuse([f"{x}: redrawn, it is another file than the archive's" for x in made if not _equal(root, drawn, x)])
    return f"redrawn byte for byte: {len(made)} files"


def _equal(root: Path, drawn: Path, name: str) -> bool:
    return (root / name).is_file() and sha256(root / name) == sha256(drawn / name)


def _same(file: Path, packed: Path) -> bool:
    made = list(packed.glob("*.tar.gz"))
    return len(made) == 1 and sha256(made[0]) == sha256(file)


def _run(root: Path, away: Path, *words: str) -> None:
    """Run a program of the archive where it was unpacked, knowing of nothing else.

    Raises:
        SelfcheckError: with its last words, if it fails.
    """
    home = away / "home"
    home.mkdir(exist_ok=True)
    env = {name: os.environ[name] for name in KEPT if name in os.environ}
    env |= {"HOME": str(home), "USERPROFILE": str(home), "PYTHONNOUSERSITE": "1", "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, *ISOLATED, *words], cwd=root, env=env, capture_output=True, text=True, encoding="utf-8",
        errors="replace", stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-25:]
        raise SelfcheckError("\n".join([f"exit {done.returncode}", *last]))
