"""Subjects that a machine may have: verified where they are, else not run; Gemma's claim on a small model."""

from __future__ import annotations

import hashlib

import pytest
import torch
import transformers as tf

import qaxis
from requirements import lock
from selfcheck.checks import gemma
from selfcheck.harness.claim import Context, NotRunError
from selfcheck.harness.files import ROOT, SelfcheckError
from selfcheck.inputs import optional

PARTS = (b"one ", b"two ", b"three")


@pytest.fixture
def subject(tmp_path, monkeypatch):
    """Three parts, each in a package of its own, and what is pinned of them."""
    for i, part in enumerate(PARTS):
        folder = tmp_path / f"qaxis_test_part{i}"
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / f"part{i}").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path))
    whole = b"".join(PARTS)
    return {
        "name": "Three parts", "requirements": "requirements/three.txt", "file": "whole", "bytes": len(whole),
        "sha256": hashlib.sha256(whole).hexdigest(), "licence": "their terms",
        "parts": [{"module": f"qaxis_test_part{i}", "file": f"part{i}"} for i in range(len(PARTS))],
    }  # fmt: skip


def test_parts_are_joined_in_order_and_leave_nothing(subject):
    assert optional.missing(subject) == []
    with optional.joined(subject) as path:
        assert path.read_bytes() == b"".join(PARTS)
    assert not path.exists()


def test_a_part_that_differs_or_is_missing_is_named(subject, tmp_path):
    part = tmp_path / "qaxis_test_part1/part1"
    part.write_bytes(b"2")
    with (
        pytest.raises(SelfcheckError, match=rf"whole: corrupted, 10 bytes\n.*{subject['sha256']}"),
        optional.joined(subject),
    ):
        pass
    part.unlink()
    with (
        pytest.raises(SelfcheckError, match=r"qaxis_test_part1/part1: not installed; .*their terms"),
        optional.joined(subject),
    ):
        pass
    subject["parts"].append({"module": "qaxis_no_such_part", "file": "x"})
    assert optional.missing(subject) == ["qaxis_no_such_part"]


def test_a_claim_without_its_subject_is_not_run(monkeypatch):
    monkeypatch.setattr(gemma.optional, "missing", lambda subject: ["one"])
    with pytest.raises(NotRunError, match=r"not installed; .*requirements/gemma\.txt.*Gemma Terms of Use"):
        gemma.gemma(Context())


def test_what_is_pinned_is_what_is_installed():
    subject = optional.subjects()["gemma"]
    asked = {line.split("==")[0].replace("-", "_") for line in lock.BARE["gemma"]}
    assert {part["module"] for part in subject["parts"]} < asked and len(asked) == 5
    assert (ROOT / subject["requirements"]).is_file() and subject["bytes"] == 253_113_024


@pytest.fixture
def small():
    torch.manual_seed(0)
    config = tf.Gemma3TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=24, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval()


@torch.inference_mode()
def test_the_claim_of_a_second_model_on_a_small_one(small, monkeypatch):
    monkeypatch.setattr(gemma, "SANE", 1e4)
    monkeypatch.setattr(gemma, "LAST", 8)
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    found = gemma.measured(small, ids, "x", 3)
    assert found.passed and found.values["off"]["value"] == found.values["every_key"]["value"] == 0
    assert found.values["same"]["value"] == 3 and found.values["dense"]["value"] < gemma.CLOSE


@pytest.mark.parametrize("wrong", [
    {}, {"off_difference": 1e-9}, {"every_key": (1e-9, 0.0, 9.0)}, {"every_key": (0.0, 1e-3, 9.0)},
    {"every_key": (0.0, 0.0, 99.0)}, {"chunks": 1e-3}, {"generation": 2}, {"tokens": 24},
])  # fmt: skip
def test_anything_wrong_with_a_second_model_fails_its_claim(small, monkeypatch, wrong):
    found = {
        "off_difference": 0.0,
        "every_key": (0.0, 1e-6, 9.0),
        "chunks": 1e-6,
        "generation": 3,
        "tokens": 25,
    } | wrong
    ids = torch.ones(1, found.pop("tokens"), dtype=torch.long)
    for name, x in found.items():
        monkeypatch.setattr(gemma, name, lambda *_, x=x: x)
    assert gemma.measured(small, ids, "x", 3).passed == (wrong == {})


@torch.inference_mode()
def test_a_second_model_whose_enabling_changes_nothing_or_too_much_fails(small, monkeypatch):
    monkeypatch.setattr(gemma, "LAST", 8)
    ids = torch.randint(3, 97, (1, 90), generator=torch.Generator().manual_seed(1))
    assert gemma.off_difference(small, ids) == 0
    real = qaxis.sparse
    monkeypatch.setattr(gemma.qaxis, "sparse", lambda model, budget, **options: real(model, "dense"))
    assert gemma.off_difference(small, ids) > 0
    monkeypatch.setattr(gemma.qaxis, "sparse", lambda model, budget, **options: real(model, 2))
    assert gemma.every_key(small, ids)[1] > gemma.CLOSE
