"""What measures completion: that the claims see a bit, an error above its bound and a cost that does not fall."""

from __future__ import annotations

import json
from contextlib import nullcontext
from fnmatch import fnmatchcase
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

import qaxis
from qaxis.attention import completion
from qaxis.cuda import emulator
from qaxis.decode import cuda
from qaxis.storage.moments import GROUP
from selfcheck.checks import completing, completion_bound, completion_cost, completion_speed, golden
from selfcheck.checks.completion_bound import Blurred, Rows
from selfcheck.harness import seal
from selfcheck.harness.claim import Context, NotRunError
from selfcheck.inputs import witness
from selfcheck.inputs.adversarial import make

from . import speeds


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


def test_steps_on_a_gpu_have_every_kind_dtype_and_way_to_cut_the_work():
    plan = list(completing._steps(Context(device="cuda")))
    assert {kind for kind, *_ in plan} == set(completing.KINDS)
    assert {dtype for _, _, dtype, _ in plan} == set(golden.DTYPES)
    cuts = set()
    for shape, k_eff in {(shape, k_eff) for _, shape, _, k_eff in plan}:
        kinds = [(kind, dtype) for kind, x, dtype, _ in plan if x == shape]
        assert len(kinds) >= 4 and shape[3] == 1 and shape[4] % GROUP
        made = step_shape(*(shape[i] for i in (0, 1, 2, 4, 5)), k_eff)
        cut = cuda.plan_of(made, 132)
        assert cut is not None
        cuts.add((cut.cluster, cut.padded // cuda.SUB > cut.cluster * cut.threads))
    assert cuts == {(1, False), (2, False), (8, False), (4, True)}
    assert {shape[1] // shape[2] for _, shape, _, _ in plan} == {3, 4, cuda.MOST_GROUP}


def step_shape(batch, heads, kv_heads, n, dim, k_eff):
    return cuda.Shape(
        batch=batch, heads=heads, kv_heads=kv_heads, n=n, head_dim=dim, dim_v=dim, k_eff=k_eff, dtype=torch.bfloat16,
        device=torch.device("cpu"), each=8, coded=True, stored=False, forced=False, logits=0, completed=True,
    )  # fmt: skip


def test_a_step_is_timed_beside_the_same_without_a_completion_round_by_round():
    found = speeds.completed()
    assert found.passed and found.cases == len(found.data["rows"]) == 7 * 6
    name = "codes_linear_b1_n131072_k2048"
    assert found.values[name]["value"] == pytest.approx(1.1) and found.values[f"{name}_clean"]["value"] == 1.2
    assert found.values[f"{name}_us"]["value"] == pytest.approx(110.0) and found.values[f"{name}_us"]["unit"] == "us"
    assert found.values["codes_none_b1_n131072_k2048_clean_us"]["value"] == pytest.approx(80.0)
    assert found.values["keys_linear_b1_n131035_k2048"]["value"] == pytest.approx(1.05)
    assert found.values["codes_mean_b1_n8192_k820"]["value"] == pytest.approx(1.05)
    # Both steps of a round are slow together: rounds that were resampled apart would say nothing.
    for v in (v for key, v in found.values.items() if "_linear_" in key and not key.endswith("us")):
        assert v["value"] * 0.99 < v["low"] <= v["value"] <= v["high"] < v["value"] * 1.01 and v["n"] == 41
    assert not any(key.startswith(("codes_none", "keys_none")) and not key.endswith("us") for key in found.values)
    row = found.data["rows"][2]
    assert (row["way"], row["completion"]) == ("codes", "linear")
    assert [(x["best"], round(x["dense"])) for x in (row, row["clean"])] == [("cuDNN", 200), ("Triton", 170)]
    json.dumps(vars(found))
    (target,) = next(c["targets"] for c in seal.claims() if c["id"] == "completion-speed")
    assert [key for key in found.values if fnmatchcase(key, target["values"])] == [name] and target["most"] == 1.08
    wrong = speeds.completed(wrong="keys/mean")
    assert not wrong.passed and wrong.verdict == "B=1 N=8192 k=820 keys/mean: another set or output"
    with pytest.raises(NotRunError, match="needs a GPU"):
        completion_speed.step(Context())


@pytest.mark.skipif(not emulator.available(), reason="needs g++")
def test_a_timed_step_has_the_bits_of_its_reference():
    case = completion_speed.Case((1, 300, 20), torch.Generator().manual_seed(5), (2, 1, 64))
    steps = case.steps()
    assert [one.name for one in steps] == [f"{way}/{kind}" for way in ("codes", "keys") for kind in completion.KINDS]
    got = {one.name: one() for one in steps}
    assert not any(case.differs(one, got[one.name]) for one in steps)
    outputs = {name: x.output for name, x in got.items()}
    for way in ("codes", "keys"):
        assert not torch.equal(outputs[f"{way}/linear"], outputs[f"{way}/none"])
        assert not torch.equal(outputs[f"{way}/linear"], outputs[f"{way}/mean"])
    for one in steps:
        step = got[one.name]
        near = step.output.clone()
        near[0, 1, 0, 3] = torch.nextafter(near[0, 1, 0, 3], torch.tensor(torch.inf, dtype=near.dtype))
        assert case.differs(one, step._replace(output=near))
        other = step.indices.clone()
        other[0, 0, 0, 0] += 1
        assert case.differs(one, step._replace(indices=other))
    assert case.differs(steps[1], got["codes/linear"]) and case.differs(steps[4], got["keys/none"])
