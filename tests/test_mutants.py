"""Faults are put where they say: each text is in its file, once, and changes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mutants import MUTANTS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_every_fault_finds_its_place(file):
    text = (ROOT / file).read_text("utf-8")
    places = {mutant.fault: text.count(mutant.old) for mutant in MUTANTS if mutant.file == file}
    assert set(places.values()) == {1}, places
    assert all(mutant.new != mutant.old for mutant in MUTANTS if mutant.file == file)


def test_every_fault_has_a_name_of_its_own_and_a_test_that_exists():
    names = [(mutant.by, mutant.fault) for mutant in MUTANTS]
    assert len(set(names)) == len(names), sorted(x for x in names if names.count(x) > 1)
    for by in {mutant.by for mutant in MUTANTS if "::" in mutant.by}:
        file, test = by.split("::")
        assert f"def {test.split('[')[0]}(" in (ROOT / "tests" / file).read_text("utf-8"), by
