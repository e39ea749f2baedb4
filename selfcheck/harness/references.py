"""What a file takes from other files of the project without running them: constants, base classes, re-exports.

A tracer sees functions run. It does not see ``UNITS`` read where it was imported, nor which class ``qaxis.Budget``
is: those are found in the syntax tree.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Module:
    """Names of one file."""

    tree: ast.Module
    #: as ``qaxis.storage`` is for ``qaxis.storage.side``, and for ``qaxis.storage`` itself
    package: str
    #: local name -> (module, name in it or ""), wherever in the file it is imported
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: name bound at the top level -> the statements that bind it
    bound: dict[str, list[ast.stmt]] = field(default_factory=dict)


def file_of(root: Path, module: str) -> str | None:
    """Path under ``root`` of a module of the project; None for others."""
    top = module.split(".")[0]
    if top not in ("qaxis", "selfcheck"):
        return None
    stem = ("src/" if top == "qaxis" else "") + module.replace(".", "/")
    return next((name for name in (f"{stem}.py", f"{stem}/__init__.py") if (root / name).is_file()), None)


def references(root: Path, name: str, whole: bool) -> list[str]:
    """Files that file ``name`` takes values from, and the names (``file.py:name``) that it reaches through a re-export.

    Args:
        whole: look into functions as well; else only at what runs on import.
    """
    return list(_references(root, name, whole, (root / name).stat().st_mtime_ns))


@lru_cache(maxsize=4096)
def _references(root: Path, name: str, whole: bool, modified: int) -> tuple[str, ...]:
    module = _module(root, name, modified)
    found: dict[str, None] = {}
    for chain, inherits in _used(module.tree, whole):
        source, original = module.imports.get(chain[0], ("", ""))
        if source:
            parts = [*([original] if original else []), *chain[1:]]
            found.update(dict.fromkeys(_follow(root, source, parts, inherits)))
    found.pop(name, None)
    return tuple(found)


def _follow(root: Path, module: str, parts: list[str], inherits: bool) -> Iterator[str]:
    """What taking ``module.parts[0].parts[1]...`` depends on."""
    name = file_of(root, module)
    if name is None or not parts:
        return
    there = _module(root, name, (root / name).stat().st_mtime_ns)
    if parts[0] not in there.bound:
        # A module of a package, or what only exists at run time.
        yield from _follow(root, f"{module}.{parts[0]}", parts[1:], inherits)
    for statement in there.bound.get(parts[0], []):
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            source, original = there.imports[parts[0]]
            if file_of(root, source) is not None:
                if isinstance(statement, ast.ImportFrom):
                    yield f"{name}:{parts[0]}"
                yield from _follow(root, source, [*([original] if original else []), *parts[1:]], inherits)
        elif isinstance(statement, ast.ClassDef):
            # A class that is used runs its methods; only what is read of it, or inherited, does not show.
            if inherits or (len(parts) > 1 and parts[1] in _bound(statement.body)):
                yield name
        elif not isinstance(statement, FUNCTIONS):
            yield name


@lru_cache(maxsize=1024)
def _module(root: Path, name: str, modified: int) -> Module:
    dotted = name.removeprefix("src/").removesuffix(".py").replace("/", ".")
    package = dotted.removesuffix(".__init__") if name.endswith("/__init__.py") else dotted.rpartition(".")[0]
    module = Module(ast.parse((root / name).read_bytes()), package)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                module.imports[local] = (alias.name if alias.asname else local, "")
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                module.imports[alias.asname or alias.name] = (source, alias.name)
    module.bound.update(_bound(module.tree.body))
    return module


def _bound(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """Names that statements bind, those inside ``if``, ``for``, ``with`` and ``try`` included."""
    out: dict[str, list[ast.stmt]] = {}
    for statement in body:
        names: list[str] = []
        if isinstance(statement, (*FUNCTIONS, ast.ClassDef)):
            names = [statement.name]
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names = [a.asname or (a.name if isinstance(statement, ast.ImportFrom) else a.name.split(".")[0])
                     for a in statement.names]  # fmt: skip
        else:
            nested = [x for part in ("body", "orelse", "finalbody") for x in getattr(statement, part, [])]
            nested += [x for handler in getattr(statement, "handlers", []) for x in handler.body]
            for name, statements in _bound(nested).items():
                out.setdefault(name, []).extend(statements)
            inside = {id(x) for s in nested for x in ast.walk(s)}
            names = [
                x.id
                for x in ast.walk(statement)
                if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store) and id(x) not in inside
            ]
        for name in names:
            out.setdefault(name, []).append(statement)
    return out


def _used(node: ast.AST, whole: bool) -> Iterator[tuple[list[str], bool]]:
    """Every name that is read, with the attributes read of it, and whether a class inherits from it.

    Annotations are left out: nothing runs them.
    """
    if isinstance(node, (*FUNCTIONS, ast.Lambda)):
        parts: list[ast.AST] = [*getattr(node, "decorator_list", []), *node.args.defaults]
        parts += [x for x in node.args.kw_defaults if x is not None]
        if whole:
            parts += [node.body] if isinstance(node, ast.Lambda) else node.body
    elif isinstance(node, ast.AnnAssign):
        parts = [node.target, *([node.value] if node.value else [])]
    elif isinstance(node, ast.ClassDef):
        for base in node.bases:
            for inherited, _ in _used(base, whole):
                yield inherited, True
        parts = [*node.decorator_list, *node.body]
    elif isinstance(node, ast.Attribute):
        chain: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            yield [inner.id, *chain], False
            return
        parts = [inner]
    elif isinstance(node, ast.Name):
        if isinstance(node.ctx, ast.Load):
            yield [node.id], False
        return
    else:
        parts = list(ast.iter_child_nodes(node))
    for part in parts:
        yield from _used(part, whole)
