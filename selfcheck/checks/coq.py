"""What Coq itself says of a compiled file: every object, its type, its body, and the axioms that it rests on.

Nothing is concluded from a file's text, where a theorem may stand in a comment. The file is compiled alone in an empty
folder; the questions are asked in another folder by a second file that requires the compiled one and does not import
it, so that its notations and names are never in force. Each answer goes to a file of its own. Types are printed
without notations, coercions and implicit arguments. An answer that is not understood is an error.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ..harness.claim import NotRunError
from ..harness.files import sha256

#: kinds of statement, and of what would be assumed, that `Search` tells apart
STATED = ("Theorem", "Lemma", "Corollary", "Proposition", "Fact", "Remark", "Property")
ASSUMED = ("Axiom", "Conjecture", "Parameter", "Hypothesis", "Variable")
#: libraries whose names types are printed with; required before the file in question, so that it cannot stand for them
LIBRARIES = "Require Import Reals List Sorted."
PRINTING = """
Set Printing All. Set Printing Width 1000000. Set Printing Depth 1000000.
Remove Search Blacklist "_subproof" "_subterm" "Private_".
"""
INSTALL = "install it (Debian, Ubuntu: apt install coq; macOS: brew install coq)"
#: a name as Coq prints it, perhaps qualified
NAME = r"[^\W\d][\w']*(?:\.[^\W\d][\w']*)*"
CLOSED, HEADING = "Closed under the global context", "Axioms:"
#: the root of the standard library, which is not the same in every version
PREFIX = re.compile(r"\b(?:Coq|Stdlib|Corelib)\.(?=\w)")
TIMEOUT = 1800


class RefusedError(Exception):
    """Coq does not accept a file, or says something of it that is not understood."""


@dataclass
class Said:
    """Coq's answers on one compiled file. Names are without the file's own."""

    types: dict[str, str]
    #: objects that are statements, and their kind
    kinds: dict[str, str]
    #: of an object that is no statement, what it stands for
    bodies: dict[str, str] = field(default_factory=dict)
    #: what all statements together rest on: the name of an axiom and its type
    axioms: dict[str, str] = field(default_factory=dict)
    #: of every statement, the names of the axioms it rests on, if it was asked for each
    rests_on: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Programs:
    """coqc and coqchk of one installation."""

    compiler: Path
    checker: Path

    def version(self) -> str:
        """Raises RefusedError if it is not said as expected."""
        said = _run([str(self.compiler), "--print-version"], Path(tempfile.gettempdir()))
        found = re.fullmatch(r"(\d+\.\d+\S*) \d+\.\d+\S*\s*", said)
        if found is None:
            raise RefusedError(f"coqc --print-version says {said.strip()[:80]!r}, not two versions")
        return found[1]

    def identity(self) -> list[dict[str, str]]:
        """Name and SHA-256 of the files that run."""
        return [{"file": path.name, "sha256": sha256(path)} for path in (self.compiler, self.checker)]


def programs() -> Programs:
    """Raises NotRunError if one of them is not there."""
    found = []
    for name in ("coqc", "coqchk"):
        path = shutil.which(name)
        if path is None:
            raise NotRunError(f"{name} is not on the PATH; {INSTALL}")
        found.append(Path(path).resolve())
    return Programs(*found)


def _run(command: list[str], folder: Path, *, errors_too: bool = False) -> str:
    """Standard output of a program that reads no file of the user's.

    Args:
        errors_too: standard error as well, where an answer stands in some versions.

    Raises:
        RefusedError: with what it said, if it fails or says anything else on standard error.
    """
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}
    env = {**kept, "HOME": str(folder), "TMPDIR": str(folder), "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if errors_too else subprocess.PIPE, text=True, encoding="utf-8",
            errors="replace", timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RefusedError(f"{Path(command[0]).name} took more than {TIMEOUT} s") from None
    if done.returncode or (done.stderr or "").strip():
        words = " ".join((done.stderr or done.stdout).split())
        raise RefusedError(f"{Path(command[0]).name} says: {words[-300:] or f'nothing, exit {done.returncode}'}")
    return done.stdout


def compiled(source: Path, found: Programs, folder: Path) -> Path:
    """Compile ``source`` alone; the result in an empty folder, whatever else compiling it wrote.

    Raises:
        RefusedError: as ``_run``.
    """
    apart, clean = folder / "compiled", folder / "asked"
    apart.mkdir()
    clean.mkdir()
    shutil.copy(source, apart / source.name)
    _run([str(found.compiler), "-q", "-w", "-all", "-Q", ".", "", source.name], apart)
    made = apart / f"{source.stem}.vo"
    if not made.is_file():
        raise RefusedError(f"{found.compiler.name} ended well and made no {made.name}")
    return Path(shutil.copy(made, clean / made.name))


def said_of(made: Path, names: list[str], found: Programs, *, each: bool, libraries: str = LIBRARIES) -> Said:
    """Ask for every object of a compiled file, for the body of each that is no statement, and for axioms.

    Args:
        names: the objects that are expected.
        each: ask for the axioms of every statement, a second each; else for those of all together.

    Raises:
        RefusedError: naming the answer that is not understood; if the file has not just these objects.
    """
    said = _objects(made, names, found, libraries)
    module, folder, stated = made.stem, made.parent, sorted(said.kinds)
    others = [name for name in names if name not in said.kinds]
    questions = {f"body{i}": f"Print {module}.{name}." for i, name in enumerate(others)}
    if each:
        questions |= {f"axioms{i}": f"Print Assumptions {module}.{name}." for i, name in enumerate(stated)}
    elif stated:
        # The definition says nothing; what it rests on is what its parts rest on.
        pairs = "".join(f", @{module}.{name}" for name in stated)
        questions |= {"together": f"Definition stated := (O{pairs}).", "axioms": "Print Assumptions stated."}
    _ask(questions, module, found, folder, libraries)
    for i, name in enumerate(others):
        said.bodies[name] = _body(_answer(folder, f"body{i}"), f"{module}.{name}", said.types[name])
    if each:
        for i, name in enumerate(stated):
            resting = axioms(_answer(folder, f"axioms{i}"), name)
            said.rests_on[name] = sorted(resting)
            said.axioms |= resting
    elif stated:
        said.axioms = axioms(_answer(folder, "axioms"), "all statements")
    return said


def _objects(made: Path, names: list[str], found: Programs, libraries: str) -> Said:
    """Types and kinds of the objects of a file, which must be ``names``; nothing may be assumed."""
    module, folder = made.stem, made.parent
    questions = {f"is{kind}": f"Search is:{kind} inside {module}." for kind in (*STATED, *ASSUMED)}
    questions |= {"all": f"Search _ inside {module}.", "module": f"Print Module {module}."}
    _ask(questions, module, found, folder, libraries)
    types = _typed(_answer(folder, "all"), module, "Search")
    kinds = {n: k for k in (*STATED, *ASSUMED) for n in _typed(_answer(folder, f"is{k}"), module, f"Search is:{k}")}
    if assumed := sorted(f"{name} ({kind})" for name, kind in kinds.items() if kind in ASSUMED):
        raise RefusedError(f"assumed, not proven: {', '.join(assumed)}")
    if set(types) != set(names):
        raise RefusedError(_apart(set(types), set(names)))
    _complete(_answer(folder, "module"), module, types)
    return Said(types, kinds)


def objects(made: Path, found: Programs, libraries: str = LIBRARIES) -> list[str]:
    """The names of a compiled file's objects."""
    _ask({"names": f"Search _ inside {made.stem}."}, made.stem, found, made.parent, libraries)
    return sorted(_typed(_answer(made.parent, "names"), made.stem, "Search"))


def _apart(there: set[str], pinned: set[str]) -> str:
    words = [f"{name} is not pinned" for name in sorted(there - pinned)]
    words += [f"{name} is pinned and not in the file" for name in sorted(pinned - there)]
    return "; ".join(words)


def _ask(questions: dict[str, str], module: str, found: Programs, folder: Path, libraries: str) -> None:
    """Each answer to a file of its own; nothing else may be said."""
    file = folder / "Ask.v"
    lines = [q if q.startswith("Definition") else f'Redirect "{name}" {q}' for name, q in questions.items()]
    file.write_text(f"{libraries}\nRequire {module}.{PRINTING}" + "\n".join(lines) + "\n", "utf-8")
    spoken = _run([str(found.compiler), "-q", "-w", "-all", "-Q", ".", "", file.name], folder)
    if spoken.strip():
        raise RefusedError(f"{found.compiler.name} says beside its answers: {' '.join(spoken.split())[:200]!r}")


def _answer(folder: Path, name: str) -> str:
    file = folder / f"{name}.out"
    if not file.is_file():
        raise RefusedError(f"coqc ended well and left no answer to the question {name!r}")
    return PREFIX.sub("", file.read_text("utf-8"))


def _entries(text: str) -> list[str]:
    """Lines of an answer, each joined with the indented ones after it."""
    return [" ".join(entry.split()) for entry in re.split(r"\n(?!\s)", text) if entry.strip()]


def _typed(text: str, module: str, question: str) -> dict[str, str]:
    """``name: type`` of every object of a file."""
    out = {}
    for entry in _entries(text):
        found = re.fullmatch(rf"{re.escape(module)}\.({NAME}): (.+)", entry)
        if found is None:
            raise RefusedError(f"{question} says {entry[:120]!r}, which is not understood")
        out[found[1]] = found[2]
    return out


def _complete(text: str, module: str, types: dict[str, str]) -> None:
    """That the module is just these objects: no submodule, nothing that a search leaves out.

    Raises:
        RefusedError: at the first item that is another.
    """
    rest, left = " ".join(text.split()), {n: t.replace(f"{module}.", "") for n, t in types.items()}
    head = f"Module {module} := Struct "
    rest = rest.removeprefix(head) if rest.startswith(head) else f"? {rest}"
    while rest != "End":
        item = re.match(rf"(?:Definition|Parameter) ({NAME}) : ", rest)
        end = f"{left.pop(item[1], '?')}. " if item else ""
        if item is None or not rest[item.end() :].startswith(end):
            raise RefusedError(f"Print Module says {rest[:120]!r}, which is not understood")
        rest = rest[item.end() + len(end) :]
    if left:
        raise RefusedError(f"Print Module does not name {', '.join(sorted(left))}")


def axioms(text: str, name: str) -> dict[str, str]:
    """What ``Print Assumptions`` names: an unsafe fixpoint, inductive or universe is not understood, and refused."""
    entries = _entries(text)
    if entries == [CLOSED]:
        return {}
    out = {}
    for entry in entries[1:]:
        found = re.fullmatch(rf"({NAME}) : (.+)", entry)
        if found is None:
            raise RefusedError(f"{name}: Print Assumptions says {entry[:120]!r}, which is not understood")
        out[found[1]] = found[2]
    if entries[:1] != [HEADING] or not out:
        raise RefusedError(f"{name}: Print Assumptions says {' '.join(entries)[:120]!r}, which is not understood")
    return out


def _body(text: str, name: str, type_: str) -> str:
    """What a definition stands for, of ``name = body : type``."""
    said = " ".join(text.partition("\n\nArguments ")[0].split())
    head, tail = f"{name} = ", f" : {type_}"
    if not (said.startswith(head) and said.endswith(tail)):
        raise RefusedError(f"Print {name} says {said[:120]!r}, which is not understood")
    return said[len(head) : -len(tail)]


# ---- The second checker, which reads compiled files only -----------------------------------------------------------

SUMMARY = re.compile(r"\s*CONTEXT SUMMARY\s*=+\s*")
SAFE = (
    "Constants/Inductives relying on type-in-type",
    "Constants/Inductives relying on unsafe (co)fixpoints",
    "Inductives whose positivity is assumed",
)


def checked(made: Path, found: Programs, *, alone: bool) -> set[str]:
    """Check a compiled file with coqchk; the axioms of all that it read.

    Args:
        alone: take the libraries that it requires as they are. Those not opened stand among the axioms, then.

    Raises:
        RefusedError: if it does not accept the file, relies on something unsafe, or is not understood.
    """
    chosen = ["-norec", made.stem] if alone else [made.stem]
    return summary(_run([str(found.checker), "-silent", "-o", "-Q", ".", "", *chosen], made.parent, errors_too=True))


def summary(text: str) -> set[str]:
    """The axioms that coqchk names; raises as ``checked``."""
    head = SUMMARY.match(text)
    sections: dict[str, list[str]] = {}
    for line in text[head.end() :].splitlines() if head else [text]:
        begins = re.fullmatch(r"\* ([^:]+):(.*)", line)
        if begins and begins[1] not in sections:
            words = sections.setdefault(begins[1], begins[2].split())
        elif sections and (not line.strip() or re.fullmatch(rf" +{NAME}", line)):
            words += line.split()
        else:
            raise RefusedError(f"coqchk says {line.strip()[:120]!r}, which is not understood")
    listed = sections.pop("Axioms", ["nothing"])
    expected = {"Theory": ["Set", "is", "predicative"], **{title: ["<none>"] for title in SAFE}}
    for title in sections.keys() | expected.keys():
        if sections.get(title) != expected.get(title):
            raise RefusedError(f"coqchk says {title}: {' '.join(sections.get(title, ['nothing']))[:120]}")
    return set() if listed == ["<none>"] else {PREFIX.sub("", name) for name in listed}
