"""What of a tree is as it should be: every sealed file, record, output and number, each with its word and why.

Reads only; needs no torch, and measures nothing. What it finds in order, it found in order among these files: whether a
number was measured at all no file can say (THREATS.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from figures import drawn
from paper import ledger, numbers
from selfcheck.harness import evidence, seal
from selfcheck.harness.files import ROOT, SelfcheckError, sha256

from . import manifest, metadata, readme

INTACT, STALE, EDITED, FORGED, NOT_RUN, FAILED = "intact", "stale", "edited", "forged", "not run", "failed"
PAPER = "nox -s paper"
#: rows of its own say what is wrong with it; measured again it is another file, and outputs are of the former
MEASURED = evidence.FILES
#: where other parties' evidence lies
ATTESTED = "selfcheck/evidence/attested"


class Row(NamedTuple):
    """One file or claim."""

    name: str
    word: str
    why: str = ""
    #: the command that mends it
    mend: str = ""
    #: whether nobody need do so
    optional: bool = False

    @property
    def good(self) -> bool:
        return self.word == INTACT


def report(root: Path = ROOT) -> tuple[list[Row], bool]:
    """Every row, and whether the tree is intact: nothing edited, stale or missing but what one more card would add.

    Raises:
        SelfcheckError: if there is no tree of this project.
    """
    if not (root / seal.LOCK).parent.is_dir():
        raise SelfcheckError(f"{root}: no tree of this project, it has no {Path(seal.LOCK).parent}")
    rows = [*_sealed(root), *_evidence(root), *_claims(root), *_outputs(root)]
    if not _missed(rows):
        rows += _generated(root)
    return rows, not _missed(rows)


def _missed(rows: list[Row]) -> list[Row]:
    """The rows that are not as they should be.

    Of a claim's cards one has to speak; what another said may be old. What needs a subject that not everyone installs
    need not have been run.
    """
    spoken = {_card(row) for row in rows if row.good} - {""}
    return [
        r for r in rows
        if not r.good and not r.optional and not (r.word in (NOT_RUN, STALE) and _card(r) in spoken)
    ]  # fmt: skip


def _card(row: Row) -> str:
    """The claim of a row that speaks of one card; nothing for others."""
    claim, of, _ = row.name.partition(" on ")
    return claim if of else ""


def _sealed(root: Path) -> list[Row]:
    found = []
    for sentence in seal.differences(root):
        name, _, why = sentence.partition(": ")
        mend = "remove it" if why.endswith("remove it") else f"git checkout {name}; or `nox -s seal`, if it was meant"
        found.append(Row(name, EDITED, why, mend))
    for asked in (seal.claims, seal.reported, seal.subjects):
        try:
            asked(root)
        except SelfcheckError as error:
            name, _, why = str(error).partition(": ")
            found.append(Row(name, EDITED, why, f"git checkout {name}"))
    return found or [Row(f"{len(seal.locked(root))} sealed files", INTACT, seal.LOCK)]


def _evidence(root: Path) -> list[Row]:
    rows = []
    attested = [f"{ATTESTED}/{path.name}" for path in sorted((root / ATTESTED).glob("*"))]
    for name in (*MEASURED, *attested):
        try:
            rows.append(Row(name, INTACT, f"{len(evidence.read(root / name, root))} records in one chain"))
        except SelfcheckError as error:
            why = str(error).removeprefix(f"{root / name}: ")
            word = FORGED if "chain" in why else NOT_RUN if "no evidence" in why else EDITED
            rows.append(Row(name, word, why, f"git checkout {name}"))
    return rows


def _claims(root: Path) -> list[Row]:
    words = {"fresh": INTACT, "stale": STALE, "missing": NOT_RUN, "failed": FAILED}
    try:
        found = evidence.states(root)
    except SelfcheckError as error:
        return [Row("claims", NOT_RUN, f"not asked: {error}")]
    rows = [
        Row(
            s.name,
            words[s.word],
            "; ".join(x.removeprefix("stale, ") for x in s.reasons),
            evidence.renewal(s),
            optional=evidence.left_out(s),
        )
        for s in found
    ]
    for table, devices in evidence.mixed_tables(found).items():
        rows.append(Row(f"table {table}", STALE, f"from several cards: {', '.join(devices)}", "nox -s evidence"))
    return rows


def _outputs(root: Path) -> Iterator[Row]:
    """Every bound file against the manifest."""
    try:
        bound = manifest.bound(root)
    except SelfcheckError as error:
        yield Row(manifest.MANIFEST, EDITED, str(error), PAPER)
        return
    for name in sorted({*bound, *manifest.names(root)}):
        path = root / name
        if name in MEASURED:
            continue
        if path.is_symlink() or not path.is_file():
            yield Row(name, EDITED, "missing, or a link", PAPER)
        elif name not in bound:
            yield Row(name, EDITED, "not in the manifest", PAPER)
        elif sha256(path) == bound[name]:
            yield Row(name, INTACT)
        else:
            yield Row(name, EDITED, "not the file that was bound", PAPER)


def _generated(root: Path) -> Iterator[Row]:
    """What is made from evidence, against the evidence that is there: bound is not yet of this evidence."""
    records = evidence.accepted(root)
    text = (root / "paper/paper.tex").read_text("utf-8")
    steps: dict[str, tuple[Callable[[], object], str]] = {
        "figures drawn from this evidence": (lambda: drawn.check(text, records, root), "nox -s figures paper"),
        "numbers.tex of this evidence": (
            lambda: _same(root / numbers.TARGET, numbers.render(records, root).encode()),
            PAPER,
        ),
        "paper.pdf of this text": (lambda: ledger.check(root), PAPER),
        "numbers of README.md": (
            lambda: _same(root / readme.README, readme.render(readme.text_of(root), records, root).encode()),
            PAPER,
        ),
        "content root": (lambda: _root(root), PAPER),
        "CITATION.cff, codemeta.json, .zenodo.json": (lambda: _metadata(root), PAPER),
    }
    for name, (holds, mend) in steps.items():
        try:
            holds()
            yield Row(name, INTACT)
        except SelfcheckError as error:
            yield Row(name, STALE, " ".join(str(error).split()), mend)


def _same(path: Path, expected: bytes) -> None:
    if path.read_bytes() != expected:
        raise SelfcheckError(f"{path.name} is not what this evidence gives")


def _root(root: Path) -> None:
    said, found = manifest.read(root)["content_root"], evidence.content_root(evidence.fresh(root), root)
    if said != found:
        raise SelfcheckError(f"{manifest.MANIFEST} says {said}, the evidence gives {found}")


def _metadata(root: Path) -> None:
    if wrong := metadata.differences(root):
        raise SelfcheckError("; ".join(wrong))
