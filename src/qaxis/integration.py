"""qaxis inside transformers: ``attn_implementation="qaxis"``, enable, disable, sparse.

Registered through transformers' own attention and mask interfaces. What a model needs to know (budget,
exactness) hangs on its attention modules while qaxis is on, and is removed when it is turned off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .attention import attend_allowed
from .budget import Budget, as_budget
from .ranking import causal_mask, resolve_backend, select_mask
from .validation import check_scale, require

NAME = "qaxis"
CAPTURE_NAME = "qaxis_capture"
_ATTRIBUTE = "_qaxis_settings"
_EXACTNESS = ("bitwise", "selection")
#: query rows that the masked mode handles at once; bounds memory at M * N * H booleans
_ROWS = 1024


@dataclass(frozen=True)
class Settings:
    """What an attention module needs to know while qaxis is on."""

    budget: Budget = field(default_factory=Budget)
    exactness: str = "bitwise"
    backend: str = "auto"


def _check_supported(kwargs: dict[str, Any], attention_mask: torch.Tensor | None) -> None:
    """Refuse score modifications under which ranking by the query axis is not ranking by logit."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("position_bias=<tensor>: allowed is None; a bias that differs between keys breaks Theorem 1")
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name}={kwargs[name]!r}: allowed is None; the order is kept, the sum is not built"
            )
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask.dtype={attention_mask.dtype}: allowed is bool or None; an additive bias breaks Theorem 1"
        )


def _score_bias(config: Any) -> str | None:
    """The bias that a model of this configuration adds to its scores, in words, or None."""
    attention = getattr(config, "attn_config", None)
    if config.model_type == "bloom" or getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "ALiBi"
    if getattr(config, "relative_attention_num_buckets", None) or getattr(config, "relative_attention", False):
        return "a relative position bias"
    return None


def qaxis_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: ``[B,H,M,D], [B,Hkv,N,D] -> [B,M,H,D]``.

    Raises:
        ValueError: for training, dropout, or a bias that differs between keys.
    """
    settings: Settings = getattr(module, _ATTRIBUTE, Settings())
    _check_supported(kwargs, attention_mask)
    require(dropout == 0.0, "dropout", dropout, "0: qaxis is for inference")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError("requires_grad=True: allowed is inference under torch.no_grad(); selection has no gradient")
    scale = check_scale(scaling, query.shape[-1])
    m, n = query.shape[2], key.shape[2]
    if attention_mask is not None:
        allowed = attention_mask[..., :n]
    elif m > 1 and (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        allowed = causal_mask(m, n, query.device)
    else:
        allowed = torch.ones(1, 1, 1, n, dtype=torch.bool, device=query.device)
    if settings.exactness == "selection":
        out = _masked(query, key, value, settings.budget, allowed, scale)
    else:
        backend = resolve_backend(settings.backend, query)
        out = attend_allowed(query, key, value, settings.budget, allowed, scale, backend).output
    return out.transpose(1, 2).contiguous(), None


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, budget: Budget, allowed: torch.Tensor, scale: float
) -> torch.Tensor:
    """Identical selection, output by a masked dense product: fast for prefill, not bitwise canonical."""
    m, group = q.shape[2], q.shape[1] // k.shape[1]
    table = budget.table(k.shape[2]).to(q.device)
    allowed = allowed.expand(-1, -1, m, -1)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        mask = select_mask(q[:, :, rows], k, allowed[:, :, rows], table[allowed[:, :, rows].sum(-1)])
        out[:, :, rows] = nn.functional.scaled_dot_product_attention(
            q[:, :, rows], keys, values, attn_mask=mask, scale=scale
        )
    # A row that may see no key has no defined softmax; canonical attention gives 0.
    return torch.where(allowed.any(-1)[..., None], out, 0.0)


def _full_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' boolean mask, never skipped for a padded or cached batch."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, qaxis_attention_forward)
AttentionMaskInterface.register(NAME, _full_mask)


def _attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


@dataclass(frozen=True)
class _Previous:
    implementation: str


def enable(
    model: PreTrainedModel, budget: Budget | int | None = None, *, exactness: str = "bitwise", backend: str = "auto"
) -> PreTrainedModel:
    """Let every attention layer of ``model`` attend to its exact top-k keys.

    Args:
        model: a transformers model whose attention goes through ``AttentionInterface``.
        budget: a :class:`~qaxis.Budget` (default: coverage 0.1, at least 64 keys), or an int.
        exactness: ``"bitwise"`` (canonical output) or ``"selection"`` (identical indices, output by a
            masked dense product; faster for prefill on a CPU, within
            :func:`qaxis.rounding.selection_output_bound` of canonical).
        backend: as in :func:`~qaxis.topk_attention`.

    Returns:
        The same model.

    Raises:
        ValueError: for a model without such attention, one that adds a bias to its scores (ALiBi, relative
            positions), or an argument out of range.
    """
    settings = Settings(as_budget(Budget() if budget is None else budget), exactness, backend)
    require(exactness in _EXACTNESS, "exactness", exactness, f"one of {_EXACTNESS}")
    require(backend in ("auto", "reference", "triton"), "backend", backend, "'auto', 'reference' or 'triton'")
    bias = _score_bias(model.config.get_text_config())
    require(
        bias is None, "model", type(model).__name__,
        f"a model whose logits are positive multiples of <q, k>; it adds {bias}, which differs between keys, so that "
        "the order of <q, k> is no longer the order of the logits (paper, section 2)",
    )  # fmt: skip
    modules = _attention_modules(model)
    require(bool(modules), "model", type(model).__name__, "a model with attention layers behind AttentionInterface")
    previous = model.config._attn_implementation
    if previous != NAME:
        model.set_attn_implementation(NAME)
        require(
            model.config._attn_implementation == NAME,
            "model",
            type(model).__name__,
            "a model that lets its attention implementation be set",
        )
        model.__dict__["_qaxis_previous"] = _Previous(previous)
    for module in modules:
        module.__dict__[_ATTRIBUTE] = settings
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`enable`: the attention implementation is the one from before, no attribute is left.

    A model that was *loaded* with ``attn_implementation="qaxis"`` has no other one to go back to and
    gets transformers' default, SDPA.
    """
    for module in _attention_modules(model):
        module.__dict__.pop(_ATTRIBUTE, None)
    previous = model.__dict__.pop("_qaxis_previous", None)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(previous.implementation if previous else "sdpa")
    return model


@contextmanager
def sparse(model: PreTrainedModel, budget: Budget | int | None = None, **options: Any) -> Iterator[PreTrainedModel]:
    """``with qaxis.sparse(model, budget): ...``: :func:`enable` inside; what was before, after."""
    was_on = model.config._attn_implementation == NAME
    saved = [(m, m.__dict__.get(_ATTRIBUTE)) for m in _attention_modules(model)]
    try:
        yield enable(model, budget, **options)
    finally:
        if was_on:
            for module, settings in saved:
                module.__dict__.pop(_ATTRIBUTE, None)
                if settings is not None:
                    module.__dict__[_ATTRIBUTE] = settings
        else:
            disable(model)


Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]
_observers: list[Observer] = []


def _capture_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    scale = check_scale(kwargs.get("scaling"), query.shape[-1])
    for observer in _observers:
        observer(int(module.layer_idx), query, key, value, scale)  # type: ignore[arg-type]
    return sdpa_attention_forward(module, query, key, value, *args, **kwargs)


AttentionInterface.register(CAPTURE_NAME, _capture_forward)
AttentionMaskInterface.register(CAPTURE_NAME, sdpa_mask)


@contextmanager
def observe_attention(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call ``observer(layer, q, k, v, scale)`` with every layer's attention inputs; attention itself is SDPA.

    q is ``[B, H, M, D]``, k and v are ``[B, Hkv, N, D]``, positions already rotated in.
    """
    before = model.config._attn_implementation
    _observers.append(observer)
    model.set_attn_implementation(CAPTURE_NAME)
    try:
        yield
    finally:
        _observers.remove(observer)
        model.set_attn_implementation(before)
