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
from qaxis.models.quantised import QuantizedLayer
from qaxis.storage.formats import FORMATS

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
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_d_conv": 4,
    "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 16, "use_mamba_kernels": False,
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
        vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
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


PADDED = torch.ones(2, 40, dtype=torch.long)
PADDED[1, :13] = 0
GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"inputs": prompt()},
    "left padding": {"inputs": prompt(batch=2) * PADDED, "attention_mask": PADDED},
    "beams": {"inputs": prompt(batch=2), "num_beams": 3},
    "prompt lookup": {"inputs": prompt(8).repeat(1, 5), "prompt_lookup_num_tokens": 3},
    "assisted": {"inputs": prompt()},
}
#: transformers refuses to guess ahead with these, as their states cannot be cropped
STATEFUL = ("Qwen3-Next", "Bamba", "Jamba", "Falcon-H1", "Zamba 2")


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("way", GENERATIONS)
def test_generate(name, way):
    model, options = build(name), {**GREEDY, **GENERATIONS[way]}
    if way == "assisted":
        options["assistant_model"] = build("Llama", seed=5)
    if name in STATEFUL and way in ("assisted", "prompt lookup"):
        with pytest.raises(ValueError, match="stateful"):
            model.generate(**options, past_key_values=ours(model))
    else:
        assert torch.equal(*both(model, lambda cache: model.generate(**options, past_key_values=cache)))


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Mistral", "DeepSeek V3", "LFM2", "Qwen3-Next"])
def test_sdpa(name):
    model = build(name, "sdpa")
    assert torch.equal(*both(model, lambda cache: model.generate(prompt(), **GREEDY, past_key_values=cache)))


@torch.no_grad()
def test_flex_attention():
    """It is compiled, so one model. torch's own is wrong on a CPU for a head_dim below 32, whatever the cache."""
    torch.manual_seed(3)
    config = tf.LlamaConfig(**{**SMALL, "hidden_size": 128, "num_hidden_layers": 1})
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention").eval()
    assert torch.equal(*both(model, lambda cache: model(prompt(), past_key_values=cache).logits))
    cache = ours(model)
    model(prompt(), past_key_values=cache)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_the_attention_at_the_time_decides_what_it_is_handed():
    model, kinds = build("Llama", "sdpa"), []
    before, other = ours(model), copy.deepcopy(ours(model))
    unpickled = pickle.loads(pickle.dumps(ours(model)))
    states = torch.ones(1, 2, 4, 8)
    for implementation in ("sdpa", "flex_attention", "qaxis", "eager"):
        model.set_attn_implementation(implementation)
        kinds += [[type(c.update(states, states, 0)[0]) is torch.Tensor for c in (before, other, unpickled)]]
    assert kinds == [[False, False, True], [True, True, True], [False, False, True], [False, False, True]]
    assert all(torch.equal(before.layers[0].keys, c.layers[0].keys) for c in (other, unpickled))
    assert type(qaxis.Int8Cache(tf.LlamaConfig()).update(states, states, 0)[0]) is torch.Tensor


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "DeepSeek V3", "LFM2"])
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_with_qaxis_on(name, implementation):
    model = build(name, implementation)
    earlier = ours(model)
    with qaxis.sparse(model, qaxis.Budget(0.2, 5)):
        stock, quantised = both(model, lambda cache: model.generate(prompt(), **GREEDY, past_key_values=cache))
        assert torch.equal(stock, quantised)
        assert torch.equal(stock, model.generate(prompt(), **GREEDY, past_key_values=earlier))


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["greedy", "left padding", "beams", "prompt lookup"])
def test_encoder_decoder(name, implementation, way):
    model = build(name, implementation if name != "T5" else "eager")
    options = {**GREEDY, **GENERATIONS[way]}
    results = [
        model.generate(**options, past_key_values=EncoderDecoderCache(own(model), cross(model)))
        for own, cross in ((plain, plain), (ours, plain), (plain, ours), (ours, ours))
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_cross_cache_is_filled_once():
    model = build("BART")
    cache = EncoderDecoderCache(ours(model), ours(model))
    model.generate(prompt(), **GREEDY, past_key_values=cache)
    assert cache.cross_attention_cache.get_seq_length() == 40 and cache.get_seq_length() == 8
    again = EncoderDecoderCache(ours(model), cache.cross_attention_cache)
    assert again.is_updated == {0: True, 1: True}
    for cache in (again, copy.deepcopy(again)):
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.is_updated == {0: False, 1: False}


@pytest.mark.parametrize("completion", ["none", "linear"])
@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("kind", [qaxis.Cache, qaxis.Int8Cache])
def test_copies_made_in_inference_mode_go_on_outside(kind, window, completion):
    config = tf.MistralConfig(**SMALL, sliding_window=window)
    model, ids = tf.MistralForCausalLM(config).eval(), prompt()
    cache = kind(config)
    with qaxis.sparse(model, 5, completion=completion):
        with torch.inference_mode():
            model(ids[:, :30], past_key_values=cache)
            copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
            both_ways = EncoderDecoderCache(cache, kind(config))
            copies.append(copy.deepcopy(both_ways).self_attention_cache)
        with torch.no_grad():
            for tokens in (ids[:, 30:31], ids[:, 31:]):
                parts = [model(tokens, past_key_values=c).logits for c in copies]
                assert all(torch.equal(parts[0], part) for part in parts)


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "DeepSeek V3", "Falcon-H1", "DeepSeek V3.2"])
@torch.no_grad()
def test_two_turns_from_copies(name):
    model, ids = build(name), prompt()

    def run(cache):
        # The recurrent states of transformers' own layers cannot leave inference mode.
        with torch.no_grad() if name in STATEFUL else torch.inference_mode():
            model(ids[:, :20], past_key_values=cache)
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
        return torch.cat([model(ids[:, 20:], past_key_values=c).logits for c in copies])

    stock, quantised = both(model, run)
    assert torch.equal(stock, quantised) and torch.equal(quantised[0], quantised[2])


@torch.no_grad()
def test_inference_mode_then_not_also_over_a_group():
    """What is stored in inference mode is written, cropped and reordered outside it."""
    model, ids = build("Llama", "sdpa"), prompt(260)
    caches = [ours(model), ours(model)]
    for cache, first in zip(caches, (torch.inference_mode, torch.no_grad), strict=True):
        with first():
            model(ids[:, :250], past_key_values=cache)
            cache.reorder_cache(torch.tensor([0]))
            cache.crop(-2)
            model(ids[:, 248:249], past_key_values=cache)
    # One token at a time finds room in the buffers of the turn before.
    out = [torch.cat([model(x, past_key_values=c).logits for x in ids[:, 249:].split(1, 1)], 1) for c in caches]
    assert torch.equal(*out) and not out[0].is_inference()


@pytest.mark.parametrize("implementation", ["sdpa", "qaxis"])
@torch.no_grad()
def test_a_compiled_forward(implementation):
    model, ids = build("Llama", implementation), prompt()
    torch._dynamo.reset()
    step = torch.compile(model.forward, backend="eager")

    def run(forward):
        cache = ours(model)
        return torch.cat([forward(part, past_key_values=cache).logits for part in ids.split((38, 1, 1), 1)], 1)

    assert torch.equal(run(step), run(model))


def fill(cache, n=30, dim=8, value_dim=8, batch=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    for layer in range(len(cache)):
        states = (torch.randn(batch, 2, n, d, generator=g).to(dtype) for d in (dim, value_dim))
        cache.update(*states, layer)
    return cache


def looked_at(cache) -> list[Any]:
    """What transformers asks a cache; some of it only in newer versions."""
    told = ["is_initialized", "is_compileable", "is_sliding", "is_linear", "is_croppable", "batch_size"]
    return [
        len(cache), cache.get_seq_length(), cache.get_seq_length(1), cache.get_mask_sizes(5, 0),
        *(getattr(cache, name, None) for name in told), [layer.keys is None for layer in cache.layers],
        *([x.numel(), x.shape, x.tolist()] for keys, values, *_ in cache for x in (keys, values) if x is not None),
    ]  # fmt: skip


CHANGES: dict[str, Any] = {
    "nothing": lambda c: None,
    "crop": lambda c: c.crop(-7),
    "crop none": lambda c: c.crop(0),
    "crop all": lambda c: c.crop(-20),
    "reorder": lambda c: c.reorder_cache(torch.tensor([2, 2, 0])),
    "repeat": lambda c: c.batch_repeat_interleave(2),
    "select": lambda c: c.batch_select_indices(torch.tensor([2, 0])),
    "select bool": lambda c: c.batch_select_indices(torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["full", "sliding", "MLA"])
def test_what_transformers_asks_and_changes(change, kind):
    config = {"full": tf.LlamaConfig(**SMALL), "sliding": tf.Gemma3TextConfig(**SMALL, **LOCAL)}.get(
        kind, tf.DeepseekV3Config(**{**SMALL, **MLA})
    )
    dims = {"dim": 24, "value_dim": 24 if kind != "MLA" else 16, "n": 20}
    answers = []
    for cache in (DynamicCache(config=config), qaxis.Int8Cache(config)):
        empty = looked_at(cache)
        CHANGES[change](fill(cache, **dims))
        answers.append([empty, looked_at(cache)[: 10 if change == "crop all" else None]])
    assert answers[0] == answers[1]
    if kind == "sliding":
        return  # older versions of transformers zero a window instead
    cache.reset()
    assert looked_at(cache) == empty
    assert looked_at(fill(cache, **dims)) == looked_at(fill(qaxis.Int8Cache(config), **dims))


def test_early_initialisation_and_a_new_start_take_any_shape():
    config = tf.LlamaConfig(**SMALL)
    for cache in (DynamicCache(config=config), qaxis.Int8Cache(config, room=256)):
        cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
        assert cache.is_initialized and cache.get_seq_length() == 0
        cache.crop(0)
        fill(cache, value_dim=4, batch=1)
        assert cache.layers[1].values.shape == (1, 2, 30, 4)


def test_update_names_what_does_not_fit_and_changes_nothing():
    k, v = torch.randn(2, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    meta = v.to("meta")
    nan = v.clone()
    nan[1, 1, 4, 7] = torch.nan
    wrong = {
        "value_states.dtype": (k, v.half()), "key_states.dtype": (k.bfloat16(), v), "value_states.device": (k, meta),
        "key_states.device": (meta, meta), "key_states.shape": (k[:1], v[:1]), "value_states.shape": (k, v[:1]),
        "value_states": (k, nan), "key_states": (k.double(), v), "layer_idx": None,
    }  # fmt: skip
    for name, states in wrong.items():
        cache = fill(qaxis.Int8Cache(tf.LlamaConfig(**SMALL)), batch=2)
        before = looked_at(cache)
        with pytest.raises(ValueError, match=name):
            cache.update(*(states or (k, v)), 0 if states else 2)
        assert looked_at(cache) == before
        empty = qaxis.Int8Cache(tf.LlamaConfig(**SMALL))
        with pytest.raises(ValueError, match="_states"):
            empty.update(nan, v, 0)
        assert not empty.is_initialized and empty.get_seq_length() == 0


def test_keys_and_values_may_differ_in_dtype():
    """As under autocast, where a norm of the keys gives float32."""
    k, v = torch.randn(1, 2, 200, 8), torch.randn(1, 2, 200, 8).bfloat16()
    cache = qaxis.Int8Cache(tf.LlamaConfig(**SMALL))
    keys, values = cache.update(k, v, 0)
    assert keys.dtype == torch.float32 and values.dtype == torch.bfloat16
    assert torch.equal(keys[:, :, 128:], k[:, :, 128:]) and torch.equal(values[:, :, 128:], v[:, :, 128:])


def test_wrong_arguments_are_named():
    config = tf.LlamaConfig(**SMALL)
    for wrong in (None, build("Llama"), {"num_hidden_layers": 2}, 2, "llama"):
        with pytest.raises(ValueError, match="config="):
            qaxis.Int8Cache(wrong)
    unknown = tf.LlamaConfig(**SMALL)
    unknown.layer_types = ["full_attention", "spectral_attention"]
    with pytest.raises(ValueError, match=r"config=.*spectral_attention"):
        qaxis.Int8Cache(unknown)
    with pytest.raises(ValueError, match="format"):
        qaxis.Int8Cache(config, format=["int8"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="offloading"):
            qaxis.Int8Cache(config, offloading=True)
    with pytest.raises(ValueError, match="cache_implementation"):
        model = build("Llama")
        model.generate(prompt(), **GREEDY, past_key_values=ours(model), cache_implementation="static")


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Gemma 3n", "DeepSeek V3", "Mistral", "Llama 4"])
@pytest.mark.parametrize("tokens", [20, 150])
@torch.no_grad()
def test_saved_and_loaded_a_second_turn_goes_on(name, tokens, tmp_path):
    model, ids = build(name), prompt(tokens)
    cache = ours(model)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = qaxis.Int8Cache.load(tmp_path / "cache", model.config)
    for part in prompt(8, seed=9).split((5, 1, 1, 1), 1):
        first, second = (model(part, past_key_values=c).logits for c in (cache, loaded))
        assert torch.equal(first, second)


def test_what_a_file_cannot_hold_is_named(tmp_path):
    path = tmp_path / "cache"
    for name, kind in (("LFM2", "LinearAttentionLayer"), ("Falcon-H1", "Hybrid"), ("DeepSeek V3.2", "Indexed")):
        model = build(name)
        cache = ours(model)
        model.generate(prompt(), **GREEDY, past_key_values=cache)
        with pytest.raises(ValueError, match=rf"layer 0=.*{kind}"):
            cache.save(path)
    assert not path.exists()
    config = tf.Gemma3TextConfig(**SMALL, **LOCAL)
    fill(qaxis.Int8Cache(config)).save(path)
    for other in (tf.LlamaConfig(**SMALL), tf.Gemma3TextConfig(**{**SMALL, **LOCAL, "sliding_window": 30})):
        with pytest.raises(ValueError, match="path="):
            qaxis.Int8Cache.load(path, other)
    for device in ("nowhere", "meta", *(() if torch.cuda.is_available() else ("cuda",))):
        with pytest.raises(ValueError, match="device="):
            qaxis.Int8Cache.load(path, config, device)
    partly = qaxis.Int8Cache(tf.LlamaConfig(**SMALL))
    partly.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 1)
    partly.save(path)
    loaded = qaxis.Int8Cache.load(path, tf.LlamaConfig(**SMALL))
    assert [loaded.get_seq_length(i) for i in (0, 1)] == [0, 3] and not loaded.layers[0].is_initialized


def test_bytes_are_those_of_every_layer():
    model = build("Falcon-H1")
    cache = ours(model)
    model(prompt(), past_key_values=cache)
    for layer in cache.layers:
        assert layer.recurrent_states[0].numel() > 0
    states = sum(x.nbytes for layer in cache.layers for x in (layer.recurrent_states[0], layer.conv_states[0]))
    assert cache.stored_bytes() == states + sum(layer.kv.nbytes() for layer in cache.layers)


@pytest.mark.parametrize("format", FORMATS)
def test_values_may_have_no_width(format, tmp_path):
    """Where attention reads all from the keys (GLM 5 Next)."""
    config = tf.LlamaConfig(**SMALL)
    cache = fill(qaxis.Int8Cache(config, format=format), n=140, dim=16, value_dim=0)
    cache.crop(-20)
    cache.reorder_cache(torch.tensor([0, 2]))
    cache.save(tmp_path / "cache")
    for each in (cache, qaxis.Int8Cache.load(tmp_path / "cache", config)):
        assert each.layers[0].keys.shape == (2, 2, 120, 16) and each.layers[0].values.shape == (2, 2, 120, 0)
    with pytest.raises(ValueError, match="key_states"):
        cache.update(torch.ones(2, 2, 3, 0), torch.ones(2, 2, 3, 0), 0)
