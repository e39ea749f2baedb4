"""The archive: a byte of each kind of member, members that lead elsewhere, the statement, the signature."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

from . import acts
from .bench import NO_EFFECT, Edit

ARCHIVE = "archive"
TOP = "qaxis-0.1.0"
Files = dict[str, bytes]
_ONCE = threading.Lock()


def available() -> bool:
    return shutil.which("git") is not None and all(importlib.util.find_spec(x) for x in ("rocrate", "swh", "archive"))


def git(folder: Path, *words: str) -> None:
    settings = ("user.name=a", "user.email=a@example.org", "commit.gpgsign=false", "core.autocrlf=false",
                "core.safecrlf=false")  # fmt: skip
    options = [word for setting in settings for word in ("-c", setting)]
    subprocess.run(["git", *options, "-C", str(folder), *words], check=True, capture_output=True)


def commit(tree: Path) -> None:
    git(tree, "init", "-q")
    git(tree, "add", "-A", "-f")
    git(tree, "commit", "-q", "-m", "all")


def members(tree: Path) -> Files:
    """Every file of an archive of a committed tree."""
    from archive import pack
    from archive import tree as trees

    return pack.contents(trees.read(tree), b"{}\n", tree)


@functools.lru_cache(maxsize=2)
def _members(base: Path) -> Files:
    tree = base.parent / "archived"
    if not tree.exists():
        shutil.copytree(base, tree)
        commit(tree)
    return members(tree)


def of_base(tree: Path) -> Files:
    with _ONCE:
        return dict(_members(tree.parent / "base"))


def packed(files: Files) -> bytes:
    from archive import tarball

    return tarball.gzipped(tarball.tar(files, frozenset(), TOP, 1_800_000_000))


def checked(change: Callable[[Files], Files | bytes]) -> Callable[[Path], tuple[int, str]]:
    def run(tree: Path) -> tuple[int, str]:
        """unpacking it, and `archive check` before any of its code runs"""
        from archive import check, signing
        from archive.unpack import unpack
        from selfcheck.harness.files import SelfcheckError

        folder = acts.beside(tree)
        made = change(of_base(tree))
        (folder / "a.tar.gz").write_bytes(made if isinstance(made, bytes) else packed(made))
        allowed = folder / "allowed_signers"
        allowed = allowed if allowed.exists() else tree / signing.ALLOWED
        try:
            steps = check.integrity(unpack(folder / "a.tar.gz", folder / "unpacked"), allowed)
        except SelfcheckError as error:
            return 1, str(error)
        return int(not all(step.ok for step in steps)), "\n".join(f"{s.name}: {s.said}" for s in steps if not s.ok)

    return run


def row(name: str, change: Callable[[Files], Files | bytes], said: str, why: str = "") -> Edit:
    return Edit(ARCHIVE, name, acts.nothing, checked(change), said, why)


def flipped(name: str) -> Callable[[Files], Files]:
    return lambda files: {**files, name: files[name][:-2] + bytes([files[name][-2] ^ 1]) + files[name][-1:]}


def listed(files: Files) -> Files:
    """The list of digests made anew, as by somebody who only knows of the list."""
    from archive import listing

    apart = (listing.MANIFEST, "statement.json", "statement.json.sig")
    return {**files, listing.MANIFEST: listing.render({n: x for n, x in files.items() if n not in apart})}


def stated(files: Files) -> Files:
    """List and statement made anew; the commit stays."""
    files = listed(files)
    said = json.loads(files["statement.json"])
    for subject in said["subject"]:
        if "sha256" in subject["digest"] and subject["name"] in files:
            subject["digest"]["sha256"] = hashlib.sha256(files[subject["name"]]).hexdigest()
    return {**files, "statement.json": json.dumps(said, indent=1, sort_keys=True).encode()}


def tarred(*entries: tuple[str, dict[str, object]]) -> Callable[[Files], bytes]:
    """An archive with members of any kind before the others."""

    def change(files: Files) -> bytes:
        import gzip

        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for name, fields in entries:
                member = tarfile.TarInfo(name)
                for field, value in fields.items():
                    setattr(member, field, value)
                tar.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
            for name, data in files.items():
                member = tarfile.TarInfo(f"{TOP}/{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return gzip.compress(stream.getvalue())

    return change


def _members_changed() -> list[Edit]:
    names = ("README.md", "src/qaxis/budget.py", "src/qaxis/prefill/select.cu", "selfcheck/evidence/gpu.json",
             "selfcheck/evidence/default.json", "paper/paper.pdf", "paper/paper.tex", "figures/entropy.png",
             "selfcheck/checks.lock", "LICENSE-CODE.txt", "CITATION.cff", "archive/allowed_signers", "sbom.cdx.json",
             "ro-crate-metadata.json", "requirements/selfcheck.txt", "paper/proofs/QueryAxis.v")  # fmt: skip
    rows = [row(f"a byte of {n}", flipped(n), rf"{re.escape(n)}: listed as") for n in names]
    readme = flipped("README.md")
    return [
        *rows,
        row("a byte of the list", flipped("MANIFEST.sha256"), "MANIFEST.sha256"),
        row("a byte of the statement", flipped("statement.json"), "statement.json: unreadable"),
        row("a member removed", lambda f: {n: x for n, x in f.items() if n != "README.md"}, "README.md: missing"),
        row("a member added", lambda f: {**f, "more.py": b"x"}, "more.py: not in MANIFEST"),
        row("a member renamed", lambda f: {n.replace("README", "README2"): x for n, x in f.items()}, "README.md: missing"),
        row("no list", lambda f: {n: x for n, x in f.items() if n != "MANIFEST.sha256"}, "MANIFEST.sha256"),
        row("no statement", lambda f: {n: x for n, x in f.items() if n != "statement.json"}, "statement.json"),
        row("a file and the list", lambda f: listed(readme(f)), "not the file that statement.json names"),
        row("a file, list and statement", lambda f: stated(readme(f)), "source tree: .*but commit"),
        row("the statement of another commit", _other_commit, "commit"),
        row("the statement of other evidence", _predicate("contentRoot", "0" * 64), "contentRoot is"),
        row("the statement of other chains", _predicate("evidenceRoots", {}), "evidenceRoots is"),
        row("the statement of another version", _predicate("version", "9.9"), "version is"),
        row("the statement of another date", _predicate("newestEvidence", "2020"), "newestEvidence is"),
        row("a subject of the statement twice", _subject("paper/paper.pdf"), "paper.pdf 2 times"),
        row("a subject with a name beyond bounds", _subject("x" * 5000), "not the file that statement.json names"),
        row("half a character in the statement", _half, "statement.json: unreadable"),
        row("byte code beside a module, with the list", _byte_code, "byte code"),
        row("a sealed file, all but the commit", lambda f: stated(flipped("src/qaxis/budget.py")(f)), "but commit|locked as"),
    ]  # fmt: skip


def _other_commit(files: Files) -> Files:
    said = json.loads(files["statement.json"])
    said["predicate"]["source"]["commit"] += "\nand more\n"
    return {**files, "statement.json": json.dumps(said).encode()}


def _predicate(key: str, value: object) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        said = json.loads(files["statement.json"])
        said["predicate"][key] = value
        return {**files, "statement.json": json.dumps(said).encode()}

    return change


def _subject(name: str) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        said = json.loads(files["statement.json"])
        said["subject"].insert(0, {"name": name, "digest": {"sha256": "0" * 64}})
        return {**files, "statement.json": json.dumps(said).encode()}

    return change


def _half(files: Files) -> Files:
    said = json.loads(files["statement.json"])
    said["predicate"]["source"]["commit"] += "\ud800"
    return {**files, "statement.json": json.dumps(said).encode()}


def _byte_code(files: Files) -> Files:
    return listed({**files, "selfcheck/__pycache__/isolated.cpython-311.pyc": b"code"})


def _headers(headers: dict[str, str], times: int = 1) -> Callable[[Files], bytes]:
    """An archive that begins with extended headers as its maker likes them."""

    def change(files: Files) -> bytes:
        import gzip

        member = tarfile.TarInfo(f"{TOP}/a")
        member.pax_headers = headers
        whole = member.tobuf(tarfile.PAX_FORMAT)
        plain = tarfile.TarInfo(f"{TOP}/a").tobuf(tarfile.USTAR_FORMAT)
        return gzip.compress(whole[: -len(plain)] * times + plain + bytes(1024))

    return change


def _hostile() -> list[Edit]:
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}
    named = {
        "a name that leads out": ("../evil", {}), "a name from the root": ("/tmp/evil", {}),
        "a name through ..": (f"{TOP}/x/../../../evil", {}), "a link": (f"{TOP}/x", link),
        "a hard link": (f"{TOP}/x", {**link, "type": tarfile.LNKTYPE}),
        "a device": (f"{TOP}/x", {"type": tarfile.CHRTYPE}), "a pipe": (f"{TOP}/x", {"type": tarfile.FIFOTYPE}),
        "a folder": (f"{TOP}/x", {"type": tarfile.DIRTYPE}), "settings of git": (f"{TOP}/.git/config", {}),
        "settings of git, spelt otherwise": (f"{TOP}/.GIT/config", {}), "two folders": ("other/x", {}),
        "a name in capitals": (f"{TOP}/readme.md", {}), "a name twice": (f"{TOP}/README.md", {}),
        "a control character": (f"{TOP}/a\x1bb", {}), "a backslash": (f"{TOP}/a\\..\\b", {}),
        "a drive": (f"{TOP}/C:x", {}), "a long name": (f"{TOP}/{'x' * 300}", {}), "a name with a dot at its end":
        (f"{TOP}/README.md.", {}), "byte code": (f"{TOP}/selfcheck/__pycache__/isolated.cpython-311.pyc", {}),
        "byte code, spelt otherwise": (f"{TOP}/A.PYO", {}), "a name of a device": (f"{TOP}/aux.py", {}),
        "an end of a line": (f"{TOP}/a\u2028b", {}), "a file and a folder": (f"{TOP}/README.md/x", {}),
    }  # fmt: skip
    rows = [row(f"tar: {name}", tarred(entry), "nothing was unpacked") for name, entry in named.items()]
    return [
        *rows,
        row("tar: empty", lambda f: b"", "not an archive"),
        row("tar: cut off", lambda f: packed(f)[:100_000], "not an archive"),
        row("tar: a bomb", _bomb, "more than"),
        row("tar: a map of holes that is none", _headers({"GNU.sparse.map": "abc"}), "not an archive"),
        row("tar: headers without end", _headers({"a": "b"}, 3000), "not an archive"),
        row("the archive as it is", lambda f: f, NO_EFFECT),
    ]


def _bomb(files: Files) -> bytes:
    import gzip

    return gzip.compress(bytes(300 << 20), 1)


def _key(folder: Path, name: str) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    return (folder / f"{name}.pub").read_text("utf-8")


def signature(name: str, key: str, change: Callable[[Files], Files], said: str) -> Edit:
    """A signature by ``key``, where only the key ``ours`` is allowed."""

    def run(tree: Path) -> tuple[int, str]:
        """unpacking it, and `archive check` before any of its code runs"""
        folder = acts.beside(tree)
        (folder / "allowed_signers").write_text(
            f'a@example.org namespaces="qaxis-evidence" {_key(folder, "ours")}', "utf-8"
        )
        if key != "ours":
            _key(folder, key)

        def sign(files: Files) -> Files:
            words = ["ssh-keygen", "-Y", "sign", "-n", "other" if key == "other" else "qaxis-evidence", "-f",
                     str(folder / ("ours" if key == "other" else key))]  # fmt: skip
            done = subprocess.run(words, input=files["statement.json"], capture_output=True, check=True)
            return change({**files, "statement.json.sig": done.stdout})

        return checked(sign)(tree)

    return Edit(ARCHIVE, name, acts.nothing, run, said)


def _signed() -> list[Edit]:
    if shutil.which("ssh-keygen") is None:
        return []
    return [
        signature("signed by an allowed key", "ours", lambda f: f, NO_EFFECT),
        signature("signed by another key", "theirs", lambda f: f, "signature:"),
        signature("signed for another purpose", "other", lambda f: f, "signature:"),
        signature("a byte of the signature", "ours", lambda f: {**f, "statement.json.sig": b"x" + f["statement.json.sig"]},
                  "signature:"),
        signature("signed, then the statement changed", "ours", lambda f: stated(flipped("README.md")(f)), "signature:"),
    ]  # fmt: skip


EDITS = [*_members_changed(), *_hostile(), *_signed()]
