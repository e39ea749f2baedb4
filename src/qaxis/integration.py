"""qaxis inside transformers: ``attn_implementation="qaxis"``, enable, disable, sparse.

Registered through transformers' own attention and mask interfaces. What a model needs to know (budget,
exactness) hangs on its attention modules while qaxis is on, and is removed when it is turned off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from .attention import reference_attend
from .budget import Budget, as_budget
from .kept import indices_with_kept
from .lazy import LazyTensor
from .logits import attend_modified
from .ranking import causal_mask, reference_indices, resolve_backend, select_mask
from .validation import check_scale, require

NAME = "qaxis"
_ATTRIBUTE = "_qaxis_settings"
_PREVIOUS = "_qaxis_previous"
_CALLS = "_qaxis_calls"
_EXACTNESS = ("bitwise", "selection")
#: query rows that the masked mode handles at once; bounds memory at M * N * H booleans
_ROWS = 1024

#: what ``budget`` may be: one for all layers, or one a layer with "default" for the others; "dense" keeps every key
LayerBudget = Budget | int | str
BudgetArgument = LayerBudget | Mapping[int | str, LayerBudget] | None


@dataclass(frozen=True)
class Settings:
    """What an attention module needs to know while qaxis is on."""

    #: None: this layer attends to every key
    budget: Budget | None = field(default_factory=Budget)
    exactness: str = "bitwise"
    backend: str = "auto"
    sinks: int = 0
    recent: int = 0
    strict: bool = False


@dataclass
class Call:
    """One attention call, as recorders see it."""

    module: nn.Module
    layer: int
    query: torch.Tensor
    key: torch.Tensor
    allowed: torch.Tensor
    scale: float
    softcap: float | None
    sink: torch.Tensor | None
    #: bool ``[B, H, M, N]``; None where every allowed key takes part
    kept: torch.Tensor | None


_recorders: list[Callable[[Call], None]] = []


def _score_bias(config: Any) -> str | None:
    """The bias that a model of this configuration adds to its scores, in words, or None."""
    attention = getattr(config, "attn_config", None)
    if config.model_type == "bloom" or getattr(config, "alibi", False) or getattr(attention, "alibi", False):
        return "ALiBi"
    if getattr(config, "relative_attention_num_buckets", None) or getattr(config, "relative_attention", False):
        return "a relative position bias"
    return None


def _check_supported(kwargs: Mapping[str, Any], attention_mask: torch.Tensor | None) -> None:
    """Refuse score modifications under which ranking by the query axis is not ranking by logit."""
    if kwargs.get("position_bias") is not None:
        raise ValueError("position_bias=<tensor>: allowed is None; a bias that differs between keys breaks Theorem 1")
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask.dtype={attention_mask.dtype}: allowed is bool or None; an additive bias breaks Theorem 1"
        )


@torch.compiler.disable(reason="a compiler may contract or reorder canonical arithmetic; the kernels stay as they are")
def qaxis_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers: ``[B,H,M,D], [B,Hkv,N,D] -> [B,M,H,D]``.

    Args:
        softcap: soft cap of the logits (Gemma 2); it keeps their order.
        s_aux: ``[H]`` sink logits that take part in the denominator (gpt-oss); they keep the order.

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
    out, kept = _attend(query, key, value, allowed, scale, settings, softcap, s_aux)
    if _recorders:
        layer = int(getattr(module, "layer_idx", -1))
        call = Call(module, layer, query, key, allowed, scale, softcap, s_aux, None if kept is None else kept())
        for recorder in _recorders:
            recorder(call)
    if settings.strict or _recorders:
        module.__dict__[_CALLS] = calls_of(module) + 1
    return out.transpose(1, 2).contiguous(), None


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
    settings: Settings,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor] | None]:
    """(output ``[B, H, M, Dv]``, how to get the mask of kept keys or None where every key was kept)."""
    bitwise = settings.exactness == "bitwise" and settings.budget is not None
    backend = resolve_backend(settings.backend, q)
    plain = softcap is None and sink is None
    if bitwise and backend == "triton" and plain and not (settings.sinks or settings.recent):
        from . import kernels_quantized

        if isinstance(k, LazyTensor) and isinstance(v, LazyTensor) and kernels_quantized.readable(k.stored, v.stored):
            assert settings.budget is not None
            indices = kernels_quantized.topk_indices(q, k.stored, settings.budget, allowed)
            out = kernels_quantized.attend(q, k.stored, v.stored, indices, scale)
            return out, lambda: _as_mask(indices, k.shape[2])
    k, v = (x.stored.dequantized() if isinstance(x, LazyTensor) else x for x in (k, v))
    if not bitwise:
        return _masked(q, k, v, allowed, scale, settings, softcap, sink)
    indices = _indices(q, k, allowed, settings, backend)
    if not plain:
        out = attend_modified(q, k, v, indices, scale, softcap=softcap, sink=sink)
    elif backend == "triton":
        from . import kernels

        out = kernels.attend(q, k, v, indices, scale)
    else:
        out = reference_attend(q, k, v, indices, scale)
    return out, lambda: _as_mask(indices, k.shape[2])


def _indices(q: torch.Tensor, k: torch.Tensor, allowed: torch.Tensor, settings: Settings, backend: str) -> torch.Tensor:
    assert settings.budget is not None
    if settings.sinks or settings.recent:
        return indices_with_kept(q, k, settings.budget, allowed, settings.sinks, settings.recent, backend)
    if backend == "triton":
        from . import kernels

        return kernels.topk_indices(q, k, settings.budget, allowed)
    return reference_indices(q, k, settings.budget, allowed)


def _as_mask(indices: torch.Tensor, n: int) -> torch.Tensor:
    """Bool ``[B, H, M, N]`` of indices padded with -1."""
    mask = torch.zeros(*indices.shape[:3], n + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(indices < 0, n, indices), True)[..., :n]


def _masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor,
    scale: float,
    settings: Settings,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> tuple[torch.Tensor, Callable[[], torch.Tensor] | None]:
    """Identical selection, output by a masked dense product: fast for prefill, not bitwise canonical."""
    m, group = q.shape[2], q.shape[1] // k.shape[1]
    allowed = allowed.expand(-1, -1, m, -1)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    masks: list[torch.Tensor] = []
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        mask = allowed[:, :, rows]
        if settings.budget is not None and (settings.sinks or settings.recent):
            mask = _as_mask(_indices(q[:, :, rows], k, mask, settings, "reference"), k.shape[2])
        elif settings.budget is not None:
            table = settings.budget.table(k.shape[2], q.device)
            mask = select_mask(q[:, :, rows], k, mask, table[mask.sum(-1)])
        if _recorders and settings.budget is not None:
            masks.append(mask)
        out[:, :, rows] = _weighted(q[:, :, rows], keys, values, mask, scale, softcap, sink)
    # A row that may see no key has no defined softmax; canonical attention gives 0.
    out = torch.where(allowed.any(-1)[..., None], out, 0.0)
    return out, None if settings.budget is None else lambda: torch.cat(masks, 2)


def _weighted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention under a bool mask, with the modifications that SDPA does not know."""
    if softcap is None and sink is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    logits = q.float() @ k.float().transpose(-1, -2) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = torch.where(mask, logits, -torch.inf)
    if sink is not None:
        extra = sink.float().reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.softmax(torch.cat([logits, extra], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(logits, -1)
    return (weights @ v.float()).to(q.dtype)


def _full_mask(batch_size: int, q_length: int, kv_length: int, **kwargs: Any) -> torch.Tensor | None:
    """transformers' boolean mask; left out only where its absence cannot be misread.

    SDPA reads no mask as causal from the *first* key on, which is how transformers uses it with a static cache;
    here no mask means that the queries are the last positions. Both agree for one query, or as many as keys.
    """
    skip = kwargs.pop("allow_is_causal_skip", True) and q_length in (1, kv_length)
    kwargs["allow_is_bidirectional_skip"] = False
    return sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=skip, **kwargs)


AttentionInterface.register(NAME, qaxis_attention_forward)
AttentionMaskInterface.register(NAME, _full_mask)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that call the attention interface, in order of their layers."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


@dataclass
class _Previous:
    implementation: str
    hooks: list[Any] = field(default_factory=list)


def _layer_budget(budget: BudgetArgument, layer: int, first_dense: int) -> Budget | None:
    """The budget of one layer, None for a dense one."""
    if layer < first_dense:
        return None
    if isinstance(budget, Mapping):
        budget = budget.get(layer, budget.get("default", Budget()))
    if isinstance(budget, str):
        require(budget == "dense", "budget", budget, "a qaxis.Budget, an integer, or 'dense'")
        return None
    return as_budget(Budget() if budget is None else budget)


def _check_budget(budget: BudgetArgument, layers: int) -> None:
    if isinstance(budget, Mapping):
        for name in budget:
            known = name == "default" or (isinstance(name, int) and 0 <= name < layers)
            require(known, "budget", name, f"a dict with layers 0..{layers - 1} and 'default' as keys")


def calls_of(module: nn.Module) -> int:
    """How often attention of this module came through qaxis; counted in strict mode and while recording."""
    return module.__dict__.get(_CALLS, 0)


class _Strict:
    """Forward hook: an attention module that was run without coming through qaxis is an error."""

    def __init__(self, module: nn.Module) -> None:
        self.seen = calls_of(module)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        before, self.seen = self.seen, calls_of(module)
        if self.seen == before:
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
            :func:`qaxis.rounding.selection_output_bound` of canonical).
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
    require(exactness in _EXACTNESS, "exactness", exactness, f"one of {_EXACTNESS}")
    require(backend in ("auto", "reference", "triton"), "backend", backend, "'auto', 'reference' or 'triton'")
    for name, n in (("first_dense", first_dense), ("sinks", sinks), ("recent", recent)):
        require(isinstance(n, int) and not isinstance(n, bool) and n >= 0, name, n, "an integer of at least 0")
    bias = _score_bias(model.config.get_text_config())
    require(
        bias is None, "model", type(model).__name__,
        f"a model whose logits are positive multiples of <q, k>; it adds {bias}, which differs between keys, so that "
        "the order of <q, k> is no longer the order of the logits (paper, section 2)",
    )  # fmt: skip
    modules = attention_modules(model)
    require(bool(modules), "model", type(model).__name__, "a model with attention layers behind AttentionInterface")
    _check_budget(budget, len(modules))
    settings = []
    for module in modules:
        chosen = _layer_budget(budget, int(module.layer_idx), first_dense)  # type: ignore[arg-type]
        require(
            chosen is None or chosen.minimum >= sinks + recent, "sinks + recent", sinks + recent,
            f"at most the budget's minimum {chosen.minimum if chosen else 0}: kept keys count towards k_eff",
        )  # fmt: skip
        settings.append(Settings(chosen, exactness, backend, sinks, recent, strict))
    previous = model.config._attn_implementation
    if previous != NAME:
        model.set_attn_implementation(NAME)
        require(
            model.config._attn_implementation == NAME,
            "model",
            type(model).__name__,
            "a model that lets its attention implementation be set",
        )
        model.__dict__[_PREVIOUS] = _Previous(previous)
    _remove_hooks(model)
    for module, each in zip(modules, settings, strict=True):
        module.__dict__[_ATTRIBUTE] = each
    if strict:
        kept = model.__dict__.setdefault(_PREVIOUS, _Previous(NAME))
        kept.hooks = [module.register_forward_hook(_Strict(module)) for module in modules]
    return model


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
        module.__dict__.pop(_ATTRIBUTE, None)
        module.__dict__.pop(_CALLS, None)
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
    saved = [(m, m.__dict__.get(_ATTRIBUTE)) for m in attention_modules(model)]
    try:
        yield enable(model, budget, **options)
    finally:
        if was_on:
            _remove_hooks(model)
            for module, settings in saved:
                module.__dict__.pop(_ATTRIBUTE, None)
                if settings is not None:
                    module.__dict__[_ATTRIBUTE] = settings
                    if settings.strict:
                        hook = module.register_forward_hook(_Strict(module))
                        model.__dict__.setdefault(_PREVIOUS, _Previous(NAME)).hooks.append(hook)
        else:
            disable(model)
