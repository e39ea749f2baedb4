"""What a model's own attention computes with: queries, keys and values, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qaxis


class Captured(NamedTuple):
    """Of one attention call: q ``[B, H, M, D]``, k and v ``[B, Hkv, N, D]``, positions already rotated in."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Capture:
    """An observer for ``qaxis.observe_attention`` that keeps a copy of what it sees, in ``found``.

    Args:
        layers: which layers; None for all.
        queries: how many of the last queries; None for all.
    """

    def __init__(self, layers: Collection[int] | None = None, queries: int | None = None) -> None:
        self.layers, self.first = layers, 0 if queries is None else -queries
        self.found: list[Captured] = []

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        if self.layers is None or layer in self.layers:
            self.found.append(Captured(layer, q[:, :, self.first :].clone(), k.clone(), v.clone()))


def first_middle_last(model: Any) -> tuple[int, int, int]:
    """Layers that stand for all."""
    layers = model.config.num_hidden_layers
    return 0, layers // 2, layers - 1


@torch.inference_mode()
def capture(
    model: Any, ids: torch.Tensor, layers: Collection[int] | None = None, queries: int | None = None
) -> list[Captured]:
    """Inputs of the attention of ``ids [1, N]``, one dense pass; arguments as of :class:`Capture`."""
    seen = Capture(layers, queries)
    with qaxis.observe_attention(model, seen):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return seen.found


@contextmanager
def watched(name: str, see: Callable[[Captured, torch.Tensor], None]) -> Iterator[None]:
    """Inside, ``see(inputs, output [B, M, H, Dv])`` is told of every call of the attention that models know by name.

    The attention itself is what it was: it is called, looked at, and put back afterwards.
    """
    real = ALL_ATTENTION_FUNCTIONS[name]

    def forward(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = real(module, q, k, v, *args, **kwargs)
        see(Captured(int(module.layer_idx), q, k, v), out[0])
        return out

    AttentionInterface.register(name, forward)
    try:
        yield
    finally:
        AttentionInterface.register(name, real)
