"""What an attention module needs to know while qaxis is on, and where on the module it hangs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..attention.always import NONE, Always
from ..budget import Budget, as_budget
from ..validation import is_integer, require

#: of the attention implementation in transformers
NAME = "qaxis"
EXACTNESS = ("bitwise", "selection")
_SETTINGS = "_qaxis_settings"
_CALLS = "_qaxis_calls"

#: what ``budget`` may be: one for all layers, or one a layer with "default" for the others; "dense" keeps every key
LayerBudget = Budget | int | str
BudgetArgument = LayerBudget | Mapping[int | str, LayerBudget] | None


@dataclass(frozen=True)
class Settings:
    """Of one attention module."""

    #: None: this layer attends to every key
    budget: Budget | None = field(default_factory=Budget)
    exactness: str = "bitwise"
    backend: str = "auto"
    always: Always = NONE
    strict: bool = False


def settings_of(module: nn.Module) -> Settings | None:
    """What was set on this module, or None."""
    return module.__dict__.get(_SETTINGS)


def set_settings(module: nn.Module, settings: Settings | None) -> None:
    """Set it, or with None leave no trace of it."""
    module.__dict__.pop(_SETTINGS, None)
    if settings is not None:
        module.__dict__[_SETTINGS] = settings


def calls_of(module: nn.Module) -> int:
    """How often attention of this module came through qaxis; counted in strict mode and while recording."""
    return module.__dict__.get(_CALLS, 0)


def count_call(module: nn.Module) -> None:
    module.__dict__[_CALLS] = calls_of(module) + 1


def forget_calls(module: nn.Module) -> None:
    module.__dict__.pop(_CALLS, None)


def layer_budget(budget: BudgetArgument, layer: int, first_dense: int) -> Budget | None:
    """The budget of one layer, None for a dense one."""
    if layer < first_dense:
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
