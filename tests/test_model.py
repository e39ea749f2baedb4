"""qaxis in transformers, and the INT8 cache, on a small real Llama."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    FalconConfig,
    MptConfig,
    T5Config,
)

import qaxis


def prompt(n=150, batch=1):
    return torch.randint(0, 97, (batch, n), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def test_off_leaves_no_trace(llama):
    ids = prompt()
    stock, config = logits(llama, ids), llama.config.to_dict()
    attributes = [set(m.__dict__) for m in llama.modules()]
    with qaxis.sparse(llama, 8):
        on = logits(llama, ids)
    with pytest.raises(KeyError), qaxis.sparse(llama, 8):
        raise KeyError
    qaxis.disable(qaxis.enable(llama, qaxis.Budget(0.2, 4)))
    assert torch.equal(stock, logits(llama, ids)) and not torch.allclose(stock, on)
    assert llama.config.to_dict() == config and attributes == [set(m.__dict__) for m in llama.modules()]


def test_nested_contexts_restore_the_outer_budget(llama):
    ids = prompt()
    with qaxis.sparse(llama, 8):
        outer = logits(llama, ids)
        with qaxis.sparse(llama, 100):
            pass
        assert torch.equal(outer, logits(llama, ids))


def test_selection_mode_is_close_to_bitwise_mode(llama):
    ids = prompt()
    with qaxis.sparse(llama, 12):
        bitwise = logits(llama, ids)
    with qaxis.sparse(llama, 12, exactness="selection"):
        selection = logits(llama, ids)
    assert torch.allclose(bitwise, selection, atol=1e-4)


def test_left_padding_is_never_selected(llama):
    ids = prompt(60)
    padded = torch.cat([torch.zeros(1, 25, dtype=torch.long), ids], 1)
    mask = (torch.arange(85) >= 25).long()[None]
    for options in ({}, {"exactness": "selection"}):
        with qaxis.sparse(llama, qaxis.Budget(0.2, 4), **options):
            alone = logits(llama, ids)
            beside = logits(llama, padded, attention_mask=mask, position_ids=(torch.arange(85) - 25).clamp(min=0)[None])
        assert torch.allclose(alone, beside[:, 25:], atol=1e-4)


def test_decode_equals_prefill(llama):
    ids = prompt(70)
    with qaxis.sparse(llama, 10), torch.inference_mode():
        whole = llama(ids).logits
        first = llama(ids[:, :50], use_cache=True)
        rest = [llama(ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in range(50, 70)]
    assert torch.allclose(whole[:, 50:], torch.cat(rest, 1), atol=1e-4)


def test_generate_with_qaxis_and_int8(llama):
    ids = prompt(140)
    stock = llama.generate(ids, max_new_tokens=6, do_sample=False)
    qaxis.enable(llama, qaxis.Budget(1.0))
    assert torch.equal(stock, llama.generate(ids, max_new_tokens=6, do_sample=False))
    qaxis.disable(llama)
    out = llama.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=qaxis.Int8Cache(llama.config))
    beams = llama.generate(
        ids, max_new_tokens=6, num_beams=3, do_sample=False, past_key_values=qaxis.Int8Cache(llama.config)
    )
    assert out.shape == beams.shape == (1, 146)


def test_loading_with_the_implementation_name(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="qaxis").eval()
    with qaxis.sparse(llama):
        assert torch.equal(logits(loaded, prompt()), logits(llama, prompt()))
    qaxis.disable(loaded)
    assert torch.equal(logits(loaded, prompt()), logits(llama, prompt()))


def test_refusals(llama):
    with pytest.raises(ValueError, match="requires_grad"), qaxis.sparse(llama, 8):
        llama(prompt())
    with pytest.raises(ValueError, match="budget"):
        qaxis.enable(llama, 0)
    with pytest.raises(ValueError, match="exactness"):
        qaxis.enable(llama, 5, exactness="approximate")
    with pytest.raises(ValueError, match="bias"), qaxis.sparse(llama, 8), torch.inference_mode():
        llama(prompt(20), attention_mask=torch.randn(1, 1, 20, 20))
    with pytest.raises(ValueError, match="input_ids"):
        qaxis.perplexity(llama, prompt(1))
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("config", "bias"),
    [
        (BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2), "ALiBi"),
        (MptConfig(vocab_size=97, d_model=32, n_layers=1, n_heads=2), "ALiBi"),
        (FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True), "ALiBi"),
        (T5Config(vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2), "relative position bias"),
    ],
    ids=["bloom", "mpt", "falcon", "t5"],
)
def test_models_that_add_a_bias_to_scores_are_refused(config, bias):
    auto = AutoModelForSeq2SeqLM if config.model_type == "t5" else AutoModelForCausalLM
    model = auto.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=f"(?s)model='{type(model).__name__}'.*{bias}"):
        qaxis.enable(model, 8)
    assert model.config._attn_implementation == before


def test_selection_mode_stays_within_its_stated_bound():
    from qaxis.arithmetic.rounding import selection_output_bound
    from qaxis.attention.logits import Logits
    from qaxis.attention.selection import causal_mask
    from qaxis.models.masked import masked
    from qaxis.models.settings import Settings

    for i, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        for size in (0.2, 1.0, 3.0):
            g = torch.Generator().manual_seed(i)
            q = (torch.randn(1, 4, 90, 64, generator=g) * size).to(dtype)
            k, v = torch.randn(2, 1, 2, 90, 64, generator=g).to(dtype)
            budget = qaxis.Budget(0.1, 20)
            exact = qaxis.topk_attention(q, k, v, budget, backend="reference").output
            fast, _ = masked(q, k, v, causal_mask(90, 90, "cpu"), Logits(64**-0.5), Settings(budget))
            worst = float((exact.double() - fast.double()).abs().max())
            bound = selection_output_bound(q, k, v, 64**-0.5, 20)
            assert 0 < worst <= bound and (dtype != torch.float32 or bound < 1e-2)
