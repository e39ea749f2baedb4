"""Evidence: what is refused, what is believed, what is the same in another laboratory, and that no record is lost."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import signal
import subprocess
import sys
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfcheck.harness import comparing, evidence, keeping, run, seal, states, strict
from selfcheck.harness.files import ROOT, SelfcheckError
from selfcheck.harness.run import Options

from . import speeds
from .test_harness import alive_in, command, ran, records, write_both

COMMITTED = evidence.committed()
#: what is optional, and was not run where the evidence was made, has no record to look at
CLAIMS = {
    claim["id"]: claim
    for claim in seal.claims()
    if not claim.get("optional", False) or any(r["claim"] == claim["id"] for r in COMMITTED)
}


def committed(claim: str) -> dict:
    """The record of a claim; one that waits for its first has another's, of numbers that are made up."""
    found = next((r for r in COMMITTED if r["claim"] == claim), None)
    made_up = {} if found else {"claim": claim, **speeds.records()[claim]}
    return {**copy.deepcopy(found or COMMITTED[-1]), **made_up}


def document(made: list) -> dict:
    """A document whose chain holds, whatever its records say."""
    links, root = evidence.chain(made)
    return {"format": 1, "root": root, "links": links, "records": made}


def refused(path: Path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(SelfcheckError) as caught:
        evidence.read(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ") and "\n" not in said and len(said) < len(str(path)) + 500
    return said


# ---- Files that are refused ----------------------------------------------------------------------------------------


def bytes_that_are_no_evidence() -> dict[str, bytes]:
    good = json.dumps(document([committed("thm1-stops")])).encode()
    return {
        "": b"", "Expecting value": b"nothing", "byte 9 is not UTF-8": good[:9] + b"\xff" + good[9:],
        "the key 'format' is there twice": b'{"format": 1, ' + good[1:],
        "NaN is not a number": good.replace(b'"cases": 5', b'"cases": NaN'),
        "-Infinity is not a number": good.replace(b'"cases": 5', b'"cases": -Infinity'),
        "1e999 is larger": good.replace(b'"cases": 5', b'"cases": 1e999'),
        "digits": good.replace(b'"cases": 5', b'"cases": ' + b"9" * 5000),
        "deep": good.replace(b'"cases": 5', b'"cases": ' + b"[" * 100_000 + b"]" * 100_000),
        "nested more than 16": good.replace(b'"cases": 5', b'"cases": ' + b"[" * 50 + b"]" * 50),
        "larger than": b" " * (strict.LARGEST + 1), "is not of type 'object'": b"[]",
        "key format: 1 was expected": good.replace(b'"format": 1', b'"format": 2'),
        "'links' is a required property": good.replace(b'"links"', b'"lynx"'),
        "key records: 'x' is not of type 'array'": json.dumps({**document([]), "records": "x"}).encode(),
        "1 records and 0 links": good.replace(b'"links": ["', b'"links": [], "lynx": ["'),
    }  # fmt: skip


@pytest.mark.parametrize("said", bytes_that_are_no_evidence())
def test_a_file_that_is_no_evidence_is_refused_in_a_sentence(tmp_path, said):
    data = bytes_that_are_no_evidence()[said]
    if said == "1 records and 0 links":
        data = json.dumps({**json.loads(json.dumps(document([committed("thm1-stops")]))), "links": []}).encode()
    (tmp_path / "x.json").write_bytes(data)
    assert said in refused(tmp_path / "x.json")


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "not a regular file" in refused(tmp_path / "folder")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(20)
        try:
            assert "not a regular file" in refused(tmp_path / "pipe")
        except KeyboardInterrupt:
            pytest.fail("a pipe is waited for")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"passed": "false"}, "key passed: 'false' is not of type 'boolean'"),
        ({"passed": 1}, "key passed: 1 is not of type 'boolean'"),
        ({"seconds": -1}, "key seconds: -1 is less than the minimum"),
        ({"cases": 1.5}, "key cases: 1.5 is not of type 'integer'"),
        ({"cases": True}, "key cases: True is not of type 'integer'"),
        ({"note": "x"}, "Additional properties are not allowed ('note' was unexpected)"),
        ({"time": "yesterday"}, "key time: 'yesterday' does not match"),
        ({"time": "2026-06-01T00:00:00"}, "key time"),
        ({"run": "2026-06-01T00:00:00+00:00\n"}, "key run"),
        ({"device": "a\x1b[31m"}, "key device"),
        ({"headline": "a\nb"}, "key headline"),
        ({"headline": "x" * 2001}, "key headline"),
        ({"verdict": "\u202egnp"}, "key verdict"),
        ({"verdict": "\ud800"}, "key verdict"),
        ({"depends": {"../../etc/passwd": "0" * 64}}, "key depends"),
        ({"depends": {"src/x.py": "0" * 63}}, "key depends.src/x.py"),
        ({"depends": {f"a{i}.py": "0" * 64 for i in range(1001)}}, "key depends"),
        ({"checks": ["a", "a"]}, "key checks: ['a', 'a'] has non-unique elements"),
        ({"checks": []}, "key checks"),
        ({"checks": [str(i) for i in range(100_000)]}, "key checks"),
        ({"values": {"a b": {"value": 1, "unit": "", "n": None, "low": None, "high": None}}}, "key values"),
        ({"values": {"a": {"value": "1", "unit": "", "n": None, "low": None, "high": None}}}, "key values.a.value"),
        ({"values": {"a": {"value": 1e19, "unit": "", "n": None, "low": None, "high": None}}}, "key values.a.value"),
        ({"values": {"a": {"value": 1, "unit": ""}}}, "key values.a"),
        ({"data": {"rows": [{"name": "\u2603"}]}}, "key data.rows.0.name"),
        ({"data": {"\\input{/etc/hostname}": 1}}, "key data"),
        ({"data": {"x": "a\n"}}, "key data.x"),
        ({"data": []}, "key data"),
        ({"versions": {"python": "3.11.7", "torch": "the best"}}, "key versions.torch"),
        ({"status": "proven"}, "key status"),
        ({"claim": "no-such-claim"}, "no claim 'no-such-claim'"),
    ],
)  # fmt: skip
def test_a_record_that_is_not_of_the_schema_is_refused_by_key(tmp_path, change, said):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document([committed("thm1"), {**committed("thm1-stops"), **change}])))
    assert "record 1" in refused(path) and said in refused(path)


@pytest.mark.parametrize("key", sorted(committed("thm1").keys() - {"check", "machine", "run"}))
def test_a_record_without_one_of_its_keys_is_refused(tmp_path, key):
    made = committed("thm1")
    del made[key]
    (tmp_path / "x.json").write_text(json.dumps(document([made])))
    assert "record 0" in (said := refused(tmp_path / "x.json")) and f"'{key}' is a required property" in said


def test_a_claim_that_is_there_twice_is_refused_but_not_on_two_cards(tmp_path):
    path = tmp_path / "x.json"
    both = [r for r in COMMITTED if r["claim"] == "golden-gpu"]
    assert len(both) == 2
    evidence.write(path, both)
    assert len(evidence.read(path)) == 2
    evidence.write(path, [both[0], {**both[0], "device": "NVIDIA H100 PCIe"}])
    assert "golden-gpu on H100 is there twice" in refused(path)
    evidence.write(path, [committed("thm1"), {**committed("thm1"), "headline": "again"}])
    assert "thm1 is there twice" in refused(path)


SMALL = [committed(name) for name in ("thm1-stops", "int8-ppl", "flag-off", "kv-combined")]
for _record in SMALL:
    _record["checks"], _record["depends"] = _record["checks"][:2], dict(list(_record["depends"].items())[:2])
LEAVES = (
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20) | st.sampled_from(["\n", "\x00", "\\input{x}", "9" * 3000, "2026-02-30T00:00:00+00:00"])
)  # fmt: skip
ANY = st.recursive(LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3))


@st.composite
def mutated(draw: st.DrawFn) -> dict:
    """The committed records with one to three places, at any level, replaced, removed or added to."""
    made = {"format": 1, "root": "", "links": [], "records": copy.deepcopy(SMALL)}
    for _ in range(draw(st.integers(1, 3))):
        here = made
        while True:
            key = draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
            inner = here[key]
            if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
                break
            here = inner
        how = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if how == "remove":
            del here[key]
        elif how == "add" and isinstance(here, dict):
            here[draw(st.text(max_size=8))] = draw(ANY)
        else:
            here[key] = draw(ANY)
        if not made or not isinstance(made.get("records"), list):
            break
    try:
        links, root = evidence.chain(made["records"])
        made |= {name: x for name, x in (("links", links), ("root", root)) if name in made and not made[name]}
    except (KeyError, TypeError, ValueError):
        pass
    return made


def understood(path: Path) -> bool:
    """Whether a file is read; if it is, nothing that reads records stumbles over it."""
    try:
        made = evidence.read(path)
    except SelfcheckError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return False
    for record in made:
        evidence.judge(evidence.State(CLAIMS[record["claim"]], "", record))
        evidence.content(record)
    comparing.compare(made, SMALL)
    evidence.write(path, made)
    return True


QUICK = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@QUICK
@given(mutated())
def test_no_mutated_record_makes_a_traceback(tmp_path_factory, made):
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_text(json.dumps(made))
    understood(path)


TEXT = json.dumps(document(SMALL)).encode()
PIECES = st.binary(max_size=3) | st.sampled_from(
    [b"NaN", b"[" * 2000, b'"', b"}", b'{"a":1,"a":1}', b"\xed\xa0\x80", b"1e400"]
)


@QUICK
@given(st.integers(0, len(TEXT)), st.integers(0, 40), PIECES)
def test_no_mutated_bytes_make_a_traceback(tmp_path_factory, at, removed, added):
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(TEXT[:at] + added + TEXT[at + removed :])
    if understood(path):
        assert json.loads(path.read_bytes())["root"] == document(SMALL)["root"]


# ---- Records that are not believed ---------------------------------------------------------------------------------

TOMORROW = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=2)


@pytest.mark.parametrize(
    ("claim", "change", "said"),
    [
        ("exp2", {"device": "Linux x86_64 CPU, 1 thread"}, "a claim of a GPU, measured on"),
        ("exp2", {"device": "NVIDIA CPU"}, "a claim of a GPU, measured on"),
        ("thm1", {"device": "NVIDIA H100 80GB HBM3"}, "a claim of a CPU, measured on"),
        ("thm1", {"check": "theorem:stops"}, "measured by theorem:stops"),
        ("thm1", {"seed": 7}, "seed 7, allowed is 20260601"),
        ("thm1", {"command": "python -c forged"}, "command 'python -c forged'"),
        ("thm1", {"command": "python -m selfcheck runaway"}, "command 'python -m selfcheck runaway'"),
        ("thm1", {"time": "2099-01-01T00:00:00+00:00"}, "in the future"),
        ("thm1", {"time": TOMORROW.isoformat(timespec="seconds")}, "in the future"),
        ("thm1", {"time": "2025-12-31T23:59:59+00:00"}, "before the first version"),
        ("thm1", {"time": "2026-02-30T00:00:00+00:00"}, "no date"),
        ("thm1", {"run": "2099-01-01T00:00:00+00:00"}, "in the future"),
        ("thm1", {"run": "2026-06-02T00:00:00+00:00"}, "its run began after it was measured"),
        ("thm1", {"statement": "P = NP"}, "made when checks.toml stated the claim otherwise"),
        ("thm1", {"status": "descriptive"}, "made when checks.toml stated the claim otherwise"),
        ("exp2", {"versions": {"python": "3.12.3", "torch": "1.0"}}, "made with torch 1.0"),
    ],
)  # fmt: skip
def test_what_no_run_would_have_written_is_not_believed(claim, change, said):
    record = next(r for r in records(ROOT) if r["claim"] == claim)
    of = {"claim": CLAIMS[claim], "card": ""}
    plain, changed = evidence.State(**of, record=record), evidence.State(**of, record={**record, **change})
    for state in (plain, changed):
        evidence.judge(state)
    assert plain.word == "fresh" and changed.word == "stale" and any(said in x for x in changed.reasons)


def test_a_gpu_claim_is_not_read_from_the_file_of_cpu_claims(tree):
    write_both(tree)
    evidence.write(tree / evidence.DEFAULT, records(tree)[:1] + [r for r in records(tree) if r["claim"] == "exp2"])
    with pytest.raises(SelfcheckError, match="exp2 is a claim of selfcheck/evidence/gpu.json"):
        evidence.states(tree)


def test_a_result_that_could_not_be_read_again_is_a_failed_claim():
    result = {"passed": True, "verdict": "line\none \x1b[0m", "headline": "h", "values": {}, "cases": 1, "data": {},
              "checks": ["a"]}  # fmt: skip
    make = partial(run.record, CLAIMS["thm1"], options=Options(), device="Linux x86_64 CPU", depends={}, subjects=None,
                   seconds=1.0)  # fmt: skip
    good = make(result)
    assert good["passed"] and good["verdict"] == "line one [0m" and evidence.malformed(good) is None
    for change in ({"data": {"x": math.nan}}, {"data": {"x": "\n"}}, {"headline": "a\x00"}, {"data": {"x": {1, 2}}}):
        made = make({**result, **change})
        assert not made["passed"] and "cannot be kept" in made["verdict"] and evidence.malformed(made) is None


# ---- Content -------------------------------------------------------------------------------------------------------

ELSEWHERE = {
    "time": "2026-03-03T03:03:03+00:00", "run": "2026-03-03T03:00:00+00:00", "seconds": 7.0,
    "command": "python -m selfcheck run --jobs 1", "headline": "other words",
    "device": "Darwin arm64 CPU, 4 threads", "versions": {"python": "3.10.1", "torch": "2.12.0"},
    "machine": {"sys_platform": "darwin", "platform_machine": "arm64", "platform_python_implementation": "CPython"},
    "verdict": "said otherwise", "names": {"corpus": "here", "model": "there"},
}  # fmt: skip


def elsewhere(record: dict) -> dict:
    """The record as another laboratory would make it: all that is not content is another."""
    made = {**copy.deepcopy(record), **ELSEWHERE}
    if CLAIMS[record["claim"]].get("cards"):
        made["device"] = record["device"]
    repeats, varies = CLAIMS[record["claim"]]["repeats"], CLAIMS[record["claim"]].get("varies", [])
    for value in made["values"].values():
        if repeats != "bits":
            value.update(value=value["value"] + 1, low=None, high=5)
        if repeats == "timed":
            value["n"] = 77
    if repeats != "bits":
        made["data"] = {"other": [1]}
    if "cases" in varies:
        made["cases"] += 1
    return made


def test_two_laboratories_have_one_content_root_in_any_order():
    others = [elsewhere(r) for r in COMMITTED]
    assert all(a != b for a, b in zip(others, COMMITTED, strict=True))
    assert evidence.content_root(others[::-1]) == evidence.content_root(COMMITTED)
    assert evidence.chain(others)[1] != evidence.chain(COMMITTED)[1]


def leaves(made, path=()):
    """Every place in a content."""
    if isinstance(made, (dict, list)) and made:
        for key, x in made.items() if isinstance(made, dict) else enumerate(made):
            yield from leaves(x, (*path, key))
    else:
        yield path


@pytest.mark.parametrize("claim", CLAIMS)
def test_whatever_is_content_changes_the_content_root(claim):
    record = committed(claim)
    was, kept = evidence.content_root([record]), evidence.content(record)
    places = list(leaves(kept))
    assert {"claim", "statement", "status", "profile", "passed", "subjects", "depends", "seed", "checks"} <= set(kept)
    for path in places[:: max(1, len(places) // 60)]:
        if path == ("claim",):
            continue
        made = copy.deepcopy(record)
        here = made
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = "another" if here[path[-1]] != "another" else "other"
        assert evidence.content_root([made]) != was, path
    assert evidence.content_root([{**record, "passed": not record["passed"]}]) != was


def test_every_claim_says_what_repeats_and_what_varies_is_there():
    for claim in CLAIMS.values():
        assert claim["repeats"] in ("bits", "interval", "timed"), claim["id"]
        record = committed(claim["id"])
        for pattern in claim.get("varies", []):
            bare = evidence.content(record)
            copied = {**copy.deepcopy(record), "values": record["values"], "data": record["data"]}
            paths = [".".join(map(str, p)) for p in leaves(copied)]
            assert any(fnmatchcase(p, pattern) or fnmatchcase(p, f"{pattern}.*") for p in paths), (claim["id"], pattern)
            assert not any(fnmatchcase(".".join(map(str, p)), pattern) for p in leaves(bare))


# ---- A second party ------------------------------------------------------------------------------------------------


def words(theirs: list[dict]) -> dict[str, tuple[str, str]]:
    return {row.name: (row.word, row.why) for row in comparing.compare(theirs, COMMITTED)}


def test_a_second_party_is_compared_claim_by_claim(monkeypatch):
    # Records of a GPU may wait for one since files changed: that is another reason to differ.
    monkeypatch.setattr(states, "stale_files", lambda *_: [])
    ours = {r["claim"]: r for r in COMMITTED}
    change = ours["int8-ppl"]["values"]["change"]
    inside, outside, wide = (copy.deepcopy(ours["int8-ppl"]) for _ in range(3))
    inside["values"]["change"]["value"] = change["low"] + 1e-6
    outside["values"]["change"]["value"] = change["high"] + 1e-6
    wide["values"]["change"] |= {"value": 3.0, "low": -100.0, "high": 100.0}
    assert words([ours["thm1"], inside])["thm1"] == ("identical", "")
    assert words([inside])["int8-ppl"][0] == "agrees" and words([inside])["thm1"][0] == "not run"
    assert words([outside])["int8-ppl"][0] == "differs" and "values.change" in words([outside])["int8-ppl"][1]
    assert words([wide])["int8-ppl"][0] == "differs"
    other = copy.deepcopy(ours["kernel-grid"])
    other["data"]["sha256"] = "0" * 64
    assert words([other])["kernel-grid"][0] == "differs" and "data.sha256" in words([other])["kernel-grid"][1]
    timed = copy.deepcopy(ours["certified-speed"])
    timed["values"]["bandwidth"]["value"] = 1.0
    assert words([timed])["certified-speed"][0] == "agrees"
    assert words([{**ours["thm1"], "device": "NVIDIA H200"}])["thm1"][0] == "differs"
    perplexity = copy.deepcopy(ours["int8-ppl"])
    perplexity["values"]["dense_perplexity"]["value"] *= 1.02
    assert words([perplexity])["int8-ppl"][0] == "differs"


def test_an_attested_run_writes_beside_and_is_compared(tree):
    before = {name: (tree / name).read_bytes() for name in (evidence.DEFAULT, evidence.GPU)}
    seal.seal(tree)
    code, out, err = ran(tree, "selfcheck", "run", "--attest", "second-party", "--only", "thm1-stops")
    assert code == 0, out + err
    assert f"1 identical, 0 agrees, 0 differs, {len(evidence.committed(tree)) - 1} not run" in out
    path = tree / "selfcheck/evidence/attested/second-party.json"
    (record,) = evidence.read(path)
    assert record["run"] <= record["time"] and record["command"].startswith("python -m selfcheck run --attest")
    assert {name: (tree / name).read_bytes() for name in before} == before
    evidence.write(path, [{**record, "passed": False, "verdict": "no"}])
    code, out, err = ran(tree, "selfcheck", "compare", str(path))
    assert code == 1 and "differs from the committed evidence: thm1-stops" in err and "failed: no" in out
    for arguments, said in (
        (("--attest", "../x"), "1 to 40 of a-z"), (("--attest", "x", "--quick"), "allowed is a full run"),
        (("--attest", "x", "--only", "exp2"), "exp2 is measured elsewhere"),
    ):  # fmt: skip
        code, _, err = ran(tree, "selfcheck", "run", *arguments)
        assert code == 1 and said in err and "Traceback" not in err


# ---- No record is lost ---------------------------------------------------------------------------------------------


def test_nothing_is_merged_into_what_cannot_be_read(tree):
    write_both(tree)
    made, path = records(tree), tree / evidence.DEFAULT
    path.write_bytes(path.read_bytes()[:-40])
    before = path.read_bytes()
    with pytest.raises(SelfcheckError, match="default.json: unreadable: .*restore it with git, or move it away"):
        keeping.keep(made[:1], Options(), tree)
    assert path.read_bytes() == before
    seal.seal(tree)
    code, out, err = ran(tree, "selfcheck", "run", "--only", "thm1-stops")
    assert code == 1 and "restore it with git, or move it away" in err and "importing torch" not in out
    assert path.read_bytes() == before
    path.unlink()
    keeping.keep(made[:1], Options(), tree)
    assert len(evidence.read(path)) == 1


def test_records_of_claims_that_are_no_more_do_not_stop_a_merge(tree):
    write_both(tree)
    parts = (tree / "selfcheck/checks.toml").read_text().split("[[claim]]\n")
    (tree / "selfcheck/checks.toml").write_text("[[claim]]\n".join([parts[0], *parts[2:]]))
    with pytest.raises(SelfcheckError, match="no claim 'thm1'"):
        evidence.read(tree / evidence.DEFAULT, tree)
    keeping.keep([r for r in records(tree) if r["claim"] == "thm1-stops"], Options(), tree)
    assert "thm1" not in {r["claim"] for r in evidence.read(tree / evidence.DEFAULT, tree)}


def test_a_full_disk_keeps_what_was_there(tree, monkeypatch):
    write_both(tree)
    before = (tree / evidence.DEFAULT).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(SelfcheckError, match="cannot write .*No space left on device"):
            keeping.keep(records(tree)[:1], Options(), tree)
    assert (tree / evidence.DEFAULT).read_bytes() == before
    assert not list((tree / "selfcheck").rglob("*.staging"))
    keeping.keep(records(tree)[:1], Options(), tree)


KEEPS = """
import json, sys
from pathlib import Path
from selfcheck.harness.keeping import keep
from selfcheck.harness.run import Options
root, made = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
print("ready", flush=True)
sys.stdin.readline()
for record in made:
    keep([record], Options(), root)
"""


def test_two_processes_at_once_keep_the_records_of_both(tree):
    write_both(tree)
    gpu = {claim["id"] for claim in seal.claims() if claim.get("where") == "gpu"}
    made = [{**r, "headline": "kept"} for r in records(tree) if r["claim"] not in gpu][:12]
    processes = []
    for i in (0, 1):
        (tree / f"{i}.json").write_text(json.dumps(made[i::2]))
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", KEEPS, str(tree), str(tree / f"{i}.json")],
                cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.wait(120) == 0
        process.stdin.close()
        process.stdout.close()
    kept = {r["claim"] for r in evidence.read(tree / evidence.DEFAULT) if r["headline"] == "kept"}
    assert kept == {r["claim"] for r in made}


def test_a_lock_left_behind_stops_nobody(tree):
    write_both(tree)
    lock = tree / keeping.LOCK
    lock.parent.mkdir(parents=True)
    lock.write_text("12345")
    keeping.keep(records(tree)[:1], Options(), tree)
    seal.seal(tree)
    assert seal.differences(tree) == []
    done = subprocess.run(["git", "check-ignore", "-q", keeping.LOCK], cwd=ROOT)
    assert done.returncode in (0, 128)  # 128: not a git repository


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_stopped_after_the_first_of_two_claims_the_first_is_kept(tree, sent):
    sleeps = "import time\n\n\ndef coq(context):\n    time.sleep(300)\n"
    (tree / "selfcheck/checks/proofs.py").write_text(sleeps)
    seal.seal(tree)
    before = evidence.read(tree / evidence.DEFAULT)
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    only = ("--only", "thm1-stops", "--only", "proofs", "--jobs", "1")
    process = command(tree, "selfcheck", "run", *only, preexec_fn=heard)
    for line in process.stdout:
        if "[2/2]" in line:
            break
    process.send_signal(getattr(signal, sent))
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0
    if sent != "SIGKILL":
        assert "interrupted; kept: thm1-stops, in " in err and "default.json" in err
        assert not sys.platform.startswith("linux") or alive_in(tree) == []
    after = evidence.read(tree / evidence.DEFAULT)
    assert [r["claim"] for r in after] == [r["claim"] for r in before]
    assert [a["claim"] for a, b in zip(after, before, strict=True) if a != b] == ["thm1-stops"]
    assert not list((tree / "selfcheck").rglob("*.staging"))
    for pid in alive_in(tree) if sys.platform.startswith("linux") else []:
        os.kill(int(pid), signal.SIGKILL)


def test_a_claim_asked_for_by_name_that_cannot_run_is_an_exit_status(tree):
    seal.seal(tree)
    only = ("--quick", "--only", "thm1-stops", "--only", "golden-gpu")
    code, out, err = ran(tree, "selfcheck", "run", *only)
    assert code == 1 and "not run: golden-gpu; the reason is above" in err and "needs a GPU" in out
    assert [r["claim"] for r in evidence.read(tree / "selfcheck/local/quick.json")] == ["thm1-stops"]
