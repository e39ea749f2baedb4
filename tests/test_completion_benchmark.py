"""What completion is measured with: every way against plain float64, runs that go on, the report."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qaxis
from benchmarks import completion, completion_plans, completion_report, completion_steps
from qaxis.storage.formats import FORMATS
from selfcheck.checks import families
from selfcheck.rivals import bytes_read, choosing_keys, completing, standing_in
from selfcheck.rivals.bytes_read import DENSE, Plan
from selfcheck.rivals.choosing_keys import Exact, Layer, Rows, Share, budgeted
from selfcheck.rivals.completing import Way, attend
from selfcheck.rivals.schemes import of_format
from selfcheck.rivals.streaming import streaming

HEADS, GROUPED, N, DIM = 2, 2, 300, 16
BUDGET = qaxis.Budget(0.1, 8)
EXACT = Exact(budgeted(BUDGET))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of queries, none a multiple of a group."""
    monkeypatch.setitem(completing.ELEMENTS, "cpu", HEADS * GROUPED * N * 100)


def layer(m: int = N, n: int = N) -> Layer:
    """Queries and keys with a direction in common, and values that go with keys: something to fit."""
    random = torch.Generator().manual_seed(5)
    q = torch.randn(HEADS, GROUPED, m, DIM, generator=random) + 1
    k = torch.randn(HEADS, n, DIM, generator=random) * 2 + 0.5
    return Layer(q, k, k[..., :8] / 4 + torch.randn(HEADS, n, 8, generator=random), DIM**-0.5)


def mean(x):
    return x.mean(0)


def stand_ins(kind: str, k: torch.Tensor, v: torch.Tensor, score: torch.Tensor, kept: torch.Tensor, x: Layer, h: int):
    """What stands for the value of every key a query of KV head ``h`` sees, ``[n, Dv]``, written out."""
    n, full = len(k), len(k) // 128 * 128
    if kind == "recent":
        return mean(v[-standing_in.RECENT :]).expand_as(v)
    if kind in ("mean", "linear"):
        some = (~kept[:full]).nonzero()[:, 0]
        line = mean(v[some]).expand_as(v).clone()
        if kind == "linear":
            away = score[some] - score[some].mean()
            slope = away @ v[some] / away.square().sum()
            line += (score - score[some].mean())[:, None] * slope
        return line
    if kind.endswith("of the rest"):
        size = int(kind.split()[1])
        out, away = torch.zeros_like(v), torch.zeros_like(score)
        for start in range(0, n, size):
            some = (~kept[start : start + size]).nonzero()[:, 0] + start
            if len(some):
                out[start : start + size] = mean(v[some])
                away[some] = score[some] - score[some].mean()
        if "slope" in kind and away.any():
            out += away[:, None] * (away @ v) / away.square().sum()
        return out
    if kind == "clusters":
        which = standing_in.clusters(x.k, N // 64)[h, :n]
        out = mean(v[:full] if full else v).expand_as(v).clone()
        for c in which[:full].unique():
            out[which == c] = mean(v[:full][which[:full] == c])
        return out
    size = 64 if kind == "block 64 + slope" else int(kind.split()[1])
    out, rise, square = torch.empty_like(v), torch.zeros(v.shape[1], dtype=v.dtype), 0.0
    for start in range(0, n, size):
        some = slice(start, min(start + size, n))
        out[some] = mean(v[some])
        if some.stop - start == size:
            if kind.startswith("weighted"):
                w = (k[some] @ x.q[h, :, some].double().mean((0, 1)) * x.scale).softmax(0)
                out[some] = w @ v[some]
            away = score[some] - score[some].mean()
            rise, square = rise + away @ v[some], square + away.square().sum()
    if kind.endswith("slope") and square:
        for start in range(0, n, size):
            some = slice(start, min(start + size, n))
            out[some] += (score[some] - score[some].mean())[:, None] * rise / square
    return out


def direct(x: Layer, kind: str) -> torch.Tensor:
    """The output of every query, one after the other, in float64."""
    m, n = x.q.shape[2], x.k.shape[1]
    q, k, v = (y.double() for y in x[:3])
    out = torch.empty(*x.q.shape[:3], x.v.shape[-1], dtype=torch.float64)
    for h in range(HEADS):
        for g in range(GROUPED):
            for i in range(m):
                seen = n - m + i + 1
                score = k[h, :seen] @ q[h, g, i]
                p = ((score - score.max()) * x.scale).exp()
                kept = torch.zeros(seen, dtype=torch.bool)
                kept[score.topk(BUDGET.k_eff(seen)).indices] = True
                values = v[h, :seen]
                if kind == "none" or (kind in ("mean", "linear") and seen < 128):
                    p = p * kept
                else:
                    stand = stand_ins(kind, k[h, :seen], values, score, kept, x, h)
                    values = torch.where(kept[:, None], values, stand)
                out[h, g, i] = p @ values / p.sum()
    return out


@pytest.mark.parametrize("kind", standing_in.EVERY)
def test_every_completion_is_what_it_says(kind):
    x = layer()
    right = direct(x, kind)
    assert float((attend(x, Way(EXACT, kind)) - right).abs().max()) < 2e-5
    if kind != "none":
        assert float((direct(x, "none") - right)[:, :, 200:].abs().max()) > 1e-2


def test_the_packages_own_kinds_are_the_packages():
    x = layer(m=20)
    for kind in ("none", *standing_in.PACKAGE):
        q, k, v = x.q.flatten(0, 1)[None], x.k[None], x.v[None]
        right = qaxis.topk_attention(q, k, v, BUDGET, backend="reference", completion=kind).output[0]
        assert float((attend(x, Way(EXACT, kind)).flatten(0, 1) - right).abs().max()) < 2e-5


def test_a_line_from_moments_is_the_line_from_scores():
    """Own masses of an exact selection are the exact ones, and moments are what the scores would give."""
    x = layer()
    both = [attend(x, Way(EXACT, kind)) for kind in ("own mass", "linear")]
    assert float((both[0] - both[1]).abs().max()) < 2e-5


def choice(x: Layer, select: Any) -> tuple[Rows, choosing_keys.Choice]:
    """All queries as one chunk."""
    scores = choosing_keys.by_heads(x.q, x.k.transpose(1, 2))
    before = x.k.shape[1] - x.q.shape[2]
    rows = Rows(x.q, scores, before)
    choosing_keys.hidden(scores, rows)
    return rows, select.prepare(x)(rows)


def test_exact_keeps_as_many_as_the_budget_says_and_none_that_is_not_seen():
    rows, found = choice(layer(), EXACT)
    assert torch.equal(found.selected.sum(-1), BUDGET.table(N)[rows.seen].expand(HEADS, GROUPED, -1))
    assert not (found.selected & ~rows.visible).any()


@pytest.mark.parametrize("tolerance", [0.3, 0.05])
def test_a_share_of_the_mass_is_kept_by_the_fewest_keys(tolerance):
    x = layer()
    rows, found = choice(x, Share(tolerance))
    p = (rows.scores.double() * x.scale).softmax(-1)
    rest = torch.where(found.selected, 0, p).sum(-1)
    least = torch.where(found.selected, p, torch.inf).amin(-1)
    assert bool((rest <= tolerance + 1e-6).all()) and bool((rest + least > tolerance - 1e-6).all())
    assert torch.equal(found.kept, found.selected.sum(-1))
    tally = completing.Tally()
    attend(x, Way(Share(tolerance), "linear"), tally)
    assert tally.mean == pytest.approx(float(found.kept.double().mean()))


@pytest.mark.parametrize("rival", ["Loki", "Double Sparsity"])
def test_a_rival_that_reads_whole_keys_is_exact(monkeypatch, rival):
    monkeypatch.setattr(choosing_keys.RIVALS[rival], "share", 1.0)
    x = layer()
    rows, found = choice(x, choosing_keys.RIVALS[rival](EXACT.counts))
    assert float((found.near - rows.scores)[rows.visible.expand_as(rows.scores)].abs().max()) < 1e-3
    right = choice(x, EXACT)[1].selected
    assert float((found.selected != right).float().mean()) < 1e-4
    whole = attend(x, Way(choosing_keys.RIVALS[rival](EXACT.counts), "own mass"))
    assert float((whole - attend(x, Way(EXACT, "linear")))[:, :, 150:].abs().mean()) < 1e-3


@pytest.mark.parametrize("rival", choosing_keys.RIVALS)
def test_a_rival_keeps_its_number_and_sees_nothing_ahead(rival):
    rows, found = choice(layer(), choosing_keys.RIVALS[rival](EXACT.counts))
    k = BUDGET.table(N)[rows.seen].expand(HEADS, GROUPED, -1)
    kept = found.selected.sum(-1)
    if rival == "Quest":
        assert bool((kept <= (k // 16).clamp(min=1) * 16).all()) and bool((kept >= 1).all())
        assert bool(found.selected.diagonal(dim1=-2, dim2=-1).all())
    else:
        assert torch.equal(kept, k)
    assert not (found.selected & ~rows.visible).any()
    assert bool((found.near[..., ~rows.visible] == choosing_keys.LOW).all())
    right = choice(layer(), EXACT)[1].selected
    if rival != "Quest":
        # Chance would be a tenth; pages live on neighbours that are alike, which these are not.
        assert 0.2 < float((found.selected & right).sum() / right.sum()) < 1


def test_quest_takes_the_pages_with_the_best_bounds():
    x = layer()
    i = N - 3
    rows, found = choice(x, choosing_keys.Quest(EXACT.counts))
    q, seen = x.q[1, 1, i], rows.first + i + 1
    bound = [float(torch.maximum(q * p.amin(0), q * p.amax(0)).sum()) for p in x.k[1, : seen // 16 * 16].split(16)]
    pages = {*np.argsort(bound)[::-1][: BUDGET.k_eff(seen) // 16 - 1].tolist(), seen // 16}
    assert {int(j) // 16 for j in found.selected[1, 1, i].nonzero()} == pages


def test_sparq_completes_by_its_own_share_of_the_mass():
    x = layer()
    rows, found = choice(x, choosing_keys.SparQ(EXACT.counts))
    i = N - 3
    kept, n = found.selected[1, 0, i], rows.first + i + 1
    alpha = (found.near[1, 0, i].double() * x.scale).softmax(-1)[kept].sum()
    p = (rows.scores[1, 0, i, kept].double() * x.scale).softmax(-1)
    right = alpha * (p @ x.v[1, kept].double()) + (1 - alpha) * x.v[1, :n].double().mean(0)
    out = attend(x, Way(choosing_keys.SparQ(EXACT.counts), "SparQ"))[1, 0, i]
    assert float((out - right).abs().max()) < 1e-5
    # The newest quarter of what is kept is always kept.
    assert bool(kept[n - BUDGET.k_eff(n) // 4 : n].all())


@pytest.mark.parametrize("rival", [name for name, kind in choosing_keys.RIVALS.items() if kind.by_groups])
@pytest.mark.parametrize("sharp", [1, 300])
def test_heads_of_a_group_keep_the_keys_with_most_of_their_weights_together(rival, sharp):
    """Also where most weights underflow."""
    x = layer()
    x = x._replace(q=x.q * sharp)
    rows, found = choice(x, choosing_keys.RIVALS[rival](EXACT.counts))
    assert torch.equal(found.selected[:, :1].expand_as(found.selected), found.selected)
    k = BUDGET.table(N)[rows.seen]
    assert torch.equal(found.selected.sum(-1), k.expand(HEADS, GROUPED, -1))
    near = found.near.double() * x.scale
    weights = near.log_softmax(-1).logsumexp(1)
    if rival == "SparQ":
        at = torch.arange(weights.shape[-1])
        weights = weights.masked_fill((at >= (rows.seen - k // 4)[:, None]) & rows.visible, torch.inf)
    least = torch.where(found.selected[:, 0], weights, torch.inf).amin(-1)
    most = torch.where(found.selected[:, 0], -torch.inf, weights).amax(-1)
    assert bool((least >= most - 1e-4 * sharp).all())
    weighed = near.softmax(-1).sum(1)
    assert (sharp > 1) == bool((weighed.float().sort(-1, descending=True).values[:, -1, int(k[-1])] == 0).any())


# A model.


def ids(n: int = N, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (1, n), generator=torch.Generator().manual_seed(seed))


def losses(model, text, way):
    hidden = completion.states(model, text, way)[0]
    return completion.compared(model, text, hidden, hidden)[0]


def test_dense_attention_is_the_models_own_and_windows_are_kept(llama):
    for model in (llama, families.build("Gemma 3", "sdpa")):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(10)
        assert float((losses(model, ids(), Way()) - qaxis.token_losses(model, ids())).abs().max()) < 1e-4
        assert model.config._attn_implementation == "sdpa"


def test_sparse_attention_is_the_packages(llama):
    with qaxis.sparse(llama, BUDGET, exactness="selection"):
        right = qaxis.token_losses(llama, ids())
    assert float((losses(llama, ids(), Way(EXACT)) - right).abs().max()) < 1e-4


def test_stored_keys_and_values_are_those_of_decoding(llama):
    with streaming(llama, of_format(FORMATS["int8"], 16)):
        right = qaxis.token_losses(llama, ids())
    found = losses(llama, ids(), Way(stored=True))
    assert float((found - right).abs().max()) < 1e-4 < float((found - losses(llama, ids(), Way())).abs().max())


@torch.inference_mode()
def test_losses_distances_and_agreement_are_those_of_the_logits(llama):
    a, b = (completion.states(llama, ids(), way)[0] for way in (Way(), Way(EXACT)))
    loss, kl, same = completion.compared(llama, ids(), a, b)
    p, q = (completion.logits_of(llama, x[:-1]).double().log_softmax(-1) for x in (a, b))
    assert float((kl - (p.exp() * (p - q)).sum(-1)).abs().max()) < 1e-6
    assert torch.equal(same, (p.argmax(-1) == q.argmax(-1)).double())
    assert float((loss + q.gather(1, ids()[0, 1:, None])[:, 0]).abs().max()) < 1e-5


# Plans, runs, the report.

SHAPE = bytes_read.Shape(9, 3, 64, 64)
COVERAGE = ("coverage", 0.1)


def test_bytes_are_those_of_the_formulas():
    n, k = np.array([1000.0]), np.array([100.0])
    read = {
        plan.name: float(bytes_read.bytes_of(plan, SHAPE, n, k)[0])
        for plan in (DENSE, *(p for some in completion_plans.parts().values() for p in some))
    }
    keys, values = 3 * 1000 * 128, 9 * 100 * 128
    assert read["dense"] == 2 * keys
    assert read["coverage 0.1, none"] == keys + values
    assert read["coverage 0.1, linear"] == keys + values + 3 * 4 * 128 * 65
    assert read["coverage 0.1, block 64"] == keys + values + keys / 64
    assert read["SparQ, coverage 0.1, none"] == keys / 4 + 2 * values / 3
    assert read["SparQ, coverage 0.1, SparQ"] == keys / 4 + 2 * values / 3 + 3 * 64 * 4
    assert read["Quest, coverage 0.1, linear"] == keys / 8 + keys + values + 3 * 4 * 128 * 65
    assert read["INT8"] == keys + 3 * 1000 / 128 * 128
    assert len(set(read)) == len(read)


@pytest.mark.parametrize("rival", ["Loki", "SparQ"])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("complete", ["none", "own mass"])
def test_at_equal_bytes_a_rival_keeps_all_that_they_pay_for(complete, stored, rival):
    plan, ours = Plan(("bytes", 0.1), complete, rival, stored), Plan(COVERAGE, "linear", stored=stored)
    n = np.arange(1, 8193)
    k = plan.counts(SHAPE, 8192)(torch.from_numpy(n)).numpy()
    paid, read, more = (
        bytes_read.bytes_of(p, SHAPE, n, x)
        for p, x in ((ours, qaxis.Budget(0.1, 64).table(8192)[1:].numpy()), (plan, k), (plan, k + 1))
    )
    assert bool(((read <= paid) | (k == 1)).all()) and bool(((more > paid) | (k == n)).all())
    assert k[-1] > 820


@pytest.mark.parametrize("kept", [3.0, 41.7])
def test_a_share_of_the_keys_with_a_mean_k(kept):
    counts = bytes_read.share_of(kept, 1000)(torch.arange(1, 1001))
    assert float(counts.double().mean()) == pytest.approx(kept, rel=0.01)


PLANS = [DENSE, Plan(COVERAGE), Plan(("tolerance", 0.1), "linear"), Plan(("like", 0.1), "linear")]


def store(path):
    return completion.Store(
        path, {"model": "smollm2", "length": N, "digest": "d", "shape": [6, 2, 16, 16], "device": "CPU"}
    )


def test_a_run_goes_on_where_it_was(llama, tmp_path, monkeypatch):
    texts, path, passes = [ids(), ids(seed=2)], tmp_path / "f.json", []
    own = completion.pass_of
    monkeypatch.setattr(completion, "pass_of", lambda *a: passes.append(a[3].name) or own(*a))
    clock = completion.Clock(None)
    monkeypatch.setattr(clock, "allows", lambda: len(passes) < 6)
    assert not completion.measure_texts(llama, texts, PLANS, store(path), clock)
    first = json.loads(path.read_text("utf-8"))
    assert [len(x["ways"]) for x in first["articles"].values()] == [4, 2]
    assert completion.measure_texts(llama, texts, PLANS, store(path), completion.Clock(None))
    assert sorted(passes) == sorted(2 * [plan.name for plan in PLANS])
    second = json.loads(path.read_text("utf-8"))
    for digest, article in first["articles"].items():
        for name, was in article["ways"].items():
            assert second["articles"][digest]["ways"][name] == was
    # A run that was never stopped finds the same: nothing depends on the passes before.
    completion.measure_texts(llama, texts, PLANS, store(tmp_path / "g.json"), completion.Clock(None))
    whole = json.loads((tmp_path / "g.json").read_text("utf-8"))
    for digest, article in whole["articles"].items():
        for name, right in article["ways"].items():
            found = second["articles"][digest]["ways"][name]
            assert {k: v for k, v in found.items() if k != "seconds"} == {
                k: v for k, v in right.items() if k != "seconds"
            }
    with pytest.raises(ValueError, match=r"length=10.*300"):
        completion.Store(path, {"model": "smollm2", "length": 10, "digest": "d"})


def test_no_pass_begins_that_would_end_too_late():
    clock = completion.Clock(100.0)
    assert clock.allows()
    clock.longest = 90.0
    assert not clock.allows()
    assert not completion.Clock(-1.0).allows() and completion.Clock(None).allows()


def document(changes: dict[str, list[float]], hits: int = 3) -> dict[str, Any]:
    """What a run at full length leaves, with these changes of the mean loss by way and article."""
    n, count = 8192, len(next(iter(changes.values())))
    at = completion_plans.bounds(n)

    def way(delta):
        return {"loss": [(3 + delta) * (m - 1) for m in at], "kl": [0.0] * len(at), "agree": at, "seconds": 1.0}

    articles = {
        str(i): {"index": i, "ways": {"dense": way(0), **{name: way(x[i]) for name, x in changes.items()}}}
        for i in range(count)
    }
    asked = {
        f"8000 {i}": {
            "article": {
                name: {"pass key": {"found": name.endswith("dense") or i < hits, "loss": 0.5}}
                for name in ("decode: dense", "decode: coverage 0.1, linear")
            }
        }
        for i in range(12)
    }
    about = {"model": "smollm2", "length": n, "digest": "d", "shape": list(SHAPE), "device": "CPU"}
    return {"about": about, "articles": articles, "tasks": asked}


def test_the_report_pairs_articles_and_says_what_is_missed():
    changes = {"coverage 0.1, linear": [0.001, 0.002, 0.003], "coverage 0.05, linear": [0.01, 0.02, 0.03]}
    whole = document(changes)
    found = completion_report.changed(whole, "coverage 0.1, linear", 8192)
    assert found.articles == 3 and found.percent == pytest.approx(100 * math.expm1(0.002))
    half = 4.302652729696142 * 0.001 / math.sqrt(3)
    assert (found.t_low, found.t_high) == pytest.approx([100 * math.expm1(0.002 + x) for x in (-half, half)])
    assert found.t_low < found.low < found.percent < found.high < found.t_high
    said = completion_report.report_of([whole], None)
    assert "coverage 0.1, linear <= +0.5 %: +0.449 % on 3 articles: met" in said
    assert "coverage 0.05, linear <= +1 %: +4.586 % on 3 articles: MISSED by 3.586" in said
    assert "k = 256, linear <= +2 %: not measured" in said
    assert "pass key, decode, coverage 0.1, linear: 3/12, dense 12/12: MISSED" in said
    assert "20.086" in said and "| linear | +0.200 [" in said
    # A second file adds its ways; nothing is counted twice.
    more = document({"k = 256, linear": [0.0, 0.0, 0.0]})
    said = completion_report.report_of([whole, more, more], 512)
    assert "k = 256, linear <= +2 %: +0.000 % on 3 articles: met" in said and "first 512 of 8192 tokens" in said
    with pytest.raises(ValueError, match=r"--tokens=500"):
        completion_report.report_of([whole], 500)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of letters and marks; every word of the tasks is one token."""
    said = " ".join([*completion.WORDS, *completion.NUMBERS, completion.BELL])
    said += " ".join(x for make in completion.TASKS.values() for i in range(12) for x in make(i))
    said += " Question : How many times did the bell ring ? Which word is most common in list Here a of words"
    words = [w for w, _ in pre_tokenizers.Whitespace().pre_tokenize_str(said)]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", *words]))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def talking() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=200, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip


def test_tasks_hide_what_they_ask_and_are_answered_alike_by_every_key(tmp_path):
    words, model, path = tokenizer(), talking(), tmp_path / "f.json"
    made = completion.prompts(words, ids(500), 3, 12, 400)
    (text, asked), (listed, common) = made["article"], made["list"]
    said = words.decode(text[0])
    assert set(asked) == {*completion.TASKS, "counting"} and all(x.shape[1] < 400 for x in (text, listed))
    for make in completion.TASKS.values():
        assert words.decode(words(make(3)[0]).input_ids) in said
    bell = words.decode(words(completion.BELL).input_ids)
    assert said.count(bell) == completion.NUMBERS.index(words.decode(asked["counting"].answer[0])) + 2
    drawn = [words.decode(listed[0]).split().count(word) for word in completion.WORDS]
    assert int(np.argmax(drawn)) == common["most frequent word"].right
    plans = [DENSE, Plan(("k", 500), "linear"), Plan(("k", 8), "none")]
    arguments = (model, words, [ids(500)] * 2, [400], plans, store(path))
    assert not completion.measure_tasks(*arguments, completion.Clock(-1.0))
    assert completion.measure_tasks(*arguments, completion.Clock(None))
    record = json.loads(path.read_text("utf-8"))["tasks"]["400 0"]["article"]
    ways = ["decode: dense", "both: k = 500, linear", "decode: k = 500, linear", "both: k = 8, none"]
    dense, whole, decoded, few = (record[name]["needle"]["loss"] for name in ways)
    assert dense == pytest.approx(whole, abs=1e-4) and dense == pytest.approx(decoded, abs=1e-4)
    assert abs(dense - few) > 1e-3
    other = completion.prompts(words, ids(500), 0, 2, 400)["article"]
    ids_of = torch.cat([other[0], other[1]["needle"].question, other[1]["needle"].answer], 1)
    length = other[1]["needle"].answer.shape[1]
    assert dense == pytest.approx(float(qaxis.token_losses(model, ids_of)[-length:].mean()), abs=1e-4)


def test_the_commands_on_a_folder(tmp_path):
    folder, out, texts = tmp_path / "model", tmp_path / "f.json", tmp_path / "texts.json"
    talking().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    texts.write_text(json.dumps([ids(200, seed)[0].tolist() for seed in range(3)]), "utf-8")

    def command(*words):
        done = CliRunner().invoke(completion.main, list(map(str, words)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    measured = ("measure", "--subject", folder, "--texts", texts, "--articles", 2, "--length", 200, "--out", out)
    only = ("--parts", "table,int8", "--only", "^INT8$|0.1, (mean|linear)$", "--device", "cpu")
    assert "coverage 0.1, linear: 2 passes of" in command(*measured, *only, "--estimate")
    assert not out.exists()
    command(*measured, *only)
    assert "dense: 0 passes" in command(*measured, *only, "--estimate")
    said = command("report", out)
    assert "| coverage 0.1, linear | 2 |" in said and "| INT8 | 2 |" in said and "### int8" in said
    with pytest.raises(ValueError, match=r"--parts='tabel'"):
        command(*measured, "--parts", "tabel")


def test_parts_of_a_file_are_joined(tmp_path):
    for i, data in enumerate((b"GG", b"UF", b"!")):
        (tmp_path / f"m.gguf.part{i:02}").write_bytes(data)
    with completion._file_of("gemma", tmp_path) as name:
        with open(name, "rb") as stream:
            assert stream.read() == b"GGUF!"
    (tmp_path / "m.gguf").write_bytes(b"")
    with completion._file_of("smollm2", tmp_path) as name:
        assert name == str(tmp_path / "m.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--subject"), completion._file_of("gemma", tmp_path / "empty"):
        pass


# Steps.


@torch.inference_mode()
def test_steps_give_the_losses_of_the_whole_text_and_a_stopped_run_goes_on(llama, tmp_path, monkeypatch):
    texts, about = [ids(N, seed) for seed in (1, 2)], {"model": "m", "length": N, "digest": "d", "steps": 20}
    made = completion_steps.Store(tmp_path / "steps.json", about)
    assert not completion_steps.measure(llama, texts, 20, made, completion.Clock(-1))
    assert completion_steps.measure(llama, texts, 20, made, completion.Clock(None))
    again = completion_steps.Store(tmp_path / "steps.json", about)
    monkeypatch.setattr(completion_steps, "losses_of_steps", lambda *_: pytest.fail("measured again"))
    assert completion_steps.measure(llama, texts, 20, again, completion.Clock(None))
    for text, article in zip(texts, again.document["articles"].values(), strict=True):
        assert [*article["ways"]] == [*completion_steps.ways()] and len(article["ways"]) == 11
        for name, way in completion_steps.ways().items():
            settings = {} if way is None else {"budget": qaxis.Budget(way[2], 64), "completion": way[1]}
            with qaxis.sparse(llama, **settings) if settings else contextlib.nullcontext():
                right = float(qaxis.token_losses(llama, text)[-20:].sum())
            assert article["ways"][name]["loss"] == pytest.approx(right, rel=1e-4)
    assert completion_steps.report_of(again, 20).count("[") == 14
    with pytest.raises(ValueError, match="steps=30"):
        completion_steps.Store(tmp_path / "steps.json", {**about, "steps": 30})
    # Of one article there is no interval, of none no number.
    again.document["articles"].popitem()
    assert completion_steps.report_of(again, 20).count("[") == 0
    assert completion_steps.change(again, 20, "dense", "no such way") is None
    (article,) = again.document["articles"].values()
    article["ways"]["near"] = {"loss": article["ways"]["dense"]["loss"] + 1e-6}
    assert completion_steps.change(again, 20, "dense", "near").percent == pytest.approx(5e-6, rel=1e-3)
    assert abs(completion_steps.change(again, 20, "bounds, linear, 0.1", "codes, linear, 0.1").percent) < 1e-3
