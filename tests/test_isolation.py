"""What is measured, drawn and typeset is what is sealed: everything that could stand in its place, planted."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import py_compile
import shutil
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest

from paper import tex
from selfcheck import isolated
from selfcheck.harness import files, seal
from selfcheck.harness.files import ROOT, SelfcheckError

PLANTED = "raise SystemExit('planted')\n"
TARGET = "selfcheck/harness/digests.py"
#: prints what a command of this tree would run on
PROBE = """
import importlib.util, json, os, sys
import tomlkit
from selfcheck.harness import digests
from selfcheck import isolated
print(json.dumps({
    "qaxis": importlib.util.find_spec("qaxis").origin, "digests": digests.__file__, "tomlkit": tomlkit.__file__,
    "path": sys.path, "env": dict(os.environ), "foreign": isolated.foreign(), "arguments": sys.argv[1:],
    "sealed": isolated.finder().locked is not None, "flags": [sys.flags.isolated, sys.flags.utf8_mode],
}))
"""


def ran(tree: Path, *words: str, how: tuple[str, ...] = (), **options) -> tuple[int, str, str]:
    """Exit status, output and errors of an isolated program of a tree."""
    start = [sys.executable, *how, "-I", "-S", "-X", "utf8", str(tree / "selfcheck/isolated.py")]
    done = subprocess.run([*start, *words], capture_output=True, text=True, timeout=300, **{"cwd": tree, **options})
    return done.returncode, done.stdout, done.stderr


def started(tree: Path, *words: str, how: tuple[str, ...] = (), **env: str) -> tuple[int, str, str]:
    """The same of ``python -m words``."""
    done = subprocess.run(
        [sys.executable, *how, "-m", *words], cwd=tree, env={**os.environ, "PYTHONPATH": "", **env},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def probed(tree: Path) -> Path:
    """A sealed tree with a program that says what it runs on."""
    (tree / "tests").mkdir()
    (tree / "tests/__init__.py").write_text("")
    (tree / "tests/probe.py").write_text(PROBE)
    seal.seal(tree)
    return tree


def plant_bytecode(source: Path) -> None:
    """Byte code of another text that Python takes for that of ``source``."""
    cached = Path(importlib.util.cache_from_source(str(source)))
    other = source.with_name("planted.txt")
    other.write_text(PLANTED)
    py_compile.compile(str(other), str(cached), doraise=True)
    other.unlink()
    status = source.stat()
    header = struct.pack("<II", int(status.st_mtime) & 0xFFFFFFFF, status.st_size & 0xFFFFFFFF)
    cached.write_bytes(cached.read_bytes()[:8] + header + cached.read_bytes()[16:])


# ---- What reaches an isolated process -------------------------------------------------------------------------------


def test_nothing_outside_the_tree_stands_in_for_it(probed, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("qaxis", "selfcheck", "selfcheck/harness", "tests"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "__init__.py").write_text(PLANTED)
    for name in ("tomlkit.py", "sitecustomize.py", "usercustomize.py", "json.py", "startup.py"):
        (elsewhere / name).write_text(PLANTED)
    plant_bytecode(probed / TARGET)
    (probed / "tomlkit.py").write_text(PLANTED)
    (probed / "src/sitecustomize.py").write_text(PLANTED)
    hostile = {"PYTHONPATH": f"{elsewhere}{os.pathsep}{probed / 'src'}", "PYTHONSTARTUP": str(elsewhere / "startup.py")}
    kept = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "LD_PRELOAD": ""}
    # As after an editable installation, whose .pth file names src.
    script = str(probed / "selfcheck/isolated.py")
    start = (
        f"import runpy, sys; sys.path.append({str(probed / 'src')!r}); runpy.run_path({script!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-X", "utf8", "-c", start, "tests.probe", "a", "--b"],
        cwd=elsewhere, env={**os.environ, **hostile, **kept}, capture_output=True, text=True,
    )  # fmt: skip
    code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0 and err == "", err
    found = json.loads(out)
    assert found["qaxis"] == str(probed / "src/qaxis/__init__.py") and found["digests"] == str(probed / TARGET)
    assert Path(found["tomlkit"]).parts[-3:-1] == ("site-packages", "tomlkit")
    assert not any(Path(x).is_relative_to(probed) or Path(x).is_relative_to(elsewhere) for x in found["path"])
    assert found["foreign"] == [] and found["sealed"] and found["flags"] == [1, 1]
    assert found["arguments"] == ["a", "--b"]
    assert kept.items() <= found["env"].items() and not hostile.keys() & found["env"].keys()


def test_planted_byte_code_is_such_as_python_takes(probed):
    # Without isolation it runs: otherwise the test above would show nothing.
    plant_bytecode(probed / TARGET)
    asked = [sys.executable, "-c", "from selfcheck.harness import digests"]
    assert "planted" in subprocess.run(asked, cwd=probed, capture_output=True, text=True).stderr


def test_variables_that_reach_into_a_library_are_dropped_and_the_machines_are_kept(monkeypatch):
    dropped = ("PYTHONPATH", "PYTHONOPTIMIZE", "PYTHONHOME", "MATPLOTLIBRC", "MPLBACKEND", "TEXINPUTS", "TEXMFHOME",
               "COQPATH", "ROCQPATH", "KPATHSEA_DEBUG")  # fmt: skip
    kept = ("PATH", "HOME", "TMPDIR", "CUDA_VISIBLE_DEVICES", "TRITON_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME",
            "https_proxy", "OMP_NUM_THREADS", "LD_PRELOAD", "PYTORCH_NO_CUDA_MEMORY_CACHING")  # fmt: skip
    for name in (*dropped, *kept):
        monkeypatch.setenv(name, "x")
    found = isolated.environment()
    assert not set(dropped) & found.keys() and set(kept) <= found.keys()


def test_commands_are_as_they_were(tree):
    seal.seal(tree)
    code, out, _ = started(tree, "selfcheck", "--help")
    assert code == 0 and out.startswith("Usage: python -m selfcheck [OPTIONS] COMMAND")
    code, _, err = started(tree, "selfcheck", "run", "--nothing")
    assert code == 2 and "No such option" in err
    code, _, err = started(tree, "selfcheck", "run", "--only", "nothing")
    assert code == 1 and err.startswith("selfcheck: --only='nothing': allowed is one of")
    assert started(tree, "paper", "--help")[1].startswith("usage: python -m paper")


@pytest.mark.parametrize("program", ["selfcheck", "figures", "paper"])
def test_a_run_without_assertions_is_refused(tree, program):
    for found in (started(tree, program, how=("-O",)), started(tree, program, PYTHONOPTIMIZE="2")):
        assert found[0] == 1 and found[2].startswith(f"{program}: Python runs with -O") and "Traceback" not in found[2]
    assert "Python runs with -O" in ran(tree, program, how=("-OO",))[2]


def test_another_process_in_ones_place_answers_interrupts():
    class Process:
        calls = 0

        def wait(self) -> int:
            self.calls += 1
            if self.calls < 3:
                raise KeyboardInterrupt
            return 7

    assert isolated.wait(Process()) == 7


# ---- What becomes code ----------------------------------------------------------------------------------------------


def test_what_is_compiled_is_what_is_sealed(probed):
    source = probed / TARGET
    text = source.read_text()
    source.write_text(text + "\n")
    code, out, err = ran(probed, "tests.probe")
    assert (
        code == 1 and out == "" and err.startswith("tests.probe: the seal is broken, nothing was run") and "is " in err
    )
    assert TARGET in err and "nox -s seal" in err and "Traceback" not in err
    source.write_text(text)
    (probed / "selfcheck/harness/extra.py").write_text("")
    (probed / "tests/probe.py").write_text("import selfcheck.harness.extra")
    assert "extra.py: not in the lock" in ran(probed, "tests.probe")[2]
    lock = probed / seal.LOCK
    lock.write_text("[files]\n[subjects]\n")
    assert "selfcheck/__init__.py: not in the lock" in ran(probed, "tests.probe")[2]
    lock.unlink()
    assert "checks.lock: unreadable" in ran(probed, "tests.probe")[2]
    assert ran(probed, "selfcheck", "seal")[0] == 0
    assert "written again while a run" in ran(probed, f"--lock={'0' * 64}", "tests.probe")[2]


def test_the_bytes_that_are_compiled_are_checked_each_time(monkeypatch):
    digest, locked = isolated.read_lock()
    finder = isolated.Finder({**locked, TARGET: "0" * 64}, digest)
    spec = finder.find_spec("selfcheck.harness.digests")
    with pytest.raises(isolated.Refused, match=f"{TARGET}: locked as 0"):
        spec.loader.get_code("selfcheck.harness.digests")
    assert not issubclass(isolated.Refused, ImportError)
    with pytest.raises(ModuleNotFoundError, match=r"selfcheck\.harness\.nothing"):
        finder.find_spec("selfcheck.harness.nothing")
    assert finder.find_spec("json") is None


def shadow(tree: Path) -> None:
    (tree / "selfcheck/harness/digests").mkdir()


def link(tree: Path) -> None:
    (tree / TARGET).rename(tree / "digests.txt")
    (tree / TARGET).symlink_to(tree / "digests.txt")


def linked_folder(tree: Path) -> None:
    (tree / "selfcheck/harness").rename(tree / "elsewhere")
    (tree / "selfcheck/harness").symlink_to(tree / "elsewhere", target_is_directory=True)


def root_module(tree: Path) -> None:
    (tree / "selfcheck.py").write_text("")


@pytest.mark.parametrize("plant", [shadow, link, linked_folder, root_module])
def test_a_module_is_one_file_of_the_tree(tree, plant):
    assert isolated.locate("selfcheck.harness.digests", tree) == tree / TARGET
    assert isolated.locate("qaxis.storage", tree) == tree / "src/qaxis/storage/__init__.py"
    assert isolated.locate("selfcheck.evidence", tree) is None
    plant(tree)
    with pytest.raises(isolated.Refused, match="a symbolic link|a folder of the same name"):
        isolated.locate("selfcheck" if plant is root_module else "selfcheck.harness.digests", tree)


def test_loaded_modules_are_the_trees(monkeypatch):
    assert isolated.foreign() == []
    planted = types.ModuleType("selfcheck.harness.digests")
    planted.__file__ = "/elsewhere/digests.py"
    monkeypatch.setitem(sys.modules, "selfcheck.harness.digests", planted)
    monkeypatch.setattr(seal, "differences", lambda root=ROOT: [])
    with pytest.raises(SelfcheckError, match=r"digests: loaded from /elsewhere/digests\.py"):
        seal.verify()


# ---- What lies in the folders ---------------------------------------------------------------------------------------

UNEXPECTED = (
    "src/sitecustomize.py", "src/usercustomize.py", "src/tomlkit.py", "src/planted.pth", "src/qaxis/budget.so",
    "selfcheck/harness/seal.pyc", "selfcheck/harness/seal/__init__.py", "selfcheck/checks/bits.cpython-311.so",
    "selfcheck/__pycache__/planted.so", "selfcheck/evidence/notes.txt", "selfcheck/inputs/extra.json",
    "figures/matplotlibrc", "figures/selector.mplstyle", "figures/more/extra.pdf", "paper/numbers/__init__.py",
    "paper/graphicx.sty", "paper/article.cls", "paper/texmf.cnf", "paper/pdflatex.fmt", "paper/other.tex",
)  # fmt: skip
HARMLESS = (
    "src/qaxis.egg-info/PKG-INFO", "src/qaxis/__pycache__/removed.cpython-311.pyc", "selfcheck/local/a/b.json",
    "selfcheck/evidence/attested/somebody.json", "figures/new.pdf", "figures/tmpx.staging", "paper/build/paper.log",
    "paper/proofs/QueryAxis.vo", "paper/proofs/.QueryAxis.aux",
)  # fmt: skip


def test_what_does_not_belong_in_a_sealed_folder_is_named(tree):
    seal.seal(tree)
    for name in HARMLESS:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    assert seal.differences(tree) == []
    for name in UNEXPECTED:
        there = (tree / name).parent.is_dir()
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text("")
        (found,) = seal.differences(tree)
        assert found.startswith(f"{name}: not "), found
        (tree / name).unlink()
        if not there:
            (tree / name).parent.rmdir()


@pytest.mark.parametrize("name", ["selfcheck/rivals", "selfcheck/inputs/seeded.py", "figures", "src/qaxis/storage"])
def test_links_are_named_though_the_bytes_are_the_same(tree, name):
    seal.seal(tree)
    (tree / name).rename(tree / "elsewhere")
    (tree / name).symlink_to(tree / "elsewhere")
    assert any(x.startswith(f"{name}: a symbolic link") for x in seal.differences(tree))


def test_every_file_that_a_number_rests_on_is_sealed():
    files_of = set(seal.expand(seal.SEALED))
    assert {
        ".gitattributes",
        "noxfile.py",
        "pyproject.toml",
        "selfcheck/golden.json",
        "selfcheck/isolated.py",
    } <= files_of
    assert {"selfcheck/rivals/schemes.py", "src/qaxis/cuda/emulated.hpp", "paper/tex.py"} <= files_of
    folders = {name for name in files_of if name.startswith(("archive/", "requirements/"))}
    assert set(seal.expand(("archive/**/*.py", "requirements/*.txt"))) <= folders


# ---- During a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resealed", [False, True])
def test_an_edit_during_a_run_keeps_no_record(tree, resealed):
    check = tree / "selfcheck/checks/theorem.py"
    edit = "    from selfcheck.harness import seal\n    path = seal.ROOT / 'src/qaxis/budget.py'\n"
    edit += "    path.write_bytes(path.read_bytes() + b'# edited\\n')\n" + "    seal.seal()\n" * resealed
    text = check.read_text()
    assert text.count("    refused = 0\n") == 1
    check.write_text(text.replace("    refused = 0\n", f"    refused = 0\n{edit}"))
    seal.seal(tree)
    code, out, err = started(tree, "selfcheck", "run", "--quick", "--only", "thm1-stops")
    assert code == 1 and "thm1-stops is not kept" in err and "Traceback" not in err, out + err
    assert ("checks.lock: written again" if resealed else "src/qaxis/budget.py: locked as") in err
    assert not (tree / "selfcheck/local/quick.json").exists()


def test_no_check_rests_on_an_assertion_that_python_may_leave_out():
    found = []
    for path in sorted(
        x for folder in ("selfcheck", "figures", "paper", "archive") for x in (ROOT / folder).rglob("*.py")
    ):
        tree = ast.parse(path.read_bytes())
        found += [f"{path.name}:{x.lineno}" for x in ast.walk(tree) if isinstance(x, ast.Assert)]
    assert found == []


def test_a_counterexample_is_one_under_every_option():
    from hypothesis import strategies as st

    from selfcheck.checks import theorem

    with pytest.raises(theorem.OrderDiffersError, match=r"x: orders \[1, 0\] and \[0, 1\]"):
        theorem.same_ranking([1, 2], [2, 1], "x")
    _, said = theorem._search(st.integers(0, 9), lambda x: theorem.same_ranking([0, x], [0, -x], "y"), 50, 1)
    assert said == "y: orders [1, 0] and [0, 1]"


def test_nox_stops_at_the_first_error():
    assert "\nnox.options.stop_on_first_error = True\n" in (ROOT / "noxfile.py").read_text("utf-8")


# ---- Figures and paper ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "name", "old", "new"),
    [("paper", "paper/paper.tex", "\\section{Limitations}", "\\section{Limitations} We also prove P = NP."),
     ("paper", "paper/numbers.py", "def render(", "def render (", ),
     ("figures", "figures/matplotlibrc", "", "x"), ("paper", "paper/graphicx.sty", "", "x"),
     ("figures", "figures/selector.py", "def draw(", "def draw ("), ("figures", "selfcheck/checks.toml", "id", "id ")],
)  # fmt: skip
def test_figures_and_paper_verify_the_seal_first(tree, program, name, old, new):
    seal.seal(tree)
    text = (tree / name).read_text("utf-8") if old else ""
    assert old in text
    (tree / name).write_text(text.replace(old, new, 1), "utf-8")
    code, out, err = started(tree, program)
    assert code == 1 and err.startswith(f"{program}: the seal is broken, nothing was run:\n  {name}: ") and out == ""


DRAW = """
import sys
from pathlib import Path
from figures import __main__ as figures
from selfcheck.harness import evidence
from selfcheck.harness.files import ROOT
figures.FIGURES = ("selector",)
records = {r["claim"]: r for name in (evidence.DEFAULT, evidence.GPU) for r in evidence.read(ROOT / name)}
with figures.nobodys_settings():
    figures.draw(records, Path(sys.argv[1]) / "figures", Path(sys.argv[1]))
"""


def test_a_users_settings_change_no_byte_of_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    home, config, here, given = (tmp_path / name for name in ("home", "config", "here", "given"))
    for folder in (home / ".config/matplotlib", config, here, given):
        folder.mkdir(parents=True)
        (folder / "matplotlibrc").write_text("axes.facecolor: red\nlines.linewidth: 9\nsavefig.bbox: tight\n")
    found = []
    plain = {"HOME": str(tmp_path / "plain"), "PATH": os.environ["PATH"]}
    ways = [(ROOT, {}), (here, {}), (ROOT, {"MATPLOTLIBRC": str(given)}), (ROOT, {"MPLCONFIGDIR": str(config)}),
            (ROOT, {"HOME": str(home)})]  # fmt: skip
    for i, (where, env) in enumerate(ways):
        path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
        done = subprocess.run(
            [sys.executable, "-c", DRAW, str(tmp_path / str(i))], cwd=where, capture_output=True, text=True,
            env={**plain, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **env},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append([(tmp_path / str(i) / f"figures/selector.{kind}").read_bytes() for kind in ("pdf", "png")])
    assert all(x == found[0] for x in found)


@pytest.fixture
def source(tmp_path):
    """A folder with a small paper.tex, where there is a pdflatex."""
    try:
        tex.pdflatex()
    except SelfcheckError as error:
        pytest.skip(str(error))
    folder = tmp_path / "work/paper"
    folder.mkdir(parents=True)
    (folder / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{lmodern,graphicx}\\begin{document}x\\end{document}"
    )
    return folder


def test_pdflatex_sees_no_style_but_its_own(source, tmp_path, monkeypatch):
    plain = tex.compile_tex(source, 1_790_000_000)
    hostile = "\\ProvidesPackage{graphicx}\\AtBeginDocument{planted}"
    for folder in ("inputs", "home/texmf/tex/latex", "texmf/tex/latex"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "graphicx.sty").write_text(hostile)
    monkeypatch.setenv("TEXINPUTS", f"{tmp_path / 'inputs'}:")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TEXMFHOME", str(tmp_path / "texmf"))
    monkeypatch.setenv("max_print_line", "40")
    assert tex.compile_tex(source, 1_790_000_000) == plain
    assert set(tex.environment(tmp_path)) <= {
        *tex.KEPT, "HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP", "TEXMFHOME", "TEXMFVAR", "TEXMFCONFIG", "TEXMFLOCAL",
        "openin_any", "openout_any", "shell_escape", "LC_ALL",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "message"),
    [("\\input{OUTSIDE}", "neither the paper's nor its own: .*secret"), ("\\write18{touch made}x", ""),
     ("\\newwrite\\f\\immediate\\openout\\f=OUTSIDE.new x", "pdflatex stopped")],
)  # fmt: skip
def test_pdflatex_reads_and_writes_in_its_folder_only(source, tmp_path, body, message):
    outside = tmp_path / "secret.tex"
    outside.write_text("secret")
    text = (
        "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{lmodern}\\begin{document}"
        + body.replace("OUTSIDE", str(outside))
        + "\\end{document}"
    )
    (source / "paper.tex").write_text(text)
    if message:
        with pytest.raises(SelfcheckError, match=f"(?s){message}"):
            tex.compile_tex(source, 1_790_000_000)
    else:
        assert tex.compile_tex(source, 1_790_000_000)
    assert not (source / "made").exists() and not Path(f"{outside}.new").exists()


@pytest.mark.parametrize(
    ("body", "refused", "told"),
    [("See~\\ref{tab:lost}.", "lost", ""), ("See~\\cite{lost}.", "lost", ""),
     ("\\label{one}\\section{x}\\label{one}x", "multiply", ""),
     ("\\begin{table}\\rule{1mm}{2\\textheight}\\end{table}x", "", "Float too large"),
     ("\\begin{table}\\begin{tabular}{l}\\rule{2\\textwidth}{1mm}\\end{tabular}\\end{table}x", "", "Overfull"),
     ("\\section{x}\\label{one}See~\\ref{one}.", "", "")],
)  # fmt: skip
def test_what_pdflatex_warns_of(source, capsys, body, refused, told):
    head = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{lmodern}\\begin{document}"
    (source / "paper.tex").write_text(head + body + "\\end{document}")
    if refused:
        with pytest.raises(SelfcheckError, match=f"(?s)cannot be followed.*{refused}"):
            tex.compile_tex(source, 1_790_000_000)
    else:
        tex.compile_tex(source, 1_790_000_000)
        said = capsys.readouterr().out
        assert told in said and any(x in said for x in ("LaTeX Warning: ", "margin")) == bool(told)


def test_the_paper_is_dated_by_no_wrong_clock():
    assert tex.date(1_790_000_000) == 1_790_000_000
    for epoch, said in ((4_165_000_000, "2101"), (0, "1970"), (10**11, "5138")):
        with pytest.raises(SelfcheckError, match=f"newest record is dated {said}-"):
            tex.date(epoch)


def test_what_typeset_the_paper_is_named(source):
    found = tex.tex_identity()
    assert "pdfTeX" in found["says"] and found["sha256"] == files.sha256(Path(tex.pdflatex()[0]))
    assert (found["package"] is None) == (found["version"] is None) == (shutil.which("pdflatex") == tex.pdflatex()[0])
