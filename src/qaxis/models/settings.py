"""What an attention module needs to know while qaxis is on, and where on the module it hangs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..attention.always import NONE, Always
from ..attention.backend import BACKENDS
from ..budget import Budget, as_budget
from ..validation import is_integer, require

#: of the attention implementation in transformers
NAME = "qaxis"
#: what may compute attention: as for a call on tensors, or the decode step in CUDA C++, emulated where there is no GPU
ENGINES = (*BACKENDS, "cuda")
EXACTNESS = ("auto", "bitwise", "selection")
_SETTINGS = "_qaxis_settings"
#: attribute of a module that counts its calls by thread
CALLS = "_qaxis_calls"

#: what ``budget`` may be: one for all layers, or one a layer with "default" for the others; "dense" keeps every key
LayerBudget = Budget | int | str
BudgetArgument = LayerBudget | Mapping[int | str, LayerBudget] | None


@dataclass(frozen=True)
class Settings:
    """Of one attention module."""

    #: None: this layer attends to every key
    budget: Budget | None = field(default_factory=Budget)
    exactness: str = "auto"
    backend: str = "auto"
    always: Always = NONE
    strict: bool = False
    #: of :data:`qaxis.attention.completion.KINDS`; a dense layer leaves nothing out and ignores it
    completion: str = "none"


def settings_of(module: nn.Module) -> Settings | None:
    """What was set on this module, or None."""
    return module.__dict__.get(_SETTINGS)


def set_settings(module: nn.Module, settings: Settings | None) -> None:
    """Set it, or with None leave no trace of it."""
    module.__dict__.pop(_SETTINGS, None)
    if settings is not None:
        module.__dict__[_SETTINGS] = settings
        # There from now on: that somebody counts is no change of the model.
        module.__dict__.setdefault(CALLS, {})


def calls_of(module: nn.Module) -> int:
    """How often attention of this module came through qaxis in this thread; counted in strict mode and recordings."""
    return module.__dict__.get(CALLS, {}).get(get_ident(), 0)


def count_call(module: nn.Module) -> None:
    """One call more in this thread. Threads have counts of their own: what one does says nothing about another."""
    counts, thread = module.__dict__.setdefault(CALLS, {}), get_ident()
    counts[thread] = counts.get(thread, 0) + 1


def forget_calls(module: nn.Module) -> None:
    """Leave no trace of the counts."""
    module.__dict__.pop(CALLS, None)


class _Watch:
    """Two hooks around the runs of a module."""

    def __init__(self, missed: Callable[[nn.Module], None]) -> None:
        self.missed = missed
        #: by thread: calls when the run that is under way began
        self.begun: dict[int, int] = {}

    @torch.compiler.disable(reason="what runs is counted, not what is traced")
    def before(self, module: nn.Module, args: Any) -> None:
        self.begun[get_ident()] = calls_of(module)

    @torch.compiler.disable(reason="what runs is counted, not what is traced")
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.begun.pop(get_ident(), None) == calls_of(module):
            self.missed(module)


def is_ours(hook: Any) -> bool:
    """Whether a hook of a module is one of :func:`watch_calls`."""
    return isinstance(getattr(hook, "__self__", None), _Watch)


def watch_calls(module: nn.Module, missed: Callable[[nn.Module], None]) -> list[RemovableHandle]:
    """Call ``missed(module)`` after every run of the module in which its attention did not come through qaxis.

    Each run is judged in its own thread, and only if it began after this call. The hooks that do it are returned.
    """
    # Replicas of a module share what is in its attributes by now.
    module.__dict__.setdefault(CALLS, {})
    watch = _Watch(missed)
    return [module.register_forward_pre_hook(watch.before), module.register_forward_hook(watch.after)]


def layer_budget(budget: BudgetArgument, layer: int, first_dense: int) -> Budget | None:
    """The budget of one layer, None for a dense one; -1 is a module that many layers share (Zamba 2)."""
    if 0 <= layer < first_dense:
        return None
    if isinstance(budget, Mapping):
        budget = budget.get(layer, budget.get("default", Budget()))
    if isinstance(budget, str):
        require(budget == "dense", "budget", budget, "a qaxis.Budget, an integer, or 'dense'")
        return None
    return as_budget(Budget() if budget is None else budget)


def check_layers(budget: BudgetArgument, layers: Collection[int]) -> None:
    """Refuse a dict that names layers without attention, which the budget would not reach."""
    if isinstance(budget, Mapping):
        for name in budget:
            known = name == "default" or (is_integer(name) and name in layers)
            allowed = ", ".join(map(str, sorted(layers)))
            require(known, "budget", name, f"a dict with layers that attend ({allowed}) and 'default' as keys")
