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
        self.original, self.twin = original, twin
        #: the implementation that the twin names; None where only a part of it, a sub-config, is a twin
        self.name = name
        #: whether all modules that read it are causal
        self.causal = causal
        self.at_first = dict(twin.__dict__)
        #: twins that have this one as a part
        self.around: list[Twin] = []
        #: (module, attribute) that read it: one that is undone leaves no reader, not even outside the part undone
        self.readers: list[tuple[weakref.ref[nn.Module], str]] = []
        self._register()

    def _register(self) -> None:
        if self.name is not None:
            key = id(self.twin)
            _originals[key] = (self.original._attn_implementation, self.causal)
            weakref.finalize(self.twin, _originals.pop, key, None)

    def __getstate__(self) -> dict[str, Any]:
        """Without its readers: those of a copy are found in the copied model."""
        return {**self.__dict__, "readers": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that is copied or unpickled while it is switched brings a twin of its own."""
        self.__dict__.update(state)
        self._register()

    def also_read(self, causal: bool) -> None:
        """Remember what one module more that reads it is."""
        self.causal = self.causal and causal
        self._register()

    def read_by(self, module: nn.Module, attribute: str) -> None:
        """Let a module read the twin."""
        module.__dict__.setdefault(_TWINS, {})[attribute] = self
        module.__dict__[attribute] = self.twin
        self.readers.append((weakref.ref(module), attribute))

    def read_no_more(self, module: nn.Module, attribute: str) -> None:
        """Let a module read the original again, or what somebody put in place of the twin."""
        marks = module.__dict__.get(_TWINS, {})
        if marks.get(attribute) is self:
            del marks[attribute]
            if not marks:
                del module.__dict__[_TWINS]
            if module.__dict__.get(attribute) is self.twin:
                module.__dict__[attribute] = self.original

    def name_again(self) -> None:
        """Take an implementation that was set meanwhile as the original's, and name ours."""
        current = self.twin.__dict__[_IMPLEMENTATION]
        if self.name is not None and current != self.name:
            self.original.__dict__[_IMPLEMENTATION] = current
            self.twin.__dict__[_IMPLEMENTATION] = self.name
            self._register()

    def hand_back(self, originals: dict[int, PreTrainedConfig]) -> None:
        """Give the original what was changed on the twin meanwhile; who still holds the twin reads the same."""
        now, before = self.twin.__dict__, self.original.__dict__
        for key in self.at_first.keys() - now.keys():
            before.pop(key, None)
        for key, value in now.items():
            ours = key == _IMPLEMENTATION and value == self.at_first[key]
            if not ours and (key not in self.at_first or value is not self.at_first[key]):
                before[key] = originals.get(id(value), value)
        now[_IMPLEMENTATION] = before[_IMPLEMENTATION]


def original_of(config: Any) -> tuple[str | None, bool] | None:
    """(implementation, whether all modules are causal) of the configuration that ``config`` is a twin of, or None."""
    return _originals.get(id(config))


def _marks(module: nn.Module) -> dict[str, Twin]:
    return module.__dict__.get(_TWINS, {})


def _found(model: nn.Module) -> list[Twin]:
    """Every twin that a module of ``model`` reads, once."""
    return list({id(twin): twin for module in model.modules() for twin in _marks(module).values()}.values())


def is_switched(module: nn.Module) -> bool:
    """Whether this module reads a twin."""
    return bool(_marks(module))


class _Twins:
    """The twins that a call of :func:`switch` makes or finds: one a configuration object."""

    def __init__(self, name: str, found: list[Twin]) -> None:
        self.name = name
        #: by the id of the original: the twin; whether all modules that are to read it are causal
        self.made = {id(twin.original): twin for twin in found}
        self.causal: dict[int, bool] = {}

    def aim_at(self, module: nn.Module) -> None:
        """The configuration of this module needs a twin that names the implementation."""
        key, causal = id(module.config), bool(getattr(module, "is_causal", True))
        self.causal[key] = self.causal.get(key, True) and causal
        if key in self.made:
            self.made[key].also_read(causal)

    def of(self, config: PreTrainedConfig) -> Twin | None:
        """The twin of a configuration; None if nothing in it is switched."""
        if id(config) in self.made:
            return self.made[id(config)]
        parts = {k: self.of(v) for k, v in config.__dict__.items() if isinstance(v, PreTrainedConfig)}
        inside = {k: part for k, part in parts.items() if part is not None}
        target = id(config) in self.causal
        if not target and not inside:
            return None
        copied = copy.copy(config)
        copied.__dict__.update({k: part.twin for k, part in inside.items()})
        if target:
            copied.__dict__[_IMPLEMENTATION] = self.name
        twin = Twin(config, copied, self.name if target else None, self.causal.get(id(config), True))
        for part in inside.values():
            part.around.append(twin)
        self.made[id(config)] = twin
        return twin


def _around(model: nn.Module, chosen: set[int]) -> list[nn.Module]:
    """The chosen modules and those that they are part of."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [path for path, module in modules.items() if id(module) in chosen]
    wanted = {""} | {path[:i] for path in paths for i in range(len(path) + 1) if i == len(path) or path[i] == "."}
    return [module for path, module in modules.items() if path in wanted]


def switch(model: nn.Module, chosen: list[nn.Module], name: str) -> None:
    """Let ``chosen`` modules of ``model``, and what makes their masks, read ``name`` as their implementation."""
    twins = _Twins(name, _found(model))
    for known in twins.made.values():
        known.name_again()
    for module in chosen:
        if not is_switched(module):
            twins.aim_at(module)
    for module in _around(model, {id(module) for module in chosen}):
        for attribute, config in list(module.__dict__.items()):
            if isinstance(config, PreTrainedConfig) and attribute not in _marks(module):
                twin = twins.of(config)
                if twin is not None:
                    twin.read_by(module, attribute)


#: of every module that reads twins: which, by attribute
State = list[tuple[nn.Module, dict[str, Twin]]]


def state(model: nn.Module) -> State:
    """What is switched in ``model`` now."""
    return [(module, dict(_marks(module))) for module in model.modules() if is_switched(module)]


def restore(model: nn.Module, to: State | None = None) -> None:
    """Undo :func:`switch` in every module of ``model``, or what was switched since an earlier :func:`state`.

    The configuration objects are those from before, and no attribute is left, not even on modules around ``model``
    that read the same twin. What was changed on a configuration meanwhile is kept.
    """
    kept = {id(twin) for _, marks in to or [] for twin in marks.values()}
    reading = {(id(module), attribute) for module, marks in to or [] for attribute in marks}
    queue = [twin for twin in _found(model) if id(twin) not in kept]
    undone: dict[int, Twin] = {}
    while queue:
        twin = queue.pop()
        undone[id(twin)] = twin
        queue += [other for other in twin.around if id(other) not in undone and id(other) not in kept]
    originals = {id(twin.twin): twin.original for twin in undone.values()}
    for twin in undone.values():
        twin.hand_back(originals)
        for reference, attribute in twin.readers:
            module = reference()
            if module is not None:
                twin.read_no_more(module, attribute)
    for module in model.modules():
        for attribute, twin in list(_marks(module).items()):
            if id(twin) in undone or (id(module), attribute) not in reading:
                twin.read_no_more(module, attribute)
    for module, marks in to or []:
        for attribute, twin in marks.items():
            if _marks(module).get(attribute) is not twin:
                twin.name_again()
                twin.read_by(module, attribute)
