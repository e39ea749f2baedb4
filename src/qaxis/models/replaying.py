"""When a step of ``generate`` is captured, when its replay is believed, and when the model's own forward pass runs.

A call of ``generate`` goes through these states:

* *warm*: a prompt, and the first steps, which compile kernels and make work space: forward passes of the model;
* *captured*: the next tokens are computed twice, by a replay and by the forward pass, which are compared bit for bit:
  whatever the model keeps on the host, a position, a length, a branch, shows there;
* *proven*: tokens are replays. At some later ones they are compared again, as a number on the host may matter late;
* *failed*: for the rest of the call forward passes of the model, and a line in the log says why.

A cache that moved, other arguments or a model that was changed meanwhile lead back to *warm*. Graphs live as long as
one call of ``generate``: nothing that changes between calls can go stale in them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from transformers import PreTrainedModel

from ..attention.logits import Logits
from . import decoding, observing, recorders
from .cache import Cache, InPlaceCache, Int8Cache
from .captured import CACHE, MASK, CapturedStep, capturing, distance, fresh, is_of_tokens, same, take_back, taken_back
from .compiled import CompiledForward
from .masks import left_pads
from .model_state import ModelState, collects, foreign_hooks
from .settings import Settings, settings_of
from .stand_in import standing_in

log = logging.getLogger(__name__)
#: steps before one is captured: kernels are compiled in them, and short answers are over
WARM = 2
#: tokens for which a replay must have the bits of the forward pass before it stands for it
PROOFS = 2
#: replays after which one is compared once more, and what every next of these numbers is multiplied by
AGAIN, EVER_RARER = 64, 16
#: how far logits of a compiled step may be from the model's own, of their spread: what rounding to 16 bits explains
ROUNDING = 0.1
#: how often a model may change under a call of ``generate`` until no step of it is captured any more
MOST_CHANGES = 3
#: tokens before a step is captured: by then a cache has all that it keeps in full of the first ones
LEAST = 128
_PROMPT = "a prompt"
#: threads that are generating, by device, once for every call
_generating: dict[torch.device, list[int]] = {}
#: of a layer that attends by itself
_DENSE = Settings(budget=None)


def _said(error: Exception) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _layers(model: PreTrainedModel) -> dict[int, Settings]:
    """The settings of every layer that has some."""
    return {int(m.layer_idx): s for m in model.modules() if (s := settings_of(m)) is not None}  # type: ignore[arg-type]


class Replaying:
    """The forward passes of one call of ``generate``; see the states above."""

    def __init__(self, model: PreTrainedModel, forward: Any, compiled: CompiledForward | None) -> None:
        self.model, self.forward, self.compiled = model, forward, compiled
        self.settings = _layers(model)
        self.step: CapturedStep | None = None
        self.state: ModelState | None = None
        #: what a step was captured for
        self.key: Any = None
        self.warm = self.proofs = self.replays = self.changes = 0
        self.again = AGAIN
        #: why this call of generate replays no more
        self.failed = ""
        self.logged: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watched = bool(recorders.current()) or observing.anybody()
        if self.proofs == PROOFS and self.step is not None and not args and not watched and self.step.goes_on(kwargs):
            # goes_on asks of what is captured all that a refusal asks of what is not.
            return self._replayed(kwargs)
        why = self.failed or self._refusal(args, kwargs)
        if why:
            self._log_once(why)
            return self.forward(*args, **kwargs)
        for layer in kwargs[CACHE].shared.holders:
            layer.reserve(1)
        if not self._ready(kwargs):
            return self.forward(**kwargs)
        return self._replayed(kwargs) if self.proofs == PROOFS else self._proven(kwargs)

    def _log_once(self, why: str) -> None:
        if why not in self.logged and why != _PROMPT:
            self.logged.add(why)
            log.info("qaxis: generate decodes without captured graphs, as %s", why)

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why this call cannot be a replay; empty if it can."""
        cache, ids, positions = (kwargs.get(name) for name in (CACHE, "input_ids", "position_ids"))
        if isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.shape[1] > 1:
            return _PROMPT
        if args or not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
            return "a step takes input_ids and position_ids, by name"
        if not isinstance(cache, InPlaceCache):
            return f"{CACHE} is a {type(cache).__name__}"
        if not is_of_tokens(kwargs.get(MASK), cache.get_seq_length() + 1):
            return "attention_mask is not one number a token"
        why = collects(self.model, [kwargs])
        if why:
            return why
        if recorders.current() or observing.anybody():
            return "a recording or an observer sees every call"
        if not self.settings:
            return "qaxis is off"
        if isinstance(cache, Int8Cache) and any(settings.budget is None for settings in self.settings.values()):
            return "a layer is dense, over a cache of codes"
        if any(s.budget is not None and s.budget.tolerance is not None for s in self.settings.values()):
            return "a budget with a tolerance is no step"
        completed = any(s.budget is not None and s.completion != "none" for s in self.settings.values())
        if completed and any(cache.is_sliding):
            return "a completion in a window is no step"
        known = (torch.Tensor, bool, int, float, str, type(None), Cache, Int8Cache)
        strange = [name for name, x in kwargs.items() if not isinstance(x, known)]
        return f"{strange[0]} is neither a tensor nor a constant" if strange else cache.not_capturable()

    def _ready(self, kwargs: dict[str, Any]) -> bool:
        """Whether there is a captured step like this; one is captured once enough steps were seen."""
        cache = kwargs[CACHE]
        key = (id(cache), cache.shared.version, *(
            (n, x.shape, x.dtype) if isinstance(x, torch.Tensor) else (n, x)
            for n, x in sorted(kwargs.items()) if n not in (CACHE, MASK)
        ), kwargs.get(MASK) is None)  # fmt: skip
        if key != self.key:
            self._start_over(key)
            # Work space for less room would not be used again.
            cache.shared.workspace.clear()
        if self.step is not None:
            return True
        if self.warm < WARM or cache.get_seq_length() < LEAST:
            self.warm += 1
            return False
        if foreign_hooks(self.model):
            self.failed = "a module has hooks"
            return False
        if self._others_generate():
            return False
        # This waits for the device.
        pads = left_pads(kwargs.get(MASK), 0, cache.get_seq_length() + 1)
        if isinstance(pads, bool):
            self.failed = "padding is not on the left"
            return False
        if pads is None and kwargs.get(MASK) is not None:
            # None so far: a caller may change rows for others that have some.
            pads = torch.zeros(kwargs[MASK].shape[0], dtype=torch.int32)
        return self._captured(kwargs, None if pads is None else pads.to(cache.shared.clock.tensor.device))

    def _start_over(self, key: Any) -> None:
        """Go back to the last warm step: what it makes, kernels and work space, is made outside of a graph."""
        self.step, self.state, self.key = None, None, key
        self.proofs, self.warm = 0, min(self.warm, WARM - 1)

    def _others_generate(self) -> bool:
        """Whether random numbers that another thread draws could raise there while a step is captured here."""
        others = bool(set(_generating.get(self.model.device, ())) - {get_ident()})
        if others:
            self._log_once("another thread generates on this device; one is captured once it does not")
        return others

    def _captured(self, kwargs: dict[str, Any], pads: torch.Tensor | None) -> bool:
        with capturing:
            return not self._others_generate() and self._captured_alone(kwargs, pads)

    def _captured_alone(self, kwargs: dict[str, Any], pads: torch.Tensor | None) -> bool:
        try:
            if self.compiled is not None:
                # The compiler's work is done before anything is captured.
                with taken_back(kwargs[CACHE]):
                    self._compiled(pads, **kwargs)
            forward = self.forward if self.compiled is None else partial(self._compiled, pads)
            self.step = CapturedStep(forward, kwargs, pads)
        except Exception as error:  # whatever a model's code, a compiler or a driver may raise
            if self.compiled is not None:
                self.compiled = None
                log.warning("qaxis: the step cannot be compiled (%s)", _said(error))
                return False
            self.failed = f"the step cannot be captured ({_said(error)})"
            log.warning("qaxis: %s; tokens take longer", self.failed)
            return False
        return True

    def _compiled(self, pads: torch.Tensor | None, **kwargs: Any) -> Any:
        """The compiled forward pass of a token."""
        assert self.compiled is not None
        cache = kwargs[CACHE]

        def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, logits: Logits) -> torch.Tensor:
            keys, values = cache.update(k, v, layer)
            shown = decoding.shown_again(keys, pads)
            settings = self.settings.get(layer, _DENSE)
            why = decoding.refusal(q, keys, values, shown, logits, settings)
            if why:
                raise RuntimeError(f"layer {layer}: {why}")
            done = decoding.attend(q, keys, values, shown, logits, settings)
            return done.output.transpose(1, 2).contiguous()

        return self.compiled({**kwargs, MASK: None}, cache, step)

    def _replayed(self, kwargs: dict[str, Any]) -> Any:
        """The output of a replay, unless the model is not what it was: that is looked at while the device works."""
        assert self.step is not None
        if self.replays == self.again:
            self.again *= EVER_RARER
            return self._proven(kwargs)
        cache, mark = self.step.cache, self.step.cache.shared.mark()
        self.step.replay(kwargs)
        assert self.state is not None
        if self.state.unchanged():
            self.replays += 1
            return fresh(self.step.output)
        take_back(cache, mark)
        return self._changed(kwargs)

    def _changed(self, kwargs: dict[str, Any]) -> Any:
        """What the model gives now that it was changed; the cache is where it was before the replay."""
        self.changes += 1
        self.settings = _layers(self.model)
        self._start_over(None)
        if self.changes == MOST_CHANGES:
            self.failed = "the model is changed between tokens"
        return self.forward(**kwargs)

    def _proven(self, kwargs: dict[str, Any]) -> Any:
        """The forward pass itself, once the replay was compared with it."""
        assert self.step is not None
        with taken_back(kwargs[CACHE]):
            self.step.replay(kwargs)
            replayed = fresh(self.step.output)
        expected = None
        if self.compiled is not None:
            with taken_back(kwargs[CACHE]):
                expected = self._compiled(self.step.pads, **kwargs)
        output = self.forward(**kwargs)
        if not same(replayed, output if expected is None else expected):
            self._disproven(kwargs[CACHE], distance(replayed, output if expected is None else expected))
        elif expected is not None and not (off := distance(replayed, output)) <= ROUNDING:
            log.warning(
                "qaxis: the compiled step is not used: its logits are off by %.1f %% of their spread", 100 * off
            )
            self.compiled = None
            self._start_over(None)
        else:
            self.proofs = min(PROOFS, self.proofs + 1)
            self.replays += 1
            self.state = ModelState(self.model) if self.proofs == PROOFS else None
        return output

    def _disproven(self, cache: InPlaceCache, off: float) -> None:
        """Replay no more, and say what that means for the tokens so far."""
        self.step, self.proofs = None, 0
        self.failed = "a replay did not give what the forward pass gives"
        log.warning(
            "qaxis: %s (off by %.2g %% of the logits' spread, %d tokens in %d layers of %s): this model keeps "
            "something on the host; tokens take longer",
            self.failed, 100 * off, cache.get_seq_length(), len(cache.layers), type(cache).__name__,
        )  # fmt: skip
        if self.replays > PROOFS:
            log.warning("qaxis: of the last %d tokens some may not be those of the forward pass", self.replays)


@contextmanager
def replaying(model: PreTrainedModel, compiled: CompiledForward | None = None) -> Iterator[None]:
    """Inside, forward passes of ``model`` in this thread that decode a token are replays of a captured one.

    Only on a GPU, over a cache of ours, and where the replay has been seen to give the same bits; with ``compiled``
    those of the compiled pass.
    """
    if model.device.type != "cuda" or torch.version.hip:
        yield
        return

    def make(forward: Callable[..., Any]) -> Replaying:
        return Replaying(model, forward, compiled)

    with _counted(model.device), standing_in(model, "forward", make):
        yield


@contextmanager
def _counted(device: torch.device) -> Iterator[None]:
    """Inside, this thread generates on ``device``; waits while another captures a step."""
    with capturing:
        _generating.setdefault(device, []).append(get_ident())
    try:
        yield
    finally:
        with capturing:
            _generating[device].remove(get_ident())
