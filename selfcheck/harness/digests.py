"""Digests for staleness: of what a file says to a compiler, so that a reworded comment makes no evidence stale.

The seal is another matter: it is over every byte.
"""

from __future__ import annotations

import ast
import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from .files import sha256

CPP = {".cu", ".cuh", ".hpp"}
#: what of C++ may not be touched (literals, numbers with their separators), then comments, then space
CPP_TOKEN = re.compile(
    r"""(?P<kept>"(?:\\.|[^"\\\n])*"|\b\d[\w.']*|'(?:\\.|[^'\\\n])*')|(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<joined>\\\n)""",
    re.DOTALL,
)


def digest(root: Path, name: str) -> str | None:
    """Digest of the file ``name`` under ``root``, or of one name that it re-exports (``file.py:name``).

    None if there is no such thing now. A Python file's digest leaves out comments, docstrings and layout, a C++ file's
    comments and layout; anything else counts byte for byte.
    """
    file, _, exported = name.partition(":")
    path = root / file
    try:
        status = path.stat()
        return _digest(path, exported, status.st_mtime_ns, status.st_size)
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


@lru_cache(maxsize=4096)
def _digest(path: Path, exported: str, modified: int, size: int) -> str | None:
    if path.suffix == ".py":
        tree = ast.parse(path.read_bytes())
        said = _exported(tree, exported) if exported else python(tree)
    elif path.suffix in CPP:
        said = cpp(path.read_text("utf-8"))
    else:
        return sha256(path)
    return None if said is None else hashlib.sha256(said.encode()).hexdigest()


def python(node: Any) -> str:
    """A syntax tree in words: the same for every version of Python, without docstrings, comments and positions."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        node = without_docstring(node)
    if isinstance(node, ast.JoinedStr):
        return f"JoinedStr[{','.join(python(part) for part in _merged(node.values))}]"
    if isinstance(node, ast.AST):
        # Empty fields are left out, as newer versions add some; "u" before a string says nothing.
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        said = [f"{name}={python(value)}" for name, value in fields if name not in ("ctx", "kind", "type_comment")]
        if isinstance(node, ast.Constant) and node.value is None:
            said = ["value=None"]
        return f"{type(node).__name__}({','.join(said)})"
    if isinstance(node, list):
        return f"[{','.join(map(python, node))}]"
    return repr(node)


def without_docstring(node: Any) -> Any:
    """The same module, class or function without its docstring."""
    if ast.get_docstring(node, clean=False) is None:
        return node
    fields = dict(ast.iter_fields(node))
    return type(node)(**{**fields, "body": node.body[1:]})


def _merged(parts: list[Any]) -> list[Any]:
    """Parts of an f-string, neighbouring constants joined and empty ones dropped: Python's versions split them anew."""
    out: list[Any] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, ast.Constant) and isinstance(last, ast.Constant):
            out[-1] = ast.Constant(str(last.value) + str(part.value))
        elif not isinstance(part, ast.Constant) or part.value:
            out.append(part)
    return out


def _exported(tree: ast.Module, name: str) -> str | None:
    """Where a module imports ``name`` from."""
    found = [
        f"{node.level}.{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) == name
    ]
    return "\n".join(found) or None


def cpp(text: str) -> str:
    """C++ without comments and with one space for any; preprocessor directives keep their lines."""
    if 'R"' in text:
        return text  # A raw string may hold anything.

    def bare(match: re.Match[str]) -> str:
        return match["kept"].translate({32: "\0", 9: "\1"}) if match["kept"] else " "

    out: list[str] = []
    for line in CPP_TOKEN.sub(bare, text).splitlines():
        line = " ".join(line.split())
        if line.startswith("#") or not out or out[-1].startswith("#"):
            out.append(line)
        else:
            out[-1] = f"{out[-1]} {line}".strip()
    return "\n".join(line for line in out if line)
