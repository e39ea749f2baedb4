"""The state of a model: what its forward pass depends on beside its arguments, and whether that is still the same.

A replayed step launches what was captured: a hook, an adapter, a weight that was put in another's place, a setting of
qaxis or autocast that came since would be passed by. All of that lies in the attributes of modules or in a few modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from .settings import CALLS, is_ours

#: what a call may be asked to collect beside logits, of every layer and token
_COLLECTED = ("output_hidden_states", "output_attentions")

#: whose hooks stay on a model that was once asked for hidden states, and do nothing where nobody asks for them
_COLLECTING = "transformers.utils.output_capturing"


def foreign_hooks(model: nn.Module) -> bool:
    """Whether somebody else looks at, or changes, what modules compute: replays would pass them by."""
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return True
    hooks = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return not all(is_ours(hook) or getattr(hook, "__module__", "") == _COLLECTING for hook in hooks)


def _modes() -> tuple[Any, ...]:
    """Of this thread: what torch does with whatever comes."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"),
        len(torch_modules._global_forward_hooks), len(torch_modules._global_forward_pre_hooks),
    )  # fmt: skip


def _containers(model: nn.Module) -> Iterator[Any]:
    """The attributes of every module, those attributes that hold others, and the configurations."""
    for module in model.modules():
        attributes = vars(module)
        yield attributes
        yield from (x for name, x in attributes.items() if isinstance(x, (dict, list)) and name != CALLS)
        config = attributes.get("config")
        if config is not None and hasattr(config, "__dict__"):
            yield vars(config)


class ModelState:
    """What they were when this was made: objects by identity, weights by their place in memory as well.

    What is compared is held, so that nothing else can have taken its place.
    """

    def __init__(self, model: nn.Module) -> None:
        containers = list(_containers(model))
        self.empty = [x for x in containers if not x]
        self.named = [x for x in containers if x and isinstance(x, dict)]
        self.listed = [x for x in containers if x and isinstance(x, list)]
        self.held = list(self._now())
        self.weights = [x for x in (*model.parameters(), *model.buffers()) if _lies_somewhere(x)]
        self.places, self.modes = [x.data_ptr() for x in self.weights], _modes()

    def _now(self) -> Iterator[Any]:
        """All that is held now, in order."""
        return chain(chain.from_iterable(map(dict.values, self.named)), chain.from_iterable(self.listed))

    def unchanged(self) -> bool:
        """Whether nothing was set, replaced, added or removed since: a millisecond for a model of 32 layers."""
        return (
            self.modes == _modes()
            and not any(self.empty)
            and sum(map(len, self.named)) + sum(map(len, self.listed)) == len(self.held)
            and all(map(is_, self._now(), self.held))
            and self.places == [x.data_ptr() for x in self.weights]
        )


def _lies_somewhere(x: torch.Tensor) -> bool:
    """Whether a weight has a place in memory of its own: of some quantised ones only their parts do."""
    try:
        x.data_ptr()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def collects(model: PreTrainedModel, asked: Iterable[Any]) -> str:
    """Why a call has to run as it is, if hidden states or attentions are asked for; empty if none are.

    Args:
        model: whose configuration asks too.
        asked: keyword arguments, or configurations, of the call.
    """
    asking = [*asked, model.config]
    found = (x.get(n) if isinstance(x, dict) else getattr(x, n, False) for x in asking for n in _COLLECTED)
    return "hidden states or attentions of every token are asked for" if any(found) else ""
