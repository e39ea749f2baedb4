"""Let some modules of a model read a configuration that names another attention implementation, and undo it.

transformers reads the implementation from a configuration object, which models, encoders and decoders, text and vision
share. Writing into it would switch them all. Here the chosen modules, and the modules around them that make their
masks, get a *twin*: a shallow copy of their configuration that differs in this one entry. Everything else keeps what it
had, and undoing puts the same objects back.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

_TWINS = "_qaxis_twins"
_IMPLEMENTATION = "_attn_implementation_internal"

#: by the id of a twin: the implementation of the original, and whether all modules that read it are causal
_originals: dict[int, tuple[str | None, bool]] = {}


class Twin:
    """A configuration and the copy that stands in for it."""

    def __init__(self, original: PreTrainedConfig, twin: PreTrainedConfig, name: str | None, causal: bool) -> None:
        """``name``: the implementation that the twin names; None where only a part of it, a sub-config, is a twin."""
        self.original, self.twin, self.name, self.causal = original, twin, name, causal
        self.at_first = dict(twin.__dict__)
        self._register()

    def _register(self) -> None:
        if self.name is not None:
            key = id(self.twin)
            _originals[key] = (self.original._attn_implementation, self.causal)
            weakref.finalize(self.twin, _originals.pop, key, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that is copied or unpickled while it is switched brings a twin of its own."""
        self.__dict__.update(state)
        self._register()

    def name_again(self) -> None:
        """Take an implementation that was set meanwhile as the original's, and name ours."""
        current = self.twin.__dict__[_IMPLEMENTATION]
        if self.name is not None and current != self.name:
            self.original.__dict__[_IMPLEMENTATION] = current
            self.twin.__dict__[_IMPLEMENTATION] = self.name
            self._register()

    def hand_back(self, originals: dict[int, PreTrainedConfig]) -> PreTrainedConfig:
        """The original, with what was changed on the twin meanwhile."""
        now, before = self.twin.__dict__, self.original.__dict__
        for key in self.at_first.keys() - now.keys():
            before.pop(key, None)
        for key, value in now.items():
            ours = key == _IMPLEMENTATION and value == self.at_first[key]
            if not ours and (key not in self.at_first or value is not self.at_first[key]):
                before[key] = originals.get(id(value), value)
        return self.original


def original_of(config: Any) -> tuple[str | None, bool] | None:
    """(implementation, whether all modules are causal) of the configuration that ``config`` is a twin of, or None."""
    return _originals.get(id(config))


def _marks(module: nn.Module) -> dict[str, Twin]:
    return module.__dict__.get(_TWINS, {})


def is_switched(module: nn.Module) -> bool:
    """Whether this module reads a twin."""
    return bool(_marks(module))


class _Twins:
    """The twins of one call of :func:`switch`: one a configuration object."""

    def __init__(self, name: str, causal: dict[int, bool]) -> None:
        self.name, self.causal = name, causal
        self.made: dict[int, Twin] = {}

    def of(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The twin of a configuration, or itself if nothing in it is switched."""
        if id(config) in self.made:
            return self.made[id(config)].twin
        inside = {k: self.of(v) for k, v in config.__dict__.items() if isinstance(v, PreTrainedConfig)}
        changed = {k: v for k, v in inside.items() if v is not config.__dict__[k]}
        target = id(config) in self.causal
        if not target and not changed:
            return config
        twin = copy.copy(config)
        twin.__dict__.update(changed)
        if target:
            twin.__dict__[_IMPLEMENTATION] = self.name
        self.made[id(config)] = Twin(config, twin, self.name if target else None, self.causal.get(id(config), True))
        return twin


def _around(model: nn.Module, chosen: set[int]) -> list[nn.Module]:
    """The chosen modules and those that they are part of."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [path for path, module in modules.items() if id(module) in chosen]
    wanted = {""} | {path[:i] for path in paths for i in range(len(path) + 1) if i == len(path) or path[i] == "."}
    return [module for path, module in modules.items() if path in wanted]


def switch(model: nn.Module, chosen: list[nn.Module], name: str) -> None:
    """Let ``chosen`` modules of ``model``, and what makes their masks, read ``name`` as their implementation."""
    for module in model.modules():
        for twin in _marks(module).values():
            twin.name_again()
    fresh = [module for module in chosen if not is_switched(module)]
    causal: dict[int, bool] = {}
    for module in fresh:
        key = id(module.config)
        causal[key] = causal.get(key, True) and bool(getattr(module, "is_causal", True))
    twins = _Twins(name, causal)
    for module in _around(model, {id(module) for module in fresh}):
        for attribute, config in list(module.__dict__.items()):
            if isinstance(config, PreTrainedConfig) and attribute not in _marks(module):
                stands_in = twins.of(config)
                if stands_in is not config:
                    module.__dict__.setdefault(_TWINS, {})[attribute] = twins.made[id(config)]
                    module.__dict__[attribute] = stands_in


def restore(model: nn.Module) -> None:
    """Undo :func:`switch` in every module of ``model``: the configuration objects from before, no attribute left.

    What was changed on a configuration meanwhile is kept. A configuration that somebody put in place of the twin stays.
    """
    modules = [module for module in model.modules() if is_switched(module)]
    twins = {id(twin.twin): twin for module in modules for twin in _marks(module).values()}
    originals = {key: twin.original for key, twin in twins.items()}
    for twin in twins.values():
        twin.hand_back(originals)
    for module in modules:
        for attribute, twin in module.__dict__.pop(_TWINS).items():
            if module.__dict__.get(attribute) is twin.twin:
                module.__dict__[attribute] = twin.original
