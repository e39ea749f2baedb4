"""The seal, and what would stand in for what is sealed."""

from __future__ import annotations

import importlib.util
import marshal
import re
import subprocess
import sys
import time
from pathlib import Path

from selfcheck.harness import seal

from . import acts
from .bench import NO_EFFECT, Edit

SEAL, STANDS_IN, AROUND, DURING = "seal", "stand-ins", "surroundings", "during a run"
#: one of every kind of sealed file, with what a dishonest hand might do to it
CHANGED = {
    "paper/paper.tex": acts.replaced("paper/paper.tex", r"\end{document}", "We also prove P=NP.\n" + r"\end{document}"),
    "paper/numbers.py": acts.appended("paper/numbers.py", "speed = lambda x: 2 * x\n"),
    "src/qaxis/budget.py": acts.flipped("src/qaxis/budget.py"),
    "src/qaxis/prefill/select.cu": acts.flipped("src/qaxis/prefill/select.cu"),
    "src/qaxis/arithmetic/canonical.cuh": acts.flipped("src/qaxis/arithmetic/canonical.cuh"),
    "selfcheck/isolated.py": acts.appended("selfcheck/isolated.py", "# \n"),
    "selfcheck/__main__.py": acts.appended("selfcheck/__main__.py"),
    "selfcheck/checks/theorem.py": acts.appended("selfcheck/checks/theorem.py"),
    "selfcheck/harness/seal.py": acts.appended("selfcheck/harness/seal.py"),
    "selfcheck/checks.toml": acts.appended("selfcheck/checks.toml"),
    "selfcheck/golden.json": acts.flipped("selfcheck/golden.json", 40),
    "selfcheck/evidence.schema.json": acts.appended("selfcheck/evidence.schema.json", " "),
    "selfcheck/inputs/subjects.toml": acts.appended("selfcheck/inputs/subjects.toml"),
    "figures/entropy.py": acts.appended("figures/entropy.py"),
    "paper/proofs/QueryAxis.v": acts.appended("paper/proofs/QueryAxis.v"),
    "paper/proofs/statements.toml": acts.appended("paper/proofs/statements.toml"),
    "constraints.txt": acts.appended("constraints.txt"),
    "constraints-gpu.txt": acts.appended("constraints-gpu.txt"),
    "pyproject.toml": acts.appended("pyproject.toml"),
    "noxfile.py": acts.appended("noxfile.py"),
    ".gitattributes": acts.appended(".gitattributes"),
    "archive/__main__.py": acts.appended("archive/__main__.py"),
    "archive/metadata.toml": acts.appended("archive/metadata.toml"),
}
EVERY = ("status", "figures", "paper", "verify", "self-check")


def _changed() -> list[Edit]:
    rows = [Edit(SEAL, f"{n} changed", act, "paper", f"{re.escape(n)}: locked as") for n, act in CHANGED.items()]
    tex = "paper/paper.tex"
    rows += [Edit(SEAL, f"{tex} changed", CHANGED[tex], c, f"{tex}.{{1,60}}locked as") for c in EVERY if c != "paper"]
    for name in ("src/qaxis/budget.py", "selfcheck/checks/theorem.py", "paper/numbers.py", "constraints.txt"):
        rows.append(Edit(SEAL, f"{name} missing", acts.removed(name), "paper", f"{name}: missing"))
    for name in ("src/qaxis/more.py", "src/qaxis/decode/more.cu", "selfcheck/checks/more.py", "figures/more.py",
                 "paper/more.py", "archive/more.py"):  # fmt: skip
        rows.append(Edit(SEAL, f"{name} added", acts.written(name), "paper", f"{name}: not in the lock"))
    for name in ("paper/paper.tex", "src/qaxis/budget.py", "selfcheck/isolated.py"):
        act = acts.carriage_returns(name)
        rows.append(Edit(SEAL, f"line endings of {name} converted", act, "paper", f"{name}: only its line endings"))
    return rows


def _emptied(tree: Path) -> None:
    (tree / seal.LOCK).write_text("[files]\n\n[subjects]\n", "utf-8")


def _line_removed(tree: Path) -> None:
    path = tree / seal.LOCK
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(x for x in lines if not x.startswith('"paper/paper.tex"')), "utf-8")


def _subject_changed(tree: Path) -> None:
    text = (tree / seal.LOCK).read_text("utf-8")
    files, _, subjects = text.partition("[subjects]")
    (tree / seal.LOCK).write_text(f"{files}[subjects]{re.sub('[0-9a-f]{64}', '0' * 64, subjects, count=1)}", "utf-8")


def _lock() -> list[Edit]:
    lock = seal.LOCK
    return [
        Edit(SEAL, "lock emptied", acts.written(lock, ""), "paper", "paper: .*(unreadable|not in the lock)"),
        Edit(SEAL, "lock without files", _emptied, "paper", "not in the lock"),
        Edit(SEAL, "lock missing", acts.removed(lock), "figures", f"{lock}: unreadable"),
        Edit(SEAL, "lock a folder", acts.together(acts.removed(lock), acts.written(f"{lock}/x", "")), "paper", lock),
        Edit(SEAL, "lock not TOML", acts.appended(lock, "[[["), "paper", f"{lock}: unreadable"),
        Edit(SEAL, "lock not UTF-8", acts.written(lock, b"\xff\xfe"), "status", f"{lock}: unreadable"),
        Edit(SEAL, "a line of the lock removed", _line_removed, "paper", r"paper/paper.tex: not in the lock"),
        Edit(SEAL, "a digest of the lock changed", acts.flipped(lock, 200), "figures", r"locked as|not in the lock"),
        Edit(SEAL, "a subject of the lock changed", _subject_changed, "paper", "its subjects differ from the lock's"),
        Edit(SEAL, "lock in a link", acts.linked(lock), "paper", f"{lock}: a symbolic link"),
    ]  # fmt: skip


def _byte_code(tree: Path) -> None:
    """Byte code that a plain interpreter takes for paper/numbers.py without a look at the source."""
    path = tree / importlib.util.cache_from_source("paper/numbers.py")
    path.parent.mkdir(exist_ok=True)
    code = marshal.dumps(compile(acts.PLANTED, "paper/numbers.py", "exec"))
    path.write_bytes(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + code)


#: a package that goes before isolated.py and is the same, but that it isolates nothing
NOT_ISOLATED = """import importlib.util, pathlib
spec = importlib.util.spec_from_file_location("apart", pathlib.Path(__file__).parents[1] / "isolated.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update({name: x for name, x in vars(module).items() if not name.startswith("__")}, enter=lambda program: None)
"""


def _stand_ins() -> list[Edit]:
    package = "selfcheck/isolated/__init__.py"
    rows = [
        Edit(STANDS_IN, f"{package}, which isolates nothing", acts.written(package, NOT_ISOLATED), "paper", package)
    ]
    for name in ("selfcheck/harness/seal", "paper/numbers", "figures/drawn", "src/qaxis/budget"):
        act = acts.written(f"{name}/__init__.py")
        rows.append(Edit(STANDS_IN, f"package {name}/ beside {name}.py", act, "paper", f"{name}"))
    for name in ("figures", "selfcheck/checks", "paper/paper.tex", "src/qaxis/budget.py", "paper/proofs",
                 "selfcheck/evidence/gpu.json"):  # fmt: skip
        rows.append(Edit(STANDS_IN, f"{name} a link", acts.linked(name), "paper", f"{name}: a symbolic link"))
    for name in ("tomlkit.py", "json.py", "jsonschema/__init__.py", "hashlib.py", "__future__.py", "sitecustomize.py", "usercustomize.py",
                 "click.py", "graphicx.sty", "texmf.cnf"):  # fmt: skip
        rows.append(Edit(STANDS_IN, f"{name} in the root", acts.written(name), "paper", NO_EFFECT))
    for name in ("matplotlib.py", "numpy.py"):
        rows.append(Edit(STANDS_IN, f"{name} in the root", acts.written(name), "figures", NO_EFFECT))
    for name in ("src/sitecustomize.py", "src/tomlkit.py", "selfcheck/json.so", "src/qaxis/budget.so", "paper/numbers.pyc",
                 "figures/style.cpython-311-x86_64-linux-gnu.so", "paper/graphicx.sty", "figures/matplotlibrc",
                 "selfcheck/usercustomize.pth"):  # fmt: skip
        rows.append(Edit(STANDS_IN, f"{name} added", acts.written(name), "paper", f"{name}: not (sealed|in the lock)"))
    rows.append(Edit(STANDS_IN, "byte code of another numbers.py", _byte_code, "paper", NO_EFFECT))
    for name in ("qaxis/__init__.py", "selfcheck/__init__.py", "sitecustomize.py"):
        act = acts.around("PYTHONPATH", name, "pass\n" if name.startswith("site") else acts.PLANTED)
        command = "self-check" if name.startswith("qaxis") else "paper"
        rows.append(Edit(STANDS_IN, f"{name} on PYTHONPATH", act, command, NO_EFFECT))
    return rows


def _around() -> list[Edit]:
    rc, sty = "font.size: 30\naxes.facecolor: red\n", r"\typeout{x}\errmessage{planted}"
    rows = [
        Edit(AROUND, "python -O", acts.under(flags="-O"), "paper", "removes assertions"),
        Edit(AROUND, "python -OO", acts.under(flags="-OO"), "figures", "removes assertions"),
        Edit(AROUND, "PYTHONOPTIMIZE=1", acts.under(PYTHONOPTIMIZE="1"), "self-check", "removes assertions"),
        Edit(AROUND, "PYTHONOPTIMIZE=2", acts.under(PYTHONOPTIMIZE="2"), "verify", "removes assertions"),
        Edit(AROUND, "PYTHONSTARTUP", acts.around("PYTHONSTARTUP", "x.py", value="x.py"), "paper", NO_EFFECT),
        Edit(AROUND, "PYTHONWARNINGS=error", acts.under(PYTHONWARNINGS="error"), "paper", NO_EFFECT),
        Edit(AROUND, "PYTHONHASHSEED=1", acts.under(PYTHONHASHSEED="1"), "figures", NO_EFFECT),
        Edit(AROUND, "matplotlibrc in the root", acts.written("matplotlibrc", rc), "figures", NO_EFFECT),
        Edit(AROUND, "MATPLOTLIBRC", acts.around("MATPLOTLIBRC", "matplotlibrc", rc), "figures", NO_EFFECT),
        Edit(AROUND, "MPLCONFIGDIR", acts.around("MPLCONFIGDIR", "matplotlibrc", rc), "figures", NO_EFFECT),
        Edit(AROUND, "matplotlibrc of a home", acts.around("HOME", ".config/matplotlib/matplotlibrc", rc), "figures",
             NO_EFFECT),
        Edit(AROUND, "MPLBACKEND=svg", acts.under(MPLBACKEND="svg"), "figures", NO_EFFECT),
        Edit(AROUND, "TEXINPUTS", acts.around("TEXINPUTS", "graphicx.sty", sty), "paper", NO_EFFECT),
        Edit(AROUND, "TEXMFHOME", acts.around("TEXMFHOME", "tex/latex/graphicx.sty", sty), "paper", NO_EFFECT),
        Edit(AROUND, "TEXMFCNF", acts.around("TEXMFCNF", "texmf.cnf", "TEXMFMAIN = /nowhere\n"), "paper", NO_EFFECT),
        Edit(AROUND, "texmf of a home", acts.around("HOME", "texmf/tex/latex/graphicx.sty", sty), "paper", NO_EFFECT),
        Edit(AROUND, "SOURCE_DATE_EPOCH=1", acts.under(SOURCE_DATE_EPOCH="1"), "paper", NO_EFFECT),
        Edit(AROUND, "SOURCE_DATE_EPOCH=1 of figures", acts.under(SOURCE_DATE_EPOCH="1"), "figures", NO_EFFECT),
        Edit(AROUND, "shell_escape=t", acts.under(shell_escape="t", openout_any="a"), "paper", NO_EFFECT),
        Edit(AROUND, "pdflatex on the PATH", _pdflatex, "paper", NO_EFFECT),
        Edit(AROUND, "LC_ALL=C", acts.under(LC_ALL="C", LANG="C"), "paper", NO_EFFECT),
        Edit(AROUND, "LC_ALL=C of figures", acts.under(LC_ALL="C", LANG="C"), "figures", NO_EFFECT),
        Edit(AROUND, "time zone of Kiritimati", acts.under(TZ="Pacific/Kiritimati"), "paper", NO_EFFECT),
        Edit(AROUND, "no HOME", acts.under(HOME="/nowhere/home"), "paper", NO_EFFECT),
        Edit(AROUND, "no HOME of figures", acts.under(HOME="/nowhere/home"), "figures", NO_EFFECT),
    ]  # fmt: skip
    return rows


def _pdflatex(tree: Path) -> dict[str, str]:
    """Another pdflatex in front: the one that is pinned comes first, where it runs."""
    import os

    program = acts.beside(tree) / "pdflatex"
    program.write_text("#!/bin/sh\necho planted; exit 1\n", "utf-8")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}


def _meanwhile(change):  # type: ignore[no-untyped-def]
    def run(tree: Path) -> tuple[int, str]:
        """python -m figures, and the edit once the first is drawn."""
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "figures"],
            cwd=tree,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # A figure's file is there before the others: nothing is said before it, as output may be kept back.
        until = time.monotonic() + 60
        was = (tree / "figures/selector.png").stat().st_mtime_ns
        while (tree / "figures/selector.png").stat().st_mtime_ns == was and time.monotonic() < until:
            time.sleep(0.02)
        change(tree)
        said = process.communicate(timeout=300)[0]
        for name in ("selector", "entropy", "inversions", "retrieval", "formats", "memory", "stages", "survivors"):
            assert (tree / f"figures/{name}.pdf").exists()
        return process.returncode, said

    return run


def _during() -> list[Edit]:
    rewritten = _meanwhile(lambda tree: (acts.appended("src/qaxis/budget.py")(tree), seal.seal(tree)))
    return [
        Edit(
            DURING, "a sealed file edited", acts.nothing, _meanwhile(acts.appended("src/qaxis/budget.py")), "not of the"
        ),
        Edit(DURING, "a file edited and sealed again", acts.nothing, rewritten, r"written again|not of the"),
    ]


EDITS = [*_changed(), *_lock(), *_stand_ins(), *_around(), *_during()]
