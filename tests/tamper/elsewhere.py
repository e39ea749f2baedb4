"""The same tree on another machine: the outputs must be the same bytes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from . import acts, packing
from .bench import COMMANDS, NO_EFFECT, Edit, command, outputs

ELSEWHERE = "other machines"


def _made(tree: Path) -> tuple[int, str]:
    """Figures and paper, and whether they are what they were."""
    was = outputs(tree)
    for words in (COMMANDS["figures"], COMMANDS["paper"]):
        code, said = command(tree, words)
        if code:
            return code, said
    wrong = sorted(name for name, digest in outputs(tree).items() if was[name] != digest)
    return int(bool(wrong)), f"other bytes: {', '.join(wrong)}" if wrong else said


def moved(name: str) -> Callable[[Path], tuple[int, str]]:
    def run(tree: Path) -> tuple[int, str]:
        """python -m figures, python -m paper"""
        return _made(Path(shutil.copytree(tree, acts.beside(tree) / name)))

    return run


def cloned(*options: str) -> Callable[[Path], tuple[int, str]]:
    def run(tree: Path) -> tuple[int, str]:
        """python -m figures, python -m paper"""
        packing.commit(tree)
        there = acts.beside(tree) / "clone"
        subprocess.run(["git", "clone", "-q", *options, str(tree), str(there)], check=True, capture_output=True)
        return _made(there)

    return run


EDITS = [
    Edit(ELSEWHERE, "a path with spaces and umlauts", acts.nothing, moved("ein Ordner für größte Mühe"), NO_EFFECT),
    Edit(ELSEWHERE, "a path with what TeX and shells obey", acts.nothing, moved("a$b%c#d~e{f}'g;h"), NO_EFFECT),
    Edit(ELSEWHERE, "git clone -c core.autocrlf=true", acts.nothing, cloned("-c", "core.autocrlf=true"), NO_EFFECT),
    Edit(ELSEWHERE, "git clone -c core.eol=crlf", acts.nothing, cloned("-c", "core.eol=crlf"), NO_EFFECT),
]
