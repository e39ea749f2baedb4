"""What the paper refuses and how it prints: figures of other evidence, numbers without a format."""

from __future__ import annotations

import pytest

from figures import drawn
from paper import numbers
from selfcheck.harness.files import ROOT, SelfcheckError

RECORDS = {"entropy": {"claim": "entropy", "data": {"x": 1}}, "dppl": {"claim": "dppl", "data": {"x": 2}}}
TEX = r"\includegraphics[width=\linewidth]{../figures/entropy.pdf} % \includegraphics{no.pdf}"


@pytest.fixture
def folder(tmp_path):
    """A figure, its code and a ledger that belong together."""
    (tmp_path / "figures").mkdir()
    for name in ("entropy.pdf", "entropy.png", "entropy.py", "style.py"):
        (tmp_path / "figures" / name).write_text(name)
    watched = drawn.Watched(RECORDS)
    assert watched["entropy"]["data"] == {"x": 1}
    drawn.write({"entropy": drawn.entry("entropy", watched, tmp_path)}, tmp_path)
    return tmp_path


def test_a_figure_of_this_evidence_is_accepted_whatever_other_claims_say(folder):
    drawn.check(TEX, RECORDS, folder)
    drawn.check(TEX, {**RECORDS, "dppl": {"claim": "dppl", "data": {"x": 3}}}, folder)


def test_a_figure_of_other_evidence_is_refused(folder):
    for other in ({}, {"entropy": {"claim": "entropy", "data": {"x": 1.5}}}):
        with pytest.raises(SelfcheckError, match=r"figures/entropy\.pdf: drawn from other evidence of entropy"):
            drawn.check(TEX, other, folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [("entropy.pdf", "edited", "not the file"), ("entropy.py", "x", r"before figures/entropy\.py changed"),
     ("style.py", "x", r"before figures/style\.py changed"), ("entropy.pdf", None, "missing"),
     ("figures.json", "not json", "unreadable"), ("figures.json", "{}", "not in figures")],
)  # fmt: skip
def test_a_figure_that_was_not_drawn_here_is_refused(folder, file, text, message):
    path = folder / "figures" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(SelfcheckError, match=message):
        drawn.check(TEX, RECORDS, folder)


def test_every_graphic_of_the_paper_is_a_figure_with_code():
    names = drawn.included((ROOT / "paper/paper.tex").read_text("utf-8"))
    assert len(names) == 10 and all((ROOT / f"figures/{name}.py").is_file() for name in names)
    with pytest.raises(SelfcheckError, match=r"elsewhere\.pdf"):
        drawn.included(r"\includegraphics{elsewhere.pdf}")


def test_numbers_are_printed_as_their_claims_say():
    assert numbers.show("int8-ppl.change", -0.0171) == r"\ensuremath{-}0.017"
    assert numbers.show("int8-ppl.change", 0.5) == "+0.500"
    assert numbers.show("dppl.change2048", 1.239) == "+1.24"
    assert numbers.show("dppl.whole_budget_difference", 0.00123) == r"\ensuremath{1.2\cdot 10^{-3}}"
    assert numbers.show("kv-memory.int4_share", 0.3004) == "0.30"
    assert numbers.show("kv-formats.int8_ratio", 0.50391) == "0.5039"
    assert numbers.show("certified-speed.bandwidth", 4) == "4"
    assert numbers.show("no-such-claim.value", 12345.0) == r"12\,345"
