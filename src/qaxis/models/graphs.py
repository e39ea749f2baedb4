"""The steps of ``generate`` as CUDA graphs: captured once for a cache's memory, replayed for every token.

A replay launches what the model's own forward pass launched, without Python between the launches. It is used only
after it gave, for two tokens that follow each other, the bits of the forward pass itself: whatever the model keeps on
the host (a position, a length, a branch) would show there. Graphs live as long as one call of ``generate``, so nothing
that changes between calls, as weights or adapters do, can go stale in them.
"""

from __future__ import annotations

import functools
import gc
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..attention.logits import Logits
from . import decoding, recorders, routing
from .cache import Cache, Int8Cache
from .compiled import CompiledForward
from .masks import left_pads
from .settings import Settings, is_ours, settings_of

log = logging.getLogger(__name__)
#: steps before one is captured: kernels are compiled in them, and short answers are over
WARM = 2
#: tokens for which a replay must have the bits of the forward pass before it stands for it
PROOFS = 2
#: how far, of the largest logit, those of a compiled step may be from those of the model's own kernels
ROUNDING = 0.05
#: of a layer that attends by itself
DENSE = Settings(budget=None)
#: what no clock shows
UNKNOWN = -1
#: tokens before a step is captured: by then a cache has all that it keeps in full of the first ones
LEAST = 128
_CACHE, _MASK, _FORWARD = "past_key_values", "attention_mask", "forward"


#: one capture at a time: what the allocator gives a capture must not be asked for by another
_capture = threading.RLock()


class _Graph:
    """One captured step, its inputs and its output.

    Args:
        forward: what is captured; with ``kwargs`` but the mask, of which only the pads are left.
    """

    def __init__(self, forward: Any, kwargs: dict[str, Any], pads: torch.Tensor | None) -> None:
        self.cache = kwargs[_CACHE]
        self.names, self.version = kwargs.keys(), self.cache.shared.version
        self.inputs = {n: x.clone() for n, x in kwargs.items() if isinstance(x, torch.Tensor) and n != _MASK}
        self.fixed = {n: x for n, x in kwargs.items() if n not in self.inputs and n != _MASK}
        shared = self.cache.shared
        shared.pads = pads
        shared.clock.move_to(shared.holders[0].length)
        state, self.graph = shared.mark(), torch.cuda.CUDAGraph()
        try:
            # Streams of torch's own for captures are one a process: two threads would share it.
            stream = torch.cuda.Stream(shared.clock.tensor.device)
            with (
                routing.only_steps(),
                decoding.rows_into(shared, self),
                _no_collection(),
                torch.cuda.device(stream.device),
            ):
                with _capture, torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                    self.output = forward(**self.inputs, **self.fixed, **{_MASK: None})
        finally:
            # Nothing was computed: the host alone went a token ahead.
            shared.rewind(state)

    def goes_on(self, kwargs: dict[str, Any]) -> bool:
        """Whether this is the next token of what was captured. Asked before every token, so it looks at little."""
        shared, mask = self.cache.shared, kwargs.get(_MASK)
        length, version = shared.holders[0].length + 1, self.version
        return (
            kwargs.keys() == self.names
            and all(kwargs[name] is x for name, x in self.fixed.items())
            and all(kwargs[name].shape == x.shape and kwargs[name].dtype == x.dtype for name, x in self.inputs.items())
            and (mask is None or (mask.ndim == 2 and mask.shape[1] == length))
            and version == shared.version
            and all(layer.has_room(length) for layer in shared.holders)
        )

    def replay(self, kwargs: dict[str, Any]) -> Any:
        """The output for these inputs; the cache is a token longer."""
        for name, to in self.inputs.items():
            to.copy_(kwargs[name])
        shared = self.cache.shared
        shared.clock.move_to(shared.holders[0].length)
        self.graph.replay()
        shared.advance(1)
        decoding.forget_rows(shared)
        return _fresh(self.output)


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


def _fresh(x: Any) -> Any:
    """A copy that the next replay does not overwrite."""
    if isinstance(x, torch.Tensor):
        return x.clone()
    if isinstance(x, ModelOutput):
        return type(x)(**{name: _fresh(part) for name, part in x.items()})
    if isinstance(x, dict):
        return {name: _fresh(part) for name, part in x.items()}
    return type(x)(map(_fresh, x)) if type(x) in (tuple, list) else x


def _same(x: Any, y: Any) -> bool:
    """Whether all tensors of two outputs have the same bits."""
    if isinstance(x, torch.Tensor):
        alike = isinstance(y, torch.Tensor) and x.shape == y.shape and x.dtype == y.dtype
        return alike and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    if isinstance(x, ModelOutput):
        return isinstance(y, ModelOutput) and x.keys() == y.keys() and all(_same(x[name], y[name]) for name in x)
    if isinstance(x, (dict, tuple, list)):
        parts = (x.values(), y.values()) if isinstance(x, dict) and isinstance(y, dict) else (x, y)
        return type(x) is type(y) and len(x) == len(y) and all(map(_same, *parts))
    return x is y or x == y or isinstance(x, (Cache, Int8Cache))


def _close(x: Any, y: Any) -> bool:
    """Whether the logits of two outputs differ by what the rounding of 16 bits explains."""
    a, b = x["logits"].float(), y["logits"].float()
    return bool((a - b).abs().amax() <= ROUNDING * b.abs().amax())


def _said(error: Exception) -> str:
    """What an error says, in a line."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _foreign_hooks(model: nn.Module) -> bool:
    """Whether somebody else looks at, or changes, what modules compute: replays would pass them by."""
    if torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
        return True
    hooks = (h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))
    return not all(map(is_ours, hooks))


class _Replay:
    """The forward passes of one call of ``generate``."""

    def __init__(self, model: PreTrainedModel, forward: Any, compiled: CompiledForward | None) -> None:
        self.model, self.forward, self.compiled = model, forward, compiled
        self.settings = {int(m.layer_idx): s for m in model.modules() if (s := settings_of(m)) is not None}  # type: ignore[arg-type]
        self.graph: _Graph | None = None
        self.key: Any = None
        self.warm = self.proofs = 0
        #: why this call of generate replays no more
        self.failed = ""
        self.told: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        graph = self.graph if self.proofs == PROOFS and not args and not recorders.current() else None
        if graph is not None and graph.goes_on(kwargs):
            return graph.replay(kwargs)
        why = self.failed or self._refusal(args, kwargs)
        if why:
            self._tell(why)
            return self.forward(*args, **kwargs)
        for layer in kwargs[_CACHE].shared.holders:
            layer.reserve(1)
        if self._ready(kwargs):
            assert self.graph is not None
            return self.graph.replay(kwargs) if self.proofs == PROOFS else self._proven(kwargs)
        return self.forward(**kwargs)

    def _tell(self, why: str) -> None:
        if why not in self.told and why != "a prompt":
            self.told.add(why)
            log.info("qaxis: generate decodes without captured graphs, as %s", why)

    def _refusal(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why this call cannot be a replay; empty if it can."""
        cache, ids, positions = (kwargs.get(name) for name in (_CACHE, "input_ids", "position_ids"))
        if isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.shape[1] > 1:
            return "a prompt"
        if args or not isinstance(ids, torch.Tensor) or not isinstance(positions, torch.Tensor):
            return "a step takes input_ids and position_ids, by name"
        if not isinstance(cache, (Cache, Int8Cache)):
            return f"{_CACHE} is a {type(cache).__name__}"
        mask = kwargs.get(_MASK)
        if mask is not None and not (mask.ndim == 2 and mask.shape[1] == cache.get_seq_length() + 1):
            return "attention_mask is not one number a token"
        if recorders.current():
            return "a recording sees every call"
        known = (torch.Tensor, bool, int, float, str, type(None), Cache, Int8Cache)
        strange = [name for name, x in kwargs.items() if not isinstance(x, known)]
        return f"{strange[0]} is neither a tensor nor a constant" if strange else cache.not_capturable()

    def _ready(self, kwargs: dict[str, Any]) -> bool:
        """Whether there is a graph of such a step; one is captured once enough steps were seen."""
        cache = kwargs[_CACHE]
        key = (id(cache), cache.shared.version, *(
            (n, x.shape, x.dtype) if isinstance(x, torch.Tensor) else (n, x)
            for n, x in sorted(kwargs.items()) if n not in (_CACHE, _MASK)
        ))  # fmt: skip
        if key != self.key:
            # What a first step makes, kernels and work space, is made outside of a graph.
            self.graph, self.proofs, self.key, self.warm = None, 0, key, min(self.warm, WARM - 1)
            # Work space for less room would not be used again.
            cache.shared.workspace.clear()
        if self.graph is not None:
            return True
        if self.warm < WARM or cache.get_seq_length() < LEAST:
            self.warm += 1
            return False
        if _foreign_hooks(self.model):
            self.failed = "a module has hooks"
            return False
        pads = left_pads(kwargs.get(_MASK), 0, cache.get_seq_length() + 1)
        if isinstance(pads, bool):
            self.failed = "padding is not on the left"
            return False
        return self._captured(kwargs, pads)

    def _captured(self, kwargs: dict[str, Any], pads: torch.Tensor | None) -> bool:
        try:
            if self.compiled is not None:
                # The compiler's work is done before anything is captured.
                self._rewound(kwargs, partial(self._compiled, pads))
            forward = self.forward if self.compiled is None else partial(self._compiled, pads)
            self.graph, self.pads = _Graph(forward, kwargs, pads), pads
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
        cache = kwargs[_CACHE]

        def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, logits: Logits) -> torch.Tensor:
            keys, values = cache.update(k, v, layer)
            shown = decoding.shown_again(keys, pads)
            settings = self.settings.get(layer, DENSE)
            why = decoding.refusal(q, keys, shown, settings)
            if why:
                raise RuntimeError(f"layer {layer}: {why}")
            done = decoding.attend(q, keys, values, shown, logits, settings)
            return done.output.transpose(1, 2).contiguous()

        return self.compiled({**kwargs, _MASK: None}, cache, step)

    def _rewound(self, kwargs: dict[str, Any], forward: Any) -> Any:
        """What ``forward`` gives for these inputs; the host counts as before."""
        shared = kwargs[_CACHE].shared
        state = shared.mark()
        try:
            return forward(**kwargs)
        finally:
            shared.rewind(state)
            for clock in shared.clocks.values():
                # The device's went on: it is set anew by whatever comes next.
                clock.at = UNKNOWN

    def _proven(self, kwargs: dict[str, Any]) -> Any:
        """The forward pass itself, once the replay was compared with it."""
        assert self.graph is not None
        replayed = self._rewound(kwargs, lambda **_: self.graph.replay(kwargs))
        expected = None
        if self.compiled is not None:
            expected = self._rewound(kwargs, partial(self._compiled, self.pads))
        output = self.forward(**kwargs)
        same = _same(replayed, output if expected is None else expected)
        if same and (expected is None or _close(replayed, output)):
            self.proofs += 1
        else:
            self.graph, self.failed = None, "a replay did not give what the forward pass gives"
            log.warning("qaxis: %s: this model keeps something on the host; tokens take longer", self.failed)
        return output


class _Forward:
    """Stands for ``model.forward`` while some thread generates; other threads, and compilers, get the model's own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.own = model.__dict__.get(_FORWARD)
        self.original = model.forward
        functools.update_wrapper(self, self.original)
        self.local, self.users = threading.local(), 0

    def stack(self) -> list[_Replay]:
        """The calls of ``generate`` of this thread, the innermost last."""
        return self.local.__dict__.setdefault("stack", [])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stack = self.stack()
        if not stack or torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        return stack[-1](*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise RuntimeError("model=<generating>: allowed is copying a model while no generate() of it is under way")


_lock = threading.Lock()


@contextmanager
def replaying(model: PreTrainedModel, compiled: CompiledForward | None = None) -> Iterator[None]:
    """Inside, forward passes of ``model`` in this thread that decode a token are replays of a captured one.

    Only on a GPU, over a cache of ours, and where the replay has been seen to give the same bits; with ``compiled``
    those of the compiled pass.
    """
    if model.device.type != "cuda" or torch.version.hip:
        yield
        return
    with _lock:
        forward = model.__dict__.get(_FORWARD)
        if not isinstance(forward, _Forward):
            forward = model.__dict__[_FORWARD] = _Forward(model)
        forward.users += 1
    forward.stack().append(_Replay(model, forward.original, compiled))
    try:
        yield
    finally:
        forward.stack().pop()
        with _lock:
            forward.users -= 1
            if forward.users == 0:
                _put_back(model, forward)


def _put_back(model: PreTrainedModel, forward: _Forward) -> None:
    if forward.own is None:
        del model.__dict__[_FORWARD]
    else:
        model.__dict__[_FORWARD] = forward.own
