"""Other machines: line endings, trees and homes that cannot be written, odd paths and locales."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from selfcheck.harness import seal
from selfcheck.harness.files import ROOT, SelfcheckError


def git(folder: Path, *arguments: str) -> None:
    """Run git as on a machine without settings of its own."""
    names = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "core.safecrlf=false")
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(["git", *names, *arguments], cwd=folder, env=env, check=True, capture_output=True)


@pytest.fixture
def committed(tree: Path) -> Path:
    """The tree as a commit of its own."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    shutil.copy(ROOT / ".gitattributes", tree)
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "-m", "all")
    return tree


def bytes_of(tree: Path) -> dict[str, bytes]:
    return {
        p.relative_to(tree).as_posix(): p.read_bytes()
        for p in tree.rglob("*")
        if p.is_file() and ".git" not in p.relative_to(tree).parts
    }


def test_a_clone_that_converts_line_endings_keeps_every_byte(committed, tmp_path_factory):
    clone = tmp_path_factory.mktemp("windows") / "clone"
    git(committed, "clone", "-q", "-c", "core.autocrlf=true", str(committed), str(clone))
    assert bytes_of(clone) == bytes_of(committed) and seal.differences(clone) == seal.differences(committed)


def test_converted_line_endings_are_named_as_such_and_mended_as_said(committed, tmp_path_factory):
    git(committed, "rm", "-q", ".gitattributes")
    seal.seal(committed)
    git(committed, "commit", "-q", "-a", "-m", "without attributes")
    clone = tmp_path_factory.mktemp("windows") / "clone"
    git(committed, "clone", "-q", "-c", "core.autocrlf=true", str(committed), str(clone))
    found = seal.differences(clone)
    assert len(found) > 90 and all(x.endswith(seal.LINE_ENDINGS) for x in found)
    with pytest.raises(SelfcheckError, match=r"line endings") as said:
        seal.verify(clone)
    assert "nox -s seal" not in str(said.value)
    for line in re.findall(r"`git ([^`]*)`", str(said.value).split("; or")[0]):
        git(clone, *line.split())
    assert seal.differences(clone) == []


def test_a_changed_byte_among_converted_lines_is_a_change(tree):
    seal.seal(tree)
    path = tree / "src/qaxis/budget.py"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\n", b"\r\n").replace(b"import", b"imporT", 1))
    (tree / "noxfile.py").write_bytes((tree / "noxfile.py").read_bytes().replace(b"\n", b"\r\n"))
    one, other = seal.differences(tree)
    assert one.startswith("noxfile.py") and one.endswith(seal.LINE_ENDINGS) and ", is " in other
    with pytest.raises(SelfcheckError, match=r"1 of 2.*\n.*nox -s seal"):
        seal.verify(tree)
