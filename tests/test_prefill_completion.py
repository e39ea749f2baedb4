"""Completion of whole prompts: prefill on matrix products and the masked engine against the canonical sums."""

from __future__ import annotations

import pytest
import torch

import qaxis
from qaxis.arithmetic import reference as canonical
from qaxis.attention import backend as door
from qaxis.attention.always import NONE, Always
from qaxis.attention.completion import Seen, completed_weights, seen_of
from qaxis.attention.logits import Logits
from qaxis.attention.selection import indices_to_mask
from qaxis.budget import as_budget
from qaxis.models import masked as engine
from qaxis.models.masked import masked
from qaxis.models.settings import Settings
from qaxis.prefill import PrefillTuning, prefill_attention, selected_positions

from .test_prefill_seen import bell, seen

both_kinds = pytest.mark.parametrize("kind", ["mean", "linear"])
#: of the largest value, as prefill_attention states it; an eighth of what is put back, or less
TOLERANCE = {torch.float32: 2.0**-17, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def qkv(b=1, h=2, kv=1, m=3, n=300, d=64, dv=None, dtype=torch.float32):
    """Values that depend on their keys, and have a mean: there is something to put back."""
    q, k = bell(b, h, m, d), bell(b, kv, n, d, seed=1)
    v = bell(b, kv, n, dv or d, seed=2) + k[..., : dv or d] + 1
    return q.to(dtype), k.to(dtype), v.to(dtype)


def in_double(q, k, v, indices, allowed, logits, kind, offset):
    """The formula in float64, from exact products."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores, selected = q.double() @ keys.transpose(-1, -2), indices_to_mask(indices, k.shape[2])
    weights = completed_weights(scores, selected, allowed, seen_of(allowed, offset), logits, kind)
    assert weights.dtype == torch.float64
    return weights @ values


def check(
    q, k, v, budget, kind, *, logits=None, always=NONE, offset=0, tuning=None, atol=None, moved=True, **what
):  # fmt: skip
    """Selection, output and what completion moves, against the canonical sums and the formula in float64.

    Returns:
        the output; what it is in float64.
    """
    tuning, kept = tuning or PrefillTuning(wide_programs=1), {"logits": logits, "always": always, **what}
    out = prefill_attention(
        q, k, v, budget, selection=True, backend="triton", tuning=tuning, completion=kind, offset=offset, **kept
    )
    allowed, used = seen(q.shape[0], q.shape[2], k.shape[2], **what), logits or Logits(q.shape[3] ** -0.5)
    k_eff = as_budget(budget, k.shape[2]).of(allowed)
    indices = door.select(q, k, allowed, k_eff, backend="reference", always=always)
    assert torch.equal(selected_positions(out.bits), indices)
    exact = door.attend(
        q, k, v, indices, used, backend="reference", completion=kind, seen=seen_of(allowed, offset)
    ).double()
    double = in_double(q, k, v, indices, allowed, used, kind, offset)
    largest = float(v.double().abs().max())
    assert out.output.dtype == q.dtype
    atol = atol or TOLERANCE[q.dtype]
    for wanted in (exact, double):
        assert torch.allclose(out.output.double(), wanted, rtol=0, atol=atol * largest)
    none = door.attend(q, k, v, indices, used, backend="reference").double()
    # A test of nothing would pass: what is put back is far more than what it may be off.
    assert float((double - none).abs().max()) > 8 * atol * largest or not moved
    return out.output, double


# ---- prefill --------------------------------------------------------------------------------------------------------


@both_kinds
@pytest.mark.parametrize(
    "shape, dtype",
    [
        ({}, torch.float32),
        ({}, torch.bfloat16),
        ({}, torch.float16),
        ({"b": 2, "h": 4, "kv": 2, "d": 16}, torch.float32),
        ({"m": 70, "n": 290, "h": 1}, torch.float32),
        ({"d": 48, "dv": 32}, torch.float32),
    ],
    ids=["float32", "bfloat16", "float16", "batches and heads", "tiles of queries", "dimensions"],
)
def test_what_is_left_out_is_put_back(shape, dtype, kind):
    check(*qkv(**shape, dtype=dtype), 20, kind)


@both_kinds
def test_a_query_counts_the_groups_that_are_complete_at_its_own_position(kind):
    """Of 258 keys the queries of a chunk see one group or two, those of a prompt none at first."""
    q, k, v = qkv(h=1, m=6, n=258, d=32)
    check(q, k, v, 12, kind)
    q, k, v = qkv(h=1, m=3, n=129, d=32)
    completed, none = check(q, k, v, 12, kind)[0], prefill_attention(q, k, v, 12).output
    assert torch.equal(completed[:, :, 0], none[:, :, 0])
    assert not torch.equal(completed[:, :, 1], none[:, :, 1])


SEEN = [
    ("pads", {"pads": [0, 130]}),
    ("pads that end a group", {"pads": [128, 172]}),
    ("a row that sees nothing", {"pads": [300, 20]}),
    ("window", {"window": 200}),
    ("pads and window", {"pads": [60, 125], "window": 240}),
    ("not causal", {"causal": False, "pads": [0, 9]}),
]


@both_kinds
@pytest.mark.parametrize("what", [w for _, w in SEEN], ids=[n for n, _ in SEEN])
def test_groups_lie_inside_what_a_query_sees(what, kind):
    check(*qkv(b=2, d=32), 16, kind, **what)


@pytest.mark.parametrize("offset", [1, 100, 128, 1000003])
def test_groups_count_from_the_first_token_of_a_window(offset):
    check(*qkv(d=32, n=290), 16, "linear", window=280, offset=offset)


@pytest.mark.parametrize("window", [150, 300])
def test_a_stretch_behind_its_origin_counts_the_same_groups(window):
    check(*qkv(d=32, h=1, n=1400), 16, "linear", window=window, offset=30)


SINKS = bell(2, seed=5) * 3
LOGITS = {
    "scale": Logits(0.3),
    "cap": Logits(0.3, soft_cap=2.0),
    "sink": Logits(0.1, sink=SINKS),
    "cap and a high sink": Logits(0.1, soft_cap=5.0, sink=SINKS + 2),
}


@both_kinds
@pytest.mark.parametrize("logits", LOGITS.values(), ids=LOGITS)
def test_logits_are_completed_as_they_are(logits, kind):
    check(*qkv(d=32), 16, kind, logits=logits)


@pytest.mark.parametrize("always", [Always(4, 0), Always(0, 7), Always(4, 11)])
@pytest.mark.parametrize("what", [{}, {"pads": [290, 5], "window": 200}], ids=["all", "pads and window"])
def test_what_is_always_kept_is_not_put_back(always, what):
    check(*qkv(b=2, d=32), qaxis.Budget(0.05, 16), "linear", always=always, **what)


@both_kinds
def test_stretches_and_chunks_complete_the_same(kind):
    """Later chunks of queries, heads one after the other."""
    tuning = PrefillTuning(memory=60000, wide_programs=1)
    check(*qkv(h=2, kv=2, m=7, n=270, d=32), 12, kind, tuning=tuning)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_a_complete_group_nothing_is_put_back(dtype, kind):
    for what in ({"n": 127}, {"window": 128, "offset": 1, "n": 300}, {"pads": [175], "n": 300}):
        n, more = what["n"], {name: x for name, x in what.items() if name != "n"}
        q, k, v = qkv(h=1, m=2, n=n, d=32, dtype=dtype)
        completed = prefill_attention(q, k, v, 10, completion=kind, **more).output
        more.pop("offset", None)
        none = prefill_attention(q, k, v, 10, **more).output
        assert torch.equal(completed, none) or dtype == torch.float16
        # Interpreted, the one rounds its weights to float16, as a GPU does; the other does not.
        assert torch.allclose(completed.float(), none.float(), rtol=0, atol=2.0**-8)


@both_kinds
def test_with_all_keys_selected_nothing_is_left(kind):
    q, k, v = qkv(d=32)
    assert torch.equal(prefill_attention(q, k, v, 300, completion=kind).output, prefill_attention(q, k, v, 300).output)


def groups_first(dtype=torch.float32):
    """Every query scores the keys of the two complete groups higher than the others of 300."""
    q, k, v = qkv(d=32, dtype=dtype)
    q[..., 0], k[..., 0] = 4, 4
    k[:, :, 256:, 0] = -8
    return q, k, v


@both_kinds
@pytest.mark.parametrize("budget", [256, 270])
def test_where_every_complete_group_is_kept_nothing_is_put_back(budget, kind):
    """Mass is left, but no key that an affine weight could stand for."""
    q, k, v = groups_first()
    for causal in (True, False):
        completed, none = (
            prefill_attention(q, k, v, budget, completion=each, causal=causal).output for each in (kind, "none")
        )
        assert torch.equal(completed, none)
    check(q, k, v, budget, kind, moved=False)
    check_masked(q, k, v, budget, kind)


@both_kinds
@pytest.mark.parametrize("left", [1, 2, 5, 40, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_few_keys_left_of_complete_groups_carry_all_that_is_left(left, dtype, kind):
    """A few lie close together next to the scores of all, and have no slope."""
    q, k, v = groups_first(dtype)
    check(q, k, v, 256 - left, kind, moved=False)
    check_masked(q, k, v, 256 - left, kind)


def test_two_keys_left_whose_scores_are_equal_share_alike():
    """Far from the usual score and close to zero: what their squares differ by is rounding."""
    q, k, v = groups_first()
    k[:, :, [100, 200]] = 1e-3 * k[:, :, :1]
    line, mean = (prefill_attention(q, k, v, 254, completion=kind).output for kind in ("linear", "mean"))
    assert torch.equal(line, mean)


def test_scores_that_hardly_differ_have_no_slope():
    q, k, v = qkv(h=1, m=2, d=32)
    k[:] = k[:, :, :1] * (1 + 1e-4 * bell(300, 1, seed=3))
    check(q, k, v, 16, "linear", moved=False)
    for zero in (q * 0, q):
        line, mean = (prefill_attention(zero, k, v, 16, completion=kind).output for kind in ("linear", "mean"))
        assert torch.equal(line, mean)


@pytest.mark.parametrize("away", [75.0, 1000.0])
def test_the_spread_is_right_where_all_scores_are_large(away):
    """Sums of squares of the scores themselves, as the canonical moments are, lose a spread that is small beside them.

    At 1000 it is so small that there is no slope.
    """
    q, k, v = qkv(d=32)
    q[..., 0], k[..., 0] = 4, away
    output, double = check(q, k, v, 16, "linear", atol=2.0**-12)
    assert torch.allclose(output.double(), double, rtol=0, atol=2.0 ** (-18 if away < 100 else -14))


def test_shares_below_the_smallest_float16_are_put_back():
    """As in a long prompt whose best key is far above the others."""
    q, k, v = qkv(h=1, d=32, dtype=torch.float16)
    k[:, :, 5] = 4 * q[:, :, 0, :] / q[:, :, 0, :].norm()
    v[:] = 30
    v[:, :, 5] = 0
    what = {"logits": Logits(2.3), "completion": "mean"}
    few = prefill_attention(q[:, :, :1], k, v, 1, causal=False, **what).output.float()
    indices = qaxis.topk_indices(q[:, :, :1], k, 1, causal=False)
    wanted = in_double(
        q[:, :, :1], k, v, indices, torch.ones(1, 1, 1, 300, dtype=torch.bool), Logits(2.3), "mean", 0
    ).float()
    assert 0 < float(wanted[0, 0, 0, 0]) and torch.allclose(few, wanted, rtol=2.0**-8)


def test_a_long_key_that_is_left_or_kept_counts_as_it_is():
    for sign in (1, -1):
        q, k, v = qkv(d=32)
        k[:, :, 140] = sign * 8 * q[:, 0, 1:2]
        check(q, k, v, 16, "linear", tuning=PrefillTuning(wide_programs=1, long_rows=4))


def test_block_is_linear_and_none_is_none():
    q, k, v = qkv(h=1, m=2, d=32)
    line, none = (prefill_attention(q, k, v, 16, completion=kind).output for kind in ("linear", "none"))
    assert torch.equal(prefill_attention(q, k, v, 16, completion="block").output, line)
    assert torch.equal(prefill_attention(q, k, v, 16).output, none) and not torch.equal(line, none)


@pytest.mark.parametrize(
    "argument, given",
    [
        ("completion", {"completion": "cubic"}),
        ("completion", {"completion": None}),
        ("offset", {"offset": -1}),
        ("offset", {"offset": 1.0}),
        ("offset", {"offset": True}),
        ("always", {"completion": "mean", "always": Always(8, 8)}),
        ("budget.tolerance", {"budget": qaxis.Budget(0, 1, 0.1)}),
        ("budget.tolerance", {"budget": qaxis.Budget(0, 1, 0.1), "completion": "mean"}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(argument, given):
    with pytest.raises(ValueError) as refused:
        prefill_attention(*qkv(d=32), **{"budget": 16, **given})
    assert str(refused.value).startswith(f"{argument}=")


# ---- the masked engine ----------------------------------------------------------------------------------------------


def check_masked(q, k, v, budget, kind, *, logits=None, always=NONE, offset=0, **what):
    allowed, used = seen(q.shape[0], q.shape[2], k.shape[2], **what), logits or Logits(q.shape[3] ** -0.5)
    settings = Settings(as_budget(budget), always=always, completion=kind)
    out, kept = masked(q, k, v, allowed, used, settings, watched=True, offset=offset)
    k_eff = door.keys_of(as_budget(budget, k.shape[2]), q, k, allowed, used)
    indices = door.select(q, k, allowed, k_eff, backend="reference", always=always)
    assert torch.equal(kept(), indices_to_mask(indices, k.shape[2]))
    exact = door.attend(
        q, k, v, indices, used, backend="reference", completion=kind, seen=seen_of(allowed, offset)
    ).double()
    largest = float(v.double().abs().max())
    assert out.dtype == q.dtype
    assert torch.allclose(out.double(), exact, rtol=0, atol=TOLERANCE[q.dtype] * largest)
    assert bool((out[~allowed.any(-1).expand(out.shape[:3])] == 0).all())


@both_kinds
@pytest.mark.parametrize(
    "what",
    [
        {},
        {"pads": [0, 130]},
        {"pads": [300, 3], "window": 200, "offset": 40},
        {"logits": LOGITS["cap and a high sink"]},
        {"always": Always(3, 4)},
    ],
    ids=["all", "pads", "window", "logits", "always"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_attention_is_completed(what, kind, dtype):
    check_masked(*qkv(b=2, h=2, m=140, d=32, dtype=dtype), 16, kind, **what)


@pytest.mark.parametrize("always", [NONE, Always(3, 4)])
@pytest.mark.parametrize("kind", ["none", "linear"])
@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_masked_attention_keeps_to_a_tolerance(scale, kind, always):
    q, k, v = qkv(b=2, h=4, kv=2, m=9, d=32)
    budget, logits = qaxis.Budget(0.02, 16, 0.2), Logits(scale)
    check_masked(q, k, v, budget, kind, logits=logits, always=always)
    _, kept = masked(q, k, v, seen(2, 9, 300), logits, Settings(budget), watched=True)
    indices = qaxis.topk_indices(q, k, budget, scale=scale)
    assert torch.equal(kept(), indices_to_mask(indices, 300))
    # A test of nothing would pass: the least of the budget is not what decides.
    assert int(kept().sum(-1).amax()) > budget.k_eff(300)


def test_masked_attention_is_completed_in_chunks_of_any_size(monkeypatch):
    q, k, v = qkv(h=2, m=140, d=32)
    allowed, settings = seen(1, 140, 300), Settings(as_budget(16), completion="linear")
    whole, _ = masked(q, k, v, allowed, Logits(0.2), settings)
    monkeypatch.setattr(engine, "_QUERIES", 64)
    monkeypatch.setattr(engine, "_SCORES", 20 * 2 * 300)
    sizes: list[int] = []

    def watched(scores: torch.Tensor, *rest: object) -> torch.Tensor:
        sizes.append(scores.shape[2])
        return completed_weights(scores, *rest)

    monkeypatch.setattr(engine, "completed_weights", watched)
    parts, _ = masked(q, k, v, allowed, Logits(0.2), settings)
    assert max(sizes) == 20 and sum(sizes) == 140
    assert torch.allclose(parts, whole, rtol=0, atol=1e-5)


def test_a_dense_layer_leaves_nothing_out():
    q, k, v = qkv(d=32)
    allowed = seen(1, 3, 300)
    plain, completed = (
        masked(q, k, v, allowed, Logits(0.2), Settings(None, completion=kind))[0] for kind in ("none", "linear")
    )
    assert torch.equal(plain, completed)


def test_keys_hidden_between_visible_ones_are_refused():
    q, k, v = qkv(d=32)
    allowed = seen(1, 3, 300)
    allowed[..., 150] = False
    with pytest.raises(ValueError, match="^attention_mask="):
        masked(q, k, v, allowed, Logits(0.2), Settings(as_budget(16), completion="mean"))


def test_the_formula_counts_the_groups_that_a_canonical_row_counts():
    """A check of the helper: one row by hand."""
    q, k, v = qkv(h=1, m=1, n=260, d=16)
    scores = canonical.scores(q, k)
    selected = torch.zeros(1, 1, 1, 260, dtype=torch.bool)
    best = int(scores.argmax())
    assert best < 256
    selected[..., best] = True
    range_seen = Seen(torch.tensor(0), torch.tensor(260))
    weights = completed_weights(scores, selected, torch.ones_like(selected), range_seen, Logits(0.25), "mean")
    p = torch.exp(0.25 * (scores - scores.max()))[0, 0, 0]
    rest = float(p.sum() - 1)
    others = torch.cat([v[0, 0, :best], v[0, 0, best + 1 : 256]])
    by_hand = (v[0, 0, best] + rest * others.mean(0)) / (1 + rest)
    assert torch.allclose((weights @ v)[0, 0, 0], by_hand, atol=1e-5)
