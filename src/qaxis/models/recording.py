"""What sparse attention did in a model: keys kept, attention mass retained, entropy, speed.

Recording looks at the inputs and the selection of each call; it never touches the output.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..validation import require
from . import recorders
from .layers import attention_modules, text_decoder, transformers_model
from .recorders import Call
from .settings import NAME, watch_calls

#: queries whose weights are formed at once
_QUERIES = 256
#: by which names a decoder takes what it reads
_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")


@dataclass
class LayerRecord:
    """Sums over the queries of one layer, each ``[H]`` float64; the properties are means."""

    queries: int = 0
    kept: Any = 0
    mass_sum: Any = 0
    entropy_sum: Any = 0
    #: calls with a selection; calls of a layer that was asked to be dense; calls in which k_eff reached every key
    sparse_calls: int = 0
    dense_calls: int = 0
    everything_calls: int = 0
    #: calls by what computed them, and after a colon why nothing faster did: ``"cuda"``, ``"triton: ..."`` (the
    #: certified decode step), ``"prefill"``, ``"canonical: ..."``, ``"masked: ..."``, ``"dense"``
    engines: Counter[str] = field(default_factory=Counter)
    #: with ``masks=True``: the keys kept in each call, bool ``[B, H, M, N]``, in the order in which calls ended
    masks: list[torch.Tensor] = field(default_factory=list)

    @property
    def k_eff(self) -> torch.Tensor:
        """Mean number of keys attended to, per head."""
        return self.kept / self.queries

    @property
    def mass(self) -> torch.Tensor:
        """Mean share of the dense attention weights that the kept keys hold, per head."""
        return self.mass_sum / self.queries

    @property
    def entropy(self) -> torch.Tensor:
        """Mean entropy of the dense attention weights, nats, per head."""
        return self.entropy_sum / self.queries


@dataclass
class Recording:
    """Statistics of a model's calls inside ``with qaxis.record(model) as recording``, of every thread."""

    layers: dict[int, LayerRecord] = field(default_factory=dict)
    #: of the forward passes that were completed
    tokens: int = 0
    #: of these passes; what several threads spend at the same time counts for each
    seconds: float = 0.0
    #: attention calls that went around qaxis: 0 unless somebody changed the model's implementation
    fallbacks: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens the model took in, per second of its forward passes, the time of recording taken off.

        With several threads it is the mean speed of one thread, not of all together.
        """
        return self.tokens / self.seconds if self.seconds > 0 else float("nan")

    @property
    def engines(self) -> Counter[str]:
        """Calls of all layers by what computed them, and why nothing faster did."""
        return sum((r.engines for r in self.layers.values()), Counter())

    def summary(self) -> str:
        """One line a layer, one for each way in which attention was computed, and one in all."""
        lines = ["layer    k_eff     mass  entropy  calls (sparse, all keys, dense)"]
        for layer, r in sorted(self.layers.items()):
            calls = f"{r.sparse_calls - r.everything_calls}, {r.everything_calls}, {r.dense_calls}"
            k_eff, mass, entropy = (float(x.mean()) for x in (r.k_eff, r.mass, r.entropy))
            lines.append(f"{layer:5d} {k_eff:8.1f} {mass:8.4f} {entropy:8.3f}  {calls}")
        lines += [f"{calls} calls: {engine}" for engine, calls in self.engines.most_common()]
        lines.append(f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s, {self.fallbacks} fallbacks")
        return "\n".join(lines)


def _measure(call: Call) -> LayerRecord:
    """The sums of one call; products and softmax in float32, also inside autocast."""
    record = LayerRecord()
    with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
        q, k = call.query.float(), call.key.float()
        batch, heads, m, _ = q.shape
        k = k.repeat_interleave(heads // k.shape[1], dim=1)
        allowed = call.allowed.expand(-1, -1, m, -1)
        for start in range(0, m, _QUERIES):
            rows = slice(start, start + _QUERIES)
            mask = allowed[:, :, rows]
            weights = torch.nan_to_num(call.logits.softmax(q[:, :, rows] @ k.transpose(-1, -2), mask))
            kept = mask.expand_as(weights) if call.kept is None else call.kept[:, :, rows].expand_as(weights)
            entropy = -torch.where(weights > 0, weights * weights.clamp(min=1e-45).log(), 0.0)
            record.kept = record.kept + kept.sum((0, 2, 3)).double().cpu()
            record.mass_sum = record.mass_sum + torch.where(kept, weights, 0.0).sum(-1).sum((0, 2)).double().cpu()
            record.entropy_sum = record.entropy_sum + entropy.sum(-1).sum((0, 2)).double().cpu()
        # A query of padding sees no key: it has no weights to count.
        record.queries = int(allowed.expand(batch, -1, -1, -1).any(-1).any(1).sum())
        record.dense_calls = int(call.kept is None)
        record.engines[f"{call.engine}: {call.reason}" if call.reason else call.engine] += 1
        if call.kept is not None:
            record.sparse_calls = 1
            record.everything_calls = int(bool((call.kept == allowed).all()))
    return record


class _Pass(threading.local):
    """The forward pass that is under way in a thread: when it began (None: there is none), seconds of recording."""

    started: float | None = None
    spent = 0.0
    tokens = 0


class _Recorder:
    """Fills a :class:`Recording` from the calls of one model and from hooks on it."""

    def __init__(self, model: PreTrainedModel, masks: bool) -> None:
        self.recording, self.masks = Recording(), masks
        self.modules, self.decoder = attention_modules(model), text_decoder(model)
        self.known = {id(m) for m in self.modules}
        self.lock, self.current = threading.Lock(), _Pass()

    def __deepcopy__(self, memo: Any) -> _Recorder:
        """A copy of a model that is being recorded has the hooks, and stays outside: its modules are not known."""
        return self

    def see(self, call: Call) -> None:
        """Measure one attention call; the time that takes is not the model's."""
        if id(call.module) not in self.known:
            return
        begun = time.perf_counter()
        measured = _measure(call)
        if self.masks:
            kept = call.allowed if call.kept is None else call.kept
            measured.masks.append(kept.expand(*call.query.shape[:3], call.key.shape[2]).clone())
        with self.lock:
            layer = self.recording.layers.setdefault(call.layer, LayerRecord())
            for each in fields(LayerRecord):
                setattr(layer, each.name, getattr(layer, each.name) + getattr(measured, each.name))
        self.current.spent += time.perf_counter() - begun

    @torch.compiler.disable(reason="what runs is timed, not what is traced")
    def before(self, module: Any, args: Any, kwargs: Any) -> None:
        if module is not self.decoder:
            return
        ids = next((x for x in map(kwargs.get, _INPUTS) if x is not None), args[0] if args else None)
        self.current.tokens = ids.shape[0] * ids.shape[1] if isinstance(ids, torch.Tensor) else 0
        _synchronize(ids)
        self.current.spent, self.current.started = 0.0, time.perf_counter()

    @torch.compiler.disable(reason="what runs is timed, not what is traced")
    def after(self, module: Any, args: Any, output: Any) -> None:
        _synchronize(output[0] if isinstance(output, (tuple, ModelOutput)) else output)
        started, self.current.started = self.current.started, None
        if started is not None:
            with self.lock:
                self.recording.seconds += time.perf_counter() - started - self.current.spent
                self.recording.tokens += self.current.tokens

    def missed(self, module: Any) -> None:
        with self.lock:
            self.recording.fallbacks += id(module) in self.known


def _synchronize(x: Any) -> None:
    if isinstance(x, torch.Tensor) and x.is_cuda:
        torch.cuda.synchronize(x.device)


def _implementation(module: Any) -> str | None:
    """Name of the attention implementation that the module looks up."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


@contextmanager
def record(model: PreTrainedModel, *, masks: bool = False) -> Iterator[Recording]:
    """Record every forward pass of a model on which qaxis is enabled, without changing a bit of its output.

    Calls of every thread are counted, each judged in its own thread. While a recording runs, ``generate`` replays no
    captured steps: each call is there to be seen, with the same bits, but slower than without a recording. Entropy and
    mass are computed in float32 by PyTorch, as its settings for float32 products have it; they are not canonical. A
    compiled model is recorded too.

    Args:
        masks: also keep which keys were attended to, ``recording.layers[i].masks``: B * H * M * N bytes a call and
            layer, on the model's device, until the recording is dropped.

    Yields:
        a :class:`Recording`; ``recording.layers[i].k_eff``, ``.mass`` and ``.entropy`` are ``[H]`` means over
        queries. Of the whole model are ``recording.engines``, calls by what computed them and why nothing faster did,
        ``recording.tokens_per_second``, which is not the speed of captured steps, and ``recording.fallbacks``.

    Raises:
        ValueError: if qaxis is not enabled on the model.
    """
    model = transformers_model(model)
    recorder = _Recorder(model, masks)
    enabled = any(_implementation(module) == NAME for module in recorder.modules)
    require(enabled, "model", type(model).__name__, "a model with qaxis enabled (qaxis.enable or qaxis.sparse)")
    decoder = recorder.decoder
    hooks: list[Any] = []
    # A run that a hook sees beginning is seen by the recorder: it is there before the hooks, and after them.
    recorders.add(recorder.see)
    try:
        hooks.append(decoder.register_forward_pre_hook(recorder.before, with_kwargs=True))
        hooks.append(decoder.register_forward_hook(recorder.after))
        for module in recorder.modules:
            hooks += watch_calls(module, recorder.missed)
        yield recorder.recording
    finally:
        for hook in hooks:
            hook.remove()
        recorders.remove(recorder.see)
