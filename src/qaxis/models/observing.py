"""Look at what a model's attention computes with, while it stays what it was.

Nothing of a model is changed, nor of its configuration: what transformers hands to its attention modules is the
function that it always does, with somebody looking over its shoulder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from ..validation import check_scale, require
from .layers import attention_modules, transformers_model

Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float], None]

_lock = threading.Lock()
#: (ids of a model's attention modules, its observer), replaced as a whole: another thread may be going through it
_observing: tuple[tuple[frozenset[int], Observer], ...] = ()
#: how modules look up their attention when nobody observes
_look_up = AttentionInterface.get_interface


def _look_up_watched(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
    """``AttentionInterface.get_interface`` while somebody observes."""
    function = _look_up(self, attn_implementation, default)

    def watched(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        for modules, observer in _observing:
            if id(module) in modules:
                scale = check_scale(kwargs.get("scaling"), query.shape[-1])
                observer(int(module.layer_idx), query, key, value, scale)  # type: ignore[arg-type]
        return function(module, query, key, value, *args, **kwargs)

    return watched


def _observe(entry: tuple[frozenset[int], Observer], begin: bool) -> None:
    """Add or remove an observer; the first changes how modules look up their attention, the last changes it back."""
    global _observing, _look_up
    with _lock:
        if not _observing:
            _look_up = AttentionInterface.get_interface
        _observing = (*_observing, entry) if begin else tuple(other for other in _observing if other is not entry)
        AttentionInterface.get_interface = _look_up_watched if _observing else _look_up  # type: ignore[method-assign]


def anybody() -> bool:
    """Whether somebody observes any model."""
    return bool(_observing)


def _check_not_compiled(model: nn.Module) -> None:
    """Refuse a model whose forward pass, or a submodule's, was compiled: which attention it runs is settled."""
    compiled = next((m for m in model.modules() if _is_compiled(m)), None)
    name = type(compiled if compiled is not None else model).__name__
    require(compiled is None, "model", name, "a model that torch.compile has not been applied to")


def _is_compiled(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return (
        isinstance(module, torch._dynamo.OptimizedModule)
        or module.__dict__.get("_compiled_call_impl") is not None
        or hasattr(forward, "_torchdynamo_orig_callable")
    )


@contextmanager
def observe_attention(model: PreTrainedModel, observer: Observer) -> Iterator[None]:
    """Call ``observer(layer, q, k, v, scale)`` with the attention inputs of every layer that ``qaxis.enable`` is for.

    q is ``[B, H, M, D]``, k and v are ``[B, Hkv, N, D]``, positions already rotated in. The tensors are the model's
    own: an observer that keeps them copies them, and none may write to them. Attention is computed by what computes it
    otherwise, qaxis included, so that not a bit of the output changes. Calls of every thread are shown, in that thread;
    those of a function that ``torch.compile`` made of the model's forward pass before are not.

    Raises:
        ValueError: for a model without attention behind ``AttentionInterface``, or one that was given to
            ``torch.compile``.
    """
    modules = attention_modules(transformers_model(model))
    _check_not_compiled(model)
    require(bool(modules), "model", type(model).__name__, "a model with attention layers behind AttentionInterface")
    entry = (frozenset(map(id, modules)), observer)
    _observe(entry, True)
    try:
        yield
    finally:
        _observe(entry, False)
