"""``generate`` of a model while qaxis is on: its cache is kept in place, and on a GPU its steps are captured graphs.

It is transformers' own ``generate`` that runs. It is given a cache where the caller passes none, long prompts in
chunks, and a forward pass that replays (``graphs.py``); all of that is taken back when it returns.
"""

from __future__ import annotations

import functools
import logging
import weakref
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .cache import Cache
from .compiled import CompiledForward
from .graphs import replaying
from .settings import settings_of

log = logging.getLogger(__name__)
#: prompts of more tokens go through the model in chunks, of so many: what a layer makes of them is bounded then
LONG_PROMPT, CHUNK = 16384, 4096
#: tokens beyond the prompt that a cache has room for at once, at most: most answers end long before they may
MOST_ROOM = 4096
_GENERATE = "generate"
#: models whose ``generate`` is ours
_ours: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def _own(model: PreTrainedModel) -> Any:
    """The class's ``generate``."""
    return type(model).generate  # type: ignore[attr-defined]


class _Generate:
    """Stands for ``model.generate`` on one model."""

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        functools.update_wrapper(self, _own(model).__get__(model))
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
        if self.compiled and self.forward is None and "forward" not in model.__dict__:
            self.forward = CompiledForward(model.forward)
        return self.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        whole = functools.partial(_own(model), model)
        if all(settings_of(module) is None for module in model.modules()):
            # A part of the model was disabled, and that was all.
            return whole(*args, **kwargs)
        inputs = _inputs(args, kwargs)
        why = _no_cache(model, args, kwargs) if inputs is not None else "the prompt is not a tensor of tokens"
        if not why:
            assert inputs is not None
            why = _give_cache(model, inputs, args, kwargs)
        if why:
            log.info("qaxis: generate keeps the cache that transformers chooses, as %s", why)
        with replaying(model, self._compiled_forward(model)):
            return whole(*args, **kwargs)


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The prompt ``[B, N]`` or ``[B, N, hidden]``."""
    found = (args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    x = next((x for x in found if x is not None), None)
    return x if isinstance(x, torch.Tensor) and x.ndim >= 2 else None


def _config(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GenerationConfig:
    given = args[1] if len(args) > 1 else kwargs.get("generation_config")
    return given if isinstance(given, GenerationConfig) else model.generation_config  # type: ignore[return-value]


def _setting(name: str, config: GenerationConfig, kwargs: dict[str, Any]) -> Any:
    return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)


def _no_cache(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why ``generate`` is given no cache of ours; empty if it is."""
    if any(kwargs.get(name) is not None for name in ("past_key_values", "cache_params")):
        return "the caller passes one"
    if kwargs.get("custom_generate") is not None:
        return "the caller generates in a way of its own"
    config = _config(model, args, kwargs)
    if kwargs.get("use_cache") is False or config.use_cache is False:
        return "use_cache=False"
    if _setting("cache_implementation", config, kwargs) is not None:
        return f"cache_implementation={_setting('cache_implementation', config, kwargs)!r}"
    if model.config.is_encoder_decoder:
        return "an encoder-decoder keeps two caches"
    return ""


def _give_cache(model: PreTrainedModel, inputs: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Put a cache of ours among the arguments; why not, if that cannot be."""
    config, prompt = _config(model, args, kwargs), inputs.shape[1]
    new = _setting("max_new_tokens", config, kwargs)
    longest = _setting("max_length", config, kwargs) or 0
    room = prompt + min(MOST_ROOM, new if new is not None else max(0, longest - prompt))
    try:
        kwargs["past_key_values"] = Cache(model.config.get_text_config(decoder=True), room=room)
    except ValueError as error:
        return str(error)
    if prompt > LONG_PROMPT and _setting("prefill_chunk_size", config, kwargs) is None:
        kwargs["prefill_chunk_size"] = CHUNK
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
