"""Imports of the library point one way: between modules nowhere round, between folders as CONTRIBUTING.md draws them.

Every import counts, inside a function and for a checker of types as well: what needs the other to be understood goes
round whether or not it runs.
"""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports_of(source: Path) -> dict[str, set[str]]:
    """By module of the package ``qaxis`` in folder ``source``: the modules that it imports, others than itself."""
    files = {".".join(path.relative_to(source).with_suffix("").parts): path for path in source.glob("qaxis/**/*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        above = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        taken = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                taken |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                package = above[: len(above) - node.level + 1] if node.level else []
                module = ".".join([*package, *([node.module] if node.module else [])])
                # A name of a package may be a module of it.
                parts = {f"{module}.{alias.name}" for alias in node.names}
                taken |= (parts & files.keys()) | ({module} if parts - files.keys() else set())
        found[name] = taken - {name}
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules of a circle, if there is one: each is imported by the next."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def drawn() -> dict[str, set[str]]:
    """By folder, or module beside the folders, what it may import: all that its arrows lead to."""
    (block,) = (x for x in (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("```") if "<-" in x)
    allowed: dict[str, set[str]] = {}
    for line in block.strip().splitlines():
        steps = [re.split(r",\s*", step.strip()) for step in line.split("<-")]
        for left, right in pairwise(steps):
            for name in right:
                allowed.setdefault(name, set()).update(left)
    for _ in allowed:
        for to in allowed.values():
            to.update(*(allowed.get(name, set()) for name in to))
    return allowed


def test_no_module_is_imported_by_what_it_imports():
    imports = imports_of(ROOT / "src")
    assert "qaxis.storage.summary" in imports["qaxis.storage.shared"] and len(imports) > 80
    assert not circle(imports)


def test_folders_import_what_is_drawn():
    allowed = drawn()
    assert allowed["decode"] >= {"attention", "cuda", "validation"} and "models" not in allowed["decode"]
    for module, taken in imports_of(ROOT / "src").items():
        folder = module.split(".")[1:2]
        # Above all: what a user takes from qaxis.
        if not folder:
            continue
        folders = {name.split(".")[1] for name in taken if name.startswith("qaxis.")} - {*folder}
        assert "qaxis" not in taken and folders <= allowed.get(folder[0], {"validation"}), module
        assert folder == ["models"] or not any(name.split(".")[0] == "transformers" for name in taken), module


@pytest.mark.parametrize(
    "back",
    ["from .a import x", "from . import a", "import qaxis.folder.a", "def f():\n    from ..folder import a",
     "if TYPE_CHECKING:\n    from .a import x"],
)  # fmt: skip
def test_every_way_to_import_counts(tmp_path, back):
    folder = tmp_path / "qaxis" / "folder"
    folder.mkdir(parents=True)
    for file, text in (("../__init__", ""), ("__init__", ""), ("a", "from .b import y"), ("b", "")):
        (folder / f"{file}.py").write_text(text)
    assert not circle(imports_of(tmp_path))
    (folder / "b.py").write_text(back)
    found = circle(imports_of(tmp_path))
    assert {*found} == {"qaxis.folder.a", "qaxis.folder.b"}
