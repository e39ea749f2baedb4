"""The logits that a model itself computes, a slice of positions at a time.

The logits of a long window at a large vocabulary are gigabytes. So the model's own forward pass is run once for every
slice, with ``logits_to_keep``, on a shallow copy of the model in which the decoder runs once and afterwards repeats
what it returned. Whatever the model does to hidden states and logits (multipliers, caps, scales, heads of any form) is
its own code, and the model itself is not touched: no hook, no attribute, nothing that another thread could see.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..validation import require

#: positions whose logits are formed at once
_POSITIONS = 512
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def own_logits(model: Any, input_ids: torch.Tensor, cache: Any = None) -> Iterator[tuple[int, torch.Tensor]]:
    """(first position, its and the following positions' logits ``[positions, V]``) for all positions but the last.

    A model whose forward pass cannot be asked for some of its logits, or is not the one of its class (hooks on the
    model, ``torch.compile``, a wrapper), is called once and gives all of them at once.

    Raises:
        ValueError: for a model that takes no cache although one is given, or whose logits are not ``[1, N, V]``.
    """
    arguments = _arguments(model, input_ids, cache)
    remembering = _Remembering.of(model, input_ids.shape[1])
    if remembering is None:
        yield from _slices(model(**arguments), input_ids.shape[1])
        return
    last = input_ids.shape[1] - 1
    for start in range(0, last, _POSITIONS):
        stop = min(start + _POSITIONS, last)
        logits = _logits(remembering(**arguments, logits_to_keep=torch.arange(start, stop)))
        if logits.ndim != 3 or logits.shape[:2] != (1, stop - start):
            # It gives others than the positions asked for.
            yield from _slices(remembering(**arguments), input_ids.shape[1])
            return
        yield start, logits[0]


def _arguments(model: Any, input_ids: torch.Tensor, cache: Any) -> dict[str, Any]:
    """Of the forward pass, as far as it knows them."""
    names = _parameters(model)
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if cache is not None:
        taken = "past_key_values" in names
        require(taken, "cache", type(cache).__name__, f"None: {type(model).__name__} takes no past_key_values")
        arguments["past_key_values"] = cache
    if "use_cache" in names:
        arguments["use_cache"] = cache is not None
    return arguments


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


def _parameters(model: Any) -> Any:
    """Names that the forward pass takes; a wrapper hands on every name."""
    parameters = inspect.signature(model.forward).parameters
    if hasattr(model, "get_base_model"):  # adapters around a model hand on what they do not name
        return {*parameters, *inspect.signature(model.get_base_model().forward).parameters}
    wrapper = "input_ids" not in parameters and any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    return _Everything() if wrapper else set(parameters)


def _logits(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.logits


def _slices(output: Any, tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    logits = _logits(output)
    shape = tuple(logits.shape)
    require(logits.ndim == 3 and shape[:2] == (1, tokens), "logits.shape", shape, f"[1, {tokens}, vocabulary]")
    for start in range(0, tokens - 1, _POSITIONS):
        yield start, logits[0, start : min(start + _POSITIONS, tokens - 1)]


def _copied(module: nn.Module) -> nn.Module:
    """A module of the same class with the same tensors, whose submodules can be exchanged."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__.update(module.__dict__)
    copied.__dict__["_modules"] = dict(module._modules)
    return copied


class _Remembering:
    """The model, with submodules that are run once: a call that sees the whole window gets what the first one got.

    A submodule that is itself handed ``logits_to_keep`` (the language model inside a multimodal one) is run like the
    model: with its own submodules remembered.
    """

    def __init__(self, model: nn.Module, tokens: int) -> None:
        self.tokens = tokens
        #: of each submodule: what its calls on the whole window returned, in order, and how many were repeated
        self.returned: list[list[Any]] = []
        self.repeated: list[int] = []
        self.copy = self._remembered(model, model.get_decoder())  # type: ignore[operator]

    @classmethod
    def of(cls, model: Any, tokens: int) -> _Remembering | None:
        """None for a model whose forward pass has to be taken as a whole."""
        if not hasattr(model, "get_decoder") or not _is_head(model):
            return None
        return None if any(_is_changed(m) for m in model.modules() if _is_head(m)) else cls(model, tokens)

    def __call__(self, **arguments: Any) -> Any:
        self.repeated = [0] * len(self.returned)
        return self.copy(**arguments)

    def _remembered(self, module: nn.Module, decoder: nn.Module) -> nn.Module:
        """A copy whose submodules remember; also theirs, where the forward pass may reach past them."""
        copied = _copied(module)
        for child in module.children():
            reached = _is_head(child) or any(m is decoder for m in child.modules() if m is not child)
            copy = self._remembered(child, decoder) if reached else _copied(child)
            copy.__dict__.update({hooks: OrderedDict() for hooks in _HOOKS}, _compiled_call_impl=None)
            copy.__dict__["forward"] = self._remember(child, copy)
            # A submodule may have two names.
            copied._modules.update({name: copy for name, other in module._modules.items() if other is child})
        return copied

    def _remember(self, real: nn.Module, copy: nn.Module) -> Callable[..., Any]:
        index = len(self.returned)
        self.returned.append([])
        self.repeated.append(0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if "logits_to_keep" in kwargs and _is_head(real):
                return type(copy).forward(copy, *args, **kwargs)
            if not any(isinstance(x, torch.Tensor) and self._whole(x) for x in (*args, *kwargs.values())):
                return real(*args, **kwargs)
            i, returned = self.repeated[index], self.returned[index]
            if i == len(returned):
                returned.append(real(*args, **kwargs))
            self.repeated[index] = i + 1
            return returned[i]

        return forward

    def _whole(self, x: torch.Tensor) -> bool:
        return x.ndim >= 2 and x.shape[1] == self.tokens


def _is_head(module: nn.Module) -> bool:
    """Whether its forward pass can be asked for some of the logits, and leaves the layers to a submodule."""
    asked = "logits_to_keep" in inspect.signature(module.forward).parameters
    return asked and not any(isinstance(child, nn.ModuleList) for child in module.children())


def _is_changed(module: nn.Module) -> bool:
    """Whether calling it runs more than the forward pass of its class."""
    own = module.__dict__
    return "forward" in own or own.get("_compiled_call_impl") is not None or any(own.get(hooks) for hooks in _HOOKS)
