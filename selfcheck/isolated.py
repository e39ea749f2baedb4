"""One way in which this project's text becomes code: from the tree's sealed source files, in an isolated interpreter.

Every command starts itself again as ``python -I -S selfcheck/isolated.py PROGRAM ...``. No variable, no working
directory, no folder of the user's, no ``sitecustomize`` and no byte code has a say there; the first finder of modules
takes the project's packages from source files below this tree, and compiles only bytes that the lock names. The
environment's installed packages, ``LD_PRELOAD`` and what else belongs to the machine are as they are.

Standard library only, in one file: nothing else of the project is loaded before the finder is there.
"""

import os
import sys

# These two are loaded with Python itself. What else is imported here comes from Python's own folder: in a process that
# is not isolated yet, the working directory and PYTHONPATH come first, and anything may lie there.
BEFORE = list(sys.path)
OWN = os.path.dirname(os.__file__)
sys.path[:] = [entry for entry in BEFORE if entry.startswith(OWN)]

import contextlib
import hashlib
import importlib
import importlib.util
import io
import linecache
import re
import runpy
import site
import subprocess
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

sys.path[:] = BEFORE

ROOT = Path(__file__).resolve().parents[1]
LOCK = "selfcheck/checks.lock"
#: the project's packages and where they lie; those of the second list are no part of what is sealed
SEALED = {"qaxis": "src/qaxis", "selfcheck": "selfcheck", "figures": "figures", "paper": "paper", "archive": "archive"}
FOLDERS = {**SEALED, "tests": "tests", "examples": "examples"}
#: commands with which a change is sealed, and so run before it is
SEALING = (["selfcheck", "seal"], ["selfcheck", "golden"])
#: commands that say file by file what is wrong, and so run beside it; what they import is compared all the same
SAYING = (["archive", "verify"],)
#: what would reach into Python, matplotlib or Coq from outside; LD_PRELOAD and the like belong to the machine
DROPPED = re.compile(r"PYTHON|MATPLOTLIBRC$|MPLBACKEND$|COQ|ROCQ|TEXINPUTS|TEXMF|KPATHSEA|KPSE_", re.IGNORECASE)

#: what is said of a file that git, an archive or an editor converted, and what to do
LINE_ENDINGS = "only its line endings differ from the lock's"
MEND_LINES = (
    "commit your own changes, if any, and run `git config core.autocrlf false`, "
    "`git rm -rq --cached .`, `git reset -q --hard`; or clone again with `git clone -c core.autocrlf=false`."
)


class Refused(Exception):
    """Text that would become code is not the tree's, or not what the lock names. No ImportError: nobody may go on."""


# ---- What the lock says --------------------------------------------------------------------------------------------


def read_lock(root: Path = ROOT) -> tuple[str, dict[str, str]]:
    """Digest of the lock, and the digests that it names.

    Raises:
        Refused: if it cannot be read.
    """
    try:
        data = (root / LOCK).read_bytes()
        if b"\r\n" in data:
            raise Refused(broken([f"{LOCK}: {LINE_ENDINGS}"]))
        table = data.decode().partition("[files]\n")[2].partition("\n[")[0]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{LOCK}: unreadable ({error}); restore it, or seal again with `nox -s seal`") from None
    return hashlib.sha256(data).hexdigest(), dict(re.findall(r'^"?([^"\n]+?)"? = "([0-9a-f]{64})"$', table, re.M))


def difference(name: str, data: bytes | None, digest: str | None) -> str | None:
    """In words, how the bytes of a sealed file are not what the lock says; None for the bytes of a missing file."""
    if digest is None:
        return f"{name}: not in the lock"
    if data is None:
        return f"{name}: missing, locked as {digest}"
    actual = hashlib.sha256(data).hexdigest()
    if actual == digest:
        return None
    bare = data.replace(b"\r\n", b"\n")
    if digest in (hashlib.sha256(x).hexdigest() for x in (bare, bare.replace(b"\n", b"\r\n"))):
        return f"{name}: {LINE_ENDINGS}"
    return f"{name}: locked as {digest}, is {actual}"


def changed(locked: dict[str, str], root: Path = ROOT) -> list[str]:
    """One sentence for every file of the lock that is missing or has other bytes."""
    found = []
    for name, digest in locked.items():
        path = root / name
        found.append(difference(name, path.read_bytes() if path.is_file() else None, digest))
    return [x for x in found if x]


def broken(found: list[str], consequence: str = "nothing was run") -> str:
    """What is said of a broken seal, and what to do."""
    converted = [x for x in found if x.endswith(LINE_ENDINGS)]
    lines, mend = "\n  ".join(found), ["If you meant the change, look at it and run `nox -s seal`."]
    if converted:
        mend = [f"Where line endings differ ({len(converted)} of {len(found)}), something rewrote them: {MEND_LINES}"]
        mend += ["For the others, if you meant the change, look at it and run `nox -s seal`."] * (found != converted)
    return f"the seal is broken, {consequence}:\n  {lines}\n" + "\n".join(mend)


# ---- From source to code -------------------------------------------------------------------------------------------


def locate(name: str, root: Path = ROOT) -> Path | None:
    """The source file of a module of the project; None if there is none.

    Raises:
        Refused: for what is a module and a folder at once, or reached through a symbolic link.
    """
    top, *rest = name.split(".")
    path = root / FOLDERS[top]
    for part in rest:
        path = path / part
    file, inside = path.with_name(f"{path.name}.py"), path / "__init__.py"
    if file.is_file() and path.exists():
        raise Refused(f"{file.relative_to(root).as_posix()}: a folder of the same name lies beside it; remove that")
    found = file if file.is_file() else inside
    for step in (found, *found.parents):
        if step == root:
            break
        if step.is_symlink():
            raise Refused(f"{step.relative_to(root).as_posix()}: a symbolic link; allowed are files of this tree")
    return found if found.is_file() else None


class Source(SourceFileLoader):
    """Compiles a source file as it was read once, and checked; byte code is neither read nor written."""

    def __init__(self, name: str, path: str, check: Callable[[str, bytes], None]) -> None:
        super().__init__(name, path)
        self.check = check

    def get_code(self, fullname: str) -> Any:
        data = self.get_data(self.path)
        self.check(self.path, data)
        # What asks for the source later, as Triton does to compile it, gets these bytes too.
        lines = io.StringIO(importlib.util.decode_source(data)).readlines()
        linecache.cache[self.path] = (len(data), None, lines, self.path)
        return self.source_to_code(data, self.path)


class Finder:
    """Takes the project's packages from this tree, whatever else bears their names.

    Args:
        locked: digests that sealed files must have; None where a change is only about to be sealed.
        lock: digest of the lock that they stand in.
    """

    def __init__(self, locked: dict[str, str] | None, lock: str = "") -> None:
        self.locked, self.lock = locked, lock
        #: what makes the loader of a module
        self.loader: Callable[[str, str, Callable[[str, bytes], None]], Source] = Source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in FOLDERS:
            return None
        found = locate(name)
        if found is None:
            # Not None: the finders after this one would look in the same folders, for more than source.
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        package = [str(found.parent)] if found.name == "__init__.py" else None
        loader = self.loader(name, str(found), self.check)
        return importlib.util.spec_from_file_location(name, found, loader=loader, submodule_search_locations=package)

    def check(self, path: str, data: bytes) -> None:
        """Raises Refused for bytes of a sealed package that are not the lock's."""
        name = Path(path).relative_to(ROOT).as_posix()
        if self.locked is not None and name.startswith(tuple(f"{x}/" for x in SEALED.values())):
            wrong = difference(name, data, self.locked.get(name))
            if wrong:
                raise Refused(broken([wrong]))


def finder() -> Finder | None:
    """The finder of this process; None if it is not isolated."""
    return next((x for x in sys.meta_path if isinstance(x, Finder)), None)


def foreign() -> list[str]:
    """One sentence for every loaded module of the project that is not the tree's."""
    found = []
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in FOLDERS:
            file, expected = getattr(module, "__file__", None), locate(name)
            if expected is None or file is None or Path(file) != expected:
                found.append(f"{name}: loaded from {file}, which is not this tree's ({ROOT})")
    return found


# ---- Processes -----------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """This process's variables without those that would reach into an isolated one or a library that it uses."""
    return {name: value for name, value in os.environ.items() if not DROPPED.match(name)}


def command(program: str, *arguments: str) -> list[str]:
    """The command that runs a program of the project isolated: under the lock of this process, if it has one."""
    here = finder()
    under = "" if here is None or here.locked is None else here.lock
    return _words(program, *arguments, option=f"--lock={under}" if under else "--unsealed")


def _words(program: str, *arguments: str, option: str | None = None) -> list[str]:
    start = [sys.executable, "-I", "-S", "-X", "utf8", str(ROOT / "selfcheck/isolated.py")]
    return [*start, *([option] if option else []), program, *arguments]


def enter(program: str) -> None:
    """Start the program of this process again, isolated; returns where it is.

    Raises:
        SystemExit: under ``-O``, which empties what rests on ``assert``; and, where a process cannot be replaced, with
            the exit status of the other.
    """
    _refuse_optimised(program)
    if finder() is None:
        _restart([program, *sys.argv[1:]])


def _refuse_optimised(program: str) -> None:
    if sys.flags.optimize:
        sys.exit(
            f"{program}: Python runs with -O or PYTHONOPTIMIZE={sys.flags.optimize}, which removes assertions from all "
            "code that is measured; nothing was run. Allowed is Python without either"
        )


def _restart(words: list[str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    start, env = _words(*words), environment()
    if os.name == "posix":
        os.execve(sys.executable, start, env)
    sys.exit(wait(subprocess.Popen(start, env=env)))


def wait(process: subprocess.Popen[Any]) -> int:
    """Exit status of a process in whose place this one stands: what interrupts both is the other's to answer."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def _add_installed_packages() -> None:
    """What ``-S`` left out, less ``sitecustomize`` and ``usercustomize``, and less this tree as a place of modules."""
    site.execsitecustomize = site.execusercustomize = lambda: None  # type: ignore[attr-defined]
    site.main()
    ours = {ROOT, ROOT / "src", *(ROOT / folder for folder in FOLDERS.values())}
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in ours]


def _locked(option: str, words: list[str]) -> tuple[dict[str, str] | None, str]:
    """What a program may be compiled from, and the lock's digest.

    Raises:
        Refused: if the lock is not the one of the process that started this, or a sealed file is not the lock's.
    """
    if option == "--unsealed" or words[:2] in SEALING:
        return None, ""
    digest, locked = read_lock()
    if option and option != f"--lock={digest}":
        raise Refused(f"{LOCK}: written again while a run was under way; start the run again")
    if words[:2] not in SAYING and (found := changed(locked)):
        raise Refused(broken(found))
    return locked, digest


def main() -> None:
    """``isolated.py [--lock=DIGEST | --unsealed] PROGRAM ...``: run a module of the project as ``python -m`` does."""
    option = sys.argv[1] if sys.argv[1:2] and sys.argv[1].startswith("--") else ""
    words = sys.argv[2:] if option else sys.argv[1:]
    if not words or words[0].partition(".")[0] not in FOLDERS:
        sys.exit(f"isolated.py {' '.join(words)}: allowed is a module of {', '.join(FOLDERS)}, and its options")
    _refuse_optimised(words[0])
    if not (sys.flags.isolated and sys.flags.no_site and sys.flags.utf8_mode):
        _restart(words)
    for name in set(os.environ) - set(environment()):
        del os.environ[name]
    _add_installed_packages()
    try:
        sys.meta_path.insert(0, Finder(*_locked(option, words)))
        this = sys.modules["selfcheck.isolated"] = sys.modules[__name__]
        importlib.import_module("selfcheck").__dict__["isolated"] = this
        sys.argv[:] = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except Refused as error:
        # What says what is wrong was itself changed: then all that the lock says otherwise.
        found = []
        if words[:2] in SAYING:
            with contextlib.suppress(Refused):
                found = changed(read_lock()[1])
        sys.exit(f"{words[0]}: {broken(found) if found else error}")
    except KeyboardInterrupt:
        sys.exit(f"{words[0]}: interrupted")
    except OSError as error:  # A full disk, a closed terminal, a name that no system has.
        sys.exit(f"{words[0]}: {error}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] in FOLDERS:
            raise
        sys.exit(
            f"{words[0]}: {error.name} is not installed for {sys.executable} (a folder of the user's own packages is "
            "left out); nox makes an environment with everything"
        )


if __name__ == "__main__":
    main()
