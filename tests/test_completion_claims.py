"""What measures completion: that the claims see a bit, an error above its bound and a cost that does not fall."""

from __future__ import annotations

from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import qaxis
from qaxis.storage.moments import GROUP
from selfcheck.checks import completing, completion_bound, completion_cost, golden
from selfcheck.checks.completion_bound import Blurred, Rows
from selfcheck.harness.claim import Context, NotRunError
from selfcheck.inputs import witness
from selfcheck.inputs.adversarial import make


def test_the_witness_without_a_completion_is_the_witness_of_attention():
    q, k, v = make("normal", (2, 4, 2, 3, 260, 32), torch.bfloat16, 5)
    plain = witness.attention(q, k, v, 0.1, 5)
    none = witness.completed(q, k, v, 0.1, 5, "none")
    assert torch.equal(plain["output"], none["output"]) and torch.equal(plain["indices"], none["indices"])


def test_the_witness_puts_the_tail_back_in_float64():
    q, k, v = make("normal", (1, 2, 1, 2, 400, 32), torch.float32, 6)
    for kind in ("mean", "linear"):
        got = witness.completed(q, k, v, 0.1, 5, kind)
        for i, n in enumerate((399, 400)):
            x = (k[0, :, :n].double() @ q[0, :, i, :, None].double())[..., 0]
            chosen = torch.zeros(2, n, dtype=torch.bool)
            for h in range(2):
                chosen[h, got["indices"][0, h, i][got["indices"][0, h, i] >= 0]] = True
            rows = Rows(x, v[0, :, :n].double().expand(2, -1, -1), chosen, n // GROUP * GROUP, 32**-0.5)
            right = completion_bound.output(rows, completion_bound.fitted(rows, kind))
            assert (got["output"][0, :, i].double() - right).abs().max() < 2e-6


def test_cases_of_a_digest_have_their_names_and_a_long_row():
    cases = golden.completed_cases()
    assert len({case.name for case in cases}) == len(cases) == 55 and all(case.shape[4] >= GROUP for case in cases)
    assert {case.completion for case in cases} == {"mean", "linear"}
    assert {case.dtype for case in cases if case.kind == "equal keys"} == set(golden.DTYPES)
    context = Context(device="cuda")
    stepped = [case for case in cases if len(golden.platforms(context, case)) == 3]
    assert stepped and all(case.shape[3] == 1 and case.shape[5] in (64, 128) for case in stepped)


def test_the_claim_sees_a_bit_where_it_is_on_and_where_it_is_off(monkeypatch):
    real = qaxis.topk_attention

    def found(change):
        tally = completing.Tally()
        monkeypatch.setattr(completing.qaxis, "topk_attention", change)
        completing._witnessed(Context(quick=True), tally)
        assert tally.rows["witness"] and tally.off
        return tally

    def one_ulp(x):
        return torch.nextafter(x.float(), torch.tensor(torch.inf)).to(x.dtype) if x.dtype == torch.float32 else x

    def on(*args, completion="none", **options):
        got = real(*args, completion=completion, **options)
        return got if completion == "none" else got._replace(output=one_ulp(got.output))

    def named(*args, completion=None, **options):
        got = real(*args, completion=completion or "none", **options)
        return got._replace(output=one_ulp(got.output)) if completion == "none" else got

    assert not found(real).wrong
    changed, off = found(on), found(named)
    assert changed.differ and not changed.off_differ and "witness: element" in changed.wrong[0]
    assert off.off_differ and not off.differ and off.wrong[0].split(":")[0].endswith("none, off")


@pytest.fixture
def rows():
    """A token of three heads, six keys of which are in no whole group; a fifth is selected."""
    generator = torch.Generator().manual_seed(3)
    x, v = torch.randn(3, 262, generator=generator).double(), torch.randn(3, 262, 8, generator=generator).double()
    v = v + 0.5 * x[..., None]
    best = x.topk(52).indices
    chosen = torch.zeros(3, 262, dtype=torch.bool).scatter_(1, best, True)
    return Rows(x, v, chosen, 256, 1.5)


@pytest.mark.parametrize("kind", completion_bound.KINDS)
def test_errors_are_those_of_the_theorem_and_below_the_bounds(rows, kind):
    line = completion_bound.fitted(rows, kind)
    seen = completion_bound.known(rows, line)
    error = completion_bound.output(rows, None) - completion_bound.output(rows, line)
    assert torch.allclose(error, completion_bound.predicted(rows, line), atol=1e-12)
    together, second = completion_bound.bounds(rows, line, seen)
    assert bool((error.norm(dim=-1) <= second).all() and (second <= together).all())
    # What a selector knows of the residuals is what they are.
    residuals = rows.fitted[..., None] * (rows.v - line.at(rows.x))
    assert torch.allclose(seen.together, residuals.square().sum((1, 2)).sqrt(), rtol=1e-6)
    assert torch.allclose(seen.most, torch.linalg.matrix_norm(residuals, 2), rtol=1e-6)


def test_the_worst_values_reach_the_bound(rows):
    line = completion_bound.fitted(rows, "linear")
    ruled, _ = completion_bound.straight(rows, rows.x, rows.p, line)
    bent = rows.fitted * (rows.p - ruled)
    # Values that bend as the weights do, and nothing else; none beside whole groups.
    worst = Rows(rows.x, bent[..., None].expand_as(rows.v).clone(), rows.chosen, rows.whole, rows.scale)
    line = completion_bound.fitted(worst, "linear")
    assert float(line.slope.abs().max()) < 1e-12
    error = (completion_bound.output(worst, None) - completion_bound.output(worst, line)).norm(dim=-1)
    together, second = completion_bound.bounds(worst, line, completion_bound.known(worst, line))
    assert torch.allclose(error, together, rtol=1e-3) and torch.allclose(error, second, rtol=1e-3)


def test_intervals_of_scores_are_part_of_the_bound(rows):
    line = completion_bound.fitted(rows, "linear")
    seen = completion_bound.known(rows, line)
    dense = completion_bound.output(rows, None)
    exact = completion_bound.blurred_bound(rows, line, seen, Blurred(rows.x, torch.zeros_like(rows.x)))
    assert torch.allclose(exact, completion_bound.bounds(rows, line, seen)[0])
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        width = rows.fitted * 0.2 * torch.rand(rows.x.shape, generator=generator).double()
        moved = width * torch.sign(torch.randn(rows.x.shape, generator=generator).double())
        blurred = Blurred(rows.x + moved, width)
        error = (dense - completion_bound.blurred_output(rows, line, blurred)).norm(dim=-1)
        bound = completion_bound.blurred_bound(rows, line, seen, blurred)
        assert bool((error <= bound).all() and (bound > exact).all())


def test_an_error_above_its_bound_is_counted():
    found = completion_bound.Found()
    found.held("a token", torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    assert found.violations == 1 and found.wrong == ["a token: 1 of 2 errors above the bound"]


def test_examples_lose_what_the_paper_says():
    mean, line = (completion_bound.exact_errors(*completion_bound.EXAMPLES[name]) for name in completion_bound.KINDS)
    assert mean == {"none": 0, "mean": Fraction(-3, 14), "linear": 0}
    assert line == {"none": 0, "mean": Fraction(-7, 45), "linear": Fraction(2, 45)}


def test_costs_are_paired_and_a_completion_that_costs_more_is_said(monkeypatch):
    plan = completion_cost.Plan(2, 4, {"c10": qaxis.Budget()})
    active: list[str] = ["dense"]
    added = {"dense": 0.0, "none": 0.1, "mean": 0.05, "linear": 0.01}

    class Sparse(nullcontext):
        def __init__(self, model, budget, completion, **how):
            super().__init__()
            assert how == {"exactness": "selection"}
            active[0] = completion

    def losses(model, ids):
        return torch.full((3,), 2.0, dtype=torch.float64) + ids.double().mean() + added[active[0]]

    def measured():
        context = Context()
        context.kept["subjects"] = SimpleNamespace(model=None), set()
        monkeypatch.setattr(Context, "texts", lambda *_: [torch.zeros(1, 4), torch.ones(1, 4)])
        return completion_cost.perplexity(context)

    monkeypatch.setattr(completion_cost, "_plan", lambda context: plan)
    monkeypatch.setattr(completion_cost, "nullcontext", lambda: Sparse(None, None, "dense", exactness="selection"))
    monkeypatch.setattr(completion_cost.qaxis, "sparse", Sparse)
    monkeypatch.setattr(completion_cost.qaxis, "token_losses", losses)
    result = measured()
    assert result.passed and result.cases == 8 and len(result.checks) == 4
    assert result.values["c10_none"]["value"] == pytest.approx(100 * (torch.tensor(0.1).exp() - 1).item(), rel=1e-4)
    assert result.values["c10_linear_upper"]["value"] == result.values["c10_linear"]["high"]
    assert result.values["c10_linear_left"]["value"] == pytest.approx(0.0956, abs=1e-3)
    added["mean"] = 0.2
    result = measured()
    assert not result.passed and result.verdict.startswith("c10, mean: +")


def test_the_long_texts_need_a_gpu():
    with pytest.raises(NotRunError, match="needs a GPU"):
        completion_cost.perplexity_gpu(Context())
