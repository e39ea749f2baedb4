"""Caches under any sequence of what may be done to them: what they hold is a plain list's, their index one made anew.

``operations()`` says how many were done; `python -m tests.test_cache_states 300` searches longer, and prints it.
"""

from __future__ import annotations

import copy
import pickle
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers.cache_utils import DynamicCache

import qaxis
from qaxis.decode import index_cache, index_keys
from qaxis.storage.formats import FORMATS
from qaxis.storage.grid import Grid, dequantize, quantize
from qaxis.storage.window import first_held

from .test_in_place import reserve, same_index

WINDOW, WIDTH, HEADS = 20, 64, 1
_done: Counter[str] = Counter()


def operations() -> int:
    """Operations done on caches so far, in this process."""
    return sum(_done.values())


def configuration() -> Any:
    return tf.Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW, head_dim=WIDTH,
        num_key_value_heads=HEADS, vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=HEADS,
    )  # fmt: skip


KINDS: dict[str, Any] = {
    "codes": lambda: qaxis.Cache(configuration()),
    "bounds": lambda: qaxis.Cache(configuration(), index="bounds", room=100),
    "int8": lambda: qaxis.Int8Cache(configuration()),
    "int4": lambda: qaxis.Int8Cache(configuration(), format="int4"),
}


def quantised(x: torch.Tensor, grid: Grid, sinks: int) -> torch.Tensor:
    """What a group of 128 tokens ``[B, Hkv, 128, D]`` is read as once complete; ``sinks`` stay in full."""
    whole = torch.cat([x[:, :, sinks : sinks + 1].expand(-1, -1, sinks, -1), x[:, :, sinks:]], 2)
    made = quantize(whole.float(), 2, grid, torch.finfo(x.dtype).max)
    return torch.cat([x[:, :, :sinks], dequantize(*made, grid, x.dtype)[:, :, sinks:]], 2)


class CacheStates(RuleBasedStateMachine):
    """One cache beside transformers' own, and beside plain tensors of what a quantised layer has to hold."""

    cache: Any

    @initialize(kind=st.sampled_from(sorted(KINDS)), batch=st.integers(1, 3), seed=st.integers(0, 99))
    def begin(self, kind: str, batch: int, seed: int) -> None:
        self.kind, self.batch = kind, batch
        self.random = torch.Generator().manual_seed(seed)
        self.cache, self.model = KINDS[kind](), DynamicCache(config=configuration())
        for each in (self.cache, self.model):
            each.activate_past_recording()
        #: keys and values of the layer of all tokens, as a quantised cache has to hold them
        self.held: list[torch.Tensor] | None = None

    def both(self, name: str, f: Any) -> None:
        _done[name] += 1
        for each in (self.cache, self.model):
            f(each)

    @property
    def length(self) -> int:
        return self.model.get_seq_length(1)

    @rule(m=st.sampled_from([1, 1, 1, 2, 7, 127, 128, 129, 200, 530]), loud=st.booleans())
    def append(self, m: int, loud: bool) -> None:
        shape = (2, 2, self.batch, HEADS, m, WIDTH)
        states = torch.randn(shape, generator=self.random)
        if loud:
            states = states * torch.exp(3 * torch.randn(WIDTH, generator=self.random)).clamp(max=500)
        states = states.bfloat16()
        for layer in (0, 1):
            out = [c.update(*states[layer], layer) for c in (self.cache, self.model)]
            if layer == 0 or self.kind in ("codes", "bounds"):
                assert all(torch.equal(x, y) for x, y in zip(*out, strict=True))
        if self.kind in FORMATS:
            self._hold(states[1])
        _done["append"] += 1

    def _hold(self, states: torch.Tensor) -> None:
        form, start = FORMATS[self.kind], self.length - states.shape[3]
        self.held = [torch.cat([x, y], 2) for x, y in zip(self.held, states, strict=True)] if start else [*states]
        for x, grid in zip(self.held, (form.keys, form.values), strict=True):
            for g in range(start // 128, self.length // 128):
                group = x[:, :, g * 128 : (g + 1) * 128]
                group.copy_(quantised(group.clone(), grid, 0 if g else form.sinks))

    @precondition(lambda self: self.length)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        # As far as the window's past is held: transformers' own would hold less than a token looks back to.
        past = self.model.layers[0].keys.shape[2]
        most = past - (WINDOW - 1) if self.length >= WINDOW else self.length - 1
        self.both("crop", lambda c: c.crop(-int(share * max(0, most))))
        if self.held is not None:
            self.held = [x[:, :, : self.length].clone() for x in self.held]

    def _rows(self, name: str, f: Any, g: Any) -> None:
        self.both(name, f)
        self.batch = self.model.layers[1].keys.shape[0]
        if self.held is not None:
            self.held = [g(x) for x in self.held]

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def reorder(self, data: Any) -> None:
        rows = torch.tensor(
            data.draw(st.lists(st.integers(0, self.batch - 1), min_size=self.batch, max_size=self.batch))
        )
        version = self.cache.shared.version
        self._rows("reorder", lambda c: c.reorder_cache(rows), lambda x: x[rows])
        assert self.cache.shared.version == version

    @precondition(lambda self: self.length)
    @rule(data=st.data())
    def select(self, data: Any) -> None:
        rows = torch.tensor(data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=3)))
        self._rows("select", lambda c: c.batch_select_indices(rows), lambda x: x[rows])

    @precondition(lambda self: self.length and self.batch == 1)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats: int) -> None:
        change = lambda x: x.repeat_interleave(repeats, 0)  # noqa: E731
        self._rows("repeat", lambda c: c.batch_repeat_interleave(repeats), change)

    @precondition(lambda self: self.length > 300)
    @rule()
    def reset(self) -> None:
        _done["reset"] += 1
        self.cache.reset()
        self.model = DynamicCache(config=configuration())
        self.model.activate_past_recording()
        self.held = None

    @rule(way=st.sampled_from([copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]))
    def copied(self, way: Any) -> None:
        _done["copy"] += 1
        self.cache = way(self.cache)

    @precondition(lambda self: self.length)
    @rule()
    def saved_and_loaded(self) -> None:
        _done["save"] += 1
        self.both("crop", lambda c: c.crop(0))
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache")
            options = {"index": self.kind} if self.kind in ("codes", "bounds") else {}
            self.cache = type(self.cache).load(Path(folder) / "cache", configuration(), **options)
        self.cache.activate_past_recording()

    @precondition(lambda self: self.length)
    @rule()
    def moved_away_and_back(self) -> None:
        _done["move"] += 1
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()

    @rule(m=st.integers(0, 3000))
    def reserve(self, m: int) -> None:
        _done["reserve"] += 1
        reserve(self.cache, m)
        version = self.cache.shared.version
        reserve(self.cache, m)
        assert self.cache.shared.version == version

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert self.cache.get_seq_length(1) == self.cache.get_seq_length(0) == self.length
        if not self.length:
            return
        for ours, own in zip(self.cache.layers, self.model.layers, strict=True):
            if ours.is_sliding or self.kind in ("codes", "bounds"):
                assert torch.equal(ours.keys, own.keys) and torch.equal(ours.values, own.values)
                if hasattr(ours, "kv"):
                    self._check_index(ours, own)
            else:
                self._check_quantised(ours)

    def _check_index(self, ours: Any, own: Any) -> None:
        kv = ours.kv
        keys, values, index = kv.operands()
        n, first = self.length, first_held(self.length, WINDOW, kv.room) if kv.window else 0
        assert keys.shape[2] == values.shape[2] == n - first
        seen = min(n, WINDOW - 1) if kv.window else n
        assert torch.equal(keys[:, :, -seen:], own.keys[:, :, -seen:])
        assert same_index(index, index_keys(keys, codes=index.codes is not None))

    def _check_quantised(self, layer: Any) -> None:
        assert torch.equal(layer.keys, self.held[0]) and torch.equal(layer.values, self.held[1])
        if layer.kv.quantised:
            assert same_index(layer.kv.operands()[2], index_cache(layer.sides[0].stored()))


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        CacheStates,
        settings=settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_any_sequence_of_operations():
    before = operations()
    run(15, 15)
    assert operations() - before > 100


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 300, 40)
    print(f"{operations()} operations: {dict(_done)}")
