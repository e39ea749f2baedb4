"""Dense decoding as fast as we can make it: keys and values in place, a whole forward pass in one CUDA graph.

What transformers gives is slower for reasons that have nothing to do with attention: it concatenates caches, repeats
key heads and launches kernels one by one. Here nothing of this is left, so a sparse way that wins against it wins by
attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from qaxis.cuda.workspaces import own_workspaces
from qaxis.storage.formats import FORMATS
from qaxis.storage.side import Side, Stored

from .dense_8bit import GROUP_SIZE
from .dense_8bit import attend as attend_codes
from .dense_decoding import split_k

#: new tokens that a cache of codes has room for in full, those after its last whole group included
ROOM = 384


@triton.jit
def _append_kernel(
    k_ptr, v_ptr, keys_ptr, values_ptr, at_ptr, k_stride, v_stride, room, DIM: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    place = (head * room + tl.load(at_ptr)) * DIM + d
    tl.store(keys_ptr + place, tl.load(k_ptr + head * k_stride + d, mask=d < DIM), mask=d < DIM)
    tl.store(values_ptr + place, tl.load(v_ptr + head * v_stride + d, mask=d < DIM), mask=d < DIM)


class InPlaceCache(StaticCache):
    """Batch 1: a token's keys and values are written by one kernel a layer, at ``at`` (int64 ``[1]`` on the device)."""

    #: ``generate`` neither compiles nor makes masks of the whole room
    is_compileable = False

    def __init__(self, config: Any, room: int, device: torch.device) -> None:
        super().__init__(config=config, max_cache_len=room)
        self.at, self.seen = torch.zeros(1, dtype=torch.int64, device=device), 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append a prompt, or one token; the whole room is returned."""
        layer: Any = self.layers[layer_idx]
        _, heads, tokens, dim = key_states.shape
        if tokens > 1:
            layer.update(key_states, value_states)
            self.move_to(tokens)
        else:
            _append_kernel[(heads,)](
                key_states, value_states, layer.keys, layer.values, self.place(), key_states.stride(1),
                value_states.stride(1), layer.max_cache_len, DIM=dim, WIDTH=triton.next_power_of_2(dim),
            )  # fmt: skip
        return layer.keys, layer.values

    def place(self) -> torch.Tensor:
        """Where the next token is written, int64 ``[1]``."""
        return self.at

    def move_to(self, tokens: int) -> None:
        """The next token is written after so many."""
        self.seen = tokens
        self.at.fill_(tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen


class CodedCache(InPlaceCache):
    """The same with the prompt in 8 bits, as :class:`qaxis.Int8Cache` holds it, and new tokens in full beside it.

    No group is completed: the time to quantise one in 128 tokens is spared.
    """

    def __init__(self, config: Any, room: int, device: torch.device) -> None:
        super().__init__(config, ROOM, device)
        self.sides: dict[int, list[Stored]] = {}
        self.coded = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = key_states.shape[2]
        if tokens > 1:
            self.coded = tokens - tokens % GROUP_SIZE
            self.sides[layer_idx] = [_stored(x[:, :, : self.coded]) for x in (key_states, value_states)]
            key_states, value_states = (x[:, :, self.coded :] for x in (key_states, value_states))
            layer: Any = self.layers[layer_idx]
            layer.update(key_states, value_states)
            self.move_to(tokens)
            return layer.keys, layer.values
        return super().update(key_states, value_states, layer_idx)

    def place(self) -> torch.Tensor:
        return self.at - self.coded


def _stored(x: torch.Tensor) -> Stored:
    side = Side(x, FORMATS["int8"].keys, FORMATS["int8"].sinks, room=x.shape[2])
    for part in x.split(1 << 14, dim=2):
        side.prepare(part)()
    return side.stored()


def _sdpa(backend: SDPBackend) -> Callable[..., torch.Tensor]:
    """Fused attention has its length on the host: every replay of a graph reads as many keys as its capture."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: InPlaceCache, layer: int) -> torch.Tensor:
        grouped = q.reshape(1, k.shape[1], -1, q.shape[3])
        n = cache.seen + 1
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(grouped, k[:, :, :n], v[:, :, :n])
        return out.reshape(q.shape)

    return attend


def stretches(n: int) -> int:
    """Stretches of ``n`` keys that programs share: enough for every multiprocessor, where there are keys enough."""
    return 64 if n > 1 << 16 else 32 if n > 1 << 12 else 4


def _triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: InPlaceCache, layer: int) -> torch.Tensor:
    """Reads exactly the keys that there are, also when replayed."""
    return split_k(q.contiguous(), k, v, stretches(k.shape[2]), last=cache.at)


def _int8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Any, layer: int) -> torch.Tensor:
    """Reads codes, and as many new tokens as there were when it was captured."""
    n = cache.seen + 1 - cache.coded
    keys, values = (
        replace(side, newest=new[:, :, :n]) for side, new in zip(cache.sides[layer], (k, v), strict=True)
    )  # fmt: skip
    return attend_codes(q, keys, values, stretches(cache.coded) - 1)


def _none(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: InPlaceCache, layer: int) -> torch.Tensor:
    """No attention at all: what is left of a token is everything else."""
    return torch.zeros_like(q)


#: ways to attend densely, by the end of their name; "none" is the floor under all of them
ATTENTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION), "flash": _sdpa(SDPBackend.FLASH_ATTENTION), "triton": _triton,
    "int8": _int8, "none": _none,
}  # fmt: skip


def attend_by(model: Any, name: str, cache: InPlaceCache) -> None:
    """Let ``model`` attend in this way from now on; masks are none, as a single query sees every key."""

    def forward(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        return ATTENTIONS[name](q, k, v, cache, module.layer_idx).transpose(1, 2).contiguous(), None

    called = f"selfcheck_graph_{name}"
    AttentionInterface.register(called, forward)
    model.config._attn_implementation = called


class Graphed:
    """One-token forward passes of ``model`` over ``cache``, each a replay of one CUDA graph.

    Make it when the cache holds its prompt; ``generate`` may then be called with that cache. Without a GPU the passes
    are the same, and not captured.
    """

    def __init__(self, model: Any, cache: InPlaceCache) -> None:
        self.cache, self.plain = cache, model.forward
        self.ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.ids.is_cuda:
            self._capture()

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
            return self.forward(*args, **kwargs)

        model.forward = forward

    @torch.no_grad()
    def _capture(self) -> None:
        tokens, side = self.cache.seen, torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with own_workspaces(), torch.cuda.graph(graph):
            self._step()
        self.graph = graph
        self.cache.move_to(tokens)

    def _step(self) -> None:
        self.logits = self.plain(
            input_ids=self.ids, position_ids=self.cache.at[None], past_key_values=self.cache, use_cache=True
        ).logits
        self.cache.at.add_(1)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, **_: Any) -> CausalLMOutputWithPast:
        if past_key_values is not self.cache or input_ids.shape != (1, 1):
            raise ValueError("a captured pass is of one token after the cache that it was captured with")
        self.ids.copy_(input_ids)
        if self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        self.cache.seen += 1
        return CausalLMOutputWithPast(logits=self.logits, past_key_values=self.cache)
