"""Build paper/paper.pdf from the accepted evidence; the same evidence gives the same bytes."""

from selfcheck import isolated

if __name__ == "__main__":
    isolated.enter("paper")

import datetime
import shutil
import sys
import tempfile
from pathlib import Path

from figures import drawn
from selfcheck.harness import evidence, leftovers, seal, surroundings
from selfcheck.harness.files import ROOT, SelfcheckError, source, target, write_atomic

from . import ledger, numbers, tex


def build(output: Path | None) -> Path:
    """Generate numbers.tex, run pdflatex until references settle, move the PDF into place, or below ``output``."""
    seal.verify()
    records = evidence.accepted(output=output)
    text = (ROOT / "paper/paper.tex").read_text("utf-8")
    drawn.check(text, records, output=output)
    said, made = target(numbers.TARGET, output=output), target("paper/paper.pdf", output=output)
    surroundings.check_writable(said, made)
    surroundings.settle()
    leftovers.remove(output=output)
    epoch = tex.date(int(datetime.datetime.fromisoformat(max(r["time"] for r in records.values())).timestamp()))
    write_atomic(said, numbers.render(records).encode())
    with tempfile.TemporaryDirectory(prefix="qaxis-paper-") as folder:
        # TeX reads and writes here only: not a tree that it cannot write, not a path that it might not understand.
        there = Path(folder)
        for name in ledger.inputs():
            (there / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source(name, output=output), there / name)
        pdf = tex.compile_tex(there / "paper", epoch)
    seal.verify(consequence="the PDF is not written, as it is not of the sealed files")
    write_atomic(made, pdf)
    ledger.write(output=output)
    return made


if __name__ == "__main__":
    try:
        made = build(surroundings.output_option("paper", __doc__))
        by = tex.tex_identity()
        carried = f"{by['package']} {by['version']}" if by["package"] else "of this machine, pinned by nothing"
        print(f"{by['says']} ({carried}), SHA-256 {by['sha256']}")
        print(f"built {made} ({made.stat().st_size // 1024} KiB)")
    except SelfcheckError as error:
        sys.exit(f"paper: {error}")
