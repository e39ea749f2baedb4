"""Which modules of a model qaxis replaces: the self-attention of the text decoder behind ``AttentionInterface``.

Encoders, cross attention, vision and audio towers stay what they are. Their rule would be another one: a budget is a
share of a text that grows, and their keys do not.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import TransformersKwargs

from ..validation import DTYPES, require

#: in the path of a module: it does not read the text that it continues
_ELSEWHERE = ("cross", "encoder_attn", "encdec", "vision", "visual", "image", "audio")
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
#: arguments of an attention call that change neither a score nor which keys are visible, or that qaxis honours.
#: A sliding window is in the mask already.
HARMLESS = frozenset(TransformersKwargs.__annotations__) | {
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "softcap", "s_aux",
    "sliding_window", "position_ids", "cache_position", "use_cache", "deterministic", "output_attentions",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "return_dict", "logits_to_keep",
}  # fmt: skip


def check_model(model: Any) -> None:
    """Refuse what is no transformers model, such as a wrapper around one.

    Raises:
        ValueError: naming the wrapper.
    """
    inner = getattr(model, "module", None)
    hint = "; take the model out of its wrapper: model.module" if isinstance(inner, PreTrainedModel) else ""
    require(isinstance(model, PreTrainedModel), "model", type(model).__name__, f"a transformers PreTrainedModel{hint}")


def _sources(cls: type) -> list[str]:
    """The sources of a class and of what it inherits from, up to torch's own."""
    found = []
    for base in cls.__mro__:
        if base is nn.Module:
            break
        try:
            found.append(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
    return found


@cache
def _calls_interface(cls: type) -> bool:
    return any(_INTERFACE in source for source in _sources(cls))


@cache
def attention_keywords(cls: type) -> frozenset[str]:
    """The keyword arguments that an attention module writes out where it calls the interface."""
    names: set[str] = set()
    words: set[str] = set()
    for source in _sources(cls):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _INTERFACE in ast.unparse(node.value):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                words |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return frozenset(words)


def _is_decoder_attention(path: str, module: nn.Module) -> bool:
    causal = getattr(module, "is_causal", True) or getattr(module, "is_decoder", False)
    return bool(
        causal
        and isinstance(getattr(module, "layer_idx", None), int)
        and isinstance(module.__dict__.get("config"), PreTrainedConfig)
        and _calls_interface(type(module))
        and not any(word in path.lower() for word in _ELSEWHERE)
    )


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's self-attention modules that call the attention interface, in the model's order."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return [module for path, module in decoder.named_modules() if _is_decoder_attention(path, module)]


def _score_bias(config: Any) -> str | None:
    """The bias that a model of this configuration adds to its scores, in words, or None."""
    attention = getattr(config, "attn_config", None)
    if config.model_type == "bloom" or getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "ALiBi"
    if getattr(config, "relative_attention_num_buckets", None) or getattr(config, "relative_attention", False):
        return "a relative position bias"
    return None


def check_attention(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Refuse a model whose logits are not positive multiples of <q, k>, or whose attention cannot be replaced.

    Raises:
        ValueError: with the reason.
    """
    name = type(model).__name__
    for config in {id(m.config): m.config for m in [model, *modules]}.values():
        bias = _score_bias(config.get_text_config())  # type: ignore[union-attr,operator]
        require(
            bias is None, "model", name,
            f"a model whose logits are positive multiples of <q, k>; it adds {bias}, which differs between keys, so "
            "that the order of <q, k> is no longer the order of the logits (paper, section 2)",
        )  # fmt: skip
    require(
        bool(modules), "model", name,
        "a model whose decoder has causal self-attention behind transformers' AttentionInterface",
    )  # fmt: skip
    for cls in {type(module) for module in modules}:
        unknown = sorted(attention_keywords(cls) - HARMLESS)
        require(
            not unknown, "model", name,
            f"a model whose attention is determined by query, key and mask; {cls.__name__} passes "
            f"{', '.join(unknown)}, which selects keys or changes scores by a rule of its own",
        )  # fmt: skip
    for module in modules:
        for parameter in module.parameters():
            known = parameter.dtype in DTYPES or parameter.dtype != torch.float64
            require(known, "model.dtype", parameter.dtype, "float32, float16 or bfloat16")
