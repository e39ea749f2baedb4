"""Other machines: line endings, trees and homes that cannot be written, odd paths and locales."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest

from figures import drawn
from selfcheck.harness import evidence, seal, surroundings
from selfcheck.harness.files import ROOT, SelfcheckError, source
from selfcheck.inputs import subjects


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


# ---- Trees and homes that cannot be written ------------------------------------------------------------------------


def ran(tree: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Exit status, output and errors of ``python -m arguments`` in an environment that has nothing else."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)]), **env}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=tree, env=env, capture_output=True, text=True, encoding="utf-8",
        timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("blocked", "command"),
    [
        ("selfcheck/local", ("selfcheck", "run", "--quick")),
        ("selfcheck/evidence/default.json", ("selfcheck", "run")),
        ("selfcheck/evidence/default.json", ("selfcheck", "evidence")),
    ],
)
def test_a_target_that_cannot_be_written_is_named_before_anything_is_measured(tree, blocked, command):
    seal.seal(tree)
    if blocked.endswith(".json"):
        (tree / blocked).unlink()
        (tree / blocked).mkdir()
    else:
        (tree / blocked).write_text("in the way")
    code, out, err = ran(tree, *command, "--only", "thm1-stops")
    assert code == 1 and f"cannot write {tree / blocked}" in err and "--output" in err and "Traceback" not in err
    assert "importing" not in out


def test_figures_and_paper_ask_as_early(monkeypatch, tmp_path_factory):
    import figures.__main__ as draw
    import paper.__main__ as build

    blocked = tmp_path_factory.mktemp("output")
    for name in ("figures", "paper"):
        (blocked / name).write_text("in the way")
    monkeypatch.setattr(evidence, "accepted", lambda *_, **__: {})
    monkeypatch.setattr(drawn, "check", lambda *_, **__: None)
    for command in (draw.main, build.build):
        with pytest.raises(SelfcheckError, match=r"cannot write .*--output FOLDER"):
            command(blocked)


def test_a_tree_of_another_user_is_noticed():
    # Not pytest's own folder, which another user could not even look into.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = folder / "evidence.json"
        surroundings.check_writable(target)
        assert list(folder.iterdir()) == []
        target.mkdir()
        with pytest.raises(SelfcheckError, match="Is a directory"):
            surroundings.check_writable(target)
        target.rmdir()
        folder.chmod(0o555)
        if os.getuid():
            with pytest.raises(SelfcheckError, match="Permission denied"):
                surroundings.check_writable(target)
        elif (child := os.fork()) == 0:  # The superuser may write anywhere: another user tries.
            try:
                os.setuid(65534)
                surroundings.check_writable(target)
            except SelfcheckError as error:
                os._exit(17 if "Permission denied" in str(error) else 1)
            finally:
                os._exit(0)
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
        folder.chmod(0o755)


def test_output_elsewhere_leaves_the_tree_and_is_found_by_what_reads_evidence(tree, tmp_path_factory):
    output = tmp_path_factory.mktemp("out put ü")
    seal.seal(tree)
    before = bytes_of(tree)
    home = tmp_path_factory.mktemp("home") / "missing"
    given = {"LC_ALL": "C", "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    code, out, err = ran(tree, "selfcheck", "run", "--only", "thm1-stops", "--output", str(output), **given)
    assert code == 0 and "is as it was" in out and "python -m figures --output" in out, out + err
    assert bytes_of(tree) == before and not home.exists() and "Warning" not in err
    was, now = (evidence.load(source(evidence.DEFAULT, tree, folder)) for folder in (None, output))
    assert was.keys() == now.keys() and was["thm1-stops"] != now["thm1-stops"] and was["proofs"] == now["proofs"]
    written = evidence.read(output / evidence.DEFAULT)
    evidence.write(output / evidence.DEFAULT, [{**r, "passed": False, "verdict": "no"} for r in written])
    there = [s for s in evidence.states(tree, output) if not s.on_gpu and not s.claim.get("optional", False)]
    assert {s.word for s in there} == {"failed"}
    assert "failed" not in {s.word for s in evidence.states(tree)}


def settled(tmp: Path, **env: str) -> list[str]:
    """HOME, the user, HF_HOME and a cache of a process after it settled."""
    code = (
        "import getpass, os; from pathlib import Path; from selfcheck.harness import surroundings\n"
        "surroundings.settle(); home = Path.home(); (home / 'x').write_text('x'); print(home)\n"
        "print(getpass.getuser()); print(os.environ.get('HF_HOME')); print(os.environ.get('MPLCONFIGDIR'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PATH": os.environ["PATH"], "TMPDIR": str(tmp), **env},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")


def test_without_a_home_caches_go_to_one_that_is_removed(tmp_path):
    home, tmp, file = tmp_path / "home", tmp_path / "tmp", tmp_path / "file"
    (home / ".cache/huggingface").mkdir(parents=True)
    tmp.mkdir()
    file.write_text("")
    assert settled(tmp, HOME=str(home), USER="me", MPLCONFIGDIR="/x")[:4] == [str(home), "me", "None", "/x"]
    for nowhere in (str(file), str(tmp_path / "missing")):
        own, user, models, cache, _ = settled(tmp, HOME=nowhere, USER="me", MPLCONFIGDIR=str(file / "x"))
        assert Path(own).parent == tmp and user == "me" and models == cache == "None"
    assert list(tmp.iterdir()) == []


def test_no_folder_for_temporary_files_is_one_sentence(monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    with pytest.raises(SelfcheckError, match="set TMPDIR"):
        surroundings.settle()


# ---- A GGUF file ---------------------------------------------------------------------------------------------------


def test_a_gguf_file_is_parsed_once_inside_and_as_before_outside(tmp_path):
    import gguf

    path = str(tmp_path / "tiny.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 1)
    writer.add_tensor("token_embd.weight", numpy.ones((4, 4), numpy.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    for error in ((), (KeyError,)):
        with contextlib.suppress(*error), subjects.parsed_once():
            one = gguf.GGUFReader(path)
            assert gguf.GGUFReader(path) is one and one.tensors[0].name == "token_embd.weight"
            names = [gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1) for _ in range(2)]
            assert names[0] is names[1] and names[0].get_name("model.embed_tokens") == "token_embd"
            for kind in error:
                raise kind
        assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
    assert gguf.GGUFReader(path) is not gguf.GGUFReader(path)
