"""Attention of a prompt, or of a chunk of one, by selection-exact prefill on matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..attention.logits import Logits
from .masks import Shown
from .settings import Settings


class Attended(NamedTuple):
    """Output ``[B, H, M, Dv]``, and how to get the mask of kept keys, bool ``[B, H, M, N]``, if it was asked for."""

    output: torch.Tensor
    kept: Callable[[], torch.Tensor] | None


def refusal(q: torch.Tensor, shown: Shown | None, settings: Settings) -> str:
    """Why prefill on matrix products is not what is wanted, or cannot be; empty if it is."""
    if settings.budget is None:
        return "the layer is dense"
    if settings.exactness == "bitwise":
        return "exactness='bitwise'"
    if settings.backend == "reference":
        return "backend='reference'"
    if q.device.type == "cpu" and "auto" in (settings.backend, settings.exactness):
        return "there is no GPU"
    return "the mask is no range of keys" if shown is None else ""


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shown: Shown, logits: Logits, settings: Settings, watched: bool
) -> Attended:
    """Attention of queries ``[B, H, M, D]``, the last of the N keys, that :func:`refusal` does not refuse."""
    # Triton exists for Linux only: without a GPU nothing here needs it.
    from ..prefill import prefill_attention, tuning_for

    assert settings.budget is not None
    n = k.shape[2]
    done = prefill_attention(
        q, k, v, settings.budget, pads=shown.pads, window=shown.window, logits=logits, always=settings.always,
        selection=watched, backend="triton" if settings.backend == "triton" else "auto",
        tuning=tuning_for(q.shape[0], q.shape[1], q.shape[2], n),
    )  # fmt: skip
    bits = done.bits
    return Attended(done.output, None if bits is None else lambda: _mask(bits, n))


def _mask(bits: torch.Tensor, n: int) -> torch.Tensor:
    """The bits ``[B, H, M, W]`` of words as bool ``[B, H, M, n]``."""
    each = (bits[..., None] >> torch.arange(32, device=bits.device, dtype=torch.int32)) & 1
    return each.flatten(-2)[..., :n].bool()
