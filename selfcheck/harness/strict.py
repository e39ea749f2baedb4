"""JSON that others may have written, read strictly: whatever a file holds, the answer is an object or one sentence."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .files import SelfcheckError

#: bytes of a file, and containers inside one another, at most
LARGEST, DEEPEST = 1 << 22, 16


def parse(path: Path) -> Any:
    """What a JSON file says.

    Raises:
        SelfcheckError: if the file cannot be read, is too large, no UTF-8 or no JSON, says a key twice, nests too
            deeply, or has a number that is not finite.
        FileNotFoundError: if there is none.
    """
    text = _text(path)
    try:
        made = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise SelfcheckError(f"{path}: unreadable: nested more than {DEEPEST} deep") from None
    except ValueError as error:
        raise SelfcheckError(f"{path}: unreadable: {shown(str(error))}") from None
    if _depth(made) > DEEPEST:
        raise SelfcheckError(f"{path}: unreadable: nested more than {DEEPEST} deep")
    return made


def shown(text: str, most: int = 160) -> str:
    """Any text as one line that a terminal can print."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def _text(path: Path) -> str:
    try:
        # Not a pipe or a device, which might never end.
        if path.exists() and not path.is_file():
            raise SelfcheckError(f"{path}: unreadable: not a regular file")
        with path.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise SelfcheckError(f"{path}: unreadable: {error.strerror}") from None
    if len(data) > LARGEST:
        raise SelfcheckError(f"{path}: unreadable: larger than {LARGEST} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SelfcheckError(f"{path}: unreadable: byte {error.start} is not UTF-8") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return made


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{shown(digits, 40)} is larger than a number can be")
    return number


def _depth(made: Any) -> int:
    """Containers inside one another, counted without recursion."""
    depth, level = 0, [made]
    while level := [x for x in level if isinstance(x, (dict, list))]:
        depth += 1
        level = [x for group in level for x in (group.values() if isinstance(group, dict) else group)]
    return depth
