"""The bench that edits are tried on: a consistent tree, copies of it, commands, and what came of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfcheck.harness import evidence, seal
from selfcheck.harness.digests import digest
from selfcheck.harness.files import ROOT

#: what is copied, with every file of the root: what git tracks, but not the tests, which no command reads
COPIED = ("src", "selfcheck", "figures", "paper", "archive", "requirements", "examples", "benchmarks", ".ci")
LEFT_OUT = ("__pycache__", "*.egg-info", "local", "build", "*.staging")
#: what figures and paper write
OUTPUTS = ("figures/*.pdf", "figures/*.png", "figures/figures.json", "paper/numbers.tex", "paper/paper.pdf")
COMMANDS = {
    "status": ("selfcheck", "status", "--strict"),
    "figures": ("figures",),
    "paper": ("paper",),
    "verify": ("archive", "verify"),
    "bind": ("archive", "bind"),
    "self-check": ("selfcheck", "run", "--quick", "--only", "thm1-stops"),
}
#: instead of a pattern: outputs must be those of the tree without the edit; and: nothing notices, and nothing can
NO_EFFECT, PASSES = "no effect", "passes"
TRACEBACK = "Traceback (most recent call last)"

Around = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Edit:
    """One row.

    Args:
        does: edits a copy of the tree; what it returns is added to the environment, ``@flags`` to Python's options.
        command: a name of ``COMMANDS``, or a function of the copy that returns exit status and what was said.
        caught: what must be said, as a regular expression; or ``NO_EFFECT``, or ``PASSES``.
        why: of an edit that nothing can catch.
    """

    kind: str
    name: str
    does: Callable[[Path], Around | None]
    command: str | Callable[[Path], tuple[int, str]]
    caught: str
    why: str = ""

    @property
    def said_command(self) -> str:
        if isinstance(self.command, str):
            return f"python -m {' '.join(COMMANDS[self.command])}"
        return (self.command.__doc__ or "").strip().splitlines()[0].rstrip(".")


@dataclasses.dataclass(frozen=True)
class Outcome:
    edit: Edit
    #: "caught", "no effect", "passes" as it must, or "FALSE PASS", "WRONG" (caught otherwise than the row says)
    word: str
    said: str

    @property
    def good(self) -> bool:
        return self.word in ("caught", NO_EFFECT, PASSES)


class Bench:
    """A consistent tree below a folder of its own, and copies of it.

    Args:
        made: whether its outputs are made anew; else they are those that were committed, which paper may refuse.
    """

    def __init__(self, folder: Path, *, made: bool = True) -> None:
        self.folder, self.base = folder, folder / "base"
        prepare(self.base, made=made)
        self.outputs = outputs(self.base)

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.base, self.folder / name, symlinks=True))

    def run(self, number: int, edit: Edit) -> Outcome:
        """Try one edit on a copy, which is removed."""
        tree = self.copy(f"{number}")
        try:
            around = edit.does(tree) or {}
            before = outputs(tree)
            if isinstance(edit.command, str):
                code, said = command(tree, COMMANDS[edit.command], around)
            else:
                code, said = edit.command(tree)
            return judged(edit, code, said, before, outputs(tree), self.outputs)
        finally:
            for path in (tree, self.folder / f"{number}-beside"):
                shutil.rmtree(path, ignore_errors=True)


def judged(edit: Edit, code: int, said: str, before: Any, after: Any, base: Any) -> Outcome:
    """What came of an edit."""
    last = " ".join(said.split())[-300:]
    if edit.caught in (NO_EFFECT, PASSES):
        same = after == base if edit.caught == NO_EFFECT else True
        return Outcome(edit, edit.caught if code == 0 and same else "WRONG", last)
    found = re.search(edit.caught, said, re.DOTALL)
    if code == 0:
        return Outcome(edit, "FALSE PASS", last)
    # Where an edit left the isolation out, nobody is there to shorten a refusal.
    refused = re.search(r"^\S*Refused: ", said.strip().rpartition("\n")[2])
    if found is None or (TRACEBACK in said and not refused):
        return Outcome(edit, "WRONG", last)
    line = next(x for x in said[: found.end()].splitlines()[::-1] if x.strip())
    return Outcome(edit, "caught" if after == before else "FALSE PASS", " ".join(line.split()))


def outputs(tree: Path) -> dict[str, str]:
    """Digests of what figures and paper write."""
    paths = sorted(path for pattern in OUTPUTS for path in tree.glob(pattern) if path.is_file())
    return {path.relative_to(tree).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def command(tree: Path, words: tuple[str, ...], around: Around | None = None) -> tuple[int, str]:
    """Run a program of a tree; (exit status, everything it said)."""
    around = dict(around or {})
    flags, cwd = around.pop("@flags", "").split(), around.pop("@cwd", str(tree))
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **around}
    done = subprocess.run(
        [sys.executable, *flags, "-m", *words], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace", timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout


def reseal(tree: Path) -> None:
    """Seal a tree as it is, and carry its evidence over to the files that are there now."""
    seal.seal(tree)
    for name in (evidence.DEFAULT, evidence.GPU):
        if (tree / name).is_file():
            rewrite(tree, name, lambda records: [carried(record, tree) for record in records])


def carried(record: dict[str, Any], tree: Path) -> dict[str, Any]:
    """A record as if it had just been measured on the files that are there now."""
    claims = {claim["id"]: claim for claim in seal.claims(tree)}
    claim = claims[record["claim"]]
    names = {*record["depends"], evidence.check_file(claim)}
    depends = {name: said for name in sorted(names) if (said := digest(tree, name)) is not None}
    return {**record, **{x: claim[x] for x in ("statement", "status", "check")}, "depends": depends}


def rewrite(tree: Path, name: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Change the records of a file and compute its chain anew, as a careful forger would."""
    document = json.loads((tree / name).read_text("utf-8"))
    document["records"] = change(document["records"])
    document["links"], document["root"] = evidence.chain(document["records"])
    (tree / name).write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", "utf-8")


def prepare(base: Path, *, made: bool) -> None:
    """A tree in which everything fits: sealed, its evidence carried over, its outputs made and bound.

    Raises:
        RuntimeError: if one of its commands does not end well.
    """
    base.mkdir()
    for path in sorted(ROOT.iterdir()):
        if path.name in COPIED:
            shutil.copytree(path, base / path.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, base / path.name)
    reseal(base)
    if made:
        commands = [("figures",), ("paper",)]
        if (base / "archive/manifest.py").is_file():
            commands += [("archive", "metadata"), ("archive", "bind")]
        for words in commands:
            code, said = command(base, words)
            if code:
                raise RuntimeError(f"python -m {' '.join(words)} in a tree without an edit: {said[-2000:]}")
