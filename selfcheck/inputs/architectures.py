"""Every architecture with which transformers decodes text, small and with random weights.

Names come from the auto classes of the installed transformers, sizes from rules on the names of a configuration's
attributes; ``OVERRIDES`` has what the rules cannot know. What stays too large, or what no rule builds, is reported
with the reason, never left out silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

#: parameters above which a model is not small
MOST = 8_000_000
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
    (r"num_labels|num_channels|in_channels|audio_channels|seed|chunk_size_feed_forward|num_return_sequences", None),
    (r"decoder_sparse_step|encoder_sparse_step|temporal_patch_size|spatial_merge_size|mlp_ratio|block_size", None),
    (r".*vocab_size.*|num_embeddings|num_embeds", VOCABULARY),
    (r"qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"qk_head_dim", HEAD_DIM + HEAD_DIM // 2),
    (r".*(head_dim|dim_head|_d_head|headdim)|d_kv|kv_channels|d_head|attention_head_size", HEAD_DIM),
    (r"index_topk", 12),
    (r"index_block_size", 8),
    (r".*(index_topk_blocks|experts_per_tok.*|moe_k|topk|top_k|shared_experts|zero_expert_num)", 2),
    (r"n_group|num_expert_group|topk_group|num_kv_shared_layers|n_head_kv", 1),
    (r".*(num_experts|_experts|expert_capacity)", HEADS),
    (r".*(key_value_heads|kv_heads|kv_n_heads|query_groups|mamba_n_groups|mamba_ngroups)", 2),
    (r".*(_heads|n_head|num_key_heads|num_value_heads|_heads_per_layer)", HEADS),
    (r".*_rank", 16),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"mamba_d_ssm|lru_width", HIDDEN),
    (r".*(sliding_window.*|attention_window.*|local_attention|attention_chunk_size|window_size)", WINDOW),
    (r".*position_embeddings|n_positions|n_ctx|.*seq_len.*|max_(source|target|text|speech)_positions", POSITIONS),
    (r".*(image_size|crop_size|resolution)", 56),
    (r"patch_size", 14),
    (r".*(hidden_layers|_layers|n_layer)|layers|depth|num_blocks|.*_depth", LAYERS),
    (r"first_k_dense_replace", 1),
    (r".*(intermediate_size.*|ffn_dim|ffn_hidden_size|mlp_dim|expert_dim|feed_forward_size)|d_ff|d_inner|dff", 96),
    (r".*(hidden_size.*|_dim|_hidden|channels|hidden_sizes|embedding_size)|d_model|n_embd|dim|num_filters", HIDDEN),
    (r".*(num_query_tokens|n_latents|num_latents|mm_tokens_per_image|image_seq_length)", 16),
]
#: of configurations below a model's own, those that are small enough or have shapes of their own
OVERRIDES: dict[str, dict[str, Any]] = {}


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
        elif isinstance(value, int):
            out[name] = _small(name, value)
        elif isinstance(value, (list, tuple)) and len(value) == full and full > layers:
            out[name] = [_small(name, x) if type(x) is int else x for x in value[:layers]]
        elif isinstance(value, (list, tuple)) and all(type(x) is int for x in value):
            out[name] = [_small(name, x) for x in value]
        elif isinstance(value, dict):
            out[name] = _rope(value, values)
    return {**out, **OVERRIDES.get(config.model_type, {})}


LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
PLAIN = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def _token(name: str, value: Any, special: int) -> tuple[Any, int]:
    """(a token id inside the small vocabulary, the next free special one)."""
    if name in PLAIN:
        return PLAIN[name], special
    return special, special + 1


def _rope(value: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Parameters of rotary embeddings with sections that fit the small head."""
    out = {k: _rope(v, values) if isinstance(v, dict) else v for k, v in value.items()}
    if isinstance(out.get("mrope_section"), list):
        half = int(HEAD_DIM * out.get("partial_rotary_factor", 1.0)) // 2
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
            config = next(x for x in vars(config).values() if isinstance(x, wanted))
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
    """Weights with which attention has something to rank; none that a model's own initialisation leaves empty or 0."""
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


def inputs(model: Any, batch: int = 1) -> list[dict[str, torch.Tensor]]:
    """Arguments of a forward pass that may fit, text first: the first that the model accepts is the one.

    Every one has its text, whose last token the logits at the end depend on, under ``text_name``.
    """
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, FIRST_SPECIAL, (batch, TOKENS), generator=generator)
    other = torch.randint(3, FIRST_SPECIAL, (batch, TOKENS // 2), generator=generator)
    text: dict[str, torch.Tensor] = {"input_ids": ids}
    found = [text, {"decoder_input_ids": ids, "input_ids": other}] if not model.config.is_encoder_decoder else [
        {"decoder_input_ids": ids, "input_ids": other}
    ]
    for name, shape in _features(model.config):
        sounds = torch.randn(batch, *shape, generator=generator)
        found += [{"decoder_input_ids": ids, name: sounds}, {"input_ids": ids, name: sounds}]
    return found


def _features(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, without the batch, of sounds and pictures that a model of this configuration may take."""
    subs = [config, *(x for x in vars(config).values() if isinstance(x, tf.PreTrainedConfig))]

    def first(*names: str, default: int = 0) -> int:
        return next((v for c in subs for n in names if isinstance(v := getattr(c, n, None), int)), default)

    mels = first("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", default=80)
    yield "input_features", (mels, 2 * first("max_source_positions", default=64))
    yield "input_features", (64, mels)
    yield "input_values", (6400,)
    side = first("image_size", default=56)
    yield "pixel_values", (first("num_channels", default=3), side, side)
    patch = first("patch_size", default=14)
    yield "flattened_patches", (12, 2 + 3 * patch * patch)


def text_name(arguments: dict[str, torch.Tensor]) -> str:
    """The argument that holds the tokens whose logits are computed."""
    return "decoder_input_ids" if "decoder_input_ids" in arguments else "input_ids"
