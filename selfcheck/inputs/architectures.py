"""Every architecture with which transformers decodes text, small and with random weights.

Names come from the auto classes of the installed transformers, sizes from rules on the names of a configuration's
attributes; ``OVERRIDES`` has what the rules cannot know. What stays too large, or what no rule builds, is reported
with the reason, never left out silently.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: parameters above which a model is not small
MOST = 20_000_000
#: ids below ``FIRST_SPECIAL`` are text, those from there on mark images, sounds and the like
VOCABULARY, FIRST_SPECIAL = 192, 120
HEADS, HEAD_DIM, HIDDEN = 4, 16, 64
#: layers at least, and at most where each kind of layer is to be there
LAYERS, MOST_LAYERS = 2, 8
WINDOW, POSITIONS = 24, 512
#: tokens of a text
TOKENS = 48
#: auto mapping: kind of its models; the first mapping that names a model decides
MAPPINGS = {
    "IMAGE_TEXT_TO_TEXT": "vision-language",
    "SPEECH_SEQ_2_SEQ": "speech",
    "SEQ_TO_SEQ_CAUSAL_LM": "sequence-to-sequence",
    "MULTIMODAL_LM": "multimodal",
    "CAUSAL_LM": "causal",
}
#: (attributes whose name matches, at most this much); the first match decides, None leaves the value
RULES: list[tuple[str, int | None]] = [
    (r".*(kernel|stride|dilation|eps|token_id|_index|_ids|dropout|loss|coef|factor|prob|range|multipl|ratio).*", None),
    (r"num_labels|num_channels|in_channels|audio_channels|num_feat_extract_layers|num_codebooks|num_quantizers", None),
    (r"seed|chunk_size_feed_forward|num_return_sequences|patch_embed_hidden_size", None),
    (r"decoder_sparse_step|encoder_sparse_step|temporal_patch_size|spatial_merge_size|mlp_ratio|block_size", None),
    (r".*vocab(_size.*)?|num_embeddings|num_embeds", VOCABULARY),
    (r"qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"qk_head_dim", HEAD_DIM + HEAD_DIM // 2),
    (r".*(head_dim|dim_head|_d_head|headdim)|d_kv|kv_channels|d_head|attention_head_size", HEAD_DIM),
    (r"index_topk", 12),
    (r"index_block_size", 8),
    (r".*(index_topk_blocks|experts_per_tok.*|moe_k|topk|top_k|shared_experts|zero_expert_num)", 2),
    (r"n_group|num_expert_group|topk_group|num_kv_shared_layers|n_head_kv", 1),
    (r".*(num_experts|_experts|expert_capacity)", HEADS),
    (r".*(key_value_heads|kv_heads|kv_n_heads|query_groups|n_groups|mamba_ngroups)", 2),
    (r"mamba_(n|num)_heads|n_mamba_heads", 2 * HIDDEN // HEAD_DIM),
    (r".*(_heads|n_head|num_key_heads|num_value_heads|_heads_per_layer)", HEADS),
    (r".*_rank", 16),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_d_ssm|lru_width", HIDDEN),
    (r".*(sliding_window.*|attention_window.*|local_attention|attention_chunk_size|window_size)", WINDOW),
    (r".*position_embeddings|n_positions|n_ctx|.*seq_len.*|max_(source|target|text|speech)_positions", POSITIONS),
    (r".*(image_size|crop_size|resolution)", 56),
    (r"patch_size", 14),
    (r"num_filters", 2),
    (r".*(hidden_layers|_layers|n_layer)|layers|depth|num_blocks|.*_depth", LAYERS),
    (r"first_k_dense_replace", 1),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|mlp_dim|expert_dim|feed_forward_size)|d_ff|d_inner|dff", 96),
    (r".*(hidden_size.*|_dim|_hidden|channels|embedding_size)|d_model|n_embd|dim", HIDDEN),
    (r"upsample_groups|adapter_input_size", HIDDEN),
    (r".*(num_query_tokens|n_latents|num_latents|mm_tokens_per_image|image_seq_length)", 16),
]
#: numbers whose defaults change so little of so small a model that their loss would not be seen
FELT = r".*(soft_?cap(ping)?|logits?_scal(e|ing)|attn_scale|lm_head_multiplier)"
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH = ["sliding_attention", "full_attention"]
#: model type of a configuration, sub-configurations included: what the rules cannot know
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_index": FIRST_SPECIAL, "image_token_id": FIRST_SPECIAL},
    "chameleon": {"vocabulary_map": {"<image>": FIRST_SPECIAL}},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(_BOTH, _PLAIN_ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "per_layer_config": {
            2: {
                "head_dim": HEAD_DIM + HEAD_DIM // 2, "qk_nope_head_dim": HEAD_DIM, "qk_rope_head_dim": HEAD_DIM // 2,
                "v_head_dim": HEAD_DIM, "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16,
                "q_lora_rank": 16,
            }
        }
    },
    "emu3": {"vocabulary_map": {"<image>": FIRST_SPECIAL}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": HIDDEN // 4}},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _BOTH * 2, "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "glm5_next_text": {"num_key_value_heads": HEADS, "index_topk": 16},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl_text": {"rope_parameters": {**_PLAIN_ROPE, "mrope_section": [2, 3, 3]}},
    "instructblip": {"image_token_index": FIRST_SPECIAL, "image_token_id": FIRST_SPECIAL},
    "instructblipvideo": {"video_token_index": FIRST_SPECIAL, "video_token_id": FIRST_SPECIAL},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "mistral4": {"rope_parameters": {**_PLAIN_ROPE, "partial_rotary_factor": 1 / 3}},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "moonshine_streaming": {"num_key_value_heads": HEADS},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM, "indexer_budget": 12,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [8, 64]},
    "step3p5": {"sliding_window": WINDOW},
    "unlimited_ocr_text": {"num_key_value_heads": HEADS},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS, "mamba_headdim": HEAD_DIM,
        "hybrid_layer_ids": [1, 3],
    },
}  # fmt: skip
#: text configurations whose rotary embeddings have sections, though the default does not say so
SECTIONED = (
    "glm46v_text", "glm4v_text", "glm4v_moe_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_5_omni_text",
    "qwen2_5_vl_text", "qwen2_vl_text",
)  # fmt: skip


class NotBuiltError(Exception):
    """The architecture is not built small; the message says why."""


@dataclass(frozen=True)
class Architecture:
    """One model class of transformers."""

    model_type: str
    name: str
    kind: str


def architectures() -> list[Architecture]:
    """Every pair of model type and class that an auto class for text decoding names, in order of their kinds."""
    found: dict[tuple[str, str], Architecture] = {}
    for mapping, kind in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            found.setdefault((model_type, name), Architecture(model_type, name, kind))
    return list(found.values())


def _small(name: str, value: int) -> int:
    for pattern, most in RULES:
        if re.fullmatch(pattern, name):
            return value if most is None else min(value, most)
    return value


def _number_of_layers(values: dict[str, Any]) -> int:
    """The fewest layers among which each kind of layer is; lists of kinds have as many entries as there are layers."""
    fewest = LAYERS
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types"):
        kinds = values.get(name)
        if isinstance(kinds, (list, tuple)) and all(isinstance(x, str) for x in kinds):
            fewest = max(fewest, *(list(kinds).index(kind) + 1 for kind in set(kinds)))
    return min(fewest, MOST_LAYERS)


def _shrink(config: Any) -> dict[str, Any]:
    """Arguments that make a small configuration of the same class."""
    values = {k: v for k, v in vars(config).items() if not k.startswith("_")}
    skipped = {"transformers_version", "architectures", "dtype", "id2label", "label2id", "problem_type"}
    full = next((values[n] for n in LAYER_NAMES if isinstance(values.get(n), int)), 0)
    layers = _number_of_layers(values)
    out: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for name, value in values.items():
        if name in skipped or value is None or isinstance(value, (bool, str)):
            continue
        if isinstance(value, tf.PreTrainedConfig):
            out[name] = {**_shrink(value), "model_type": value.model_type}
        elif name in LAYER_NAMES:
            out[name] = min(value, layers) if isinstance(value, int) else value
        elif re.fullmatch(r".*(token_id|token_index)", name):
            out[name], special = _token(name, value, special)
        elif type(value) is float and re.fullmatch(FELT, name):
            out[name] = 2.0
        elif isinstance(value, int):
            out[name] = _small(name, value)
        elif isinstance(value, (list, tuple)) and len(value) == full and full > layers:
            out[name] = [_small(name, x) if type(x) is int else x for x in value[:layers]]
        elif isinstance(value, (list, tuple)) and all(type(x) is int for x in value):
            out[name] = [_small(name, x) for x in value]
        elif isinstance(value, dict):
            out[name] = _rope(value)
    return _merged({**out, **_heads(values, out, config.model_type)}, OVERRIDES.get(config.model_type, {}))


def _merged(values: dict[Any, Any], others: dict[Any, Any]) -> dict[Any, Any]:
    """The first with what the second says, dict by dict."""
    return values | {
        k: _merged(values[k], v) if isinstance(v, dict) and isinstance(values.get(k), dict) else v
        for k, v in others.items()
    }


def _heads(values: dict[str, Any], out: dict[str, Any], model_type: str) -> dict[str, Any]:
    """Heads where the default says None, and those of multi-head latent attention, of which each has its key."""
    found: dict[str, Any] = {}
    heads = next((out[n] for n in ("num_attention_heads", "n_head", "n_heads") if isinstance(out.get(n), int)), HEADS)
    if "head_dim" in values and values["head_dim"] is None:
        found["head_dim"] = HEAD_DIM
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        found["num_key_value_heads"] = heads
    if isinstance(out.get("qk_rope_head_dim"), int) and out["qk_rope_head_dim"] > 0:
        found["num_key_value_heads"] = heads
        if "head_dim" in values:
            found["head_dim"] = out["qk_rope_head_dim"]
    if model_type in SECTIONED and isinstance(out.get("rope_parameters"), dict):
        found["rope_parameters"] = _rope({**out["rope_parameters"], "mrope_section": [16, 24, 24]})
    return found


LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
PLAIN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _token(name: str, value: Any, special: int) -> tuple[Any, int]:
    """(a token id inside the small vocabulary, the next free special one)."""
    if name in PLAIN:
        return PLAIN[name], special
    return special, special + 1


def _rope(value: dict[str, Any]) -> dict[str, Any]:
    """Parameters of rotary embeddings with sections that fit the small head."""
    out: dict[str, Any] = {k: _rope(v) if isinstance(v, dict) else v for k, v in value.items()}
    if isinstance(out.get("mrope_section"), list):
        half: int = int(HEAD_DIM * out.get("partial_rotary_factor", 1.0)) // 2
        total, sections = sum(out["mrope_section"]), out["mrope_section"]
        small = [max(1, half * x // total) for x in sections]
        small[0] += half - sum(small)
        out["mrope_section"] = small
    return out


def small_config(architecture: Architecture) -> Any:
    """A configuration of few layers, heads and dimensions, of the class that the model takes.

    Raises:
        NotBuiltError: if there is none.
    """
    try:
        cls = CONFIG_MAPPING[architecture.model_type]
        config = cls(**_shrink(cls()))
        wanted = getattr(tf, architecture.name).config_class
        if not isinstance(config, wanted):
            subs = (x for x in vars(config).values() if isinstance(x, wanted))
            config = next(subs, None) or wanted(**_shrink(wanted()))
        if architecture.kind == "causal" and hasattr(config, "is_decoder"):
            config.is_decoder = True
        return config
    except Exception as error:
        raise NotBuiltError(f"configuration: {_words(error)}") from error


def _words(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:240]


def build(architecture: Architecture, implementation: str = "eager") -> Any:
    """The model with random weights, float32, in eval mode.

    Raises:
        NotBuiltError: if it is not built, or stays too large.
    """
    config, cls = small_config(architecture), getattr(tf, architecture.name)
    try:
        with torch.device("meta"):
            meta = cls._from_config(config, attn_implementation=implementation)
        count = sum(p.numel() for p in meta.parameters())
        if count > MOST:
            raise NotBuiltError(f"{count / 1e6:.0f} million parameters")
        torch.manual_seed(3)
        model = cls._from_config(small_config(architecture), attn_implementation=implementation)
    except NotBuiltError:
        raise
    except Exception as error:
        raise NotBuiltError(_words(error)) from error
    _spread(model)
    return model.float().eval()


@torch.no_grad()
def _spread(model: Any) -> None:
    """Weights with which attention has something to rank; random where initialisation leaves 0, or nothing finite."""
    generator = torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        flat = not torch.isfinite(weight).all() or float(weight.abs().max()) in (0.0, float("inf"))
        if name.endswith("sinks"):
            weight.copy_(torch.linspace(-1, 2, weight.numel()).view_as(weight))
        elif flat and weight.ndim > 0:
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
        elif weight.ndim > 1 and "embed" not in name:
            # Weights of the usual size give nearly flat attention; larger ones give it something to rank.
            weight.mul_(4.0)


def inputs(model: Any) -> list[dict[str, torch.Tensor]]:
    """Arguments of a forward pass that may fit, text alone first: the first that the model accepts is the one."""
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    most = min(FIRST_SPECIAL, getattr(model.config.get_text_config(decoder=True), "vocab_size", VOCABULARY))
    ids = torch.randint(3, most, (1, TOKENS), generator=generator)
    source = torch.randint(3, most, (1, TOKENS // 2), generator=generator)
    found = [{"decoder_input_ids": ids, "input_ids": source}] if "decoder_input_ids" in names else [{"input_ids": ids}]
    if "bbox" in names:
        found.append({**found[0], "bbox": torch.zeros(1, source.shape[1], 4)})
    for name, shape in _features(model.config):
        if name in names:
            feature = torch.randn(1, *shape, generator=generator)
            if name == "flattened_patches":
                # A patch begins with its row and column.
                feature[..., :2] = 1
            found += [{text: ids, name: feature} for text in ("decoder_input_ids", "input_ids") if text in names]
    if "qformer_input_ids" in names:
        found = [{**arguments, "qformer_input_ids": source} for arguments in found]
    queries = getattr(model.config, "num_query_tokens", None)
    if queries:
        # Places in the text that the image takes.
        image = ids.clone()
        image[:, :queries] = FIRST_SPECIAL
        found.append({**found[-1], "input_ids": image})
        found[-1].pop("decoder_input_ids", None)
    return found


def _features(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, without the batch, of sounds and pictures that a model of this configuration may take."""
    subs = [config, *(x for x in vars(config).values() if isinstance(x, tf.PreTrainedConfig))]

    def first(*names: str, default: int = 0) -> int:
        return next((v for c in subs for n in names if isinstance(v := getattr(c, n, None), int)), default)

    mels = first("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", default=80)
    yield "input_features", (mels, 2 * first("max_source_positions", default=64))
    yield "input_features", (64, mels)
    yield "input_features", (mels, 8 * TOKENS)
    yield "input_values", (6400,)
    side = first("image_size", default=56)
    channels = first("num_channels", default=3)
    yield "pixel_values", (channels, side, side)
    yield "pixel_values", (1, channels, side, side)
    patch = first("patch_size", default=14)
    yield "flattened_patches", (12, 2 + first("patch_embed_hidden_size", default=3 * patch * patch))


def pictures(model: Any) -> Iterator[torch.Tensor]:
    """Pictures of the shapes that its tower may take."""
    for name, shape in _features(model.config):
        if name == "pixel_values":
            yield torch.randn(1, *shape, generator=torch.Generator().manual_seed(5))


def text_name(arguments: dict[str, torch.Tensor]) -> str:
    """The argument that holds the tokens whose logits are computed."""
    return "decoder_input_ids" if "decoder_input_ids" in arguments else "input_ids"
