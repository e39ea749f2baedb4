"""The archive: metadata from one source, reproducible packs, what a changed byte or a hostile file is told."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import io
import json
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
        **{f"{package}/__init__.py": "" for package in ("selfcheck", "figures", "paper", "archive")},
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
     ("[[author]]", "[[author", "unreadable")],
)  # fmt: skip
def test_metadata_that_cannot_be_right_are_refused(own: Path, text: str, by: str, said: str) -> None:
    source = own / metadata.SOURCE
    source.write_text(source.read_text("utf-8").replace(text, by, 1), "utf-8")
    with pytest.raises(SelfcheckError, match=said):
        metadata.load(own)


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
    "text", ["", "[]", "{}", "[" * 100_000, '{"_type": 1, "predicateType": 2, "predicate": 3}', "\0"]
)
def test_what_is_no_statement_is_said_to_be_none(unpacked: Path, text: str) -> None:
    (unpacked / tree.STATEMENT).write_text(text)
    with pytest.raises(SelfcheckError, match="statement.json"):
        statement.read(unpacked)


@pytest.mark.parametrize(
    "line", ["x  a", "0" * 64 + "  ../a", "0" * 64 + "  /a", "0" * 64 + " a", "0" * 64 + "  a/./b"]
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
        ["a/.git/config"], ["a/.GIT/config"], ["a/" + "b" * 300], [of_type(tarfile.SYMTYPE, "/etc")],
        [of_type(tarfile.LNKTYPE, "a/c")], [of_type(tarfile.CHRTYPE)], [of_type(tarfile.BLKTYPE)],
        [of_type(tarfile.FIFOTYPE)], [of_type(tarfile.DIRTYPE)], [of_type(tarfile.CONTTYPE)], [],
    ],
    ids=repr,
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


@pytest.mark.parametrize("words", [["doi", "10.5281/zenodo.x"], ["check", "nowhere.tar.gz"], ["validate", "nowhere"]])
def test_a_command_says_in_a_sentence_what_is_wrong(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "archive", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("archive: ") and "Traceback" not in done.stderr
