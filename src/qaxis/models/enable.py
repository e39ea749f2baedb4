"""Turn qaxis on and off for a model: enable, disable, sparse.

What a model needs to know (budget, exactness) hangs on its attention modules while qaxis is on, and is removed when it
is turned off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..attention.always import Always
from ..attention.completion import kind_of
from ..budget import Budget
from ..validation import check_flag, is_integer, require
from . import attention as _registered  # noqa: F401  registers the implementation that enable() names
from .generation import hand_back, take_over, taken_over
from .layers import attention_modules, check_attention, transformers_model
from .settings import (
    ENGINES,
    EXACTNESS,
    NAME,
    BudgetArgument,
    Settings,
    check_layers,
    forget_calls,
    layer_budget,
    set_settings,
    settings_of,
    watch_calls,
)
from .switching import restore, state, switch

#: of a module: the handles of its hooks in strict mode
_HOOKS = "_qaxis_hooks"


def _missed(module: nn.Module) -> None:
    raise RuntimeError(
        f"layer {getattr(module, 'layer_idx', '?')}: attention did not go through qaxis (strict=True); the "
        "model's attention implementation was changed after qaxis.enable"
    )


def enable(
    model: PreTrainedModel,
    budget: BudgetArgument = None,
    *,
    exactness: str = "auto",
    backend: str = "auto",
    first_dense: int = 0,
    sinks: int = 0,
    recent: int = 0,
    strict: bool = False,
    compiled: bool = False,
    completion: str = "none",
) -> PreTrainedModel:
    """Let the self-attention of ``model``'s text decoder attend to its exact top-k keys.

    Encoders, cross attention, vision and audio towers are left alone, whatever configuration they share with the
    decoder; so are linear and recurrent layers. While it is on, the decoder reads a copy of its configuration: change
    ``model.config`` by that name, and the change is kept; a configuration object held from before is not read, and a
    model that is built from the copy is one loaded with ``attn_implementation="qaxis"``. Attention weights are not
    returned (``output_attentions``). ``model.generate`` is given a :class:`qaxis.Cache` where the caller passes no
    cache and names none, and on a GPU decodes in captured CUDA graphs. Neither this nor :func:`disable` may be called
    while a forward pass of the model is under way: its masks were made for what computed attention when it began. The
    model holds its ``generate``, which holds the model: its memory is free after :func:`disable`, or once Python
    collects garbage.

    Args:
        model: a transformers model whose decoder's attention goes through ``AttentionInterface``.
        budget: a :class:`~qaxis.Budget` (default: coverage 0.1, at least 64 keys), an int, ``"dense"``, or a dict
            from layers (the ``layer_idx`` of attention) to these, with ``"default"`` for those it does not name. With
            a tolerance each head and token keeps its own number of keys: tokens and prompts are canonical by scores of
            every key then, slowly, on a GPU too, and never captured; ``exactness="selection"`` takes the dense product.
            What is always kept counts towards that number, and may leave out more than the tolerance says.
        exactness: which keys are attended to is always the canonical choice; this is about their sum. ``"auto"``: a
            token's is canonical, bit for bit, on every device; a prompt's too on a CPU, while on a GPU it is summed by
            matrix products (:mod:`qaxis.prefill`), within
            :func:`qaxis.arithmetic.rounding.selection_output_bound` of canonical. ``"bitwise"``: always canonical,
            slow for prompts on a GPU. ``"selection"``: as ``"auto"`` on a GPU; on a CPU, and for masks that the fast
            ways do not know, a dense product over the chosen keys, within that bound as well, for tokens too.
        backend: ``"auto"``: tokens on a GPU go through :class:`qaxis.decode.Decoder`, which is CUDA C++ where that runs
            and Triton elsewhere, prompts through :mod:`qaxis.prefill`; a CPU takes the reference. ``"triton"``: the
            Triton kernels of both, on a CPU in Triton's interpreter. ``"reference"``: PyTorch alone, never captured.
            ``"cuda"``: as ``"auto"`` on a GPU; on a CPU tokens go through the CUDA C++ step, emulated where g++ is
            there, slowly, as a check. What ran, and why nothing faster, is in :func:`qaxis.record` (``engines``) and,
            on a GPU, once in the log.
        first_dense: the first so many layers stay dense.
        sinks, recent: the first and the newest so many visible keys are always kept. They count towards k_eff,
            so the budget's minimum must hold them.
        strict: raise if a layer's attention is ever computed by anything else, or on a GPU by neither the decode step
            nor prefill, unless that was asked for.
        compiled: let ``generate`` on a GPU compile what lies between the attentions of a step (``torch.compile``, once
            for every batch size until :func:`disable`, a second a layer or so): fewer kernels a token. Attention keeps
            its bits; the rest may be rounded otherwise. Before a compiled step is used it is compared with the model's
            own pass for two tokens: logits may differ by a twentieth of the largest. What cannot be compiled is
            captured as it is, after one warning.
        completion: ``"none"`` is the published method. ``"mean"`` and ``"linear"`` (``"block"`` is the same) put back
            what is left out: the exact softmax mass of the unselected keys times the mean value, or a line fitted to
            the values along the query (:func:`qaxis.topk_attention`). The chosen keys are the same, and dense layers
            leave nothing out. The budget's minimum must be one key more than is always kept. A query must see a range
            of keys, or the call is refused. A token over a :class:`qaxis.Cache` or :class:`qaxis.Int8Cache` without a
            window goes through the step in CUDA C++: over bounds canonical, over 8-bit codes with the left out ones
            weighed by scores of 16 bits, unless ``exactness="bitwise"``. Else, and several tokens at once, canonical
            by PyTorch, which takes far longer; :func:`qaxis.record` tells. Prompts go the same ways as without, and so
            do tokens that see fewer than 128 keys: nothing is put back there.

    Returns:
        The same model.

    Raises:
        ValueError: for a model without such attention, one that adds a bias to its scores (ALiBi, relative
            positions) or selects keys by a rule of its own, one in float64, or an argument out of range.
    """
    inner = transformers_model(model)
    modules = attention_modules(inner)
    check_attention(inner, modules)
    always = Always(sinks, recent)
    _check_options(exactness, backend, first_dense, always)
    check_flag("compiled", compiled)
    kind = kind_of(completion)
    check_layers(budget, {int(module.layer_idx) for module in modules})  # type: ignore[arg-type]
    settings = []
    for module in modules:
        chosen = layer_budget(budget, int(module.layer_idx), first_dense)  # type: ignore[arg-type]
        _check_room(chosen, always, kind)
        settings.append(Settings(chosen, exactness, backend, always, strict, kind))
    switch(inner, modules, NAME)
    for module, each in zip(modules, settings, strict=True):
        _set(module, each)
    take_over(inner, compiled)
    return model


def _set(module: nn.Module, settings: Settings | None) -> None:
    """Hang settings and, in strict mode, a hook on a module; None leaves no trace of either."""
    for hook in module.__dict__.pop(_HOOKS, ()):
        hook.remove()
    set_settings(module, settings)
    if settings is None:
        forget_calls(module)
    elif settings.strict:
        module.__dict__[_HOOKS] = watch_calls(module, _missed)


def _check_options(exactness: str, backend: str, first_dense: int, always: Always) -> None:
    require(exactness in EXACTNESS, "exactness", exactness, f"one of {EXACTNESS}")
    require(backend in ENGINES, "backend", backend, f"one of {ENGINES}")
    for name, n in (("first_dense", first_dense), *always._asdict().items()):
        require(is_integer(n) and n >= 0, name, n, "an integer of at least 0")


def _check_room(budget: Budget | None, always: Always, completion: str) -> None:
    """Refuse a budget that does not hold what is always kept, and the one key that a completion looks up to."""
    if budget is None:
        return
    total, minimum = always.sinks + always.recent, budget.minimum
    require(
        minimum >= total, "sinks + recent", total,
        f"at most the budget's minimum {minimum}: kept keys count towards k_eff",
    )  # fmt: skip
    require(
        completion == "none" or minimum > total, "sinks + recent", total,
        f"less than the budget's minimum {minimum}: completion={completion!r} needs one key that is kept by its score",
    )  # fmt: skip


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo :func:`enable`, also of a part of the model: every configuration is the one from before, no attribute is
    left.

    A model that was *loaded* with ``attn_implementation="qaxis"`` has no other one to go back to and
    gets transformers' default: SDPA where the model supports it, eager attention elsewhere.

    Raises:
        ValueError: for what is not a transformers model.
    """
    inner = transformers_model(model)
    for module in inner.modules():
        _set(module, None)
    hand_back(inner)
    restore(inner)
    for part in inner.modules():
        if isinstance(part, PreTrainedModel) and part.config._attn_implementation == NAME:
            part.set_attn_implementation("sdpa" if part._supports_sdpa else "eager")
    return model


@contextmanager
def sparse(model: PreTrainedModel, budget: BudgetArgument = None, **options: Any) -> Iterator[PreTrainedModel]:
    """``with qaxis.sparse(model, budget): ...``: :func:`enable` inside; what was before, after."""
    inner = transformers_model(model)
    before = [(module, settings) for module in inner.modules() if (settings := settings_of(module)) is not None]
    switched, generates = state(inner), taken_over(inner)
    try:
        yield enable(model, budget, **options)
    finally:
        for module in inner.modules():
            _set(module, None)
        if generates is None:
            hand_back(inner)
        else:
            take_over(inner, generates)
        restore(inner, switched)
        for module, settings in before:
            _set(module, settings)
