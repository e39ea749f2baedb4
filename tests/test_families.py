"""Model families: the measurements of the self-check, one family at a time, and what only some families have."""

from __future__ import annotations

import pytest
import torch

import qaxis
from qaxis.models import routing
from selfcheck.checks import architectures
from selfcheck.checks.families import (
    FAMILIES,
    TOKENS,
    build,
    decode_difference,
    off_difference,
    prompt,
    whole_budget,
    wrong_rows,
)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_family(family):
    assert off_difference(family) == 0
    between, dense = whole_budget(family)
    assert between == 0 and dense < 1e-4
    assert decode_difference(family) < 1e-4
    assert wrong_rows(family) == (0, 480) and wrong_rows(family, "selection") == (0, 480)


@torch.inference_mode()
def test_selection_stays_inside_the_window():
    model = build("Mistral", "sdpa")
    with qaxis.sparse(model, 6), qaxis.record(model, masks=True) as recording:
        model(prompt())
    mask = recording.layers[0].masks[0][0]
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)[None]
    assert not mask[:, (distance < 0) | (distance >= 24)].any() and mask.any()


@pytest.mark.parametrize("family", ["Gemma 2", "gpt-oss"])
@torch.inference_mode()
def test_soft_cap_and_sink_agree_with_eager_when_every_key_is_kept(family):
    model = build(family)
    dense = model(prompt()).logits
    outputs = []
    for options in ({"backend": "reference"}, {"backend": "triton"}, {"exactness": "selection"}):
        with qaxis.sparse(model, TOKENS, **options):
            outputs.append(model(prompt()).logits)
    assert torch.equal(outputs[0], outputs[1])
    for out in outputs:
        assert float((out - dense).abs().max()) < 1e-4 * float(dense.abs().max())
    # The modification matters: without it the logits would be others.
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
        if hasattr(module, "sinks"):
            module.sinks.fill_(-30.0)
    assert float((model(prompt()).logits - dense).abs().max()) > 1e-2 * float(dense.abs().max())


@pytest.mark.parametrize("architecture", architectures.chosen(quick=True), ids=lambda a: a.name)
@torch.inference_mode()
def test_architecture_is_equal_to_eager_or_refused(architecture):
    row = architectures.survey(architecture)
    assert row.outcome in ("equal", "refused"), row
    if row.outcome == "refused":
        assert row.reason
    else:
        assert row.difference is not None and row.difference < architectures.CLOSE


def surveyed(model_type: str) -> architectures.Row:
    (found,) = (a for a in architectures.chosen(quick=True) if a.model_type == model_type)
    with torch.inference_mode():
        return architectures.survey(found)


def test_the_survey_sees_a_mask_that_is_dropped(monkeypatch):
    # What was a mask lets a query see every key, those behind it too.
    monkeypatch.setattr(routing, "attend", _blind(routing.attend))
    row = surveyed("llama")
    assert row.outcome == "wrong" and "from eager" in row.reason


def _blind(attend):
    return lambda q, k, v, shown, allowed, *more: attend(q, k, v, None, lambda: torch.ones_like(allowed()), *more)


def test_the_survey_sees_a_switch_that_does_nothing(monkeypatch):
    monkeypatch.setattr(qaxis, "enable", lambda model, *args, **options: model)
    row = surveyed("llama")
    assert row.outcome == "wrong" and "changes nothing" in row.reason


def test_the_survey_sees_what_disable_leaves(monkeypatch):
    monkeypatch.setattr(qaxis, "disable", lambda model: model)
    row = surveyed("llama")
    assert row.outcome == "wrong" and row.reason.startswith("after disable: ")


def test_the_survey_sees_a_crash(monkeypatch):
    def crash(*_args, **_options):
        raise TypeError("unforeseen")

    monkeypatch.setattr(routing, "attend", crash)
    row = surveyed("llama")
    assert row.outcome == "crashed" and "unforeseen" in row.reason


def test_architectures_are_found_once_and_a_quick_run_knows_every_kind():
    found = [(a.model_type, a.name) for a in architectures.chosen(quick=False)]
    assert len(found) == len(set(found)) > 300
    quick = architectures.chosen(quick=True)
    assert len(quick) == len(architectures.QUICK)
    assert {a.kind for a in quick} == {"vision-language", "speech", "sequence-to-sequence", "causal"}
