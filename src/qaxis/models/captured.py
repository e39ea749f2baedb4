"""One step of ``generate`` as a CUDA graph, which serves every token that follows while the cache stays where it is.

A replay launches what the model's own forward pass launched, without Python between the launches. What changes with a
token lies in device memory: the cache's clock, the token, its position, and how much of a row is padding.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import ModelOutput

from ..cuda.workspaces import own_workspaces
from . import decoding, routing
from .cache import InPlaceCache

CACHE, MASK = "past_key_values", "attention_mask"
#: what no clock shows
_UNKNOWN = -1
#: one capture at a time: what the allocator gives a capture must not be asked for by another
capturing = threading.RLock()


class CapturedStep:
    """One captured step, its inputs and its output.

    Args:
        forward: what is captured; called with ``kwargs``, without the mask, of which the pads tell all.
        pads: int32 ``[B]``, how many of the first tokens of a row are padding; None where there is no mask. Written
            before every replay.
    """

    def __init__(self, forward: Callable[..., Any], kwargs: dict[str, Any], pads: torch.Tensor | None) -> None:
        self.cache: InPlaceCache = kwargs[CACHE]
        self.names, self.version, self.pads = kwargs.keys(), self.cache.shared.version, pads
        self.inputs = {n: x.clone() for n, x in kwargs.items() if isinstance(x, torch.Tensor) and n != MASK}
        self.fixed = {n: x for n, x in kwargs.items() if n not in self.inputs and n != MASK}
        shared = self.cache.shared
        shared.pads = pads
        shared.clock.move_to(shared.holders[0].length)
        state, self.graph = shared.mark(), torch.cuda.CUDAGraph()
        try:
            # Streams of torch's own for captures are one a process: two threads would share it.
            stream = torch.cuda.Stream(shared.clock.tensor.device)
            with (
                capturing,
                _no_collection(),
                routing.only_steps(),
                decoding.rows_into(shared, self),
                torch.cuda.device(stream.device),
                own_workspaces(),
                torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self.output = forward(**self.inputs, **self.fixed, **{MASK: None})
        finally:
            # Nothing was computed: the host alone went a token ahead.
            shared.rewind(state)

    def goes_on(self, kwargs: dict[str, Any]) -> bool:
        """Whether this is the next token of what was captured. Asked before every token, so it looks at little."""
        shared, mask = self.cache.shared, kwargs.get(MASK)
        length, version = shared.holders[0].length + 1, self.version
        return (
            kwargs.keys() == self.names
            and all(kwargs[name] is x for name, x in self.fixed.items())
            and all(kwargs[name].shape == x.shape and kwargs[name].dtype == x.dtype for name, x in self.inputs.items())
            and (mask is None) == (self.pads is None)
            and is_of_tokens(mask, length)
            and version == shared.version
            and all(layer.has_room(length) for layer in shared.holders)
        )

    def replay(self, kwargs: dict[str, Any]) -> None:
        """Write :attr:`output` for these inputs, without waiting for it; the cache is a token longer."""
        for name, to in self.inputs.items():
            to.copy_(kwargs[name])
        if self.pads is not None:
            # Rows may have changed places since; that padding is on the left was seen when this was captured.
            self.pads.copy_((kwargs[MASK] == 0).sum(1))
        shared = self.cache.shared
        shared.clock.move_to(shared.holders[0].length)
        self.graph.replay()
        shared.advance(1)
        decoding.forget_rows(shared)


def take_back(cache: InPlaceCache, mark: Any) -> None:
    """What was appended since ``mark`` does not count: the same token comes once more, into the same places."""
    shared = cache.shared
    shared.rewind(mark)
    for clock in shared.clocks.values():
        # The device's went on: it is set anew by whatever comes next.
        clock.at = _UNKNOWN
    decoding.forget_rows(shared)


@contextmanager
def taken_back(cache: InPlaceCache) -> Iterator[None]:
    """What is appended inside does not count; see :func:`take_back`."""
    mark = cache.shared.mark()
    try:
        yield
    finally:
        take_back(cache, mark)


def is_of_tokens(mask: Any, length: int) -> bool:
    """Whether a mask is none, or one number for each of ``length`` tokens of a row."""
    return mask is None or (isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[1] == length)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Inside, no garbage is collected: what it frees, other graphs too, must not be freed while one is captured."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def fresh(x: Any) -> Any:
    """A copy that the next replay does not overwrite."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, ModelOutput):
        return type(x)(**{name: fresh(part) for name, part in x.items()})
    if isinstance(x, dict):
        return {name: fresh(part) for name, part in x.items()}
    return type(x)(map(fresh, x)) if type(x) in (tuple, list) else x


def same(x: Any, y: Any) -> bool:
    """Whether all tensors of two outputs have the same bits."""
    if isinstance(x, torch.Tensor):
        alike = isinstance(y, torch.Tensor) and x.shape == y.shape and x.dtype == y.dtype
        return alike and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    if isinstance(x, ModelOutput):
        return isinstance(y, ModelOutput) and x.keys() == y.keys() and all(same(x[name], y[name]) for name in x)
    if isinstance(x, (dict, tuple, list)):
        parts = (x.values(), y.values()) if isinstance(x, dict) and isinstance(y, dict) else (x, y)
        return type(x) is type(y) and len(x) == len(y) and all(map(same, *parts))
    return x is y or x == y or isinstance(x, InPlaceCache)


def distance(x: Any, y: Any) -> float:
    """How far the logits of ``x`` are from those of ``y``, of how far these are from their mean: root mean squares."""
    a, b = x["logits"].double(), y["logits"].double()
    return float((a - b).square().sum().sqrt() / (b - b.mean(-1, keepdim=True)).square().sum().sqrt())
