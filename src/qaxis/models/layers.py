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

from ..validation import require

#: in the path of a module: it does not read the text that it continues
_ELSEWHERE = ("cross", "encoder_attn", "encdec", "vision", "visual", "image", "audio")
_INTERFACE, _MASK = "ALL_ATTENTION_FUNCTIONS", "attention_mask"
#: arguments of an attention call that change neither a score nor which keys are visible, or that qaxis honours.
#: A sliding window is in the mask already.
HARMLESS = frozenset(TransformersKwargs.__annotations__) | {
    "module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "softcap", "s_aux",
    "sliding_window", "position_ids", "cache_position", "use_cache", "deterministic", "output_attentions",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "return_dict", "logits_to_keep",
}  # fmt: skip


def transformers_model(model: Any) -> PreTrainedModel:
    """The model that was given, or that ``torch.compile`` was given.

    Raises:
        ValueError: for what is no transformers model, such as another wrapper around one.
    """
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "module", None)
    hint = "; take the model out of its wrapper: model.module" if isinstance(inner, PreTrainedModel) else ""
    require(isinstance(model, PreTrainedModel), "model", type(model).__name__, f"a transformers PreTrainedModel{hint}")
    return model


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
def _calls_interface(cls: Any) -> bool:
    return any(_INTERFACE in source for source in _sources(cls))


class _Method:
    """One method of a class: its calls of the attention interface, as far as its source tells."""

    def __init__(self, method: ast.AST) -> None:
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(method):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        self.assigned.setdefault(target.id, []).append(node.value)
        interfaces = {n for n, values in self.assigned.items() if any(_INTERFACE in ast.unparse(v) for v in values)}
        self.calls = [
            node
            for node in ast.walk(method)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in interfaces
        ]

    def keywords(self) -> set[str]:
        """The keyword arguments that are written out."""
        return {keyword.arg for call in self.calls for keyword in call.keywords if keyword.arg}

    def computes_mask(self) -> bool:
        """Whether the mask that is passed on is not the one that came in, or a part of it."""
        masks = [
            m for call in self.calls for m in (*call.args[4:5], *(k.value for k in call.keywords if k.arg == _MASK))
        ]
        return any(not self._handed_on(mask) for mask in masks)

    def _handed_on(self, mask: ast.expr, seen: frozenset[str] = frozenset()) -> bool:
        if isinstance(mask, ast.Constant):
            return True
        if isinstance(mask, ast.IfExp):
            return self._handed_on(mask.body, seen) and self._handed_on(mask.orelse, seen)
        if isinstance(mask, ast.Subscript):
            return self._handed_on(mask.value, seen)
        if isinstance(mask, ast.Call):  # one of several masks, by name
            return isinstance(mask.func, ast.Attribute) and mask.func.attr == "get"
        if isinstance(mask, ast.Name):
            values = self.assigned.get(mask.id, []) if mask.id not in seen else []
            return all(self._handed_on(value, seen | {mask.id}) for value in values)
        return False


@cache
def own_rules(cls: Any) -> tuple[str, ...]:
    """What an attention class does, by its source, that qaxis cannot follow: in words, empty if nothing is seen."""
    methods = [
        _Method(node)
        for source in _sources(cls)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
    ]
    unknown = sorted(set().union(*(method.keywords() for method in methods)) - HARMLESS)
    found = [f"passes {', '.join(unknown)}"] if unknown else []
    if any(method.computes_mask() for method in methods):
        found.append("computes a mask of its own")
    return tuple(found)


@cache
def _takes_cache(cls: Any) -> bool:
    return "past_key_values" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]


def _decodes(module: nn.Module, generates: bool) -> bool:
    """Whether this module continues a text: it is causal, or says that it decodes, or generates with a cache.

    The last are prefix language models (PaliGemma's Gemma): what is not causal in them stands in their masks. A
    configuration that is not causal makes an encoder of any model.
    """
    if not getattr(module.config, "is_causal", True):
        return False
    kind: Any = type(module)
    continues = getattr(module, "is_decoder", generates and _takes_cache(kind))
    return bool(getattr(module, "is_causal", True) or continues)


def _is_decoder_attention(path: str, module: nn.Module, generates: bool) -> bool:
    kind: Any = type(module)
    return bool(
        isinstance(getattr(module, "layer_idx", None), int)
        and isinstance(module.__dict__.get("config"), PreTrainedConfig)
        and _calls_interface(kind)
        and _decodes(module, generates)
        and not any(word in path.lower() for word in _ELSEWHERE)
    )


def text_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of the model that continues a text, or the model."""
    decoder = model.get_decoder()
    # Some models call another part of theirs a decoder, such as the projection to the vocabulary.
    return decoder if isinstance(decoder, PreTrainedModel) else model


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's self-attention modules that call the attention interface, in the model's order."""
    decoder, generates = text_decoder(model), model.can_generate()
    return [module for path, module in decoder.named_modules() if _is_decoder_attention(path, module, generates)]


def _score_bias(config: Any) -> str | None:
    """The bias that a model of this configuration adds to its scores, in words, or None."""
    attention = getattr(config, "attn_config", None)
    if config.model_type == "bloom" or getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "ALiBi"
    if getattr(config, "relative_attention_num_buckets", None) or getattr(config, "relative_attention", False):
        return "a relative position bias"
    return None


def check_attention(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Refuse a model whose logits are not positive multiples of <q, k>, whose attention cannot be replaced, or that is
    in float64.

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
    kinds: set[Any] = {type(module) for module in modules}
    for cls in kinds:
        rules = own_rules(cls)
        require(
            not rules, "model", name,
            f"a model whose attention is determined by query, key and the mask it is given; {cls.__name__} "
            f"{' and '.join(rules)}, which selects keys or changes scores by a rule of its own",
        )  # fmt: skip
    for module in modules:
        for parameter in module.parameters():
            double = parameter.dtype == torch.float64
            require(not double, "model.dtype", parameter.dtype, "float32, float16 or bfloat16")
