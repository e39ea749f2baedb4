"""Whose loss: cross entropy of the logits that the model itself computes, whatever it does to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import qaxis
from qaxis.measures import own_logits
from selfcheck.checks.families import GQA, LOCAL, SMALL

TOKENS = 70
#: what a family does besides multiplying hidden states and head: (configuration)
FAMILIES: dict[str, Any] = {
    "Llama": tf.LlamaConfig(**GQA),
    "soft cap (Gemma 2)": tf.Gemma2Config(**GQA, **LOCAL, head_dim=16, final_logit_softcapping=5.0),
    "soft cap (Gemma 3)": tf.Gemma3TextConfig(**GQA, **LOCAL, head_dim=16, final_logit_softcapping=5.0),
    "logits divided (Granite)": tf.GraniteConfig(**GQA, logits_scaling=8.0),
    "logits multiplied (Cohere)": tf.CohereConfig(**GQA, logit_scale=0.1),
    "decoder inside a wrapper (OPT)": tf.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=32),
    "decoder reached past its wrapper (BART)": tf.BartConfig(
        vocab_size=97, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96
    ),
    "head of two modules (ModernBERT)": tf.ModernBertDecoderConfig(
        **SMALL, cls_token_id=1, sep_token_id=2, local_attention=24
    ),
    "head with a transform (BERT)": tf.BertConfig(**SMALL, is_decoder=True),
    "no logits_to_keep (TrOCR)": tf.TrOCRConfig(
        vocab_size=97, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96,
        cross_attention_hidden_size=64,
    ),
    "recurrent (Mamba)": tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
    "layers told of logits_to_keep (Gemma 4)": tf.Gemma4TextConfig(
        **GQA, **LOCAL, head_dim=16, global_head_dim=16, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8,
        final_logit_softcapping=5.0,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Several slices of one short window."""
    monkeypatch.setattr(own_logits, "_POSITIONS", 20)


def prompt(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, 97, (1, tokens), generator=torch.Generator().manual_seed(1))


def build(config: Any) -> Any:
    """A small model whose logits are of the size that trained ones have."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        head = model.get_output_embeddings()
        if head is not None:
            head.weight.mul_(30)
    return model


def cross_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_losses_are_those_of_the_models_own_logits(family):
    model, ids = build(FAMILIES[family]), prompt()
    layers = [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] == "0"]
    runs: list[int] = []
    hooks = [m.register_forward_hook(lambda *_: runs.append(1)) for m in layers]
    attributes = [set(m.__dict__) for m in model.modules()]
    wanted = cross_entropy(model(input_ids=ids).logits, ids)
    once = len(runs)
    losses = qaxis.token_losses(model, ids)
    assert len(runs) == 2 * once > 0, "the layers ran once"
    for hook in hooks:
        hook.remove()
    assert losses.dtype == torch.float64 and losses.shape == (TOKENS - 1,)
    assert torch.allclose(losses, wanted, rtol=1e-5, atol=1e-4)
    assert attributes == [set(m.__dict__) for m in model.modules()]
    assert qaxis.perplexity(model, ids) == pytest.approx(float(wanted.mean().exp()), rel=1e-4)


@pytest.mark.parametrize("family", ["Llama", "soft cap (Gemma 2)", "logits divided (Granite)"])
@pytest.mark.parametrize("kind", ["dynamic", "int8"])
@torch.inference_mode()
def test_a_cache_is_written_once_and_read(family, kind):
    model, ids = build(FAMILIES[family]), prompt()

    def cache() -> Any:
        return tf.DynamicCache(config=model.config) if kind == "dynamic" else qaxis.Int8Cache(model.config)

    used, own = cache(), cache()
    wanted = cross_entropy(model(ids, past_key_values=own).logits, ids)
    assert torch.allclose(qaxis.token_losses(model, ids, cache=used), wanted, rtol=1e-5, atol=1e-4)
    assert used.get_seq_length() == own.get_seq_length() == TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_llama_gets_the_bits_of_its_decoder_and_head(dtype, llama, monkeypatch):
    monkeypatch.undo()
    llama, ids = llama.to(dtype), prompt(1100)[:, :1000]
    hidden = llama.model(ids, use_cache=False).last_hidden_state
    expected = []
    for start, stop in ((0, 512), (512, 999)):
        logits, target = llama.lm_head(hidden[:, start:stop])[0].float(), ids[0, start + 1 : stop + 1]
        expected.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    assert torch.equal(qaxis.token_losses(llama, ids), torch.cat(expected).double())


@torch.inference_mode()
def test_a_text_model_inside_a_multimodal_one():
    text = tf.LlamaConfig(**GQA)
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=96)
    model, ids = tf.LlavaForConditionalGeneration(config).eval(), prompt().clamp(max=95)
    assert torch.allclose(
        qaxis.token_losses(model, ids), cross_entropy(model(input_ids=ids).logits, ids), rtol=1e-5, atol=1e-4
    )


@torch.inference_mode()
def test_whoever_changes_the_models_logits_is_heard(llama):
    ids = prompt()
    plain = qaxis.token_losses(llama, ids)

    def normalise(module, args, output):
        # By the whole window: a slice would give something else.
        output.logits = output.logits / output.logits.abs().max()
        return output

    hook = llama.register_forward_hook(normalise)
    changed = qaxis.token_losses(llama, ids)
    assert not torch.allclose(plain, changed)
    assert torch.allclose(changed, cross_entropy(llama(ids).logits, ids), rtol=1e-5, atol=1e-4)
    hook.remove()
    forward = llama.forward
    llama.forward = lambda *args, **kwargs: normalise(None, None, forward(*args, **kwargs))
    assert torch.equal(changed, qaxis.token_losses(llama, ids))
    del llama.forward
    assert torch.equal(plain, qaxis.token_losses(llama, ids))


@torch.inference_mode()
def test_a_model_in_float64_is_measured_in_float64(llama):
    llama, ids = llama.double(), prompt()
    assert torch.allclose(qaxis.token_losses(llama, ids), cross_entropy(llama(ids).logits, ids), rtol=1e-12, atol=0)


def test_what_does_not_fit_is_named(llama):
    ids = prompt()
    for argument, wrong in {
        "input_ids.shape": ids[0],
        "input_ids.dtype": ids.int(),
        "input_ids=97": torch.where(ids > 90, 97, ids),
        "input_ids=-1": torch.where(ids > 90, -1, ids),
        "input_ids.device": ids.to("meta"),
        "input_ids='list'": ids.tolist(),
    }.items():
        with pytest.raises(ValueError, match=argument):
            qaxis.token_losses(llama, wrong)
    llama.model.layers[1].train()
    with pytest.raises(ValueError, match="training"):
        qaxis.perplexity(llama, ids)
    with pytest.raises(ValueError, match="cache='DynamicCache'"):
        qaxis.token_losses(build(FAMILIES["recurrent (Mamba)"]), ids, cache=tf.DynamicCache())
    small = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    with pytest.raises(ValueError, match="model='BartForConditionalGeneration'"):
        qaxis.token_losses(tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=97, **small, **heads)).eval(), ids)


class Adapter(torch.nn.Module):
    """As adapters are put around models: it names some arguments and hands on all others."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)


def test_adapters_hand_on_the_cache(llama):
    ids = torch.randint(3, 97, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    cache = tf.DynamicCache(config=llama.config)
    assert torch.equal(qaxis.token_losses(Adapter(llama).eval(), ids, cache=cache), qaxis.token_losses(llama, ids))
    assert cache.get_seq_length() == TOKENS
