"""The quantised cache wherever transformers takes one: below a group it is lossless, so every token must be equal."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import qaxis
from qaxis.models.cache import QuantizedLayer

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE: dict[str, Any] = {
    "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip
MLA: dict[str, Any] = {
    **MOE, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 24,
}  # fmt: skip
LOCAL: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24, "head_dim": 8}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_chunk_size": 16, "use_mamba_kernels": False,
}  # fmt: skip
#: by name: the configuration, and how many of the layers are quantised
DECODERS: dict[str, tuple[Any, int]] = {
    "Llama": (lambda: tf.LlamaConfig(**SMALL), 2),
    "GPT-2": (lambda: tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2), 2),
    "Gemma 2": (lambda: tf.Gemma2Config(**SMALL, **LOCAL), 1),
    "Gemma 3": (lambda: tf.Gemma3TextConfig(**SMALL, **LOCAL), 1),
    "gpt-oss": (lambda: tf.GptOssConfig(**SMALL, **LOCAL, **MOE), 1),
    "Mistral": (lambda: tf.MistralConfig(**SMALL, sliding_window=24), 0),
    "DeepSeek V2": (lambda: tf.DeepseekV2Config(**{**SMALL, **MLA}), 2),
    "DeepSeek V3": (lambda: tf.DeepseekV3Config(**{**SMALL, **MLA}), 2),
    "Gemma 3n": (lambda: tf.Gemma3nTextConfig(**{
        **SMALL, **LOCAL, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        num_kv_shared_layers=2, vocab_size_per_layer_input=97, hidden_size_per_layer_input=8, altup_num_inputs=2,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 4), 1),
    "Llama 4": (lambda: tf.Llama4TextConfig(**SMALL, **MOE, attention_chunk_size=24, intermediate_size_mlp=48,
        head_dim=8, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]), 1),
    "Qwen3-Next": (lambda: tf.Qwen3NextConfig(**SMALL, **MOE, **LINEAR, head_dim=8, decoder_sparse_step=5,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"]), 1),
    "Bamba": (lambda: tf.BambaConfig(**SMALL, **MAMBA, attn_layer_indices=[1]), 1),
    "Jamba": (lambda: tf.JambaConfig(**SMALL, **MOE, **MAMBA, attn_layer_offset=1, attn_layer_period=2,
        expert_layer_period=9, mamba_dt_rank=4), 1),
    "Falcon-H1": (lambda: tf.FalconH1Config(**SMALL, **MAMBA, head_dim=8), 2),
    "LFM2": (lambda: tf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"], conv_L_cache=3), 1),
    "Zamba 2": (lambda: tf.Zamba2Config(**SMALL, mamba_d_state=8, mamba_headdim=16, n_mamba_heads=4, mamba_ngroups=1,
        chunk_size=16, num_mem_blocks=1, use_mem_rope=True, layers_block_type=["mamba", "hybrid"],
        use_mamba_kernels=False), 1),
    "DeepSeek V3.2": (lambda: tf.DeepseekV32Config(**{**SMALL, **MLA}, index_topk=64, index_n_heads=2,
        index_head_dim=16), 2),
}  # fmt: skip
SEQUENCES: dict[str, Any] = {
    "BART": lambda: tf.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None),
    "T5": lambda: tf.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=1),
    "Marian": lambda: tf.MarianConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=256, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=1, forced_eos_token_id=None),
}  # fmt: skip
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def prompt(n: int = 40, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def build(name: str, implementation: str = "eager", seed: int = 3) -> Any:
    torch.manual_seed(seed)
    if name in DECODERS:
        config = DECODERS[name][0]()
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    else:
        model = tf.AutoModelForSeq2SeqLM.from_config(SEQUENCES[name](), attn_implementation=implementation)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in label:
                weight.mul_(3.0)
    return model.eval()


def plain(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def ours(model: Any) -> qaxis.Int8Cache:
    return qaxis.Int8Cache(model.config)


def both(model: Any, run: Any) -> tuple[Any, Any]:
    return run(plain(model)), run(ours(model))


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_logits_of_every_kind_of_cache(name):
    model, ids = build(name), prompt(batch=2)
    cache = ours(model)
    assert sum(isinstance(layer, QuantizedLayer) for layer in cache.layers) == DECODERS[name][1]
    assert len(cache) == len(plain(model)) and not cache.is_compileable

    def run(cache):
        parts = [model(ids[:, :30], past_key_values=cache, use_cache=True).logits]
        return torch.cat([*parts, *(model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40))], 1)

    stock, quantised = both(model, run)
    assert torch.equal(stock, quantised)


def generations(name: str) -> dict[str, dict[str, Any]]:
    padded = torch.ones(2, 40, dtype=torch.long)
    padded[1, :13] = 0
    return {
        "greedy": {"inputs": prompt()},
        "left padding": {"inputs": prompt(batch=2) * padded, "attention_mask": padded},
        "beams": {"inputs": prompt(batch=2), "num_beams": 3},
        "prompt lookup": {"inputs": prompt(8).repeat(1, 5), "prompt_lookup_num_tokens": 3},
        "assisted": {"inputs": prompt()},
    }


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("way", generations(""))
def test_generate(name, way):
    model = build(name)
    options = {**GREEDY, **generations(name)[way]}
    if way == "assisted":
        options["assistant_model"] = build("Llama", seed=5)
    try:
        stock = model.generate(**options, past_key_values=plain(model))
    except (ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        pytest.skip(f"transformers itself: {error}")
    assert torch.equal(stock, model.generate(**options, past_key_values=ours(model)))
    if way == "assisted":
        assert torch.equal(stock, model.generate(**GREEDY, inputs=prompt(), past_key_values=plain(model)))
