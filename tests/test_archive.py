"""The archive: metadata from one source, reproducible packs, what a changed byte or a hostile file is told."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import importlib.util
import io
import json
import marshal
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from archive import check, listing, metadata, pack, roots, signing, statement, tarball, tree, unpack, validate
from selfcheck.harness import seal
from selfcheck.harness.files import ROOT, SelfcheckError

COPIED = (
    "archive/metadata.toml", "archive/allowed_signers", "LICENSE-CODE.txt", "LICENSE-TEXT-DATA.txt", ".gitignore",
    ".gitattributes", ".ci/run", "selfcheck/evidence/default.json", "selfcheck/evidence/gpu.json",
    "selfcheck/checks.toml", "selfcheck/inputs/subjects.toml", "selfcheck/isolated.py",
)  # fmt: skip
#: programs in the place of the archive's own: what they do is said in the test
PROGRAM = """
import os, pathlib, sys
there = pathlib.Path(sys.argv[sys.argv.index("--output") + 1]) if "--output" in sys.argv else None
{does}
"""
REDRAWS = """
for name in {names}:
    made = there / name
    made.parent.mkdir(parents=True, exist_ok=True)
    made.write_bytes(pathlib.Path(name).read_bytes())
"""
MEASURES = """
assert "--quick" in sys.argv, sys.argv
made = there / "selfcheck/local/quick.json"
made.parent.mkdir(parents=True)
made.write_bytes(pathlib.Path("selfcheck/evidence/default.json").read_bytes())
"""
#: packs the file that is being checked, which the test leaves where temporary files are
PACKS = """
if "pack" in sys.argv:
    there.mkdir()
    (there / "a.tar.gz").write_bytes((pathlib.Path(os.environ["TMPDIR"]) / "a.tar.gz").read_bytes())
"""


def git(folder: Path, *words: str) -> str:
    # An identity and a date of its own, whatever the user's settings are.
    settings = ("user.name=a", "user.email=a@example.org", "commit.gpgsign=false", "core.autocrlf=false")
    options = [word for setting in settings for word in ("-c", setting)]
    return subprocess.run(
        ["git", *options, "-C", str(folder), *words], check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


def commit(folder: Path) -> None:
    git(folder, "add", "-A")
    git(folder, "update-index", "--chmod=+x", ".ci/run")
    git(folder, "commit", "-qm", "A commit, with an umlaut: ä")


def _sign(key: Path, root: Path) -> None:
    made = signing.signature(key, (root / tree.STATEMENT).read_bytes())
    (root / tree.SIGNATURE).write_bytes(made)


@pytest.fixture(scope="module", autouse=True)
def believed() -> Iterator[None]:
    """Roots and a date for the small tree, whose evidence nobody would believe; the real tree keeps its own."""
    said = {
        "content_root": "0" * 64, "chain_roots": {"selfcheck/evidence/gpu.json": "1" * 64},
        "newest": datetime.datetime(2026, 6, 1, tzinfo=datetime.timezone.utc),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in said.items():
            patch.setattr(roots, name, _elsewhere(getattr(roots, name), value))
        yield


def _elsewhere(real: Callable[..., Any], value: Any) -> Callable[..., Any]:
    return lambda root=ROOT, *rest, **named: real(root, *rest, **named) if root == ROOT else value


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tree with everything that an archive speaks of, committed. For reading."""
    pytest.importorskip("rocrate", reason="nox -s tests installs rocrate")
    pytest.importorskip("swh.model", reason="nox -s tests installs swh.model")
    if shutil.which("git") is None:
        pytest.skip("no git on the PATH")
    root = tmp_path_factory.mktemp("repository")
    for name in COPIED:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / ".ci/run").chmod(0o755)
    made = {
        "archive/manifest.json": "{}\n", "paper/paper.pdf": "%PDF\n", "figures/a.pdf": "a\n", "README.md": "read\n",
        "figures/__main__.py": PROGRAM.format(does=REDRAWS.format(names=["figures/a.pdf"])),
        "paper/__main__.py": PROGRAM.format(does=REDRAWS.format(names=["paper/paper.pdf"])),
        "archive/__main__.py": PROGRAM.format(does=PACKS),
        "selfcheck/__main__.py": PROGRAM.format(does=MEASURES),
        **{f"{package}/__init__.py": "# a package\n" for package in ("selfcheck", "figures", "paper", "archive")},
    }  # fmt: skip
    for name, text in made.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    metadata.write(root)
    seal.seal(root)
    git(root, "init", "-q")
    commit(root)
    return root


@pytest.fixture
def own(repository: Path, tmp_path: Path) -> Path:
    """A copy of the small repository, to be changed."""
    return Path(shutil.copytree(repository, tmp_path / "own"))


def packed(root: Path, sbom: bytes = b"{}\n") -> bytes:
    """An archive of a tree, made without asking whether its outputs are as they should be."""
    found = tree.read(root)
    return tarball.gzipped(
        tarball.tar(pack.contents(found, sbom, root), found.executable, "qaxis-0.1.0", 1_000_000_000)
    )


@pytest.fixture(scope="module")
def archived(repository: Path) -> bytes:
    return packed(repository)


@pytest.fixture
def unpacked(archived: bytes, tmp_path: Path) -> Path:
    return unpacked_from(archived, tmp_path)


def unpacked_from(data: bytes, folder: Path) -> Path:
    (folder / "a.tar.gz").write_bytes(data)
    return unpack.unpack(folder / "a.tar.gz", folder / "away/unpacked")


def members(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: member for member in tar}


# ---- Metadata ------------------------------------------------------------------------------------------------------


def test_committed_metadata_is_what_its_source_and_the_evidence_give() -> None:
    assert metadata.differences() == []
    project = tomlkit.parse((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert metadata.load()["version"] == project["version"]  # type: ignore[index]


@pytest.mark.parametrize("name", sorted(validate.SCHEMAS))
def test_json_metadata_are_valid_and_a_misspelt_name_is_not(name: str) -> None:
    pytest.importorskip("jsonschema")
    data = (ROOT / name).read_bytes()
    assert validate.against_schema(name, data) == []
    assert "versoin" in validate.against_schema(name, data.replace(b'"version"', b'"versoin"'))[0]


def test_a_doi_is_filled_in_everywhere_by_one_command(own: Path) -> None:
    assert metadata.doi(own) is None and b"doi:" not in (own / "CITATION.cff").read_bytes().split(b"references")[0]
    metadata.set_doi("10.5281/zenodo.123", own)
    assert metadata.doi(own) == "10.5281/zenodo.123"
    assert b"\ndoi: 10.5281/zenodo.123\n" in (own / "CITATION.cff").read_bytes()
    assert "https://doi.org/10.5281/zenodo.123" in json.loads((own / "codemeta.json").read_bytes())["identifier"]
    assert metadata.differences(own) == []
    commit(own)
    assert b"https://doi.org/10.5281/zenodo.123" in pack.contents(tree.read(own), b"", own)[tree.CRATE]


@pytest.mark.parametrize(
    "doi",
    ["", "x", "10.5281/zenodo.", "10.5281/zenodo.12x", "https://doi.org/10.5281/zenodo.1", "10.5281/zenodo.20514229",
     "10.5281/zenodo.1\n", "10.5281/zenodo.0", "10.1000/1"],
)  # fmt: skip
def test_what_is_no_doi_of_this_package_is_refused(own: Path, doi: str) -> None:
    before = (own / metadata.SOURCE).read_bytes()
    with pytest.raises(SelfcheckError, match="DOI"):
        metadata.set_doi(doi, own)
    assert (own / metadata.SOURCE).read_bytes() == before


@pytest.mark.parametrize(
    ("text", "by", "said"),
    [('orcid = "0009-0004-3712-6798"', 'orcid = "0009-0004-3712-6799"', "check digit"), ("title", "titel", "title"),
     ('doi = ""', 'doi = "soon"', "allowed is"), ('repository = ""', 'repository = "file:///a"', "https"),
     ("[[author]]", "[[author", "unreadable"),
     ('version = "0.1.0"', 'version = "1/../../0"', "version = .*digits and dots"),
     ('version = "0.1.0"', "version = 0.1", "version = .*digits"), ('doi = ""', "doi = 1", "doi = '1': allowed is"),
     ('doi = ""', 'doi = false', "doi = 'False'"), ('orcid = "0009-0004-3712-6798"', "orcid = 9", "author.orcid = '9'"),
     ('orcid = "0009', 'orkid = "0009', "author.orkid = .*no such key"), ('given = "E."', "", "author.given missing"),
     ('family = "Vyaltsev"', 'family = ["Vyaltsev"]', "author.family = .*one line"),
     ("month = 6", "month = 13", "month = '13'"),
     ("month = 6", "month = true", "month = 'True'"), ("year = 2026", 'year = "2026"', "preprint.year = '2026'"),
     ("[preprint]", "[[preprint]]", "preprint = .*a table of"),
     ("[companion]", "[companions]", "companions = .*no such key"),
     ('id = "MIT"', 'id = "ISC"', "MIT missing"),
     ('file = "LICENSE-CODE.txt"', 'file = "../a"', "licence.file = '../a'"),
     ('covers = "code"', 'covers = ""', "licence.covers"),
     ("keywords = [", "keywords = [1, ", "keywords = .*list of texts"),
     ("keywords = [", "keywords = []\nother = [", "other = .*no such key"), ("E.", "E.\\n", "author.given")],
)  # fmt: skip
def test_metadata_that_cannot_be_right_are_refused(own: Path, text: str, by: str, said: str) -> None:
    source = own / metadata.SOURCE
    source.write_text(source.read_text("utf-8").replace(text, by, 1), "utf-8")
    with pytest.raises(SelfcheckError, match=said):
        metadata.load(own)


def test_a_doi_that_cannot_be_written_everywhere_is_written_nowhere(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def refuse(*args: Any) -> bytes:
        raise SelfcheckError("no evidence")

    before = {p.name: p.read_bytes() for p in (own / "CITATION.cff", own / metadata.SOURCE)}
    monkeypatch.setattr("archive.citation.zenodo", refuse)
    with pytest.raises(SelfcheckError, match="no evidence"):
        metadata.set_doi("10.5281/zenodo.123", own)
    assert {p.name: p.read_bytes() for p in (own / "CITATION.cff", own / metadata.SOURCE)} == before


def test_a_licence_without_its_text_is_not_packed(own: Path) -> None:
    source = own / metadata.SOURCE
    source.write_text(source.read_text("utf-8").replace("LICENSE-CODE.txt", "LICENCE.txt"), "utf-8")
    commit(own)
    with pytest.raises(SelfcheckError, match="LICENCE.txt"):
        pack.contents(tree.read(own), b"", own)


# ---- Packing -------------------------------------------------------------------------------------------------------


def test_two_packs_are_one_and_so_is_that_of_the_unpacked_archive(own: Path, archived: bytes, tmp_path: Path) -> None:
    for path in own.rglob("*"):  # Another clone: other times, other modes.
        if path.is_file() and ".git" not in path.parts:
            path.chmod(0o600 if path.name != "run" else 0o700)
    assert packed(own) == archived
    there = unpacked_from(archived, tmp_path)
    assert not (there / ".git").exists()
    assert packed(there) == archived


def test_an_archive_is_sorted_of_nobody_and_of_one_time(archived: bytes) -> None:
    found = members(archived)
    assert list(found) == sorted(found)
    assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in found.values()} == {(0, 0, "", "", 1_000_000_000)}
    assert {name for name, m in found.items() if m.mode != 0o644} == {"qaxis-0.1.0/.ci/run"}
    assert archived[4:9] == b"\0" * 5  # no time, no flags


@pytest.mark.parametrize("size", [0, 1, 0xFFFF, 0x10000, 3 * 0xFFFF])
def test_a_stored_gzip_is_read_by_everyone(size: int) -> None:
    assert gzip.decompress(tarball.gzipped(b"a" * size)) == b"a" * size


def test_the_swhid_is_gits_own_tree(repository: Path) -> None:
    assert tree.read(repository).swhid == "swh:1:dir:" + git(repository, "rev-parse", "HEAD^{tree}").strip()
    assert tree.read(repository).revision == git(repository, "rev-parse", "HEAD").strip()


def test_sha256sum_reads_the_list(unpacked: Path) -> None:
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on the PATH")
    subprocess.run(["sha256sum", "--strict", "-c", listing.MANIFEST], cwd=unpacked, check=True, capture_output=True)


def test_a_changed_tree_is_not_packed(own: Path) -> None:
    (own / "README.md").write_text("other\n")
    with pytest.raises(SelfcheckError, match="README.md"):
        tree.read(own)
    git(own, "update-index", "--assume-unchanged", "README.md")
    with pytest.raises(SelfcheckError, match="not as it was committed"):
        tree.read(own)


@pytest.mark.parametrize("name", ["statement.json", "link"])
def test_what_an_archive_cannot_hold_is_refused(own: Path, name: str) -> None:
    if name == "link":
        (own / name).symlink_to("README.md")
    else:
        (own / name).write_text("{}")
    git(own, "add", "-f", name)
    git(own, "commit", "-qm", "b")
    with pytest.raises(SelfcheckError, match=name):
        tree.read(own)


@pytest.mark.parametrize(
    "name", ["selfcheck/__pycache__/a.cpython-311.pyc", "a.PYO", "__pycache__/a", "src/aux.py", "CON", "a\u2028b",
             "a\x85b"],
)  # fmt: skip
def test_a_name_that_is_not_unpacked_is_not_packed(own: Path, name: str) -> None:
    blob = git(own, "rev-parse", "HEAD:README.md").strip()
    git(own, "update-index", "--add", "--cacheinfo", f"100644,{blob},{name}")
    git(own, "commit", "-qm", "b")
    git(own, "update-index", "--skip-worktree", name)
    with pytest.raises(SelfcheckError, match="nothing for an archive"):
        tree.read(own)


def test_a_tracked_file_that_is_not_there_is_named(own: Path) -> None:
    git(own, "update-index", "--skip-worktree", "README.md")  # as a sparse checkout does
    (own / "README.md").unlink()
    with pytest.raises(SelfcheckError, match="README.md .*sparse-checkout"):
        tree.read(own)


def test_a_name_that_is_no_text_is_named(own: Path) -> None:
    blob = git(own, "rev-parse", "HEAD:README.md").strip().encode()
    entry = b"100644 " + blob + b"\t\xe9.txt\0"
    subprocess.run(["git", "-C", str(own), "update-index", "-z", "--index-info"], input=entry, check=True)
    with pytest.raises(SelfcheckError, match=r"\\xe9.txt.*UTF-8"):
        tree.read(own)


def test_a_commit_in_another_encoding_keeps_its_name(own: Path, tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.write_bytes(b"\xe4 and \x80\n")
    git(own, "-c", "i18n.commitEncoding=latin-1", "commit", "-q", "--allow-empty", "-F", str(message))
    there = unpacked_from(packed(own), tmp_path)
    assert statement.read(there)["predicate"]["source"]["encoding"] == "latin-1" and statement.wrong(there) == []
    assert tree.read(there).revision == git(own, "rev-parse", "HEAD").strip()
    assert packed(there) == packed(own)


# ---- A byte changed in each kind of member -------------------------------------------------------------------------


def intact(root: Path) -> list[check.Step]:
    return check.integrity(root, ROOT / signing.ALLOWED)


def test_an_intact_archive_is_found_intact_and_unsigned(unpacked: Path) -> None:
    steps = {step.name: step for step in intact(unpacked)}
    assert all(step.ok for step in steps.values()), steps
    assert steps["signature"].said == signing.UNSIGNED


def test_every_changed_byte_is_named(unpacked: Path) -> None:
    every = sorted(p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file())
    assert {tree.SBOM, tree.CRATE, tree.STATEMENT, listing.MANIFEST, "paper/paper.pdf", ".ci/run"} <= set(every)
    for name in every:
        before = (unpacked / name).read_bytes()
        middle = len(before) // 2
        (unpacked / name).write_bytes(before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :])
        wrong = [step.said for step in intact(unpacked) if not step.ok]
        (unpacked / name).write_bytes(before)
        assert any(name in line for line in wrong), name


def test_every_missing_or_added_file_is_named(unpacked: Path) -> None:
    (unpacked / "sitecustomize.py").write_text("")
    (unpacked / "figures/a.pdf").unlink()
    wrong = "\n".join(step.said for step in intact(unpacked) if not step.ok)
    assert "sitecustomize.py: not in" in wrong and "figures/a.pdf: missing" in wrong


def relisted(root: Path, name: str, data: bytes) -> None:
    """What someone does who changes a file, and the list and the statement with it."""
    (root / name).write_bytes(data)
    listed = {**listing.read(root), name: hashlib.sha256(data).hexdigest()}
    (root / listing.MANIFEST).write_text("".join(f"{listed[n]}  {n}\n" for n in sorted(listed)), "utf-8")
    said = statement.read(root)
    for subject in said["subject"]:
        if "sha256" in subject["digest"]:
            subject["digest"]["sha256"] = hashlib.sha256((root / subject["name"]).read_bytes()).hexdigest()
    (root / tree.STATEMENT).write_text(json.dumps(said), "utf-8")


def test_a_file_changed_with_list_and_statement_is_not_of_the_commit(unpacked: Path) -> None:
    relisted(unpacked, "README.md", b"faster\n")
    wrong = "\n".join(step.said for step in intact(unpacked) if not step.ok)
    assert "not as it was committed" in wrong


def test_another_commit_is_not_the_one_of_the_statement(unpacked: Path) -> None:
    said = statement.read(unpacked)
    said["predicate"]["source"]["commit"] += "and more\n"
    (unpacked / tree.STATEMENT).write_text(json.dumps(said), "utf-8")
    assert any("commit object" in line for line in statement.wrong(unpacked))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["predicate"].update(contentRoot="f" * 64), "contentRoot is 'fff"),
        (lambda s: s["predicate"].update(evidenceRoots={}), "evidenceRoots is '{}'"),
        (lambda s: s["predicate"].update(version="9"), "version is '9', but its files give '0.1.0'"),
        (lambda s: s["predicate"].pop("newestEvidence"), "newestEvidence is 'None'"),
        (lambda s: s["subject"].insert(0, {"name": "paper/paper.pdf", "digest": {"sha256": "0"}}), "paper.pdf 2 times"),
        (lambda s: s["subject"].append({"name": "x" * 5000, "digest": {"sha256": "0"}}), "xxx: not the file"),
        (lambda s: s["subject"].append({"name": "a\0b", "digest": {"sha256": "0"}}), "not the file"),
        (lambda s: s["subject"][0].update(digest={}), "says nothing of"),
        (lambda s: s["predicate"]["source"].update(commit="\ud800"), "unreadable"),
        (lambda s: s["predicate"]["source"].update(executable=["\udfff"]), "unreadable"),
        (lambda s: s["predicate"]["source"].update(commit="\u2028", encoding="latin-1"), "commit: not latin-1"),
        (lambda s: s["predicate"]["source"].update(encoding="rot13"), "not a statement"),
    ],
)
def test_a_statement_of_something_else_is_wrong_before_any_code_runs(
    unpacked: Path, change: Callable[[Any], Any], said: str
) -> None:
    stated = json.loads((unpacked / tree.STATEMENT).read_bytes())
    change(stated)
    (unpacked / tree.STATEMENT).write_text(json.dumps(stated), "utf-8")
    step = next(step for step in intact(unpacked) if step.name == tree.STATEMENT)
    assert not step.ok and said in step.said


@pytest.mark.parametrize("error", [OSError("long"), ValueError("odd"), RecursionError("deep"), KeyError("a")], ids=repr)
def test_whatever_a_step_raises_it_is_wrong_in_words(
    unpacked: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(root: Path) -> None:
        raise error

    monkeypatch.setattr(seal, "verify", broken)
    step = next(step for step in intact(unpacked) if step.name == "seal")
    assert not step.ok and type(error).__name__ in step.said


@pytest.mark.parametrize(
    "name", [seal.LOCK, "selfcheck/checks.toml", metadata.SOURCE, listing.MANIFEST, tree.STATEMENT]
)
@pytest.mark.parametrize("data", [b"", b"files = 5\n", b"\xff", b"a = " + b"[" * 50_000, b'[["a"]]\n'])
def test_whatever_a_file_holds_its_step_is_wrong_in_words(unpacked: Path, name: str, data: bytes) -> None:
    (unpacked / name).write_bytes(data)
    assert not all(step.ok for step in intact(unpacked))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "[" * 100_000, '{"_type": 1, "predicateType": 2, "predicate": 3}', "\0"]
)
def test_what_is_no_statement_is_said_to_be_none(unpacked: Path, text: str) -> None:
    (unpacked / tree.STATEMENT).write_text(text)
    with pytest.raises(SelfcheckError, match="statement.json"):
        statement.read(unpacked)


@pytest.mark.parametrize(
    "line",
    [
        "x  a",
        "0" * 64 + "  ../a",
        "0" * 64 + "  /a",
        "0" * 64 + " a",
        "0" * 64 + "  a/./b",
        "0" * 64 + "  a\u2028b",
        "0" * 64 + "  a\x85b",
        "0" * 64 + "  a\r",
        "0" * 64 + "  " + "a" * 5000,
    ],
)
def test_what_is_no_list_is_said_to_be_none(unpacked: Path, line: str) -> None:
    (unpacked / listing.MANIFEST).write_text(line)
    with pytest.raises(SelfcheckError, match="line 1"):
        listing.read(unpacked)


# ---- Hostile archives ----------------------------------------------------------------------------------------------


def hostile(folder: Path, *made: tarfile.TarInfo | str, size: int = 1) -> Path:
    """An archive of these members, plain files where only a name is given."""
    path = folder / "hostile.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member in made:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.type == tarfile.REGTYPE:
                info.size = size
            tar.addfile(info, io.BytesIO(b"a" * info.size))
    return path


def of_type(kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo("a/b")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "made",
    [
        ["../b"], ["a/../../b"], ["/etc/b"], ["a//b"], ["a/./b"], ["b"], ["a/b", "c/d"], ["a/b", "a/b"], ["a/b", "a/B"],
        ["a/\u00e4", "a/a\u0308"], ["a/b", "a/b/c"], ["a/b/c", "a/b"], ["a/c:b"], ["a\\b"], ["a/b\n"], ["a/b."],
        ["a/.git/config"], ["a/.GIT/config"], ["a/" + "b" * 300], ["a/aux.py"], ["a/CON"], ["a/nul.txt"], ["a/com1/b"],
        ["a/__pycache__/b"], ["a/b.pyc"], ["a/B.PYO"], ["a/b\u2028c"], ["a/b\x85"], [of_type(tarfile.SYMTYPE, "/etc")],
        [of_type(tarfile.LNKTYPE, "a/c")], [of_type(tarfile.CHRTYPE)], [of_type(tarfile.BLKTYPE)],
        [of_type(tarfile.FIFOTYPE)], [of_type(tarfile.DIRTYPE)], [of_type(tarfile.CONTTYPE)], [],
    ],
    # The same in every process: a member's own text has its address.
    ids=lambda made: ", ".join(x if isinstance(x, str) else f"type {x.type!r}" for x in made),
)  # fmt: skip
def test_a_hostile_member_is_refused_before_anything_is_written(tmp_path: Path, made: list[tarfile.TarInfo]) -> None:
    with pytest.raises(SelfcheckError):
        unpack.unpack(hostile(tmp_path, *made), tmp_path / "away")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hostile.tar.gz"]


def test_a_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "UNPACKED", 3 << 20)
    with pytest.raises(SelfcheckError, match="when unpacked"):
        unpack.unpack(hostile(tmp_path, "a/b", size=4 << 20), tmp_path / "away")
    monkeypatch.setattr(unpack, "MEMBERS", 3)
    with pytest.raises(SelfcheckError, match="3 files"):
        unpack.unpack(hostile(tmp_path, *(f"a/{i}" for i in range(5))), tmp_path / "away")
    monkeypatch.setattr(unpack, "PACKED", 10)
    with pytest.raises(SelfcheckError, match="allowed are 10"):
        unpack.unpack(hostile(tmp_path, "a/b"), tmp_path / "away")


def _block(name: str, kind: bytes, data: bytes = b"") -> bytes:
    """A member, its data filled up to whole blocks."""
    member = tarfile.TarInfo(name)
    member.size, member.type = len(data), kind
    return member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


def _said(**said: str) -> bytes:
    """An extended header of these keywords, whose lengths count themselves."""
    records = b""
    for key, value in said.items():
        rest = f" {key.replace('__', '.')}={value}\n".encode()
        length = next(n for n in range(len(rest), len(rest) + 9) if len(str(n)) + len(rest) == n)
        records += str(length).encode() + rest
    return _block("x", b"x", records)


FILE = _block("a/b", b"0")
HEADERS = {
    "a map that is none": _said(GNU__sparse__map="abc", GNU__sparse__size="1") + FILE,
    "a map in the data": _said(GNU__sparse__major="1", GNU__sparse__minor="0") + _block("a/b", b"0", b"abc\nxyz\n"),
    "a size that is none": _said(GNU__sparse__map="1,2", GNU__sparse__size="z") + FILE,
    "many extended headers": _said(a="b") * 3000 + FILE,
    "many long names": _block("././@LongLink", b"L", b"a/b\0") * 3000 + FILE,
    "a size beyond all": _said(size=str(2**70)) + FILE,
    "a size below none": _said(size="-1024") + FILE,
    "a header's size beyond all": FILE[:124] + b"\x80" + (2**70).to_bytes(11, "big") + FILE[136:],
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_made_to_break_a_reader_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(HEADERS[name] + bytes(1024)))
    with pytest.raises(SelfcheckError, match="a.tar.gz: "):
        unpack.unpack(tmp_path / "a.tar.gz", tmp_path / "away")
    assert not (tmp_path / "away").exists()


@pytest.mark.parametrize("error", [RecursionError("deep"), MemoryError(), OverflowError("wide"), ValueError("odd")])
def test_whatever_a_reader_raises_is_a_sentence(
    archived: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(tarfile, "open", broken)
    with pytest.raises(SelfcheckError, match=f"not an archive .*{type(error).__name__}"):
        unpacked_from(archived, tmp_path)


def test_a_place_that_is_no_folder_is_named(archived: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a.tar.gz").write_bytes(archived)
    for folder, said in ((tmp_path / "file", "file: not a folder"), (tmp_path / "file/below", "cannot write")):
        with pytest.raises(SelfcheckError, match=said):
            unpack.unpack(tmp_path / "a.tar.gz", folder)


@pytest.mark.parametrize("cut", [0, 5, 40, 100, 5000, -1])
def test_an_archive_cut_short_is_said_to_be_none(archived: bytes, tmp_path: Path, cut: int) -> None:
    with pytest.raises(SelfcheckError, match="not an archive"):
        unpacked_from(archived[:cut], tmp_path)


def test_only_an_empty_folder_is_unpacked_into(archived: bytes, tmp_path: Path) -> None:
    unpacked_from(archived, tmp_path)
    with pytest.raises(SelfcheckError, match="not empty"):
        unpacked_from(archived, tmp_path)


# ---- Signatures ----------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Two keys made here, and the list that allows the first."""
    if shutil.which("ssh-keygen") is None:
        pytest.skip("no ssh-keygen on the PATH, which makes, signs and verifies (OpenSSH)")
    for name in ("good", "other"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(tmp_path / name)], check=True
        )  # fmt: skip
    public = (tmp_path / "good.pub").read_text()
    (tmp_path / "allowed").write_text(f'a@example.org namespaces="{signing.NAMESPACE}" {public}')
    return {name: tmp_path / name for name in ("good", "other", "allowed")}


def test_a_signature_is_made_kept_and_verified(own: Path, keys: dict[str, Path], tmp_path: Path) -> None:
    (own / tree.STATEMENT).write_bytes(pack.contents(tree.read(own), b"{}\n", own)[tree.STATEMENT])
    _sign(keys["good"], own)
    data = packed(own)
    there = unpacked_from(data, tmp_path)
    assert signing.verify(there, keys["allowed"]).startswith("signed by a@example.org")
    assert packed(there) == data
    assert all(step.ok for step in check.integrity(there, keys["allowed"]))


def test_a_signature_of_another_key_or_purpose_counts_for_nothing(unpacked: Path, keys: dict[str, Path]) -> None:
    _sign(keys["other"], unpacked)
    with pytest.raises(SelfcheckError, match="its key is not in"):
        signing.verify(unpacked, keys["allowed"])
    with pytest.raises(SelfcheckError, match="its key is not in"):
        signing.verify(unpacked, ROOT / signing.ALLOWED)
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", str(keys["good"]), "-n", "other", tree.STATEMENT],
        cwd=unpacked, input="y\n", text=True, check=True, capture_output=True,
    )  # fmt: skip
    with pytest.raises(SelfcheckError, match="not a good signature|its key is not in"):
        signing.verify(unpacked, keys["allowed"])


def test_a_signature_over_what_was_changed_since_is_an_error(unpacked: Path, keys: dict[str, Path]) -> None:
    _sign(keys["good"], unpacked)
    relisted(unpacked, "paper/paper.pdf", b"%PDF, We also prove P=NP")
    with pytest.raises(SelfcheckError, match="not a good signature"):
        signing.verify(unpacked, keys["allowed"])
    (unpacked / tree.SIGNATURE).write_text("no signature")
    with pytest.raises(SelfcheckError, match="its key is not in"):
        signing.verify(unpacked, keys["allowed"])


def test_a_file_changed_under_a_good_signature_is_named(unpacked: Path, keys: dict[str, Path]) -> None:
    _sign(keys["good"], unpacked)
    (unpacked / "paper/paper.pdf").write_bytes(b"%PDF, We also prove P=NP")
    steps = {step.name: step for step in check.integrity(unpacked, keys["allowed"])}
    assert steps["signature"].ok
    assert "paper/paper.pdf" in steps[listing.MANIFEST].said and "paper/paper.pdf" in steps[tree.STATEMENT].said


def test_an_old_signature_is_not_packed(own: Path, keys: dict[str, Path]) -> None:
    (own / tree.STATEMENT).write_bytes(b"{}")
    _sign(keys["good"], own)
    with pytest.raises(SelfcheckError, match="another state of the tree"):
        packed(own)


def test_what_is_no_key_is_refused(unpacked: Path, keys: dict[str, Path]) -> None:
    for key in (unpacked / "nothing", unpacked / "README.md"):
        with pytest.raises(SelfcheckError, match="--sign"):
            _sign(key, unpacked)
    assert not (unpacked / tree.SIGNATURE).exists()


# ---- An archive checks itself --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def checked(data: bytes, folder: Path, selfcheck: bool = True) -> dict[str, check.Step]:
    (folder / "a.tar.gz").write_bytes(data)
    asked = check.Asked(ROOT / signing.ALLOWED, selfcheck)
    return {step.name: step for step in check.check(folder / "a.tar.gz", asked)}


def test_an_archive_redraws_packs_and_measures_itself(archived: bytes, tmp_path: Path) -> None:
    steps = checked(archived, tmp_path)
    assert all(step.ok for step in steps.values()), steps
    assert steps["figures"].said == "redrawn byte for byte: 1 files" and steps["paper"].ok
    assert "self-check, quick" in steps and "self-check, quick" not in checked(archived, tmp_path, selfcheck=False)


@pytest.mark.parametrize(
    ("name", "does", "step"),
    [("figures", "(there / 'figures').mkdir(parents=True); (there / 'figures/a.pdf').write_text('b')", "figures"),
     ("figures", "", "figures"), ("paper", "sys.exit('pdflatex stopped')", "paper"),
     ("archive", "sys.exit('stale')", "archive verify"),
     ("selfcheck", "sys.exit('failed: thm1')", "self-check, quick")],
)  # fmt: skip
def test_what_an_archive_cannot_make_again_is_wrong(own: Path, tmp_path: Path, name: str, does: str, step: str) -> None:
    (own / name / "__main__.py").write_text(PROGRAM.format(does=does or "pass"))
    seal.seal(own)
    commit(own)
    found = checked(packed(own), tmp_path)[step]
    assert not found.ok and (not does.startswith("sys") or does.split("'")[1] in found.said), found


def test_no_code_of_a_changed_archive_is_run(unpacked: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (unpacked / "figures/__main__.py").write_text(f"open({str(marker)!r}, 'w')")
    files = {p.relative_to(unpacked).as_posix(): p.read_bytes() for p in unpacked.rglob("*") if p.is_file()}
    steps = checked(tarball.gzipped(tarball.tar(files, frozenset(), "qaxis-0.1.0", 0)), tmp_path)
    assert not steps["the archive's code"].ok and not marker.exists()


def test_byte_code_beside_the_archives_programs_is_not_run(
    archived: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it unpacked: as byte code that says it need not be compared with its source."""
    marker, real = tmp_path / "ran", check.unpack

    def planting(file: Path, folder: Path) -> Path:
        root = real(file, folder)
        for name in ("figures/__init__", "figures/__main__", "selfcheck/__init__"):
            code = compile(f"open({str(marker)!r}, 'w')", name, "exec")
            data = importlib.util.MAGIC_NUMBER + b"\1\0\0\0" + bytes(8) + marshal.dumps(code)
            planted = Path(importlib.util.cache_from_source(str(root / f"{name}.py")))
            planted.parent.mkdir(exist_ok=True)
            planted.write_bytes(data)
        return root

    monkeypatch.setattr(check, "unpack", planting)
    monkeypatch.setattr(check, "integrity", lambda *args: [])
    steps = checked(archived, tmp_path)
    assert steps["figures"].ok and not marker.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [(["doi", "10.5281/zenodo.x"], "allowed is"), (["check", "nowhere.tar.gz"], "no such file"),
     (["validate", "nowhere"], "no such file"), (["validate", "src"], "not an unpacked archive"),
     (["check", "src"], "not a file"), (["unpack", "README.md", "README.md"], "not a folder")],
)  # fmt: skip
def test_a_command_says_in_a_sentence_what_is_wrong(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "archive", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("archive: ") and "Traceback" not in done.stderr
    assert said in done.stderr
