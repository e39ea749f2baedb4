"""``generate`` of a model while qaxis is on: its cache is kept in place, and on a GPU its steps are captured graphs.

It is transformers' own ``generate`` that runs. Where it would make a ``DynamicCache`` it is given a :class:`Cache`;
long prompts go through the model in chunks where that cannot matter, and steps are replayed (``replaying.py``). All of
that is taken back when it returns.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from .cache import Cache
from .captured import CACHE, MASK
from .compiled import CompiledForward
from .holding import HoldingLayer, holds_nothing
from .model_state import collects
from .replaying import replaying
from .settings import settings_of
from .stand_in import standing_in

log = logging.getLogger(__name__)
#: prompts of more tokens go through the model in chunks, of so many: what a layer makes of them is bounded then
LONG_PROMPT, CHUNK = 16384, 2048
#: tokens beyond the prompt that a cache has room for at once, of all rows and of one at least: answers may end long
#: before they must
MOST_ROOM, LEAST_ROOM = 4096, 256
_GENERATE, _PREPARE = "generate", "_prepare_cache_for_generation"
#: arguments of a model that can be cut into chunks, or do not tell one token from another
_IN_CHUNKS = {CACHE, MASK, "position_ids", "cache_position", "use_cache", "logits_to_keep"}
#: models whose ``generate`` is ours
_ours: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def _own(model: PreTrainedModel) -> Any:
    """The class's ``generate``."""
    return type(model).generate  # type: ignore[attr-defined]


class _Generate:
    """Stands for ``model.generate`` on one model."""

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        whole = _own(model).__get__(model)
        functools.update_wrapper(self, whole)
        # Of the wrapped function it would have a `self` before its arguments.
        self.__signature__ = inspect.signature(whole)
        # Held: who calls enable(model).generate() holds nothing else.
        self.model, self.compiled = model, compiled
        self.forward: CompiledForward | None = None
        _ours.add(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Generate:
        return _Generate(memo.get(id(self.model), self.model), self.compiled)

    def __reduce__(self) -> Any:
        return _Generate, (self.model, self.compiled)

    def _compiled_forward(self, model: PreTrainedModel) -> CompiledForward | None:
        """What is compiled once for all calls, if it is wanted."""
        if self.compiled and self.forward is None:
            if "forward" in model.__dict__:
                log.info("qaxis: steps are not compiled, as something else stands for the model's forward pass")
            else:
                self.forward = CompiledForward(model.forward)
        return self.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        whole = functools.partial(_own(model), model)
        if all(settings_of(module) is None for module in model.modules()):
            # A part of the model was disabled, and that was all.
            return whole(*args, **kwargs)
        with _given_caches(model), replaying(model, self._compiled_forward(model)):
            return whole(*args, **kwargs)


@contextmanager
def _given_caches(model: PreTrainedModel) -> Iterator[None]:
    """Inside, ``generate`` of this thread gets caches in place where it makes one that grows by concatenation."""

    def make(prepare: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(prepare)

        def prepared(*args: Any, **kwargs: Any) -> Any:
            told = signature.bind(*args, **kwargs).arguments
            inputs, config = told["model_kwargs"], told["generation_config"]
            passed = inputs.get(CACHE)
            result = prepare(*args, **kwargs)
            why = _no_cache(passed, inputs, config)
            if not why:
                why = _give_cache(model, told)
            if why:
                log.info("qaxis: generate keeps the cache that transformers chooses, as %s", why)
            return result

        return prepared

    with standing_in(model, _PREPARE, make):
        yield


def _no_cache(passed: Any, inputs: dict[str, Any], config: Any) -> str:
    """Why what transformers prepared is left as it is; empty if it is not."""
    made = inputs.get(CACHE)
    if made is None:
        return "it makes none"
    if made is passed:
        return "the caller passes one"
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r}"
    return "" if type(made) is DynamicCache else f"it is a {type(made).__name__}"


def _length(inputs: dict[str, Any], config: Any) -> int:
    """Tokens of the prompt, by what transformers made of it: a mask of ones is left out; 0 if nothing tells."""
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.shape[1]
    return positions.shape[-1] if isinstance(positions, torch.Tensor) else getattr(config, "_mask_length", None) or 0


def _give_cache(model: PreTrainedModel, told: dict[str, Any]) -> str:
    """Put a cache of ours in the place of one that is empty; why not, if that cannot be."""
    inputs, config, batch = told["model_kwargs"], told["generation_config"], told["batch_size"]
    longest, prompt = told["max_cache_length"] + 1, _length(inputs, config)
    rows = batch * max(config.num_beams or 1, config.num_return_sequences or 1)
    room = min(longest, prompt + max(LEAST_ROOM, MOST_ROOM // rows))
    try:
        cache = Cache(model.config.get_text_config(decoder=True), room=room)
    except ValueError as error:
        return str(error)
    if config.is_assistant:
        # What an assistant drafts is taken back.
        cache.activate_past_recording()
    inputs[CACHE] = cache
    if prompt > LONG_PROMPT and config.prefill_chunk_size is None:
        whole = _not_in_chunks(model, cache, inputs, config)
        if whole:
            log.info("qaxis: a prompt of %d tokens is not cut into chunks, as %s", prompt, whole)
        else:
            # Of this call: transformers made it.
            config.prefill_chunk_size = CHUNK
    return ""


def _not_in_chunks(model: PreTrainedModel, cache: Cache, inputs: dict[str, Any], config: Any) -> str:
    """Why a prompt in chunks might not give what it gives whole; empty if it does."""
    for i, layer in enumerate(cache.layers):
        # A recurrent state may start anew with every chunk (Jamba), or with the padding of one (Qwen 3 Next).
        if not isinstance(layer, HoldingLayer) and not holds_nothing(layer):
            return f"layer {i} of its cache is a {type(layer).__name__}"
    strange = sorted(name for name, x in inputs.items() if x is not None and name not in _IN_CHUNKS)
    if strange:
        return f"{strange[0]} is passed"
    if model.main_input_name != "input_ids":
        return f"its input is {model.main_input_name}"
    why = collects(model, [config])
    if why:
        return why
    for module in model.modules():
        kind = getattr(module, "rope_type", "default")
        for each in kind.values() if isinstance(kind, dict) else (kind,):
            if each == "longrope" or "dynamic" in str(each):
                return f"its positions depend on the length of the prompt (rope_type={each!r})"
    return ""


def take_over(model: PreTrainedModel, compiled: bool = False) -> None:
    """From now on ``model.generate`` is given a cache and replays, ``compiled`` or not; but not what somebody set."""
    known = model.__dict__.get(_GENERATE)
    if isinstance(known, _Generate):
        known.compiled = compiled
        known.forward = known.forward if compiled else None
    elif known is None and model.can_generate():
        model.__dict__[_GENERATE] = _Generate(model, compiled)


def hand_back(model: PreTrainedModel) -> None:
    """``generate`` of the model, and of models whose parts it has, is the class's own again, once no part is on."""
    for other in [model, *_ours]:
        ours = isinstance(other.__dict__.get(_GENERATE), _Generate)
        if ours and all(settings_of(module) is None for module in other.modules()):
            del other.__dict__[_GENERATE]
            _ours.discard(other)


def taken_over(model: PreTrainedModel) -> bool | None:
    """Whether steps are compiled in a ``model.generate`` that is ours; None for one that is not."""
    known = model.__dict__.get(_GENERATE)
    return known.compiled if isinstance(known, _Generate) else None
