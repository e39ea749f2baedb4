"""One step of a model with all but its attention compiled: what is between two attentions becomes a few fused kernels.

The compiler sees a cache that gives back what it is given and an attention that is one opaque operation,
``qaxis::step``; the operation appends to the real cache and runs the certified step on it. So a compiled model serves
any cache of any length. Attention keeps its bits; of the rest the compiler may round otherwise than eager kernels do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..attention.logits import Logits
from ..validation import check_scale, require

#: ``(q, k, v, layer, logits) -> [B, 1, H, Dv]``
AttendStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, Logits], torch.Tensor]

#: whether a model is being traced for this module: then its attention is the operation, and it needs no mask
_tracing = False
_lock = threading.RLock()


class _Local(threading.local):
    """What the operation does in this thread."""

    step: AttendStep | None = None


_local = _Local()


def is_tracing() -> bool:
    """Whether the code that asks is being traced for this module, not run."""
    return _tracing and torch.compiler.is_compiling()


@torch.library.custom_op("qaxis::step", mutates_args=())
def step_operation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float, soft_cap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Append a token's key and value to a layer of the cache at hand and attend: ``[B, 1, H, Dv]``.

    Args:
        q: ``[B, H, 1, D]``. k: ``[B, Hkv, 1, D]``. v: ``[B, Hkv, 1, Dv]``.
        scale, soft_cap, sink: as in :class:`~qaxis.attention.logits.Logits`.

    Raises:
        RuntimeError: outside of :func:`stepping`.
    """
    if _local.step is None:
        raise RuntimeError("qaxis::step: allowed is running it in the thread that decodes with it")
    return _local.step(q, k, v, layer, Logits(scale, soft_cap, sink))


@step_operation.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int, scale: float, soft_cap: float | None,
    sink: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def traced_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None,
    soft_cap: float | None, sink: torch.Tensor | None,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention as a compiler is shown it."""
    scale = check_scale(scaling, query.shape[-1])
    return step_operation(query, key, value, module.layer_idx, scale, soft_cap, sink), None


class _EchoLayer(CacheLayerMixin):
    """A layer that gives back what it is given, and holds nothing."""

    is_compileable = True

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding  # type: ignore[misc]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


@contextmanager
def stepping(step: AttendStep) -> Iterator[None]:
    """Inside, the operation of this thread is ``step``."""
    before, _local.step = _local.step, step
    try:
        yield
    finally:
        _local.step = before


class CompiledForward:
    """The forward pass of one token, compiled at its first call for every batch size."""

    def __init__(self, forward: Any) -> None:
        # Eager kernels round what lies between two operations to 16 bits; so do these, where the compiler can.
        options: dict[str, Any] = {"emulate_precision_casts": True}
        self.forward = torch.compile(forward, dynamic=False, fullgraph=True, options=options)
        self.echoes: dict[tuple[bool, ...], Cache] = {}

    def __call__(self, kwargs: dict[str, Any], cache: Any, step: AttendStep) -> Any:
        """The output for ``kwargs`` over ``cache``, which is what it carries as well.

        Raises:
            RuntimeError: from the compiler, if there is something that it does not take in one piece.
        """
        global _tracing
        sliding = tuple(bool(x) for x in cache.is_sliding)
        if sliding not in self.echoes:
            self.echoes[sliding] = Cache(layers=[_EchoLayer(x) for x in sliding])
        with _lock, stepping(step):
            _tracing = True
            try:
                output = self.forward(**{**kwargs, "past_key_values": self.echoes[sliding]})
            finally:
                _tracing = False
        require("past_key_values" in output, "return_dict", False, "a model output, with names")
        output["past_key_values"] = cache
        return output
