"""Completion of what top-k leaves out, canonical: against sums in double precision, and what it has to keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qaxis
from qaxis.attention import backend, completed, completion
from qaxis.attention.always import Always
from qaxis.attention.completion import GROUP, Seen, completed_weights, kind_of, seen_of
from qaxis.attention.logits import Logits
from qaxis.attention.reference import logits_of
from qaxis.attention.selection import causal_mask
from qaxis.storage.moments import add_groups, empty
from selfcheck.checks.completion_bound import ROUNDED
from selfcheck.inputs import witness

KINDS = ("mean", "linear")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tensors(n, m=2, batch=1, kv_heads=1, group=1, dim=16, dim_v=16, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    sizes = ((kv_heads * group, m, dim), (kv_heads, n, dim), (kv_heads, n, dim_v))
    q, k, v = (torch.randn(batch, *size, generator=g) for size in sizes)
    # Keys with a direction of their own, and values that follow them: there is a mean, and a slope.
    k = k + torch.randn(batch, kv_heads, 1, dim, generator=g)
    v = v + 0.3 + k[..., :1]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def as_rows(x, like):
    """A range of :class:`Seen` as int64 ``[B, H, M]``."""
    return x.expand(*like.shape[:3])


def direct(q, k, v, indices, kind, seen, logits):
    """The meaning, key by key, in double precision."""
    group, n = q.shape[1] // k.shape[1], k.shape[2]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    begins, ends = (as_rows(x, q) for x in seen[:2])
    place = torch.arange(n)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).reshape(-1, 3).tolist():
        keys, values = k[b, h // group].double(), v[b, h // group].double()
        score = keys @ q[b, h, i].double()
        logit = logits.of(score)
        begin, end = int(begins[b, h, i]), int(ends[b, h, i])
        visible = (place >= begin) & (place < end)
        taken = torch.zeros(n, dtype=torch.bool)
        taken[indices[b, h, i][indices[b, h, i] >= 0]] = True
        top = logit[taken].max()
        p = torch.where(visible, (logit - top).exp(), 0.0)
        token = place + seen.offset
        fitted = (token // GROUP * GROUP >= begin + seen.offset) & (token // GROUP * GROUP + GROUP <= end + seen.offset)
        squares = score[fitted].square().sum()
        fitted &= ~taken
        stand_in = torch.zeros_like(values)
        if fitted.any():
            s, x = score[fitted], values[fitted]
            spread = (s - s.mean()).square().sum()
            sloped = kind == "linear" and spread > squares * 2.0**-12
            slope = ((s - s.mean()) @ (x - x.mean(0))) / spread if sloped else torch.zeros_like(x[0])
            stand_in = x.mean(0) + (score - s.mean())[:, None] * slope
        below = p[taken].sum() if not fitted.any() else p.sum()
        if logits.sink is not None:
            below = below + (logits.sink[h].double() - top).exp()
        rest = visible & ~taken & fitted.any()
        out[b, h, i] = (p[taken] @ values[taken] + p[rest] @ stand_in[rest]) / below
    return out


def all_seen(m, n):
    return seen_of(causal_mask(m, n, "cpu"))


def same_bits(x, y):
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(129, 420), m=st.integers(1, 4), batch=st.integers(1, 2), kv_heads=st.integers(1, 2),
    group=st.integers(1, 3), dim=st.sampled_from([3, 8, 16, 17]), dim_v=st.sampled_from([1, 5, 16]),
    k_eff=st.integers(1, 100), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6), scale=st.sampled_from([None, 0.01, 1.0]),
)  # fmt: skip
def test_any_shape_is_what_double_precision_gives(
    n, m, batch, kv_heads, group, dim, dim_v, k_eff, kind, dtype, seed, scale
):
    q, k, v = tensors(n, m, batch, kv_heads, group, dim, dim_v, seed, dtype)
    got = qaxis.topk_attention(q, k, v, k_eff, scale=scale, completion=kind)
    expected = direct(q, k, v, got.indices, kind, all_seen(m, n), Logits(dim**-0.5 if scale is None else scale))
    rounding = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got.output.double(), expected, rtol=rounding, atol=rounding)
    plain = qaxis.topk_attention(q, k, v, k_eff, scale=scale)
    assert torch.equal(got.indices, plain.indices)
    assert torch.equal(got.indices, qaxis.topk_indices(q, k, k_eff))


@pytest.mark.parametrize("n", [200, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_put_back_brings_the_output_to_dense(n, kind):
    q, k, v = tensors(n, kv_heads=2, group=2)
    dense = qaxis.topk_attention(q, k, v, n).output
    plain, whole = (qaxis.topk_attention(q, k, v, 16, completion=c).output for c in ("none", kind))
    assert (whole - dense).norm() < 0.6 * (plain - dense).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_complete_group_nothing_is_put_back(kind):
    # The newer of two queries sees a complete group, the older one key less.
    q, k, v = tensors(128, kv_heads=2, group=2)
    plain, whole = (qaxis.topk_attention(q, k, v, 9, completion=c).output for c in ("none", kind))
    assert same_bits(plain[:, :, 0], whole[:, :, 0]) and not torch.equal(plain[:, :, 1], whole[:, :, 1])
    few = [qaxis.topk_attention(q, k[:, :, :100], v[:, :, :100], 9, completion=c).output for c in ("none", kind)]
    assert same_bits(*few)
    # A group that padding or a window cuts is not complete.
    indices = qaxis.topk_indices(q, k, 9, causal=False)
    seen = Seen(torch.tensor([1]), torch.tensor([128]))
    cut = [backend.attend(q, k, v, indices, Logits(0.25), completion=c, seen=seen) for c in ("none", kind)]
    assert same_bits(*cut)


@pytest.mark.parametrize("kind", KINDS)
def test_with_every_key_kept_it_is_dense(kind):
    q, k, v = tensors(300, kv_heads=2, group=2)
    assert same_bits(*(qaxis.topk_attention(q, k, v, 300, completion=c).output for c in ("none", kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_that_keeps_no_key_gets_zeros(kind):
    q, k, v = tensors(200)
    none = torch.full((1, 1, 2, 4), -1)
    out = completed.attend(q, k, v, none, Logits(0.25), kind, Seen(torch.tensor([0]), torch.tensor([200])))
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_all_the_same_are_given_back(kind):
    q, k, v = tensors(333, kv_heads=2, group=2)
    v = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(3)).expand(1, 2, 333, 16)
    out = qaxis.topk_attention(q, k, v, 7, completion=kind).output
    torch.testing.assert_close(out, v.repeat_interleave(2, 1)[:, :, :2], rtol=1e-5, atol=1e-6)


def test_values_on_a_line_along_the_query_are_restored():
    """Attention to all keys, from a few of them; also where most of a token's keys are in no complete group."""
    for n in (255, 256, 384):
        q, k, v = tensors(n, m=1)
        score = qaxis.canonical_scores(q, k)[0, 0, 0]
        v = (0.5 + score[:, None] * torch.linspace(-1, 1, 16))[None, None]
        dense = qaxis.topk_attention(q, k, v, n).output
        line, mean = (qaxis.topk_attention(q, k, v, 5, completion=kind).output for kind in ("linear", "mean"))
        torch.testing.assert_close(line, dense, rtol=1e-4, atol=1e-4)
        assert float((mean - dense).abs().max()) > 0.05


def test_equal_scores_have_no_slope():
    """Where rounding alone tells scores apart a line is a constant, and nothing is divided by it."""
    q, k, v = tensors(256)
    # Alike, and nearly so.
    for noise in (0.0, 1e-3, 4e-3):
        near = q[:, :, :1] + noise * k
        mean, line = (qaxis.topk_attention(q[:, :, :1], near, v, 9, completion=kind).output for kind in KINDS)
        assert same_bits(mean, line) and line.isfinite().all()
    k = k[:, :, :1].expand(1, 1, 256, 16)
    zero = qaxis.topk_attention(torch.zeros_like(q), k, v, 9, completion="linear").output
    # All weights are the same, and all keys but the nine stand for the mean of those of complete groups.
    groups = [v[0, 0, 9:n].mean(0) for n in (128, 256)]
    by_hand = [(v[0, 0, :9].sum(0) + (n - 9) * mean) / n for n, mean in zip((255, 256), groups, strict=True)]
    torch.testing.assert_close(zero[0, 0], torch.stack(by_hand), rtol=1e-5, atol=1e-5)


def test_names():
    q, k, v = tensors(256)
    line, block = (qaxis.topk_attention(q, k, v, 9, completion=c).output for c in ("linear", "block"))
    assert same_bits(line, block) and kind_of("block") == "linear"
    for wrong in ("quadratic", "", "Mean", None, 1, True, ["mean"]):
        with pytest.raises(ValueError, match="completion=.*'none', 'mean' or 'linear'"):
            qaxis.topk_attention(q, k, v, 9, completion=wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_how_tensors_lie_and_who_selects_changes_no_bit(kind, dtype):
    q, k, v = tensors(260, kv_heads=2, group=2, batch=2, dtype=dtype)
    plain = qaxis.topk_attention(q, k, v, 9, completion=kind).output
    strided = [torch.cat([x, x], -1)[..., : x.shape[-1]] for x in (q, k, v)]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for other in (strided, turned):
        assert same_bits(plain, qaxis.topk_attention(*other, 9, completion=kind).output)
    assert plain.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_triton_selects_and_the_bits_are_the_same(kind):
    q, k, v = tensors(140, m=1)
    got = [qaxis.topk_attention(q, k, v, 9, completion=kind, backend=b).output for b in ("reference", "triton")]
    assert same_bits(*got)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_rows_and_batches_are_computed_as_if_alone(kind, monkeypatch):
    q, k, v = tensors(300, m=5, batch=2, kv_heads=2, group=3)
    whole = qaxis.topk_attention(q, k, v, 11, completion=kind).output
    for b in range(2):
        for h in range(6):
            one = (q[b : b + 1, h : h + 1], *(x[b : b + 1, h // 3 : h // 3 + 1] for x in (k, v)))
            assert same_bits(whole[b, h], qaxis.topk_attention(*one, 11, completion=kind).output[0, 0])
    for i in range(5):
        n = 296 + i
        row = qaxis.topk_attention(q[:, :, i : i + 1], k[:, :, :n], v[:, :, :n], 11, completion=kind).output
        assert same_bits(whole[:, :, i : i + 1], row)
    # However many rows are handled at once.
    from qaxis.arithmetic import reference as canonical

    for elements in (1, 16 * 512 * 2):
        monkeypatch.setattr(canonical, "CHUNK_ELEMENTS", elements)
        some = [x[:, :1] for x in (q[:1], k[:1], v[:1])]
        assert same_bits(whole[:1, :1], qaxis.topk_attention(*some, 11, completion=kind).output)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logits", [Logits(0.25), Logits(0.25, 2.0), Logits(0.25, None, torch.tensor([0.5, 9.0]))])
def test_caps_sinks_padding_and_kept_keys(kind, logits):
    """What models add: raw scores are fitted, logits weighed; the sink may be above every key."""
    q, k, v = tensors(300, m=3, group=2)
    place, always = torch.arange(300), Always(3, 5)
    seen = Seen(torch.tensor([[[0, 40, 200]]]), torch.tensor([[[300, 290, 300]]]))
    allowed = (place >= seen.begin[..., None]) & (place < seen.end[..., None])
    assert all(map(torch.equal, seen[:2], seen_of(allowed)[:2]))
    indices = backend.select(q, k, allowed, torch.full((1, 1, 3), 20), always=always)
    got = backend.attend(q, k, v, indices, logits, completion=kind, seen=seen)
    torch.testing.assert_close(got.double(), direct(q, k, v, indices, kind, seen, logits), rtol=1e-4, atol=1e-4)
    # The last sees no complete group.
    plain = backend.attend(q, k, v, indices, logits)
    assert same_bits(got[:, :, 2], plain[:, :, 2]) and not torch.equal(got[:, :, 1], plain[:, :, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropped", [1, 16, 127, 140])
def test_what_a_window_dropped_is_counted(kind, dropped):
    """Groups and runs begin with the first token, wherever the first key is that is left."""
    q, k, v = tensors(600, m=2, group=2)
    begin, end = torch.tensor([[[150, 160]]]), torch.tensor([[[590, 600]]])
    place = torch.arange(600)
    allowed = (place >= begin[..., None]) & (place < end[..., None])
    indices = backend.select(q, k, allowed, torch.full((1, 1, 2), 20))
    whole = backend.attend(q, k, v, indices, Logits(0.25), completion=kind, seen=Seen(begin, end))
    left = (k[:, :, dropped:], v[:, :, dropped:], indices - dropped)
    seen = Seen(begin - dropped, end - dropped, dropped)
    assert same_bits(whole, backend.attend(q, *left, Logits(0.25), completion=kind, seen=seen))
    away = Seen(begin - dropped, end - dropped, dropped + 1)
    assert not torch.equal(whole, backend.attend(q, *left, Logits(0.25), completion=kind, seen=away))


def test_a_mask_with_holes_is_refused():
    allowed = torch.ones(1, 1, 2, 9, dtype=torch.bool)
    assert seen_of(allowed)[0].tolist() == [[[0, 0]]] and seen_of(allowed)[1].tolist() == [[[9, 9]]]
    allowed[0, 0, 1, 4] = False
    with pytest.raises(ValueError, match=r"attention_mask.*hidden between visible ones.*range of keys"):
        seen_of(allowed)
    # Nothing at all is a range.
    begin, end, offset = seen_of(torch.zeros(1, 1, 1, 9, dtype=torch.bool), 7)
    assert int(begin) == int(end) == 0 and offset == 7


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_dense_product_give_the_same(kind):
    """What is not canonical: a coefficient for every value."""
    q, k, v = tensors(400, m=3, batch=2, kv_heads=2, group=2)
    seen, logits = all_seen(3, 400), Logits(0.25, 5.0, torch.tensor([0.5, 1.0, -4.0, 7.0]))
    place = torch.arange(400)
    visible = ((place >= seen.begin[..., None]) & (place < seen.end[..., None])).expand(2, 4, 3, 400)
    indices = qaxis.topk_indices(q, k, 20)
    selected = torch.zeros(2, 4, 3, 400, dtype=torch.bool).scatter_(-1, indices, True)
    weights = completed_weights(qaxis.canonical_scores(q, k), selected, visible, seen, logits, kind)
    canonical = completed.attend(q, k, v, indices, logits, kind, seen)
    torch.testing.assert_close(weights @ v.repeat_interleave(2, 1), canonical, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "query", "number"),
    [(1.0, 1.0, 2e36), (1e18, 1e-18, 1e20), (3e37, 1e-38, 1.0), (1e18, 1e-18, 3e36), (1.0, 1.0, 3e38)],
    ids=["values", "products", "keys", "both", "what is chosen"],
)
def test_where_moments_leave_float32_what_cannot_be_put_back_is_not(kind, key, query, number):
    """Of values that are all equal every mean, and so every output, is that value."""
    q, k, v = tensors(256, m=1)
    q, k, v = q * query, k * key, torch.full_like(v, number)
    got, plain = (qaxis.topk_attention(q, k, v, 9, completion=x) for x in (kind, "none"))
    right = witness.completed(q, k, v, 0, 9, kind)
    assert same_bits(got.output, right["output"])
    if number < 3e38:
        torch.testing.assert_close(got.output, plain.output, rtol=1e-5, atol=0)
    else:
        assert same_bits(got.output, plain.output)


# ---- selected keys are taken out of sums over all keys ---------------------------------------------------------------


def bell(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_scores(score, v, k_eff, kind, logits=None):
    """Output of one query with the raw scores ``[N]``, which has the witness's bits, and that of double precision."""
    logits, n = logits or Logits(1.0), len(score)
    q, k, v = torch.zeros(1, 1, 1, 4), bell(1, 1, n, 4, seed=1), v[None, None]
    q[..., 0], k[..., 0] = 1.0, score
    indices, seen = qaxis.topk_indices(q, k, k_eff), all_seen(1, n)
    got = backend.attend(q, k, v, indices, logits, completion=kind, seen=seen)
    told = witness.Setting(scale=logits.scale, cap=logits.soft_cap)
    right = witness.completed(q, k, v, 0, k_eff, kind, told)
    assert torch.equal(indices, right["indices"]) and same_bits(got, right["output"])
    return got, direct(q, k, v, indices, kind, seen, logits)


def rounded(got, right, v):
    """Whether an output is that of double precision, as near as the theorem's claim asks for."""
    return float((got.double() - right).abs().max()) <= ROUNDED * float(v.abs().max())


def tail_of(score, selected):
    """Sums of rows with the raw scores ``[R, N]`` of which the keys ``selected [N]`` are selected."""
    picked, seen, exact = score[:, selected], torch.ones_like(score, dtype=torch.bool), score.double()
    live, no_values = torch.ones_like(picked, dtype=torch.bool), (torch.zeros(1), torch.zeros(len(score), 1))
    fitted = completion.Fitted(score.shape[1], exact.sum(-1).float(), exact.square().sum(-1).float(), *no_values)
    chosen = completion.Chosen(picked, picked, live, live)
    return completion.tail(score, seen, chosen, picked.amax(-1), fitted, Logits(1.0))


LEFT = {
    "one": [7], "two of two runs": [37, 200], "one of every run": list(range(3, 300, 16)),
    "one run": list(range(32, 48)), "one run and one key": [*range(64, 80), 81], "of no complete group": [5, 90, 299],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("apart", [0.0, 3.0, 20.0])
def test_runs_of_which_all_or_all_but_one_key_is_kept(left, kind, apart):
    score, v = bell(300, seed=2), bell(300, 8, seed=3)
    score[left] = score.min() - apart - bell(len(left), seed=4).abs()
    v[left] += score[left, None] + apart
    assert rounded(*of_scores(score, v, 300 - len(left), kind), v)


@pytest.mark.parametrize("apart", [0.0, 5.0, 69.0])
@pytest.mark.parametrize("left", [[], [11], [5, 17, 40], list(range(16, 32))])
def test_the_mass_of_what_is_left_is_near_and_never_negative(left, apart):
    """What rounding leaves of weights that were taken out is at most 20 2^-24 of all; some would fall below zero."""
    score, selected = bell(500, 48), torch.ones(48, dtype=torch.bool)
    selected[left] = False
    score[:, left] -= apart
    rest, p = tail_of(score, selected), torch.exp(score.double() - score[:, selected].amax(-1, keepdim=True))
    right = p[:, ~selected].sum(-1)
    assert (rest.mass >= 0).all() and bool(((rest.mass - right).abs() <= 20 * 2.0**-24 * p.sum(-1)).all())
    assert rest.mass.any() and (apart < 69 or not rest.mass.all())
    assert torch.equal(rest.many, torch.full((500,), 48 - len(left)))
    away = p * (score.double() - score.double().mean(-1, keepdim=True))
    assert bool(((rest.excess - away[:, ~selected].sum(-1)).abs() <= 40 * 2.0**-24 * away.abs().sum(-1)).all())


def test_sums_have_no_order():
    """Wherever runs and selected keys lie, sums over them are the same."""
    score, selected = bell(50, 160), bell(160, seed=1) > 0
    turned = torch.arange(160).unflatten(0, (10, 16)).flip(0).flatten()
    assert all(map(torch.equal, tail_of(score, selected), tail_of(score[:, turned], selected[turned])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [1, 8, 15])
def test_keys_that_vanish_beside_a_selected_one_of_their_run(kept, kind):
    """Weights of 1e-30 of the selected ones': nothing of them is left in the run's mass, nor has it to be."""
    for seed in range(10):
        score, v = bell(256, seed=seed), bell(256, 8, seed=seed + 50)
        left = (torch.arange(256) % 16 + seed) % 16 >= kept
        score[left] = 2.5 * score[left] - 69 - 10
        v[left] += 0.2 * score[left, None].clamp(-84, -74) + 16
        assert float(score[~left].min()) > float(score[left].max()) + 60
        assert rounded(*of_scores(score, v, int((~left).sum()), kind), v)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coverage", [0.9, 0.99])
@pytest.mark.parametrize("n", [129, 500, 1100])
def test_nearly_all_keys_are_kept(n, coverage, kind):
    q, k, v = tensors(n, m=3, kv_heads=2, group=2)
    got = qaxis.topk_attention(q, k, v, qaxis.Budget(coverage, 1), completion=kind)
    assert 0 < n - got.indices.shape[-1] < n / 9
    right = witness.completed(q, k, v, coverage, 1, kind)
    assert torch.equal(got.indices, right["indices"]) and same_bits(got.output, right["output"])
    assert rounded(got.output, direct(q, k, v, got.indices, kind, all_seen(3, n), Logits(0.25)), v)


@pytest.mark.parametrize("begin", [0, 256], ids=["everywhere", "behind the complete groups"])
@pytest.mark.parametrize(("edge", "scale"), [(3e38, 1.0), (5e37, 1e-38)], ids=["distances", "their sum"])
def test_an_excess_that_leaves_float32_leaves_no_slope(begin, edge, scale):
    """Scores at both edges of the range: what is infinite makes the line a mean, whose mass is as it was."""
    # Values so small that their products with scores add up to something finite.
    score, v = bell(300, seed=2), bell(300, 8, seed=3) * 2.0**-6
    score[begin:] = -edge
    score[begin + 3 :: 16] = edge
    kept = int((score > 1e37).sum()) + 20
    line, mean = (of_scores(score, v, kept, kind, Logits(scale)) for kind in ("linear", "mean"))
    assert line[0].isfinite().all() and same_bits(line[0], mean[0])
    assert rounded(*mean, v)


def test_the_tail_is_relative_to_the_logit_of_the_highest_selected_score():
    """A cap that rounds may give the higher of two neighbours among scores the lower logit."""
    score, v, capped = 6 + 0.5 * bell(300, seed=2), bell(300, 8, seed=3), Logits(1.0, 50.0)
    low = torch.tensor(8.569159507751465)
    score[40], score[80] = low, torch.nextafter(low, torch.tensor(9.0))
    logit = logits_of(score, capped)
    assert score.argmax() == 80 and logit.argmax() == 40 and logit[40] > logit[80]
    for kind in KINDS:
        assert rounded(*of_scores(score, v, 30, kind, capped), v)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_are_weighed_by_what_is_known_of_their_scores(kind):
    """Mass and excess are those of known scores; the line, and weights of selected keys, of canonical ones."""
    q, k, v = (x[0, 0] for x in tensors(300, m=1))
    logits, moments = Logits(0.25), add_groups(empty(k, v), k, v, 0, 2)
    chosen = qaxis.topk_indices(q[None, None], k[None, None], 40)[0, 0]
    visible, arguments = torch.ones(1, 300, dtype=torch.bool), (moments, (0, 2), logits, 0, kind)
    # Never above the canonical one: what is above the top counts as that.
    got = completed.rows_of(q, k, v, chosen, visible, *arguments, known=lambda x: (8 * x).floor() / 8)
    score, values = k.double() @ q[0].double(), v.double()
    known = (8 * score.float()).floor().double() / 8
    taken = torch.zeros(300, dtype=torch.bool).scatter_(0, chosen[0], True)
    top, fitted = score[taken].max(), ~taken & (torch.arange(300) < 256)
    p = torch.exp((torch.where(taken, score, known) - top) * 0.25)
    s, x = score[fitted], values[fitted]
    slope = (s - s.mean()) @ (x - x.mean(0)) / (s - s.mean()).square().sum() * (kind == "linear")
    drawn = x.mean(0) + (known - s.mean())[:, None] * slope
    right = p @ torch.where(taken[:, None], values, drawn) / p.sum()
    assert rounded(got[0], right, v)
    assert not rounded(got[0], direct(*(y[None, None] for y in (q, k, v, chosen)), kind, all_seen(1, 300), logits), v)
