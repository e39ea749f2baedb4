"""The ways to generate that are timed side by side: dense ones of transformers, dense ones of ours, qaxis.

Each has a model of its own (the same weights), so that what one sets is nothing to the others, and every one is timed
through the model's own ``generate``.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

import qaxis
from qaxis.storage.formats import FORMATS

from ..harness.token_times import Median, generated, median
from ..inputs.filled import fill, head_dim
from ..rivals.schemes import of_format

#: tokens of a generation that are not timed: kernels are compiled and graphs captured in them
WARM = 8
#: places that every cache has for new tokens
ROOM = 256
TRANSFORMERS = {
    "dynamic": "DynamicCache, SDPA",
    "static": "StaticCache, SDPA",
    "compiled": "StaticCache, torch.compile",
}
#: keys and values in place, one CUDA graph a token; by the attention that reads them
IDEAL = {
    "graph-cudnn": "one graph, cuDNN",
    "graph-flash": "one graph, FlashAttention-2",
    "graph-triton": "one graph, split-K",
}
FLOOR = "graph-none"
#: the same reading an 8-bit cache, half the bytes: the rival of exact steps that read one
CODED = "graph-int8"
#: at the end of a name: what lies between the attentions of a step is compiled
COMPILED = "+compiled"
#: an index and a budget
QAXIS = ("codes-2048", "codes-0.02", "codes-0.1", "bounds-2048", "int8-2048", "int8-0.02", "codes-2048+compiled")


@dataclass
class Way:
    """One way to generate with ``model``.

    Attributes:
        cache: an empty cache with room for so many tokens.
        options: of ``generate``.
        attention: of :mod:`selfcheck.rivals.dense_graph`, where it is one of these.
    """

    name: str
    model: Any
    cache: Callable[[int], Any]
    options: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None


def twin(model: Any) -> Any:
    """A copy of ``model`` with the same weights, and nothing else in common."""
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def kind_of(name: str) -> str:
    """What a way's cache holds: a format, "codes", "bounds", or something else that holds keys and values alone."""
    first, _, rest = name.partition("-")
    return rest if first in ("plain", "graph") else first


def budget_of(word: str) -> int | qaxis.Budget:
    return qaxis.Budget(float(word)) if "." in word else int(word)


def way(name: str, model: Any) -> Way:
    """The way of this name, with a twin of ``model``.

    Raises:
        ValueError: for a name that is none.
    """
    model = twin(model)
    kind, _, what = name.partition("-")
    if name == "dynamic":
        return Way(name, model, lambda _: DynamicCache(config=model.config))
    if name in ("static", "compiled"):
        static = partial(StaticCache, model.config)
        return Way(name, model, static, {} if name == "compiled" else {"disable_compile": True})
    if kind == "graph":
        from ..rivals.dense_graph import CodedCache, InPlaceCache

        made = CodedCache if what == "int8" else InPlaceCache
        return Way(name, model, lambda room: made(model.config, room, model.device), attention=what)
    config = model.config
    if kind == "plain" and what in FORMATS:
        return Way(name, model, lambda room: qaxis.Int8Cache(config, format=what, room=room))
    if kind in ("codes", "bounds", *FORMATS):
        compiled = what.endswith(COMPILED)
        qaxis.enable(model, budget_of(what.removesuffix(COMPILED)), compiled=compiled)
        if kind in FORMATS:
            return Way(name, model, lambda room: qaxis.Int8Cache(config, format=kind, room=room))
        return Way(name, model, lambda room: qaxis.Cache(config, index=kind, room=room))
    raise ValueError(f"way={name!r}: allowed is one of {(*TRANSFORMERS, *IDEAL, FLOOR, CODED, *QAXIS)}")


def needed(model: Any, kind: str, tokens: int) -> int:
    """Bytes that a cache of ``tokens`` has to hold: keys and values, and 8-bit codes of keys where there are any."""
    config = model.config
    numbers = tokens * config.num_hidden_layers * config.num_key_value_heads * head_dim(config)
    if kind in FORMATS:
        scheme = of_format(FORMATS[kind], head_dim(config))
        return int(numbers * (scheme.key_bits + scheme.value_bits) / 8)
    return 2 * numbers * model.dtype.itemsize + (numbers + numbers // 128 if kind == "codes" else 0)


class Running:
    """One way with a cache that holds ``tokens`` tokens, ready to go on; ``cache``, if it is not the way's own."""

    def __init__(self, chosen: Way, tokens: int, seed: int, cache: Any = None) -> None:
        cuda = chosen.model.device.type == "cuda"
        self.way, self.tokens, self.start = chosen, tokens, time.perf_counter()
        before = torch.cuda.memory_allocated() if cuda else 0
        self.cache = fill(chosen.cache(tokens + ROOM) if cache is None else cache, chosen.model, tokens, seed)
        self.held = torch.cuda.memory_allocated() - before if cuda else 0
        self.graph: Any = None
        if chosen.attention is not None:
            from ..rivals.dense_graph import Graphed, attend_by

            attend_by(chosen.model, chosen.attention, self.cache)
            self.graph = Graphed(chosen.model, self.cache)
        numbers = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, chosen.model.config.vocab_size, (1, tokens + ROOM), generator=numbers)
        self.peak, self.times = 0, list[float]()

    def generate(self, new: int) -> list[float]:
        """Milliseconds of each of ``new`` tokens after the first ones."""
        _, ticks = generated(self.way.model, self._prompt(), new + WARM, self.cache, **self.way.options)
        self.peak = max(self.peak, ticks.peak())
        return ticks.milliseconds()[WARM - 1 :]

    def logits(self, new: int) -> Any:
        """What ``generate`` returns for ``new`` tokens, with the logits of each, float32 ``[1, V]``."""
        kept = {"output_logits": True, "return_dict_in_generate": True}
        return generated(self.way.model, self._prompt(), new, self.cache, **self.way.options, **kept)[0]

    @torch.no_grad()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``[1, V]`` of one forward pass of the model itself, without ``generate``."""
        return self.way.model(token, past_key_values=self.cache, use_cache=True).logits[:, -1].float()

    def _prompt(self) -> torch.Tensor:
        """Ids of as many tokens as there are in the cache, and one more, which is not."""
        if self.graph is not None:
            # Fused attention reads as many keys as there were when its graph was captured.
            self.cache.move_to(self.tokens)
        return self.ids[:, : int(self.cache.get_seq_length()) + 1].to(self.way.model.device)


def measured(
    model: Any,
    names: Sequence[str],
    tokens: int,
    *,
    rounds: int,
    new: int,
    seed: int,
    alone: bool = False,
    failed: Callable[[str, Exception], None] | None = None,
    progress: Callable[..., Iterable[Any]] = lambda items, label: items,
) -> list[dict[str, Any]]:
    """One row a way: milliseconds a token after ``tokens`` random tokens.

    Each round goes through all ways in a new random order. Where their caches do not fit beside each other, ``alone``,
    each is made anew for its turn. A way that raises is handed to ``failed``, if there is one, and left out.
    """
    if "compiled" in names:
        # Another length is another graph: compiled for this one alone.
        torch.compiler.reset()
    left, times = list(names), {name: list[float]() for name in names}
    facts: dict[str, dict[str, Any]] = {}
    running: dict[str, Running] = {}
    order = random.Random(seed)
    for _ in progress(range(rounds), f"{model.config.num_hidden_layers} layers, {tokens} tokens"):
        for name in order.sample(left, len(left)):
            try:
                if name not in running:
                    running[name] = _warmed(way(name, model), tokens, seed, facts)
                times[name] += running[name].generate(new)
                facts[name]["peak"] = running[name].peak
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                left.remove(name)
            if alone or name not in left:
                running.pop(name, None)
                torch.cuda.empty_cache()
    return [_row(model, name, tokens, median(times[name]), facts[name]) for name in left]


def _warmed(chosen: Way, tokens: int, seed: int, facts: dict[str, dict[str, Any]]) -> Running:
    """A first generation that is not timed: graphs and kernels are made in it."""
    one = Running(chosen, tokens, seed)
    one.generate(2)
    facts.setdefault(chosen.name, {"held": one.held, "ready": time.perf_counter() - one.start})
    one.peak = 0
    return one


def _row(model: Any, name: str, tokens: int, ms: Median, facts: dict[str, Any]) -> dict[str, Any]:
    return {
        "layers": model.config.num_hidden_layers, "tokens": tokens, "way": name, "ms": ms.value, "low": ms.low,
        "high": ms.high, "mean": ms.mean, "slowest": ms.largest, "timed": ms.n, **facts,
        "needed": needed(model, kind_of(name), tokens),
    }  # fmt: skip
