"""What sparse attention did in a model: keys kept, attention mass retained, entropy, speed.

Recording looks at the inputs and the selection of each call; it never touches the output.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..validation import require
from .attention import Call, recorders
from .layers import attention_modules
from .settings import NAME, calls_of

#: query rows whose weights are formed at once
_ROWS = 256


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
    #: with ``masks=True``: the keys kept in each call, bool ``[B, H, M, N]``
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
    """Statistics of a model's calls inside ``with qaxis.record(model) as recording``."""

    layers: dict[int, LayerRecord] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    #: attention calls that went around qaxis: 0 unless somebody changed the model's implementation
    fallbacks: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens the model took in, per second of its forward passes, the time of recording taken off."""
        return self.tokens / self.seconds if self.seconds > 0 else float("nan")

    def summary(self) -> str:
        """One line a layer, and one in all."""
        lines = ["layer    k_eff     mass  entropy  calls (sparse, all keys, dense)"]
        for layer, r in sorted(self.layers.items()):
            calls = f"{r.sparse_calls - r.everything_calls}, {r.everything_calls}, {r.dense_calls}"
            k_eff, mass, entropy = (float(x.mean()) for x in (r.k_eff, r.mass, r.entropy))
            lines.append(f"{layer:5d} {k_eff:8.1f} {mass:8.4f} {entropy:8.3f}  {calls}")
        lines.append(f"{self.tokens} tokens, {self.tokens_per_second:.1f} tokens/s, {self.fallbacks} fallbacks")
        return "\n".join(lines)


def _measure(call: Call, record: LayerRecord) -> None:
    q, k = call.query.float(), call.key.float()
    batch, heads, m, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    allowed = call.allowed.expand(-1, -1, m, -1)
    for start in range(0, m, _ROWS):
        rows = slice(start, start + _ROWS)
        mask = allowed[:, :, rows]
        weights = torch.nan_to_num(call.logits.softmax(q[:, :, rows] @ k.transpose(-1, -2), mask))
        kept = mask.expand_as(weights) if call.kept is None else call.kept[:, :, rows].expand_as(weights)
        entropy = -torch.where(weights > 0, weights * weights.clamp(min=1e-45).log(), 0.0)
        record.kept = record.kept + kept.sum((0, 2, 3)).double().cpu()
        record.mass_sum = record.mass_sum + torch.where(kept, weights, 0.0).sum(-1).sum((0, 2)).double().cpu()
        record.entropy_sum = record.entropy_sum + entropy.sum(-1).sum((0, 2)).double().cpu()
    record.queries += batch * m
    record.dense_calls += call.kept is None
    if call.kept is not None:
        record.sparse_calls += 1
        record.everything_calls += int(bool((call.kept == allowed).all()))


class _Recorder:
    """Fills a :class:`Recording` from the calls of one model and from hooks on it."""

    def __init__(self, model: PreTrainedModel, masks: bool) -> None:
        self.recording, self.masks = Recording(), masks
        self.modules = attention_modules(model)
        self.seen = {id(m): calls_of(m) for m in self.modules}
        self.started = self.spent = 0.0

    def see(self, call: Call) -> None:
        """Measure one attention call; the time that takes is not the model's."""
        if id(call.module) not in self.seen:
            return
        begun = time.perf_counter()
        with torch.no_grad():
            layer = self.recording.layers.setdefault(call.layer, LayerRecord())
            _measure(call, layer)
            if self.masks:
                kept = call.allowed if call.kept is None else call.kept
                layer.masks.append(kept.expand(*call.query.shape[:3], call.key.shape[2]).clone())
        self.spent += time.perf_counter() - begun

    def before(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if isinstance(ids, torch.Tensor):
            self.recording.tokens += ids.shape[0] * ids.shape[1]
            _synchronize(ids)
        self.spent, self.started = 0.0, time.perf_counter()

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        _synchronize(output[0] if isinstance(output, tuple) else output.last_hidden_state)
        self.recording.seconds += time.perf_counter() - self.started - self.spent

    def around(self, module: Any, args: Any, output: Any) -> None:
        calls = calls_of(module)
        self.recording.fallbacks += calls == self.seen[id(module)]
        self.seen[id(module)] = calls


def _synchronize(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


@contextmanager
def record(model: PreTrainedModel, *, masks: bool = False) -> Iterator[Recording]:
    """Record every forward pass of a model on which qaxis is enabled, without changing a bit of its output.

    Args:
        masks: also keep which keys were attended to, ``recording.layers[i].masks``.

    Yields:
        a :class:`Recording`; ``recording.layers[i].k_eff``, ``.mass`` and ``.entropy`` are ``[H]`` means over
        queries, ``recording.tokens_per_second`` and ``recording.fallbacks`` are of the whole model.

    Raises:
        ValueError: if qaxis is not enabled on the model.
    """
    enabled = model.config._attn_implementation == NAME
    require(enabled, "model", type(model).__name__, "a model with qaxis enabled (qaxis.enable or qaxis.sparse)")
    recorder, decoder = _Recorder(model, masks), model.get_decoder()
    hooks = [
        decoder.register_forward_pre_hook(recorder.before, with_kwargs=True),
        decoder.register_forward_hook(recorder.after, with_kwargs=True),
        *(m.register_forward_hook(recorder.around) for m in recorder.modules),
    ]
    recorders.append(recorder.see)
    try:
        yield recorder.recording
    finally:
        recorders.remove(recorder.see)
        for hook in hooks:
            hook.remove()
