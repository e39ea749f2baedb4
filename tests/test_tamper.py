"""The tamper table: what it says of itself, and its quickest rows (`nox -s tamper` tries all)."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from .tamper import acts, bench, packing, records, table
from .tamper.bench import NO_EFFECT, PASSES, Edit, judged

#: rows of commands that take a second each, one of every kind that needs no outputs made anew
QUICK = (
    "paper/paper.tex changed", "src/qaxis/more.py added", "lock emptied", "selfcheck/checks a link", "measured in 2102",
    "package paper/numbers/ beside paper/numbers.py", "paper/graphicx.sty added", "python -O", "a record dropped",
    "src/qaxis/decode/cuda.py changed and sealed",
)  # fmt: skip
READ = [edit for edit in table.EDITS if edit.command is records.read]
QUICKLY = [edit for edit in table.EDITS if edit.name in QUICK and edit.command == "paper"]


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    return bench.Bench(tmp_path_factory.mktemp("tamper"), made=False)


def test_every_row_is_another_and_the_committed_table_has_them_all():
    assert len(table.EDITS) >= 120
    names = [(edit.kind, edit.name, edit.said_command) for edit in table.EDITS]
    assert len(set(names)) == len(names)
    assert all(edit.why for edit in table.EDITS if edit.caught == PASSES)
    assert {edit.kind for edit in table.EDITS if edit.caught == PASSES} == {table.beyond.BEYOND}
    if not table.TABLE.is_file():
        pytest.skip("tests/TAMPER.md is not there yet: nox -s tamper writes it")
    text = table.TABLE.read_text("utf-8")
    assert "false passes: 0" in text and f"{len(table.EDITS)} edits: " in text
    rows = [line for line in text.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == len(table.EDITS)


EDIT = Edit("kind", "name", acts.nothing, "paper", "named: x")


@pytest.mark.parametrize(
    ("caught", "code", "said", "after", "word"),
    [
        ("named: x", 1, "first\nnamed: x is wrong\nlast", {}, "caught"),
        ("named: x", 0, "named: x", {}, "FALSE PASS"),
        ("named: x", 1, "named: x", {"paper/paper.pdf": "another"}, "FALSE PASS"),
        ("named: x", 1, "something else", {}, "WRONG"),
        ("named: x", 1, "Traceback (most recent call last)\nnamed: x", {}, "WRONG"),
        (NO_EFFECT, 0, "built", {}, NO_EFFECT),
        (NO_EFFECT, 0, "built", {"paper/paper.pdf": "another"}, "WRONG"),
        (NO_EFFECT, 1, "stopped", {}, "WRONG"),
        (PASSES, 0, "built", {"paper/paper.pdf": "another"}, PASSES),
        (PASSES, 1, "stopped", {}, "WRONG"),
    ],
)
def test_an_outcome_is_what_was_said_and_written(caught, code, said, after, word):
    outcome = judged(dataclasses.replace(EDIT, caught=caught), code, said, {}, after, {})
    assert outcome.word == word and outcome.good == (word in ("caught", NO_EFFECT, PASSES))


@pytest.mark.parametrize("edit", READ, ids=lambda edit: edit.name)
def test_evidence_of_another_form_is_refused(tried, edit):
    outcome = tried.run(0, edit)
    assert outcome.word == "caught", outcome


@pytest.mark.parametrize("edit", QUICKLY, ids=lambda edit: edit.name)
def test_a_quick_row(tried, edit):
    outcome = tried.run(1, edit)
    assert outcome.word == "caught", outcome


def test_line_endings_of_a_clone_are_those_of_the_commit(tried, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("no git on the PATH")
    tree = tried.copy("committed")
    packing.commit(tree)
    for option in ("core.autocrlf=true", "core.eol=crlf"):
        packing.git(tree, "clone", "-q", "-c", option, str(tree), str(tmp_path / option))
        assert bench.outputs(tmp_path / option) == bench.outputs(tree)
        assert bench.seal.differences(tmp_path / option) == []
