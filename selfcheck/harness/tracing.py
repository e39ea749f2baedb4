"""Which files a claim depends on, found while it runs.

A claim depends on the files whose functions it ran, whose Triton kernels it launched and which it opened; on the files
that these took values from (``references.py``); and on what ran while these were imported. That a file was imported
says nothing: ``import qaxis`` imports nearly all of them.

Functions report themselves: modules of the project are compiled with a call of ``__ran__`` at the start of every
function, 40 ns. ``sys.settrace`` sees the same and makes Triton's interpreter four times slower; ``sys.monitoring``
does not, but needs Python 3.12. The harness itself is left out: it decides what is run, not what is measured, and what
a check can read of a context that bears on a number (how many texts, how long) lies in ``inputs``. Standard library
only: child processes of a check are traced too, and most of them must not load anything else.
"""

from __future__ import annotations

import ast
import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from .. import isolated
from .digests import without_docstring
from .files import ROOT, SelfcheckError
from .references import references

#: modules that are traced; of the harness only what measures
TRACED = ("src/qaxis/", "selfcheck/checks/", "selfcheck/inputs/", "selfcheck/rivals/", "selfcheck/harness/timing.py")
#: where data lies that a check may read, and what there is the harness's own
DATA = ("src/qaxis/", "selfcheck/", "paper/proofs/")
NO_DATA = ("selfcheck/checks.toml", "selfcheck/checks.lock", "selfcheck/evidence/", "selfcheck/local/")
CODE = (".py", ".pyc", ".staging")
#: a command line that runs code of the project, and the variable that names where a traced child leaves its report
PROJECT, REPORT = re.compile(r"\b(import|from)\s+(qaxis|selfcheck)\b|^(qaxis|selfcheck)(\.|$)"), "QAXIS_TRACE"

#: files that ran or were read since the last ``apart``; never replaced by another set, as functions hold it
RAN: set[str] = set()
#: what ran while a module was imported
IMPORTED: dict[str, frozenset[str]] = {}
_PREFIX = str(ROOT) + os.sep
_installed = False


def place(path: str | os.PathLike[str]) -> str | None:
    """Posix path below the repository's root; None elsewhere."""
    real = os.path.realpath(path)
    return real[len(_PREFIX) :].replace(os.sep, "/") if real.startswith(_PREFIX) else None


def install() -> None:
    """Trace every module of the project that is imported from now on, and every file that is opened.

    Raises:
        SelfcheckError: if one is loaded already: it would run unseen; or in a process that is not isolated.
    """
    global _installed
    if _installed:
        return
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("qaxis", "selfcheck"):
            where = place(getattr(module, "__file__", None) or "") or ""
            if where.startswith(TRACED) and not where.endswith("__init__.py"):
                raise SelfcheckError(f"{name} was imported before it could be traced")
    finder = isolated.finder()
    if finder is None:
        raise SelfcheckError("code is traced in isolated processes only; selfcheck.harness.children.run starts one")
    finder.loader = _loader
    sys.addaudithook(_opened)
    _installed = True


@contextmanager
def apart() -> Iterator[set[str]]:
    """Collect what runs inside in a set of its own, which is complete when the block ends."""
    outer, found = set(RAN), set[str]()
    RAN.clear()
    try:
        yield found
    finally:
        found |= RAN
        RAN.clear()
        RAN.update(outer)


def dependencies(ran: Iterable[str], root: Path = ROOT) -> list[str]:
    """Every file that a run depends on in which the files ``ran``, sorted; ``file.py:name`` for a re-exported name."""
    todo = [(name, True) for name in ran]
    seen: set[tuple[str, bool]] = set()
    while todo:
        name, whole = entry = todo.pop()
        if entry in seen:
            continue
        seen.add(entry)
        if name.endswith(".py"):
            todo += [(other, True) for other in IMPORTED.get(name, ())]
            todo += [(other, False) for other in references(root, name, whole)]
    # The harness is left out, whatever is imported from it: its root, its errors.
    return sorted({name for name, _ in seen if name.startswith(TRACED) or not name.startswith("selfcheck/harness/")})


def clear_caches() -> None:
    """Empty every ``lru_cache`` of the project, so that what an earlier claim computed is computed, and seen, again."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("qaxis", "selfcheck") and not name.startswith("selfcheck.harness"):
            for holder in (module, *(x for x in vars(module).values() if isinstance(x, type))):
                for x in list(vars(holder).values()):
                    x = getattr(x, "__func__", x) if isinstance(x, (staticmethod, classmethod)) else x
                    if isinstance(x, functools._lru_cache_wrapper) and x.__module__.startswith(("qaxis", "selfcheck")):
                        x.cache_clear()


def _loader(name: str, path: str, check: Callable[[str, bytes], None]) -> isolated.Source:
    """What loads a module of the project: traced, if its place is one of those."""
    where = place(path) or ""
    return (_Loader if where.startswith(TRACED) else isolated.Source)(name, path, check)


class _Loader(isolated.Source):
    """Compiles a module with its functions reporting themselves."""

    def source_to_code(self, data: Any, path: Any, **_: Any) -> CodeType:  # type: ignore[override]
        tree = _Reporting().visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        where = place(self.path) or ""
        module.__dict__["__ran__"] = _reporter(where)
        with apart() as found:
            super().exec_module(module)
        IMPORTED[where] = frozenset(found - {where})
        for item in list(vars(module).values()):
            if isinstance(item, type) and item.__module__ == module.__name__:
                _report_construction(item, module.__dict__["__ran__"])
        _watch_triton()


def _reporter(where: str) -> Callable[[], None]:
    def ran() -> None:
        RAN.add(where)

    # A compiler that traces the function calls it once, then, and takes what it gives for a constant.
    ran._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return ran


class _Reporting(ast.NodeTransformer):
    """Puts a call of ``__ran__`` before everything else in every function."""

    def _function(self, node: Any) -> Any:
        self.generic_visit(node)
        documented = len(node.body) - len(without_docstring(node).body)
        line = node.body[min(documented, len(node.body) - 1)]
        node.body.insert(documented, ast.copy_location(ast.Expr(_call(line)), line))
        return node

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function

    def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
        self.generic_visit(node)
        # set.add gives None: the value of ``or`` is the lambda's own.
        node.body = ast.copy_location(ast.BoolOp(ast.Or(), [_call(node.body), node.body]), node.body)
        return node


def _call(place_of: ast.AST) -> ast.expr:
    call = ast.Call(ast.Name("__ran__", ast.Load()), [], [])
    return ast.copy_location(call, place_of)


def _report_construction(made: type, ran: Any) -> None:
    """Report instances of a class whose ``__init__`` or ``__new__`` was generated: dataclasses and named tuples."""
    for name in ("__init__", "__new__"):
        method = inspect.unwrap(getattr(vars(made).get(name), "__func__", vars(made).get(name)))  # type: ignore[arg-type]
        if isinstance(method, FunctionType) and method.__code__.co_filename == "<string>":

            def reporting(*args: Any, method: Any = method, **kwargs: Any) -> Any:
                ran()
                return method(*args, **kwargs)

            functools.update_wrapper(reporting, method)
            setattr(made, name, staticmethod(reporting) if name == "__new__" else reporting)


def _opened(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: a file of the project that is opened for reading is a dependency.

    Raises:
        SelfcheckError: if Python is started on the project's code so that nothing would be known of what it runs.
    """
    if event == "subprocess.Popen":
        words = [os.fsdecode(word) for word in args[1]] if isinstance(args[1], (list, tuple)) else []
        if sys.executable in words and any(map(PROJECT.search, words)) and REPORT not in (args[3] or os.environ):
            raise SelfcheckError("a check starts Python itself; selfcheck.harness.children.run has it traced")
    if event != "open" or not isinstance(args[0], (str, bytes)):
        return
    mode, flags = args[1], args[2]
    if (mode and set("wax+") & set(mode)) or (not mode and flags & (os.O_WRONLY | os.O_RDWR)):
        return
    where = place(os.fsdecode(args[0]))
    if where and where.startswith(DATA) and not where.startswith(NO_DATA) and not where.endswith(CODE):
        RAN.add(where)


# ---- Triton's kernels: compiled on a GPU, rewritten by the interpreter, they report nothing themselves -------------


def _watch_triton() -> None:
    for module, kind in (("triton.runtime.jit", "JITFunction"), ("triton.runtime.interpreter", "InterpretedFunction")):
        found = getattr(sys.modules.get(module), kind, None)
        if found is not None and not hasattr(found, "unwatched"):
            found.unwatched = found.run
            found.run = _launch


def _launch(kernel: Any, *args: Any, **kwargs: Any) -> Any:
    RAN.update(_files_of(kernel))
    return kernel.unwatched(*args, **kwargs)


@functools.lru_cache(maxsize=1024)
def _files_of_function(function: FunctionType) -> frozenset[str]:
    """Files of a kernel and of the kernels that it calls."""
    todo, seen = [function], set[FunctionType]()
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        named = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
        values = [*named.values(), *(cell.cell_contents for cell in function.__closure__ or ())]
        for module in [x for x in values if isinstance(x, ModuleType)]:
            values += [vars(module)[name] for name in _names(function.__code__) if name in vars(module)]
        todo += [kernel for x in values if (kernel := _function_of(x)) is not None]
    return frozenset(where for f in seen if (where := place(f.__code__.co_filename)) and where.startswith(TRACED))


def _files_of(kernel: Any) -> frozenset[str]:
    function = _function_of(kernel)
    return _files_of_function(function) if function is not None else frozenset()


def _function_of(kernel: Any) -> FunctionType | None:
    """The Python function of a kernel, however it is wrapped; None for what is none."""
    if not type(kernel).__module__.startswith("triton."):
        return None
    while not isinstance(kernel, FunctionType):
        kernel = vars(kernel).get("fn") if hasattr(kernel, "__dict__") else None
        if kernel is None:
            return None
    return kernel


def _names(code: CodeType) -> set[str]:
    """Global names and attributes that code mentions, nested functions included."""
    return set(code.co_names).union(*(_names(x) for x in code.co_consts if isinstance(x, CodeType)))
