"""Turn qaxis on and off for a model: enable, disable, sparse.

What a model needs to know (budget, exactness) hangs on its attention modules while qaxis is on, and is removed when it
is turned off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..attention.always import Always
from ..attention.backend import check_backend
from ..budget import Budget
from ..validation import is_integer, require
from . import attention as _registered  # noqa: F401  registers the implementation that enable() names
from .settings import (
    EXACTNESS,
    NAME,
    BudgetArgument,
    Settings,
    attention_modules,
    check_layers,
    forget_calls,
    layer_budget,
    set_settings,
    settings_of,
    watch_calls,
)

_PREVIOUS = "_qaxis_previous"


def _score_bias(config: Any) -> str | None:
    """The bias that a model of this configuration adds to its scores, in words, or None."""
    attention = getattr(config, "attn_config", None)
    if config.model_type == "bloom" or getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "ALiBi"
    if getattr(config, "relative_attention_num_buckets", None) or getattr(config, "relative_attention", False):
        return "a relative position bias"
    return None


@dataclass
class _Previous:
    implementation: str
    hooks: list[Any] = field(default_factory=list)


def _missed(module: nn.Module) -> None:
    raise RuntimeError(
        f"layer {getattr(module, 'layer_idx', '?')}: attention did not go through qaxis (strict=True); the "
        "model's attention implementation was changed after qaxis.enable"
    )


def enable(
    model: PreTrainedModel,
    budget: BudgetArgument = None,
    *,
    exactness: str = "bitwise",
    backend: str = "auto",
    first_dense: int = 0,
    sinks: int = 0,
    recent: int = 0,
    strict: bool = False,
) -> PreTrainedModel:
    """Let every attention layer of ``model`` attend to its exact top-k keys.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface``.
        budget: a :class:`~qaxis.Budget` (default: coverage 0.1, at least 64 keys), an int, ``"dense"``, or a dict
            from layers to these, with ``"default"`` for the layers it does not name.
        exactness: ``"bitwise"`` (canonical output) or ``"selection"`` (identical indices, output by a
            masked dense product; faster for prefill on a CPU, within
            :func:`qaxis.arithmetic.rounding.selection_output_bound` of canonical).
        backend: as in :func:`~qaxis.topk_attention`.
        first_dense: the first so many layers stay dense.
        sinks, recent: the first and the newest so many visible keys are always kept. They count towards k_eff,
            so the budget's minimum must hold them.
        strict: raise if a layer's attention is ever computed by anything else.

    Returns:
        The same model.

    Raises:
        ValueError: for a model without such attention, one that adds a bias to its scores (ALiBi, relative
            positions), or an argument out of range.
    """
    _check_model(model)
    modules = attention_modules(model)
    always = Always(sinks, recent)
    _check_options(exactness, backend, first_dense, always)
    check_layers(budget, len(modules))
    settings = []
    for module in modules:
        chosen = layer_budget(budget, int(module.layer_idx), first_dense)  # type: ignore[arg-type]
        _check_room(chosen, always)
        settings.append(Settings(chosen, exactness, backend, always, strict))
    _switch_on(model)
    _remove_hooks(model)
    for module, each in zip(modules, settings, strict=True):
        set_settings(module, each)
    if strict:
        kept = model.__dict__.setdefault(_PREVIOUS, _Previous(NAME))
        kept.hooks = [hook for module in modules for hook in watch_calls(module, _missed)]
    return model


def _check_model(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are not positive multiples of <q, k>, or whose attention cannot be replaced."""
    bias = _score_bias(model.config.get_text_config())
    require(
        bias is None, "model", type(model).__name__,
        f"a model whose logits are positive multiples of <q, k>; it adds {bias}, which differs between keys, so that "
        "the order of <q, k> is no longer the order of the logits (paper, section 2)",
    )  # fmt: skip
    known = bool(attention_modules(model))
    require(known, "model", type(model).__name__, "a model with attention layers behind AttentionInterface")


def _check_options(exactness: str, backend: str, first_dense: int, always: Always) -> None:
    require(exactness in EXACTNESS, "exactness", exactness, f"one of {EXACTNESS}")
    check_backend(backend)
    for name, n in (("first_dense", first_dense), *always._asdict().items()):
        require(is_integer(n) and n >= 0, name, n, "an integer of at least 0")


def _check_room(budget: Budget | None, always: Always) -> None:
    """Refuse a budget that does not hold what is always kept."""
    total = always.sinks + always.recent
    require(
        budget is None or budget.minimum >= total, "sinks + recent", total,
        f"at most the budget's minimum {budget.minimum if budget else 0}: kept keys count towards k_eff",
    )  # fmt: skip


def _switch_on(model: PreTrainedModel) -> None:
    """Let transformers call qaxis, and remember what it called before."""
    previous = model.config._attn_implementation
    if previous != NAME:
        model.set_attn_implementation(NAME)
        done = model.config._attn_implementation == NAME
        require(done, "model", type(model).__name__, "a model that lets its attention implementation be set")
        model.__dict__[_PREVIOUS] = _Previous(previous)


def _remove_hooks(model: PreTrainedModel) -> None:
    previous = model.__dict__.get(_PREVIOUS)
    if previous is not None:
        for hook in previous.hooks:
            hook.remove()
        previous.hooks = []


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`enable`: the attention implementation is the one from before, no attribute is left.

    A model that was *loaded* with ``attn_implementation="qaxis"`` has no other one to go back to and
    gets transformers' default: SDPA where the model supports it, eager attention elsewhere.
    """
    _remove_hooks(model)
    for module in attention_modules(model):
        set_settings(module, None)
        forget_calls(module)
    previous = model.__dict__.pop(_PREVIOUS, None)
    if model.config._attn_implementation == NAME:
        default = "sdpa" if model._supports_sdpa else "eager"
        known = previous is not None and previous.implementation != NAME
        model.set_attn_implementation(previous.implementation if known else default)
    return model


@contextmanager
def sparse(model: PreTrainedModel, budget: BudgetArgument = None, **options: Any) -> Iterator[PreTrainedModel]:
    """``with qaxis.sparse(model, budget): ...``: :func:`enable` inside; what was before, after."""
    was_on = model.config._attn_implementation == NAME
    saved = [(m, settings_of(m)) for m in attention_modules(model)]
    try:
        yield enable(model, budget, **options)
    finally:
        if was_on:
            _remove_hooks(model)
            for module, settings in saved:
                set_settings(module, settings)
                if settings is not None and settings.strict:
                    model.__dict__.setdefault(_PREVIOUS, _Previous(NAME)).hooks += watch_calls(module, _missed)
        else:
            disable(model)
