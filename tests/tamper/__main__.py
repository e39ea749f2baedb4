"""``python -m tests.tamper [WORD ...]``: try every row, or those that a word is found in; write tests/TAMPER.md."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from selfcheck.harness.files import write_atomic

from . import table
from .bench import Bench


def main(words: list[str]) -> None:
    """Raises SystemExit if a row is not as it says, or cannot be tried."""
    edits = table.chosen(words)
    left_out = [(edit, why) for edit in edits if (why := table.missing(edit))]
    with tempfile.TemporaryDirectory(prefix="qaxis-tamper-") as folder:
        bench = Bench(Path(folder))
        outcomes = list(table.tried(bench, [edit for edit in edits if not table.missing(edit)]))
    print(table.counts(outcomes))
    for why in sorted({why for _, why in left_out}):
        print(f"not tried, {why}: {sum(x == why for _, x in left_out)}")
    wrong = [f"{o.word}: {o.edit.kind}: {o.edit.name}" for o in outcomes if not o.good]
    if wrong:
        sys.exit("tamper:\n  " + "\n  ".join(wrong))
    if not words and not left_out:
        write_atomic(table.TABLE, table.rendered(outcomes).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
