"""The scripts of examples/, run as their users run them, on the pinned model (shorter)."""

from __future__ import annotations

import re

import pytest
from click.testing import CliRunner

from examples import engineer, researcher, reviewer


def run(main, *arguments):
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_reviewer():
    out = run(reviewer.main, "--tokens", "256", "--layer", "3")
    assert "0 of 288 sets differ" in out and "max|dlogit| = 0 off" in out
    assert re.search(r"numbers: 0\.5\d{3}\.", out)


def test_researcher(tmp_path):
    pytest.importorskip("matplotlib")
    target = tmp_path / "cost"
    out = run(
        researcher.main, "--tokens", "160", "--texts", "2", "--coverage", "0.1", "--coverage", "1", "--out", str(target)
    )
    rows = target.with_suffix(".csv").read_text().splitlines()
    assert len(rows) == 3 and target.with_suffix(".png").stat().st_size > 5000 and "cite" in out
    tenth, all_keys = (float(row.split(",")[3]) for row in rows[1:])
    assert abs(all_keys) < 1e-3 < tenth


def test_engineer():
    out = run(engineer.main, "--new", "6")
    assert "equal to dense: True" in out and "0 fallbacks" in out
    assert len(re.findall(r"The first|In 1969", out)) >= 3
