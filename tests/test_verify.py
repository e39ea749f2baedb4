"""Outputs bound to the evidence: what `verify` says of each file and claim, and README's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from archive import manifest, metadata, readme, roots, verify
from figures import drawn
from paper import ledger as typeset
from paper import numbers
from selfcheck.harness import digests, evidence, seal, versions
from selfcheck.harness.files import ROOT, SelfcheckError

from . import speeds

KEPT = ("README.md", "CONTRIBUTING.md", "THREATS.md", "LICENSE-CODE.txt", "LICENSE-TEXT-DATA.txt", "examples")


def renewed(record: dict, claim: dict, tree: Path) -> dict:
    """A committed record as if it had been measured with the tree as it is."""
    depends = {name: digests.digest(tree, name) for name in record["depends"]}
    said = {name: claim[name] for name in ("statement", "status", "check")}
    return {**record, **said, "depends": {name: x for name, x in depends.items() if x} | _check(claim, tree)}


def _check(claim: dict, tree: Path) -> dict[str, str]:
    name = evidence.check_file(claim)
    return {name: str(digests.digest(tree, name))}


@pytest.fixture
def bound(tree: Path) -> Path:
    """A sealed tree with believable evidence of every claim, and everything that is made from it."""
    for name in KEPT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    claims, made_up = {claim["id"]: claim for claim in seal.claims(tree)}, speeds.records()
    for name in (evidence.DEFAULT, evidence.GPU):
        records = json.loads((ROOT / name).read_text("utf-8"))["records"]
        # Of what two cards may measure, one: as an H100 has it, whichever said it last.
        last = {r["claim"]: {**r, "device": "NVIDIA H100"} if claims[r["claim"]].get("cards") else r for r in records}
        one = [renewed(r, claims[r["claim"]], tree) for r in last.values()]
        # What is timed may be recorded in another form by now, or not at all.
        one = [{**r, **made_up.get(r["claim"], {})} for r in one]
        if name == evidence.GPU:
            missing = [claims[x] for x in made_up.keys() - last.keys()]
            one += [renewed({**one[0], "claim": c["id"], **made_up[c["id"]]}, c, tree) for c in missing]
        evidence.write(tree / name, one)
    seal.seal(tree)
    bind(tree)
    return tree


def bind(tree: Path) -> None:
    """What figures and paper leave, but for drawing and typesetting."""
    records = evidence.accepted(tree)
    ledger = {}
    for name in drawn.included((tree / "paper/paper.tex").read_text("utf-8")):
        watched = drawn.Watched(records)
        watched["thm1"]
        for ending in ("pdf", "png"):
            # One that cannot be drawn before its evidence is there.
            if not (tree / f"figures/{name}.{ending}").exists():
                shutil.copy(tree / f"figures/entropy.{ending}", tree / f"figures/{name}.{ending}")
        ledger[name] = drawn.entry(name, watched, tree)
    drawn.write(ledger, tree)
    (tree / numbers.TARGET).write_text(numbers.render(records, tree), "utf-8", newline="\n")
    typeset.write(tree)
    text = (tree / readme.README).read_text("utf-8")
    (tree / readme.README).write_text(readme.render(text, records, tree), "utf-8", newline="\n")
    metadata.write(tree)
    manifest.write({}, roots.content_root(tree), tree)


def words(tree: Path) -> dict[str, str]:
    """Of every row that is not as it should be, its word."""
    rows, intact = verify.report(tree)
    found = {row.name: row.word for row in rows if not row.good}
    assert intact == (found.keys() <= {"golden-gpu on H200"})
    return found


def test_a_tree_in_order_is_intact_and_what_one_more_card_would_add_is_said(bound):
    assert words(bound) == {"golden-gpu on H200": "not run"}


def test_of_a_claims_cards_one_has_to_speak(bound):
    """What an older card said may be stale, as for the paper; a failure of it may not be."""
    path = bound / evidence.GPU
    records = evidence.read(path, bound)
    old = next(r for r in records if r["claim"] == "golden-gpu")
    other = {**old, "device": "NVIDIA H200"}
    for change, word in (({"versions": {**old["versions"], "torch": "1.0"}}, "stale"), ({"passed": False}, "failed")):
        at = records.index(old) + 1
        evidence.write(path, [*records[:at], {**other, **change}, *records[at:]])
        rows, intact = verify.report(bound)
        found = {row.name: row.word for row in rows if not row.good}
        assert found["golden-gpu on H200"] == word and intact == (word == "stale")


@pytest.mark.parametrize(
    "name",
    ["figures/entropy.pdf", "figures/stages.png", "figures/figures.json", "paper/paper.pdf", "paper/numbers.tex",
     "README.md", "examples/reviewer.py", "CITATION.cff", "codemeta.json", "LICENSE-CODE.txt", "THREATS.md"],
)  # fmt: skip
def test_an_edited_output_is_named(bound, name):
    with (bound / name).open("ab") as stream:
        stream.write(b" ")
    assert words(bound)[name] == "edited"


def test_a_missing_and_an_added_output_are_named(bound):
    (bound / "figures/entropy.png").unlink()
    (bound / "examples/more.py").write_text("")
    assert {"figures/entropy.png": "edited", "examples/more.py": "edited"}.items() <= words(bound).items()


def test_a_number_that_was_bound_but_is_not_of_the_evidence_is_stale(bound):
    """Whoever edits and binds again has the manifest on their side, and not the evidence."""
    for name, old, new in (
        ("README.md", "<!--qx content-->", "<!--qx content-->0"),
        ("paper/numbers.tex", "\\qxset{", "\\qxset{ "),
        ("CITATION.cff", "sha256:", "sha256:0"),
    ):
        path = bound / name
        path.write_text(path.read_text("utf-8").replace(old, new, 1), "utf-8", newline="\n")
    manifest.write({}, "0" * 64, bound)
    assert words(bound) == {
        "golden-gpu on H200": "not run", "numbers of README.md": "stale", "numbers.tex of this evidence": "stale",
        "paper.pdf of this text": "stale", "content root": "stale",
        "CITATION.cff, codemeta.json, .zenodo.json": "stale",
    }  # fmt: skip


def test_evidence_is_said_to_be_forged_edited_stale_or_not_run(bound):
    path = bound / evidence.DEFAULT
    before = path.read_text("utf-8")
    document = json.loads(before)
    document["records"][0]["seconds"] += 1
    path.write_text(json.dumps(document))
    assert words(bound)[evidence.DEFAULT] == "forged"
    path.write_text(before.replace('"records"', '"record"'))
    assert words(bound)[evidence.DEFAULT] == "edited"
    path.unlink()
    assert words(bound)[evidence.DEFAULT] == "not run"
    evidence.write(path, document["records"][1:])
    assert words(bound)[document["records"][0]["claim"]] == "not run"
    records = [{**r, "versions": {**r["versions"], "torch": "1.0"}} for r in document["records"]]
    evidence.write(path, records)
    found = words(bound)
    assert {found[r["claim"]] for r in records} == {"stale"} and versions.CPU_LIST
    evidence.write(path, [{**r, "passed": False} for r in document["records"]])
    assert words(bound)[document["records"][3]["claim"]] == "failed"


def test_a_broken_seal_is_named_file_by_file_and_stops_nothing_from_being_said(bound):
    (bound / "paper/paper.tex").write_text("We also prove P = NP.")
    (bound / "src/tomlkit.py").write_text("")
    assert {"paper/paper.tex": "edited", "src/tomlkit.py": "edited"}.items() <= words(bound).items()


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "files": 3}', "\x00", '{"a": NaN}'])
def test_what_is_no_manifest_is_said_to_be_none(bound, text):
    (bound / manifest.MANIFEST).write_text(text)
    assert words(bound)[manifest.MANIFEST] == "edited"


def test_a_number_of_the_readme_is_written_as_the_evidence_has_it(bound):
    records = evidence.accepted(bound)
    said = readme.render("<!--qx kv-formats.int8_ratio .3f-->9<!--/--> <!--qx claims.cpu-->x<!--/-->", records, bound)
    value = records["kv-formats"]["values"]["int8_ratio"]["value"]
    on_cpu = sum(claim.get("where") != "gpu" for claim in seal.claims(bound))
    assert (
        said.startswith(f"<!--qx kv-formats.int8_ratio .3f-->{value:.3f}<!--/-->") and readme.in_words(on_cpu) in said
    )
    with pytest.raises(SelfcheckError, match="no-such"):
        readme.render("<!--qx no-such.value-->1<!--/-->", records, bound)
    assert [readme.in_words(n) for n in (7, 20, 41)] == ["Seven", "Twenty", "Forty-one"]


def test_what_goes_to_tex_is_text(bound):
    """A record's text reaches TeX escaped, whatever it says."""
    records = evidence.accepted(bound)
    hostile = r"\input{/etc/hostname} $x^2_1$ & # % ~ {}"
    for claim in ("golden", "flag-off", "families", "ablation"):
        for row in records[claim]["data"]["rows"]:
            row.update({k: hostile for k, x in row.items() if isinstance(x, str)})
    for record in records.values():
        record["device"], record["versions"] = hostile, {"python": hostile}
    records["proofs"]["data"]["coq"] = hostile
    assert r"\input" not in numbers.render(records, bound).replace(r"\textbackslash{}input", "")


def test_a_record_without_what_is_shown_of_it_is_named_in_a_sentence(bound):
    records = evidence.accepted(bound)
    records["kv-speed"]["data"]["rows"][0].pop("dense")
    with pytest.raises(SelfcheckError, match=r"table caches .*KeyError"):
        numbers.render(records, bound)


def test_the_table_of_evidence_tells_this_run_from_what_was_committed(bound):
    """A run is a CPU's, which anybody repeats; what a GPU measured later is committed all the same."""
    records = evidence.accepted(bound)
    for record in records.values():
        record["run"] = "2026-06-01T00:00:00+00:00" if "CPU" in record["device"] else "2026-06-02T00:00:00+00:00"
    records["thm1"]["run"] = "2026-05-01T00:00:00+00:00"
    rows = {line.split(" & ")[0]: line.split(" & ")[1] for line in numbers.TABLES["evidence"](records)}
    assert (rows["thm1"], rows["golden"], rows["golden-gpu"]) == ("committed", "this run", "committed")
