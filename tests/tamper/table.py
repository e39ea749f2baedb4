"""Every row, which of them this machine can try, and the table of what came of them."""

from __future__ import annotations

import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from selfcheck.harness.files import ROOT

from . import beyond, elsewhere, outputs, packing, proving, records, sealed
from .bench import NO_EFFECT, PASSES, Bench, Edit, Outcome

TABLE = ROOT / "tests/TAMPER.md"
EDITS = [edit for part in (sealed, records, outputs, proving, packing, elsewhere, beyond) for edit in part.EDITS]
HEAD = """# Edits, and what catches each

Written by `nox -s tamper`: each edit on a copy of the tree, sealed before it, in which everything fits. *Caught*: the
command exits with an error that names it, without a traceback, and writes no output. *No effect*: figures, numbers and
PDF are those of the tree without the edit, byte for byte. The last rows pass, as nothing here can catch them.

"""


def missing(edit: Edit) -> str:
    """Why this machine cannot try a row; empty if it can."""
    if edit.command is proving.examine and not proving.available():
        return "no coqc and coqchk on the PATH"
    packs = edit.kind == packing.ARCHIVE or edit.command is beyond.EDITS[-1].command
    if packs and not packing.available():
        return "no git on the PATH, or no rocrate and swh.model"
    if edit.command == "verify" and not (ROOT / "archive/verify.py").is_file():
        return "no archive/verify.py"
    if edit.command == "self-check" and importlib.util.find_spec("torch") is None:
        return "no torch"
    return ""


def chosen(words: Iterable[str]) -> list[Edit]:
    """Rows whose kind, name or command holds one of these; all if there are none."""
    wanted = [re.compile(word) for word in words]
    return [e for e in EDITS if not wanted or any(w.search(f"{e.kind}: {e.name}: {e.said_command}") for w in wanted)]


def said(line: str) -> None:
    """Print at once, wherever it goes."""
    print(line, flush=True)


def tried(bench: Bench, edits: list[Edit], say: Callable[[str], None] = said) -> Iterator[Outcome]:
    """Outcomes in the order of the rows."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for i, outcome in enumerate(pool.map(bench.run, range(len(edits)), edits), 1):
            edit = outcome.edit
            say(f"[{i}/{len(edits)}] {outcome.word}: {edit.kind}: {edit.name}: {outcome.said[:160]}")
            yield outcome


def counts(outcomes: list[Outcome]) -> str:
    words = Counter(outcome.word for outcome in outcomes)
    return (
        f"{len(outcomes)} edits: {words['caught']} caught, {words[NO_EFFECT]} without effect, {words[PASSES]} cannot be "
        f"caught; false passes: {words['FALSE PASS']}"
    )


def rendered(outcomes: list[Outcome]) -> str:
    """The table."""
    lines = [HEAD + counts(outcomes) + ".\n\n| | of | edit | command | |\n|---|---|---|---|---|\n"]
    for i, outcome in enumerate(outcomes, 1):
        edit, said = outcome.edit, outcome.word
        if said == "caught":
            said = f"caught: {_shown(edit.caught)}"
        elif said == PASSES:
            said = f"passes: {edit.why}"
        command = edit.said_command if edit.said_command[:6] != "python" else f"`{edit.said_command}`"
        lines.append(f"| {i} | {edit.kind} | {_shown(edit.name)} | {command} | {said} |\n")
    return "".join(lines)


def _shown(text: str) -> str:
    """Text in a cell, as code."""
    text = text.replace("[^\n]*", " ... ").replace("|", "\\|").replace("\\.", ".").replace("\u202e", "U+202E")
    return f"`{text}`" if re.search(r"[/\\_.*]", text) else text
