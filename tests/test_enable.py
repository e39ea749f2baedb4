"""enable and disable on models of every build: which modules are switched, what they read, what is left behind."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers as tf
from torch import nn

import qaxis
from qaxis.models.attention import qaxis_attention_forward
from qaxis.models.layers import attention_modules
from qaxis.prefill import prefill_attention

SMALL = {
    "vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 97, "d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
FEW_EXPERTS = {"num_experts": 2, "encoder_sparse_step": 0, "decoder_sparse_step": 0}
ENCODER_DECODERS = {
    "bart": (tf.BartConfig, {}),
    "marian": (tf.MarianConfig, {}),
    "mbart": (tf.MBartConfig, {}),
    "pegasus": (tf.PegasusConfig, {}),
    "pegasus_x": (tf.PegasusXConfig, {}),
    "m2m_100": (tf.M2M100Config, {}),
    "nllb_moe": (tf.NllbMoeConfig, FEW_EXPERTS),
    "blenderbot": (tf.BlenderbotConfig, {}),
    "bigbird_pegasus": (tf.BigBirdPegasusConfig, {"attention_type": "original_full"}),
}
IMPLEMENTATIONS = ["eager", "sdpa"]


def tokens(n, seed=1, top=97):
    return torch.randint(3, top, (1, n), generator=torch.Generator().manual_seed(seed))


def encoder_decoder(name, implementation="eager"):
    config, more = ENCODER_DECODERS[name]
    torch.manual_seed(0)
    config = config(**SEQ2SEQ, **more)
    return tf.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation).eval()


def llava(implementation="eager", patch=4):
    parts = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**parts, image_size=28, patch_size=patch),
        text_config=tf.LlamaConfig(**SMALL), image_token_index=119, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


def llama_of(config):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config).eval()


def configurations(model):
    """Every configuration object that a module holds, with what it names."""
    return [
        (path, name, id(config), config._attn_implementation)
        for path, module in model.named_modules()
        for name, config in module.__dict__.items()
        if isinstance(config, tf.PreTrainedConfig)
    ]


def traces(model):
    """What hangs on the modules."""
    return [(set(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@torch.inference_mode()
def run(model, source, target, **more):
    return model(input_ids=source, decoder_input_ids=target, use_cache=False, **more).logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_encoder_decoders_see_what_they_saw(name, implementation):
    if name in ("nllb_moe", "pegasus_x", "bigbird_pegasus") and implementation == "sdpa":
        implementation = "eager"
    model, source, target = encoder_decoder(name, implementation), tokens(40), tokens(24, 2)
    padding = (torch.arange(40) >= 9).long()[None]
    later = target.clone()
    later[0, -1] = 3 + (later[0, -1] - 2) % 94
    before, hung = configurations(model), traces(model)
    stock = run(model, source, target, attention_mask=padding)
    for budget in (qaxis.Budget(1.0), "dense"):
        with qaxis.sparse(model, budget, strict=True):
            every = run(model, source, target, attention_mask=padding)
            other = run(model, source, later, attention_mask=padding)
        assert torch.allclose(every, stock, atol=1e-5)
        assert torch.equal(every[:, :-1], other[:, :-1])
    with qaxis.sparse(model, 3), qaxis.record(model) as recording:
        assert not torch.allclose(run(model, source, target, attention_mask=padding), stock, atol=1e-5)
    assert sorted(recording.layers) == [0, 1] and recording.fallbacks == 0
    assert torch.equal(run(model, source, target, attention_mask=padding), stock)
    assert configurations(model) == before and traces(model) == hung


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_the_decoder_of_an_encoder_decoder_is_switched(implementation):
    model = encoder_decoder("bart", implementation)
    chosen = {path for path, module in model.named_modules() if module in attention_modules(model)}
    assert chosen == {"model.decoder.layers.0.self_attn", "model.decoder.layers.1.self_attn"}
    stock, source = model.model.encoder(tokens(40)).last_hidden_state, tokens(40)
    with qaxis.sparse(model, 3):
        assert model.model.encoder.config._attn_implementation == implementation
        assert model.model.decoder.layers[0].encoder_attn.config._attn_implementation == implementation
        assert torch.equal(model.model.encoder(source).last_hidden_state, stock)


def test_an_encoder_decoder_loaded_by_name_is_sparse_in_its_decoder_alone(tmp_path):
    model, source, target = encoder_decoder("bart"), tokens(40), tokens(24, 2)
    model.save_pretrained(tmp_path)
    loaded = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="qaxis").eval()
    with qaxis.sparse(model):
        by_switch = run(model, source, target)
    assert torch.allclose(run(loaded, source, target), by_switch, atol=1e-5)
    with qaxis.sparse(loaded, 3), qaxis.sparse(model, 3):
        assert torch.allclose(run(loaded, source, target), run(model, source, target), atol=1e-5)
    assert loaded.config._attn_implementation == "qaxis"
    qaxis.disable(loaded)
    assert "qaxis" not in {implementation for *_, implementation in configurations(loaded)}


@torch.inference_mode()
@pytest.mark.parametrize("budget", ["dense", 4, qaxis.Budget(1.0)])
def test_vision_towers_stay_what_they_are(budget):
    model = llava()
    tower = model.model.vision_tower
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    stock = tower(image).last_hidden_state
    with qaxis.sparse(model, budget, strict=True):
        assert torch.equal(tower(image).last_hidden_state, stock)
        assert model.model.language_model.layers[0].self_attn.config._attn_implementation == "qaxis"
        assert model.config.vision_config._attn_implementation == "eager"


def test_every_configuration_is_the_object_from_before():
    model = llava()
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    before, hung = configurations(model), traces(model)
    with qaxis.sparse(model, 8):
        with qaxis.sparse(model, 80):
            pass
        assert configurations(model) != before
        with pytest.raises(KeyError), qaxis.sparse(model, {0: 5, "default": "dense"}, strict=True):
            raise KeyError
    assert configurations(model) == before and traces(model) == hung


@torch.inference_mode()
def test_two_models_of_one_configuration():
    config = tf.LlamaConfig(**SMALL)
    one, two, ids = llama_of(config), llama_of(config), tokens(90)
    stock = two(ids).logits
    qaxis.enable(one, 8)
    assert torch.equal(two(ids).logits, stock) and not torch.allclose(one(ids).logits, stock)
    qaxis.enable(two, 16)
    qaxis.disable(one)
    assert torch.equal(one(ids).logits, stock) and not torch.allclose(two(ids).logits, stock)
    qaxis.disable(two)
    assert torch.equal(two(ids).logits, stock) and one.config is two.config is config


def test_what_the_user_changes_meanwhile_is_kept(llama):
    config = llama.config
    with qaxis.sparse(llama, 8):
        llama.config.use_cache = False
        llama.config.note = "mine"
    assert llama.config is config and config.use_cache is False and config.note == "mine"
    qaxis.enable(llama, 8)
    llama.set_attn_implementation("eager")
    qaxis.disable(llama)
    assert llama.config is config and config._attn_implementation == "eager"
    qaxis.enable(llama, 8)
    llama.set_attn_implementation("sdpa")
    qaxis.enable(llama, 8)
    assert llama.config._attn_implementation == "qaxis"
    qaxis.disable(llama)
    assert config._attn_implementation == "sdpa"


@torch.inference_mode()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_copy_of_an_enabled_model_is_enabled_and_apart(implementation, tmp_path):
    model, source, target = encoder_decoder("bart", implementation), tokens(40), tokens(24, 2)
    padding = (torch.arange(40) >= 9).long()[None]
    stock = run(model, source, target, attention_mask=padding)
    qaxis.enable(model, 3, strict=True)
    sparse = run(model, source, target, attention_mask=padding)
    other = copy.deepcopy(model)
    assert torch.equal(run(other, source, target, attention_mask=padding), sparse)
    qaxis.disable(model)
    assert torch.equal(run(other, source, target, attention_mask=padding), sparse)
    assert torch.equal(run(model, source, target, attention_mask=padding), stock)
    qaxis.disable(other)
    assert torch.equal(run(other, source, target, attention_mask=padding), stock)
    model.save_pretrained(tmp_path / "off")
    qaxis.enable(model, 3).save_pretrained(tmp_path / "on")
    off, on = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("off", "on"))
    assert off == on


def test_enabling_a_part_and_disabling_the_whole(llama):
    before, hung = configurations(llama), traces(llama)
    for whole, part in ((llama, llama.model), (llama.model, llama)):
        qaxis.enable(part, 8, strict=True)
        with qaxis.sparse(whole, 4, strict=True):
            pass
        assert llama.model.config._attn_implementation == "qaxis"
        qaxis.disable(llama)
        assert configurations(llama) == before and traces(llama) == hung


@torch.inference_mode()
def test_budgets_name_the_layers_that_attend():
    config = tf.Qwen3NextConfig(
        **{**SMALL, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=16, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = tf.Qwen3NextForCausalLM(config).eval(), tokens(90)
    stock = model(ids).logits
    with qaxis.sparse(model, {3: 8, "default": "dense"}):
        assert not torch.allclose(model(ids).logits, stock, atol=1e-5)
    with pytest.raises(ValueError, match=r"budget=0: allowed is a dict with layers that attend \(3\)"):
        qaxis.enable(model, {0: 8, "default": "dense"})


def own_selector():
    config = tf.DeepseekV32Config(
        **SMALL, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12, n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=32, n_group=1, topk_group=1,
        first_k_dense_replace=1, index_topk=16, index_n_heads=4, index_head_dim=16, pad_token_id=0,
    )  # fmt: skip
    return tf.DeepseekV32ForCausalLM(config)


def test_models_that_qaxis_cannot_serve_are_refused_with_the_reason(llama):
    model = own_selector()
    before = configurations(model)
    with pytest.raises(ValueError, match="DeepseekV32Attention passes indices and computes a mask of its own, which"):
        qaxis.enable(model, 8)
    assert configurations(model) == before
    doge = tf.DogeForCausalLM(tf.DogeConfig(**SMALL))
    with pytest.raises(ValueError, match="DogeAttention computes a mask of its own"):
        qaxis.enable(doge, 8)
    encoder = tf.BertModel(tf.BertConfig(**SMALL))
    with pytest.raises(ValueError, match="BertModel.*whose decoder has causal self-attention"):
        qaxis.enable(encoder, 8)
    with pytest.raises(ValueError, match=r"model.dtype=torch.float64: allowed is float32, float16 or bfloat16"):
        qaxis.enable(copy.deepcopy(llama).double(), 8)
    for bidirectional in (
        tf.EuroBertModel(tf.EuroBertConfig(**SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
        tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, is_causal=False)),
    ):
        with pytest.raises(ValueError, match="whose decoder has causal self-attention"):
            qaxis.enable(bidirectional, 8)
    for wrapper, hint in ((nn.DataParallel(llama), "model.module"), (nn.Linear(4, 4), "PreTrainedModel"), (None, "")):
        for door in (qaxis.enable, qaxis.disable, lambda m: qaxis.sparse(m).__enter__()):
            with pytest.raises(ValueError, match=f"model='{type(wrapper).__name__}'.*{hint}"):
                door(wrapper)


def call(mask=None, m=5, n=5, dtype=torch.float32, module=None, **more):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 16, generator=g).to(dtype) for length in (m, n, n))
    module = module or nn.Module()
    module.layer_idx = 0
    return qaxis_attention_forward(module, q, k, v, mask, **more)[0]


@pytest.mark.parametrize("name", ["indices", "block_indices", "position_bias", "sinks", "cache", "anything"])
def test_arguments_that_qaxis_does_not_know_are_refused(name):
    call(**{name: None})
    with pytest.raises(ValueError, match=f"{name}='Tensor': allowed is None; qaxis does not know"):
        call(**{name: torch.zeros(1)})
    call(position_ids=torch.zeros(1), cu_seq_lens_q=None, sliding_window=4, output_attentions=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_of_every_form(dtype):
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    plain = call(seen, dtype=dtype)
    lowest = torch.finfo(dtype).min
    for hidden in (lowest, -torch.inf):
        assert torch.equal(call(torch.where(seen, 0.0, hidden).to(dtype), dtype=dtype), plain)
    longer = nn.functional.pad(seen, (0, 3))
    assert torch.equal(call(longer, dtype=dtype), plain) and torch.equal(call(dtype=dtype), plain)
    assert torch.equal(call(torch.ones(1, 5), dtype=dtype), plain)
    padded = call(torch.tensor([[0, 1, 1, 1, 1]]), dtype=dtype)
    assert torch.equal(padded, call(seen & torch.tensor([False, True, True, True, True]), dtype=dtype))
    bias = torch.where(seen, 0.0, lowest).to(dtype)
    bias[0, 0, 3, 1] = -0.5
    for wrong in (bias, torch.where(seen, 0.0, -1e4).to(dtype)):
        with pytest.raises(ValueError, match=r"attention_mask=.*a bias that differs between keys"):
            call(wrong, dtype=dtype)
    for wrong in (seen[..., :4], seen.long(), seen[0], seen.expand(2, -1, -1, -1), "mask"):
        with pytest.raises(ValueError, match="attention_mask"):
            call(wrong, dtype=dtype)


def test_the_module_decides_what_no_mask_means():
    free = nn.Module()
    free.is_causal = False
    everything = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    assert torch.allclose(call(module=free), call(everything)) and not torch.allclose(call(module=free), call())
    assert torch.equal(call(is_causal=False), call(everything))
    assert torch.allclose(call(module=free, is_causal=True), call())
    with pytest.raises(ValueError, match="attention_mask=None: allowed is a mask for 3 queries that meet 5 keys"):
        call(m=3)
    assert torch.equal(call(m=1), call(everything[:, :, :1], m=1))


@torch.inference_mode()
def test_an_additive_mask_of_a_user_is_no_bias(llama):
    ids = tokens(20)
    seen = torch.ones(20, 20, dtype=torch.bool).tril()[None, None] & (torch.arange(20) > 4)
    seen |= torch.eye(20, dtype=torch.bool)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    with qaxis.sparse(llama, 6):
        assert torch.equal(llama(ids, attention_mask=seen).logits, llama(ids, attention_mask=additive).logits)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inside_autocast_nothing_but_the_dtype_changes(llama, dtype):
    ids, seen, free = tokens(80), [], nn.Module()
    free.is_causal = False
    dense = call(module=free)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(call(module=free), dense)
    original = qaxis.models.routing.attend

    def spy(q, k, v, shown, allowed, *more):
        done = original(q, k, v, shown, allowed, *more)
        seen.append((q, k, allowed(), done.kept()))
        return done

    qaxis.models.routing.attend = spy
    try:
        with qaxis.sparse(llama, 8), torch.autocast("cpu", dtype=dtype):
            llama(ids)
    finally:
        qaxis.models.routing.attend = original
    for q, k, allowed, kept in seen:
        score = (q.double() @ k.double().repeat_interleave(3, 1).transpose(-1, -2)).masked_fill(~allowed, -torch.inf)
        least, most = score.masked_fill(~kept, torch.inf).amin(-1), score.masked_fill(kept, -torch.inf).amax(-1)
        assert bool((least >= most - 1e-5).all())


def test_training_and_mixed_dtypes_are_refused():
    q = torch.zeros(1, 1, 2, 8, requires_grad=True)
    with pytest.raises(ValueError, match="requires_grad"):
        qaxis_attention_forward(nn.Module(), q, q, q, None)
    for attend in (qaxis.topk_attention, prefill_attention):
        for asking in itertools.product([False, True], repeat=3):
            given = [q.detach().requires_grad_(x) for x in asking]
            with pytest.raises(ValueError, match="requires_grad") if any(asking) else nullcontext():
                attend(*given, 1)
            with torch.no_grad():
                attend(*given, 1)
    k = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"key.dtype=torch.bfloat16: allowed is the query's torch.float32"):
        qaxis_attention_forward(nn.Module(), k, k.bfloat16(), k, None)
    with pytest.raises(ValueError, match=r"query.dtype=torch.float64: allowed is float32"):
        call(dtype=torch.float64)


@torch.inference_mode()
def test_a_model_given_to_the_compiler_is_enabled_inside(llama):
    ids = tokens(60)
    stock = llama(ids).logits
    compiled = torch.compile(llama, backend="eager")
    assert torch.equal(compiled(ids).logits, stock)
    with qaxis.sparse(compiled, 6):
        assert torch.equal(compiled(ids).logits, llama(ids).logits)
        assert not torch.allclose(compiled(ids).logits, stock)
    assert torch.equal(compiled(ids).logits, stock)


@torch.inference_mode()
def test_a_module_that_layers_share_gets_its_budget():
    config = tf.Zamba2Config(
        **SMALL, num_key_value_heads=4, layers_block_type=["mamba", "hybrid"], mamba_d_state=8, mamba_ngroups=1,
        n_mamba_heads=4, mamba_headdim=32, num_mem_blocks=1, hybrid_layer_ids=[1], attention_head_dim=32,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = tf.Zamba2ForCausalLM(config).eval(), tokens(60)
    stock = model(ids).logits
    with qaxis.sparse(model, 4):
        assert not torch.equal(model(ids).logits, stock)


def test_a_part_is_undone_for_the_whole(llama):
    before, hung = configurations(llama), traces(llama)
    qaxis.enable(llama, 5)
    qaxis.disable(llama.model)
    assert configurations(llama) == before and traces(llama) == hung
    qaxis.enable(llama.model, 5)
    part = configurations(llama)
    assert llama.config._attn_implementation == "sdpa"
    with qaxis.sparse(llama, 7):
        assert llama.config._attn_implementation == "qaxis"
    assert configurations(llama) == part
    with pytest.raises(KeyError), qaxis.sparse(llama, 7):
        qaxis.disable(llama)
        raise KeyError
    assert configurations(llama) == part
    qaxis.disable(llama.model)
    assert configurations(llama) == before and traces(llama) == hung
    model = llava()
    before = configurations(model)
    qaxis.enable(model, 5)
    qaxis.disable(model.model.language_model)
    assert configurations(model) == before
    qaxis.enable(model.model.language_model, 5)
    qaxis.enable(model, 6)
    assert model.config.text_config is model.model.language_model.config
    qaxis.disable(model.model.language_model)
    assert configurations(model) == before


@torch.inference_mode()
def test_an_enabled_model_can_be_pickled(llama):
    ids = tokens(60)
    with qaxis.sparse(llama, 5, strict=True):
        other = pickle.loads(pickle.dumps(llama))
        assert torch.equal(other(ids).logits, llama(ids).logits)
        other.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="strict=True"):
            other(ids)
        llama(ids)


@torch.inference_mode()
def test_a_model_being_recorded_can_be_copied(llama):
    ids = tokens(60)
    with qaxis.sparse(llama, 5), qaxis.record(llama) as recording:
        other = copy.deepcopy(llama)
        other(ids)
        assert recording.tokens == 0 and not recording.layers
        llama(ids)
        assert recording.tokens == 60 and recording.fallbacks == 0


@torch.inference_mode()
def test_a_cache_made_while_enabled_serves_other_attention(llama):
    """Attention that knows nothing of lazy tensors gets numbers again once qaxis is off."""
    seen = []

    def other(module, query, key, value, attention_mask, **more):
        seen.append(type(key))
        return tf.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **more)

    tf.AttentionInterface.register("of_a_stranger", other)
    tf.AttentionMaskInterface.register("of_a_stranger", tf.masking_utils.sdpa_mask)
    try:
        llama.set_attn_implementation("of_a_stranger")
        with qaxis.sparse(llama, 5):
            cache = qaxis.Int8Cache(llama.config)
            llama(tokens(20), past_key_values=cache)
        llama(tokens(20), past_key_values=cache)
        assert seen == [torch.Tensor] * 2
    finally:
        for interface in (tf.AttentionInterface, tf.AttentionMaskInterface):
            interface._global_mapping.pop("of_a_stranger")
