"""The lists that everything is installed from: versions, digests, who uses them; the bill of materials; leftovers."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from archive import requirements as lists
from requirements import lock
from selfcheck.harness import leftovers, versions
from selfcheck.harness.files import ROOT, SelfcheckError, sha256

MACHINES = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("win32", "AMD64"))
SYSTEMS = {"linux": "Linux", "darwin": "Darwin", "win32": "Windows"}
WHERE = [
    {
        **default_environment(), "python_version": f"3.{minor}", "python_full_version": f"3.{minor}.1", "extra": "",
        "sys_platform": system, "platform_system": SYSTEMS[system], "platform_machine": machine,
        "os_name": "nt" if system == "win32" else "posix", "platform_python_implementation": "CPython",
    }
    for minor, (system, machine) in itertools.product(range(10, 14), MACHINES)
]  # fmt: skip
LISTS = lists.environments()
BUILDS = ("torch", "torch-cpu")


def active(requirements: list[Requirement], where: dict[str, str]) -> dict[str, str]:
    """Versions by name on one machine; each package has one."""
    here = [r for r in requirements if r.marker is None or r.marker.evaluate(where)]
    found = {canonicalize_name(r.name): str(r.specifier).removeprefix("==").removesuffix("+cpu") for r in here}
    assert len(found) == len(here), sorted(r.name for r in here)
    return found


@pytest.mark.parametrize(
    "where", WHERE, ids=lambda w: "-".join((w["python_version"], w["sys_platform"], w["platform_machine"]))
)
def test_every_list_has_the_versions_of_the_constraints(where: dict[str, str]):
    constraints = active([Requirement(x) for x in (ROOT / "constraints.txt").read_text("utf-8").splitlines()], where)
    seen: dict[str, str] = {}
    for name, lines in LISTS.items():
        if name in lock.APART:
            continue
        for package, version in active([line.requirement for line in lines], where).items():
            assert version == constraints.get(package, version), f"{name}.txt: {package}"
            assert version == seen.setdefault(package, version), f"{name}.txt: {package}"


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("name", lock.WITH_LIBRARY)
def test_records_made_with_a_list_are_not_stale(name: str, build: str):
    for where in WHERE:
        installed = active([line.requirement for line in LISTS[name] + LISTS[build]], where)
        found = {p: installed.get(p, versions.ABSENT) for p in versions.PACKAGES if p in installed or p != "triton"}
        record = {"versions": {"python": where["python_full_version"], **found}, "machine": where}
        assert versions.outside(record, on_gpu=False) == []


def test_every_list_has_what_its_environment_asks_for():
    asked = {name: [*lock.project()["dependencies"], *lock.packages(x)] for name, x in lock.WITH_LIBRARY.items()}
    asked |= {name: lock.packages(x) for name, x in lock.DOWNSTREAM.items()} | lock.TOOLS | lock.BARE | lock.APART
    assert set(asked) | set(BUILDS) == set(LISTS)
    for (name, needs), where in itertools.product(asked.items(), WHERE):
        beside = LISTS["torch"] if name in lock.WITH_LIBRARY else []
        has = active([line.requirement for line in LISTS[name] + beside], where)
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate(where):
                version = has.get(canonicalize_name(need.name))
                assert version and need.specifier.contains(version), f"{name}.txt: {need}"


def test_only_what_runs_the_library_needs_torch():
    for name in (*lock.DOWNSTREAM, *lock.TOOLS, *lock.BARE):
        assert not {"torch", "transformers"} & {line.name for line in LISTS[name]}
    cuda = {line.name for line in LISTS["torch"]} - {"torch"}
    assert cuda and all(line.requirement.marker for line in LISTS["torch"] if line.name != "torch")
    for name in (*lock.WITH_LIBRARY, "torch-cpu"):
        assert not cuda & {line.name for line in LISTS[name]}, name


def test_lists_name_no_index_and_no_folder():
    for path in sorted((ROOT / "requirements").glob("*.txt")):
        text = path.read_text("utf-8")
        options = {line.split()[0] for line in text.splitlines() if line.startswith("-")}
        assert options <= {"--only-binary", "--no-binary"} and "://" not in text, path.name


@pytest.mark.parametrize(
    "line, why",
    [
        ("torch==2.13.0", "needs --hash=sha256:"),
        ("torch==2.13.0 --hash=sha256:12", "64 hexadecimal digits"),
        ("torch>=2.13.0 --hash=sha256:" + "0" * 64, "not one version"),
        ("torch==2.13.0,<3 --hash=sha256:" + "0" * 64, "not one version"),
        ("==2.13.0 --hash=sha256:" + "0" * 64, "not a requirement"),
    ],
)
def test_a_line_without_version_or_digest_is_named(tmp_path: Path, line: str, why: str):
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements/selfcheck.txt").write_text(f"# head\n--only-binary :all:\n{line}\n")
    with pytest.raises(SelfcheckError, match=rf"requirements/selfcheck.txt: .*{why}"):
        lists.environments(tmp_path)


def wheel(folder: Path, text: str) -> Path:
    path = folder / "qaxis_probe-1.0-py3-none-any.whl"
    about = "qaxis_probe-1.0.dist-info/"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("qaxis_probe.py", text)
        made.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: qaxis-probe\nVersion: 1.0\n")
        made.writestr(
            about + "WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        made.writestr(about + "RECORD", "".join(f"{name},,\n" for name in [*made.namelist(), about + "RECORD"]))
    return path


def pip(folder: Path, listed: str) -> subprocess.CompletedProcess[str]:
    (folder / "list.txt").write_text(listed)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--require-hashes", "--no-index"]
    command += ["--find-links", str(folder), "-r", str(folder / "list.txt")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    return subprocess.run(command, capture_output=True, text=True, env={**environment, "PIP_CONFIG_FILE": os.devnull})


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip here")
def test_another_file_than_the_locked_one_is_not_installed(tmp_path: Path):
    path = wheel(tmp_path, "x = 1")
    data = path.read_bytes()
    listed = f"qaxis-probe==1.0 --hash=sha256:{'0' * 64} --hash=sha256:{sha256(path)}\n"
    wheel(tmp_path, "x = 2")
    refused = pip(tmp_path, listed)
    assert refused.returncode and "DO NOT MATCH THE HASHES" in refused.stderr
    path.write_bytes(data)
    accepted = pip(tmp_path, listed)
    assert accepted.returncode == 0 and "Would install qaxis-probe-1.0" in accepted.stdout


class Session:
    """What a session of nox installs and runs."""

    def __init__(self, *posargs: str, indexes: str = "", fails: bool = False):
        self.posargs, self.indexes, self.fails = list(posargs), indexes, fails
        self.calls: list[tuple[str, ...]] = []

    def install(self, *words: str, **options: Any) -> None:
        import nox

        self.calls.append(words)
        if self.fails:
            raise nox.command.CommandFailed("pip failed")

    def run_install(self, *words: str, **options: Any) -> str:
        self.calls.append(words)
        return self.indexes

    run = run_install

    def error(self, *words: str) -> None:
        raise SelfcheckError(*words)

    def notes(self) -> list[str]:
        return [" ".join(call) for call in self.calls]


@lru_cache(maxsize=1)
def noxfile() -> Any:
    """The module; a session can be registered once only."""
    pytest.importorskip("nox")
    namespace: dict[str, Any] = {"__name__": "noxfile"}
    exec(compile((ROOT / "noxfile.py").read_text("utf-8"), "noxfile.py", "exec"), namespace)
    return SimpleNamespace(**namespace)


@pytest.mark.parametrize("indexes, build", [("2.14.1, 2.13.0+cpu, 2.13.0", "torch-cpu"), ("2.14.1, 2.13.0", "torch")])
def test_torch_is_the_cpu_build_where_an_index_has_one(indexes: str, build: str):
    session = Session(indexes=indexes)
    noxfile().project(session, "selfcheck")
    assert any(f"-r requirements/selfcheck.txt -r requirements/{build}.txt" in note for note in session.notes())


def test_every_install_is_by_hash_or_named_here():
    made = noxfile()
    sessions = {name: x for name, x in vars(made).items() if isinstance(x, type(made.lock)) and name != "peers"}
    installs = set()
    for function, words in itertools.product(sessions.values(), [(), ("--device", "cuda")]):
        # Two sessions are about a file.
        session = Session(*(("x.tar.gz",) if function.func.__name__ in ("verify_archive", "validate") else words))
        function.func(session)
        installs |= {note for note in session.notes() if note.startswith(("-", "python -m pip install"))}
    assert len(sessions) > 10 and len(installs) > 10
    by_version = {note for note in installs if "--require-hashes" not in note}
    assert by_version == {"-c constraints-gpu.txt -e .[selfcheck]", "--no-deps --no-build-isolation -e ."}


def test_gpu_evidence_has_its_own_versions_and_no_other_run_does():
    made = noxfile()
    for function, words, gpu in (
        (made.selfcheck, ("--device", "cuda"), True), (made.evidence, ("--device=cuda",), True),
        (made.selfcheck, (), False), (made.tests, ("-k", "cuda"), False),
    ):  # fmt: skip
        session = Session(*words)
        function.func(session)
        assert any("constraints-gpu.txt" in note for note in session.notes()) is gpu


def test_a_list_that_does_not_fit_a_machine_says_so():
    with pytest.raises(
        SelfcheckError, match=r"requirements/\{figures\}.txt.*no wheel for this machine.*CPython 3.10 to 3.13"
    ):
        noxfile().install(Session(fails=True), "figures")


def test_ci_and_readme_install_nox():
    assert "pip install -q --require-hashes -r requirements/nox.txt" in (ROOT / ".ci/run").read_text("utf-8")


# ---- making the lists


def test_cpu_builds_stay_where_their_index_is_out_of_reach(monkeypatch: pytest.MonkeyPatch):
    def unreachable(*_: object, **__: object) -> str:
        raise lock.NoSolutionError("no network")

    torch = (ROOT / "requirements/torch.txt").read_text("utf-8")
    monkeypatch.setattr(lock, "resolve", unreachable)
    assert lock.torch_cpu(torch) == (ROOT / "requirements/torch-cpu.txt").read_text("utf-8")
    with pytest.raises(lock.NoSolutionError, match="no network"):
        lock.torch_cpu(torch.replace("torch==2.13.0", "torch==2.13.1"))


def test_a_cpu_build_that_changed_on_its_index_stops(monkeypatch: pytest.MonkeyPatch):
    torch, before = ((ROOT / f"requirements/{name}.txt").read_text("utf-8") for name in BUILDS)
    digest = lock.hashes(before)[0]
    monkeypatch.setattr(lock, "resolve", lambda *_, **__: before.replace(digest, "f" * 64))
    with pytest.raises(lock.NoSolutionError, match=f"has no file any more with {digest}"):
        lock.torch_cpu(torch)


def test_lists_are_all_written_or_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fails_late(name: str, asked: list[str], *_: object, **__: object) -> str:
        if name == "tex":
            raise lock.NoSolutionError("requirements/tex.txt: no such version")
        return "torch==2.13.0 \\\n    --hash=sha256:" + "0" * 64 + "\n"

    monkeypatch.setattr(lock, "FOLDER", tmp_path)
    monkeypatch.setattr(lock, "resolve", fails_late)
    with pytest.raises(SystemExit, match=r"tex.txt: no such version\nNothing was written"):
        lock.main()
    assert list(tmp_path.iterdir()) == []


# ---- the bill of materials


def test_the_bill_of_materials_has_every_package_once():
    sbom = pytest.importorskip("archive.sbom")
    text = sbom.render()
    found = {(c["name"], c["version"]): c for c in json.loads(text)["components"]}
    wanted = {(canonicalize_name(line.name), line.version) for lines in LISTS.values() for line in lines}
    assert set(found) == wanted and len(json.loads(text)["components"]) == len(wanted)
    numpy = found["numpy", "2.4.6"]
    assert numpy["purl"] == "pkg:pypi/numpy@2.4.6"
    assert {h["content"] for h in numpy["hashes"]} == {
        digest for lines in LISTS.values() for line in lines if (line.name, line.version) == ("numpy", "2.4.6")
        for digest in line.hashes
    }  # fmt: skip
    uses = {p["value"] for p in numpy["properties"] if p["name"] == sbom.ENVIRONMENT}
    assert uses == {name for name, lines in LISTS.items() if "numpy" in {line.name for line in lines}}


def test_the_bill_of_materials_is_of_its_content(tmp_path: Path):
    sbom = pytest.importorskip("archive.sbom")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    first = sbom.render(tmp_path)
    assert first == sbom.render()
    path = tmp_path / "requirements/tex.txt"
    path.write_text(path.read_text("utf-8").replace(LISTS["tex"][0].hashes[0], "0" * 64), "utf-8")
    assert json.loads(sbom.render(tmp_path))["serialNumber"] != json.loads(first)["serialNumber"]
    shutil.rmtree(tmp_path / "requirements")
    with pytest.raises(SelfcheckError, match="no lists of requirements"):
        sbom.render(tmp_path)


# ---- what killed runs leave


def old(path: Path) -> Path:
    for x in (*path.rglob("*"), path):
        os.utime(x, (time.time() - 2 * leftovers.OLD,) * 2, follow_symlinks=False)
    return path


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree, output, temporary = (tmp_path / name for name in ("tree", "output", "temporary"))
    for folder in (tree / "selfcheck/evidence", output / "figures", temporary):
        folder.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(temporary))
    gone = [tree / "selfcheck/evidence/tmpabc.staging", output / "figures/tmp1.staging", temporary / "qaxis-home-1"]
    kept = [tree / "selfcheck/evidence/default.json", tree / "selfcheck/evidence/mine.staging", temporary / "other"]
    young = [tree / "selfcheck/evidence/tmpnew.staging", temporary / "qaxis-paper-1"]
    for path in (*gone[:2], *kept[:2], young[0]):
        path.write_text("x")
    for path in (gone[2], kept[2], young[1]):
        path.mkdir()
        (path / "file").write_text("x")
    (temporary / "qaxis-link").symlink_to(kept[2], target_is_directory=True)
    link = tree / "selfcheck/evidence/tmplink.staging"
    link.symlink_to(kept[0])
    for path in (*gone, *kept, young[1], link):
        old(path)
    (young[1] / "file").write_text("in use")
    assert sorted(leftovers.remove(tree, output)) == sorted(gone)
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in (*kept, *young, link, temporary / "qaxis-link", kept[2] / "file"))
    assert leftovers.remove(tree, output) == []


def test_leftovers_of_another_user_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "qaxis-home-1").mkdir()
    old(tmp_path / "qaxis-home-1")
    if hasattr(os, "getuid"):
        monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
        assert leftovers.remove(tmp_path) == [] and (tmp_path / "qaxis-home-1").exists()
