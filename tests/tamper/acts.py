"""What an edit does to a tree, as functions that make such functions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from .bench import Around, reseal

Act = Callable[[Path], Around | None]
#: a module that would be noticed if it ever ran
PLANTED = "raise SystemExit('planted text ran')\n"


def nothing(tree: Path) -> None:
    """The tree as it is."""


def replaced(name: str, old: str, new: str) -> Act:
    """One text for another, which must be there."""

    def act(tree: Path) -> None:
        text = (tree / name).read_bytes().decode()
        assert old in text, f"{name} has no {old!r}; update tests/tamper"
        (tree / name).write_bytes(text.replace(old, new, 1).encode())

    return act


def appended(name: str, text: str | bytes = "\n") -> Act:
    def act(tree: Path) -> None:
        with (tree / name).open("ab") as stream:
            stream.write(text.encode() if isinstance(text, str) else text)

    return act


def flipped(name: str, at: int = -2) -> Act:
    """One bit of one byte."""

    def act(tree: Path) -> None:
        data = bytearray((tree / name).read_bytes())
        data[at] ^= 1
        (tree / name).write_bytes(data)

    return act


def written(name: str, data: str | bytes = PLANTED) -> Act:
    def act(tree: Path) -> None:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(data.encode() if isinstance(data, str) else data)

    return act


def removed(name: str) -> Act:
    def act(tree: Path) -> None:
        path = tree / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def linked(name: str) -> Act:
    """A link to what lay there, now outside of the tree."""

    def act(tree: Path) -> None:
        there = beside(tree) / Path(name).name
        shutil.move(tree / name, there)
        (tree / name).symlink_to(there, target_is_directory=there.is_dir())

    return act


def carriage_returns(*names: str) -> Act:
    def act(tree: Path) -> None:
        for name in names:
            (tree / name).write_bytes((tree / name).read_bytes().replace(b"\n", b"\r\n"))

    return act


def beside(tree: Path) -> Path:
    """A folder outside of the tree, which goes with it."""
    folder = tree.parent / f"{tree.name}-beside"
    folder.mkdir(exist_ok=True)
    return folder


def around(variable: str, name: str, text: str = PLANTED, *, value: str = "") -> Act:
    """A file ``name`` beside the tree, and a variable with the folder's path, or with ``value`` below it."""

    def act(tree: Path) -> Around:
        folder = beside(tree)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
        return {variable: str(folder / value)}

    return act


def under(**variables: str) -> Act:
    """Variables only; ``flags`` are Python's options."""
    return lambda tree: {("@flags" if name == "flags" else name): value for name, value in variables.items()}


def resealed(*acts: Act) -> Act:
    """Edits by somebody who seals afterwards and carries the evidence over."""

    def act(tree: Path) -> Around:
        found: Around = {}
        for each in acts:
            found |= each(tree) or {}
        reseal(tree)
        return found

    return act


def together(*acts: Act) -> Act:
    def act(tree: Path) -> Around:
        found: Around = {}
        for each in acts:
            found |= each(tree) or {}
        return found

    return act
