"""generate() with qaxis on: batches, caches, beams, layers, kept keys, recording, strictness."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import qaxis
from qaxis.attention.selection import causal_mask


def prompt(n=90, batch=1):
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def test_a_padded_batch_generates_what_its_members_generate_alone(llama):
    ids = prompt(40)
    padded = torch.cat([torch.zeros(1, 15, dtype=torch.long), ids], 1)
    both = torch.cat([prompt(55), padded])
    mask = torch.ones_like(both)
    mask[1, :15] = 0
    with qaxis.sparse(llama, qaxis.Budget(0.2, 5)):
        alone = llama.generate(ids, **GREEDY)[:, 40:]
        batch = llama.generate(both, attention_mask=mask, **GREEDY)[:, 55:]
    assert torch.equal(batch[1:], alone)


def test_chunks_and_turns_are_one_prefill(llama):
    ids = prompt()
    with qaxis.sparse(llama, qaxis.Budget(0.2, 5)), torch.inference_mode():
        whole = llama(ids).logits
        cache, parts = DynamicCache(config=llama.config), []
        for start, stop in ((0, 30), (30, 31), (31, 64), (64, 90)):
            parts.append(llama(ids[:, start:stop], past_key_values=cache).logits)
    assert torch.allclose(whole, torch.cat(parts, 1), atol=1e-4)


def test_static_cache_beams_and_assisted_decoding_agree_with_the_plain_way(llama):
    ids = prompt(50)
    with qaxis.sparse(llama, qaxis.Budget(0.2, 5)):
        plain = llama.generate(ids, **GREEDY)
        static = llama.generate(ids, past_key_values=StaticCache(llama.config, max_cache_len=80), **GREEDY)
        assert torch.equal(plain, static)
        assert torch.equal(plain, llama.generate(ids, prompt_lookup_num_tokens=3, **GREEDY))
        beams = llama.generate(ids, num_beams=3, **GREEDY)
        again = llama.generate(ids, num_beams=3, **GREEDY)
    assert torch.equal(beams, again) and beams.shape == plain.shape


def test_off_generates_what_the_stock_model_generates(llama):
    ids = prompt(50)
    ways = (
        {}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "disable_compile": True},
    )  # fmt: skip
    stock = [llama.generate(ids, **GREEDY, **way) for way in ways]
    qaxis.disable(qaxis.enable(llama, 8, strict=True))
    for way, expected in zip(ways, stock, strict=True):
        assert torch.equal(expected, llama.generate(ids, **GREEDY, **way))


def test_layers_with_their_own_budgets(llama):
    ids = prompt()
    with qaxis.sparse(llama, {0: "dense", "default": 7}), qaxis.record(llama) as recording:
        named = logits(llama, ids)
    assert recording.layers[0].dense_calls == 1 and recording.layers[1].sparse_calls == 1
    assert float(recording.layers[0].mass.min()) > 1 - 1e-5
    assert float(recording.layers[1].k_eff.max()) == pytest.approx((sum(range(1, 8)) + 7 * 83) / 90)
    with qaxis.sparse(llama, 7, first_dense=1):
        assert torch.equal(named, logits(llama, ids))
    for wrong in ({5: 3}, {"all": 3}, {0: "sparse"}, {0: 0}):
        with pytest.raises(ValueError, match="budget"):
            qaxis.enable(llama, wrong)
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [{}, {"backend": "triton"}, {"exactness": "selection"}])
def test_sinks_and_recent_keys_are_kept_inside_the_budget(llama, options):
    # Long enough that coverage exceeds the minimum; the interpreter gets no more than that.
    tokens = 50 if options.get("backend") == "triton" else 90
    ids, budget = prompt()[:, :tokens], qaxis.Budget(0.2, 9)
    with qaxis.sparse(llama, budget, sinks=2, recent=4, **options), qaxis.record(llama, masks=True) as recording:
        logits(llama, ids)
        logits(llama, ids[:, :1])
    kept = recording.layers[0].masks[0][0]
    for i in range(tokens):
        assert (kept[:, i].sum(-1) == budget.k_eff(i + 1)).all()
        assert kept[:, i, :2][:, : i + 1].all() and kept[:, i, max(0, i - 3) : i + 1].all()
    # Between them, the best: a plain top-k of the remaining keys and the remaining budget.
    with qaxis.sparse(llama, 3), qaxis.record(llama, masks=True):
        pass
    with pytest.raises(ValueError, match="sinks"):
        qaxis.enable(llama, 5, sinks=3, recent=3)
    with pytest.raises(ValueError, match="recent"):
        qaxis.enable(llama, 5, recent=-1)


def test_kept_keys_leave_the_rest_to_the_ranking():
    from qaxis.attention import backend
    from qaxis.attention.always import Always

    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 6, 16, generator=g), torch.randn(2, 2, 50, 16, generator=g)
    allowed = causal_mask(6, 50, "cpu")
    k_eff = qaxis.Budget(0, 12).of(allowed)
    got = [backend.select(q, k, allowed, k_eff, backend=b, always=Always(2, 3)) for b in ("reference", "triton")]
    assert torch.equal(*got)
    score = qaxis.canonical_scores(q, k)
    for i in range(6):
        last = 44 + i
        middle = score[:, :, i, 2 : last - 2].topk(7).indices + 2
        expected = torch.cat([middle, torch.tensor([0, 1, last - 2, last - 1, last]).expand(2, 4, 5)], -1)
        assert torch.equal(got[0][:, :, i], expected.sort(-1).values)


def test_recording_changes_no_bit_and_counts(llama):
    ids = prompt(80, batch=2)
    with qaxis.sparse(llama, qaxis.Budget(0.1, 6)):
        plain, unrecorded = logits(llama, ids), llama.generate(ids[:1], **GREEDY)
        with qaxis.record(llama) as recording:
            assert torch.equal(plain, logits(llama, ids))
            out = llama.generate(ids[:1], **GREEDY)
        assert torch.equal(out, unrecorded)
        assert torch.equal(plain, logits(llama, ids))
    assert recording.tokens == 160 + 80 + out.shape[1] - 80 - 1 and recording.tokens_per_second > 0
    layer = recording.layers[1]
    assert layer.queries == recording.tokens and layer.k_eff.shape == (6,) and recording.fallbacks == 0
    assert bool((layer.entropy > 0).all()) and bool(((layer.mass > 0) & (layer.mass < 1)).all())
    assert "tokens/s" in recording.summary()
    with pytest.raises(ValueError, match="enabled"), qaxis.record(llama):
        pass


def test_falling_back_is_counted_and_strict_mode_raises(llama):
    ids = prompt(20)
    with qaxis.sparse(llama, 8):
        with qaxis.record(llama) as recording:
            llama.set_attn_implementation("sdpa")
            logits(llama, ids)
            llama.set_attn_implementation("qaxis")
        assert recording.fallbacks == 2
    with qaxis.sparse(llama, 8, strict=True):
        logits(llama, ids)
        llama.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="layer 0: attention did not go through qaxis"):
            logits(llama, ids)
        llama.set_attn_implementation("qaxis")
    logits(llama, ids)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_decode_step_gives_the_same_bits_and_leaves_attention_alone(llama, monkeypatch, compiler):
    from qaxis.models import routing

    traced = []
    plain_attend = routing.attend
    monkeypatch.setattr(routing, "attend", lambda *a: traced.append(torch.compiler.is_compiling()) or plain_attend(*a))
    ids = prompt(40)
    with qaxis.sparse(llama, 8), torch.inference_mode():
        first = llama(ids, use_cache=True)
        plain = llama(ids[:, -1:], past_key_values=first.past_key_values).logits
        first = llama(ids, use_cache=True)
        torch._dynamo.reset()
        step = torch.compile(llama.forward, backend=compiler)
        compiled = step(ids[:, -1:], past_key_values=first.past_key_values).logits
    assert torch.equal(plain, compiled)
    assert traced == [False] * 8
